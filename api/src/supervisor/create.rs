//! Create: the first head claims the id while the guest starts, from its booted template or by booting; the answer comes when the guest takes
//! requests.
//!
//! Failure at any step ends the VM, writes a tombstone if a head may exist, and leaves the sandbox `deleted` with the reason.

use super::machine::vmm_error;
use super::materialise::{Held, materialise};
use super::{Core, blocking, detached};
use crate::admission::Purpose;
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::ids::SandboxId;
use crate::journal::{OperationId, OperationKind};
use crate::record::{Record, Spec};
use crate::registry::Sandbox;
use crate::states::{Event, State};
use crate::template::{Ready, Template};
use crate::timing::Timing;
use crate::validate::{self, FieldError, TemplateLimits};
use serde_json::{Map, Value};
use stasis_snapshot::commit::{Attempt, Change, HeadState};
use stasis_snapshot::manifest::ManifestRef;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Makes a sandbox of `tenant` as `body` asks for it and waits until it runs.
pub async fn create(core: &Arc<Core>, tenant: &str, body: &Map<String, Value>) -> Result<(Record, Timing), Error> {
    let begun = Instant::now();
    let name = validate::template_name(body).map_err(Error::Invalid)?;
    let template = {
        let (core, tenant, name) = (core.clone(), tenant.to_owned(), name.clone());
        blocking(move || Ok(core.templates.find(&tenant, &name, &core.journal)?)).await
    };
    let template = match template {
        Err(Error::Template(error @ crate::template::TemplateError::Unknown { .. })) => {
            return Err(Error::Invalid(vec![FieldError {
                field: "template_name".to_owned(),
                error: format!("is unknown: {error}"),
            }]));
        }
        other => other?,
    };
    let limits = TemplateLimits { min_memory_mib: template.min_memory_mib, disk_mib: template.disk_mib };
    let asked = validate::create(body, limits).map_err(Error::Invalid)?;
    core.kvm.check(&template)?;
    let spec = Spec {
        template_name: name,
        template_id: template.id(),
        template_digest: template.digest.clone(),
        rootfs_digest: template.rootfs_digest.clone(),
        agent: template.ready == Ready::Agent,
        vcpu: asked.vcpu,
        memory_mib: asked.memory_mib,
        disk_mib: template.disk_mib,
        timeout_s: asked.timeout_s,
        auto_pause: asked.auto_pause,
        env_vars: asked.env_vars,
        port: template.port,
        network_policy: asked.network_policy,
        network: template.ready == Ready::Agent && core.network.is_on(),
        authority: None,
        snapshot: None,
        created_at: core.sources.now_ms(),
    };
    run(core, tenant, spec, Beginning::Template(Box::new(template)), begun).await
}

/// Makes a sandbox of `tenant` that goes on where the named `snapshot` stood, which is `manifest`, and waits until it runs.
pub(super) async fn from_snapshot(
    core: &Arc<Core>,
    tenant: &str,
    spec: Spec,
    (snapshot, manifest): (String, ManifestRef),
) -> Result<(Record, Timing), Error> {
    run(core, tenant, spec, Beginning::Snapshot(snapshot, manifest), Instant::now()).await
}

/// What a sandbox begins as.
enum Beginning {
    Template(Box<Template>),
    /// Its id, and what it is.
    Snapshot(String, ManifestRef),
}

async fn run(
    core: &Arc<Core>,
    tenant: &str,
    spec: Spec,
    from: Beginning,
    begun: Instant,
) -> Result<(Record, Timing), Error> {
    let (core, tenant) = (core.clone(), tenant.to_owned());
    detached(async move {
        let purpose = match from {
            Beginning::Template(_) => Purpose::Create,
            Beginning::Snapshot(..) => Purpose::Restore,
        };
        let (id, mut spec) = (SandboxId::new(&core.sources), spec);
        let kept = core.keep_secrets(&id, &mut spec);
        let mut record = Record::new(id.clone(), tenant.clone(), spec);
        record.data_key = core.draw_data_key();
        let admitted = kept.and_then(|()| core.admitted(&tenant, purpose, || core.registry.add(record)));
        let sandbox = match admitted {
            Ok(sandbox) => sandbox,
            Err(error) => {
                core.journal.forget_secrets(id.as_str())?;
                return Err(error);
            }
        };
        // Nobody else knows the sandbox yet, and the table forbids everything in `starting`.
        let guard = sandbox.lock().await;
        let operation = core.journal.begin(&sandbox.id, OperationKind::Create, core.sources.now_ms())?;
        let mut timing = Timing::default();
        timing.since("template", begun);
        let outcome = match make(&core, &sandbox, &from, operation, &mut timing).await {
            Ok(()) => {
                let head = sandbox.head().map(|current| (current.head.epoch, current.head.seq));
                core.registry.record(&sandbox, Event::Ready, None, |record| {
                    (record.epoch, record.seq) = head.unwrap_or_default();
                })
            }
            Err(error) => {
                let reason = error.chain();
                core.end_vm(&sandbox).await;
                core.registry
                    .record(&sandbox, Event::Failed, Some(&reason), |record| record.reason = Some(reason.clone()))?;
                sandbox.set_head(None);
                if let Err(left) = core.bury(&sandbox).await {
                    tracing::warn!(id = %sandbox.id, error = left.chain(), "a failed create may have left a head");
                }
                Err(error)
            }
        };
        core.account(&sandbox, "create", begun, outcome.as_ref().err(), &timing);
        let note = outcome.as_ref().err().map_or_else(|| "ok".to_owned(), Error::chain);
        core.journal.end(operation, &note, core.sources.now_ms())?;
        drop(guard);
        outcome.map(|record| (record, timing))
    })
    .await
}

