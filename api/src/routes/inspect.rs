//! What is in the bucket for one sandbox: head, manifest, packs, and its past here. An extension of ours, for people.

use super::table::Route;
use super::{Path, Shared, Tenant, answers};
use crate::error::{Error, StoreContext as _, chain};
use crate::openapi::{Operation, Tag};
use crate::registry::Sandbox;
use crate::store::place;
use crate::supervisor::Core;
use crate::wire::sandboxes::{HeadObject, Inspection, StoredObject, VmmPlace};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use stasis_snapshot::image::PageRef;
use stasis_snapshot::manifest::{Image, ImageKind, Manifest, ManifestRef};
use stasis_snapshot::seal::manifest_sealed_under;

pub(super) fn routes() -> Vec<Route> {
    let operation = Operation::new("inspectSandbox", Tag::Sandbox, "Show what is in the bucket for a sandbox")
        .says("Its head, manifest and packs, and its past on this host. Damage is part of the answer.")
        .of_sandbox()
        .answers::<Inspection>(200, "Everything that is known.")
        .stores();
    vec![Route::get("/v1/sandbox/{id}/inspect", inspect, operation)]
}

/// 200 with everything; damage is part of the answer, not an error.
async fn inspect(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Json<Inspection>, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let place = place(&sandbox.tenant, &sandbox.id)?;
    let objects = core.store.list_all(place.prefix()).await?;
    let head = core.store.head_of(&place).read().await.doing("read the head")?;
    let manifest = match head.as_ref().and_then(|current| current.head.manifest.as_ref()) {
        Some(named) => Some(describe(&core, named).await),
        None => None,
    };
    let total: u64 = objects.iter().map(|(_, size)| size).sum();
    Ok(Json(Inspection {
        sandbox: answers::live_sandbox(&sandbox),
        vmm: vmm(&sandbox),
        run_ahead: sandbox.ahead(|spent| *spent),
        head: head.map(|current| HeadObject { etag: current.etag.0.clone(), body: json!(current.head) }),
        manifest,
        objects: objects.into_iter().map(|(key, bytes)| StoredObject { key, bytes }).collect(),
        objects_bytes: total,
        transitions: core.journal.transitions(&sandbox.id)?,
    }))
}

fn vmm(sandbox: &Sandbox) -> Option<VmmPlace> {
    let vm = sandbox.vm()?;
    Some(VmmPlace { pid: vm.identity().pid, run_dir: vm.run_dir().display().to_string() })
}

async fn describe(core: &Core, named: &ManifestRef) -> Value {
    let read = async {
        let object = core.store.objects().get(&named.key).await.map_err(|e| chain(&e))?;
        let (manifest, _) = Manifest::open(named, &object.bytes, core.store.seals()).map_err(|e| chain(&e))?;
        Ok::<_, String>((object.bytes.len(), manifest, manifest_sealed_under(&object.bytes)))
    };
    match read.await {
        Err(problem) => json!({ "key": named.key, "digest": named.digest, "problem": problem }),
        Ok((bytes, manifest, sealed)) => json!({
            "key": named.key,
            "digest": named.digest,
            "bytes": bytes,
            "sealed": sealed.map(|(key, _)| key.to_string()),
            "platform": manifest.platform,
            "lineage": manifest.lineage,
            "packs": manifest.packs.iter().map(|pack| json!({
                "key": pack.key, "bytes": pack.size, "digest": pack.digest, "frames": pack.frames.len(),
                "data_key": pack.sealed,
            })).collect::<Vec<_>>(),
            "images": manifest.images.iter().map(image).collect::<Vec<_>>(),
            "state": manifest.state.iter().map(|blob| json!({
                "kind": blob.kind, "version": blob.version, "bytes": blob.bytes.len(),
            })).collect::<Vec<_>>(),
            "sealed_state": manifest.sealed_state.as_ref().map(|state| json!({
                "data_key": state.key, "bytes": state.bytes.len(),
            })),
        }),
    }
}

fn image(image: &Image) -> Value {
    let (mut zero, mut packed, mut base) = (0, 0, 0);
    for run in image.map.runs() {
        match run.at {
            PageRef::Zero => zero += run.pages,
            PageRef::Pack { .. } => packed += run.pages,
            PageRef::Base { .. } => base += run.pages,
        }
    }
    let kind = match image.kind {
        ImageKind::Memory => "memory".to_owned(),
        ImageKind::Disk(n) => format!("disk/{n}"),
    };
    json!({ "kind": kind, "pages": image.map.pages(), "zero": zero, "packed": packed, "base": base })
}