async fn make(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    from: &Beginning,
    operation: OperationId,
    timing: &mut Timing,
) -> Result<(), Error> {
    // A snapshot's manifest is named from the first head on, so that the collector keeps what the guest still needs of it.
    let manifest = match from {
        Beginning::Template(_) => None,
        Beginning::Snapshot(_, manifest) => Some(manifest.clone()),
    };
    let change = Change { state: HeadState::Live, manifest, record: Core::head_record(sandbox, State::Running)? };
    let attempt = Attempt::first(sandbox.id.as_str(), &core.owner, change, core.commit_id())
        .map_err(Core::head_error(sandbox))?;
    core.propose(operation, &[&attempt])?;
    let begun = Instant::now();
    // The first failure drops the other: the caller ends the VM, and a head that may still land gets a tombstone.
    let (claimed, started) = tokio::try_join!(
        async {
            if let Beginning::Snapshot(snapshot, manifest) = from {
                core.hold_fork(&sandbox.tenant, snapshot, manifest).await?;
            }
            core.commit(sandbox, &attempt, "claim the id").await?;
            Ok::<_, Error>(begun.elapsed())
        },
        async {
            match from {
                Beginning::Template(template) => start(core, sandbox, template).await,
                Beginning::Snapshot(_, manifest) => clone(core, sandbox, manifest, Held::default()).await,
            }
        }
    )?;
    timing.phase("claim", claimed);
    started.into_iter().for_each(|(name, took)| timing.phase(name, took));
    Ok(())
}

/// What a part of a start took.
type Phase = (&'static str, Duration);

/// A guest that is ready: from its booted template when there is one, else by booting it.
async fn start(core: &Arc<Core>, sandbox: &Arc<Sandbox>, template: &Template) -> Result<Vec<Phase>, Error> {
    let spec = sandbox.record().spec;
    let mut shape = None;
    if core.config.warm.golden {
        let (asked, core) = ((template.clone(), spec.clone()), core.clone());
        let name =
            blocking(move || core.goldens.shape(&asked.0, &asked.1, &core.vmm_program, &core.seal_word())).await?;
        shape = Some(name);
    }
    if let Some(shape) = shape
        && let Some(golden) = core.golden(shape).await
    {
        core.registry.amend(sandbox, |record| record.origin = Some(golden.manifest.clone()))?;
        match clone(core, sandbox, &golden.manifest, golden.held()?).await {
            Ok(mut phases) => {
                phases.extend(tell_image(core, sandbox, template).await?);
                return Ok(phases);
            }
            Err(error) => {
                tracing::warn!(id = %sandbox.id, error = error.chain(), "it cannot start from its booted template, and boots");
                core.goldens.give_up(shape);
                core.end_vm(sandbox).await;
                core.registry.amend(sandbox, |record| record.origin = None)?;
            }
        }
    }
    let begun = Instant::now();
    let vm = core.start_vmm(sandbox).await?;
    let spawned = begun.elapsed();
    let begun = Instant::now();
    let tap = core.connect(sandbox, &vm).await?;
    core.raise_network(sandbox, &vm).await?;
    core.boot(sandbox, &vm, template, tap, None).await?;
    if spec.agent {
        // It has a template's names, like a clone of a booted one.
        core.tell_wake(sandbox, &vm, Some(core.new_identity(sandbox))).await?;
    }
    core.tell_trust(sandbox, &vm, false).await?;
    let booted = begun.elapsed();
    if let Some(shape) = shape {
        core.make_golden(template.clone(), &spec, shape);
    }
    let told = tell_image(core, sandbox, template).await?;
    Ok([("spawn", spawned), ("boot", booted)].into_iter().chain(told).collect())
}

/// Nothing for a template that was not made from an image.
async fn tell_image(core: &Core, sandbox: &Sandbox, template: &Template) -> Result<Option<Phase>, Error> {
    let begun = Instant::now();
    core.tell_image(sandbox, template).await?;
    Ok(template.upload.as_ref().map(|_| ("image", begun.elapsed())))
}

/// A guest that goes on where `manifest` stood, under an identity of its own.
async fn clone(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    manifest: &ManifestRef,
    held: Held,
) -> Result<Vec<Phase>, Error> {
    let restored = materialise(core, sandbox, manifest, held).await?;
    let begun = Instant::now();
    let vm = &restored.vm;
    core.raise_network(sandbox, vm).await?;
    vm.client.resume().await.map_err(vmm_error(sandbox, vm, "let it run"))?;
    reach(Point::GuestRuns);
    let ran = begun.elapsed();
    let begun = Instant::now();
    core.tell_wake(sandbox, vm, Some(core.new_identity(sandbox))).await?;
    core.tell_trust(sandbox, vm, sandbox.record().spec.snapshot.is_some()).await?;
    Ok(vec![("spawn", restored.spawned), ("restore", restored.took), ("run", ran), ("wake", begun.elapsed())])
}
