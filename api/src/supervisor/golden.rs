//! Template start (design §4, `v1/template/…`): a template is booted once for each shape of machine and captured when it is ready; creates of
//! that shape restore from the capture, so that a create costs what a wake costs.
//!
//! The capture is named by everything that it depends on ([`shape`]), so supervisors share it without coordination: its manifest is written once,
//! whoever comes first, under a fixed key; who loses deletes its own packs. The first create of a shape boots as it always did, and the capture
//! is made afterwards, in the background, one at a time, in a VMM that belongs to no sandbox. A capture that cannot be restored is not tried
//! again by this supervisor: creates boot.
//!
//! What must differ between clones differs: the VM generation id with the restore; entropy, clock, host name and machine id with the agent's
//! wake call. A guest without an agent is told nothing, as after a wake.

use super::Core;
use super::capture::Size;
use super::files::in_memory;
use super::machine::{close_memory, vmm_error};
use super::materialise::Held;
use crate::error::{Error, StoreContext as _};
use crate::fail_points::{Point, reach};
use crate::ids::SandboxId;
use crate::known_packs::KnownPacks;
use crate::record::{Record, Spec};
use crate::registry::Sandbox;
use crate::template::Template;
use crate::template_digest::content_digest;
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use bytes::Bytes;
use stasis_snapshot::ids::Digest;
use stasis_snapshot::layout::Owner;
use stasis_snapshot::manifest::{Lineage, Manifest, ManifestRef};
use stasis_snapshot::store::{ErrorKind, StoreError};
use stasis_vmm::control::types::CaptureMode;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The create that found no capture comes first: the machine is not to be busy with its own boot and another one.
const MAKE_AFTER: Duration = Duration::from_millis(1500);
/// A capture that failed is not tried again for so long.
const RETRY_AFTER: Duration = Duration::from_mins(10);

/// A booted template in the store.
#[derive(Clone, Debug)]
pub(super) struct Golden {
    pub(super) manifest: ManifestRef,
    pub(super) bytes: Bytes,
    pub(super) known: Arc<KnownPacks>,
}

impl Golden {
    /// What of it is on this host already.
    pub(super) fn held(&self) -> Result<Held, Error> {
        Ok(Held { manifest: Some((in_memory("manifest", &self.bytes)?, self.known.clone())), ..Held::default() })
    }
}

#[derive(Clone, Debug)]
enum Known {
    /// Somebody here makes it, or is about to.
    Making,
    Ready(Arc<Golden>),
    /// It could not be made or restored.
    Failed(Instant),
}

/// The booted templates that this supervisor knows of.
#[derive(Debug, Default)]
pub struct Goldens {
    known: Mutex<HashMap<Digest, Known>>,
    /// What runs them, by digest: another VMM may not read what this one wrote.
    vmm: OnceLock<String>,
    one_at_a_time: tokio::sync::Mutex<()>,
}

/// Names a booted template: what is in it, the machine it booted on, what booted it, and how it is sealed: another key, or none, makes another
/// one, since its manifest has no head by which it could be moved to a new key.
fn shape(template: &Template, spec: &Spec, vmm: &str, cpu: &str, seal: &str) -> Digest {
    let mut lines = vec![
        "stasis golden 1".to_owned(),
        template.digest.clone(),
        format!("{:?} {}", template.ready, template.exit_counter),
        format!("{} {} {} {}", spec.vcpu, spec.memory_mib, spec.disk_mib, spec.network),
        vmm.to_owned(),
        cpu.to_owned(),
    ];
    if !seal.is_empty() {
        lines.push(seal.to_owned());
    }
    Digest::of(lines.join("\n").as_bytes())
}

/// Vendor and features of the first processor.
fn cpu_of(cpuinfo: &str) -> String {
    let field = |name: &str| cpuinfo.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    format!("{}\n{}", field("vendor_id"), field("flags"))
}

impl Goldens {
    fn known(&self) -> MutexGuard<'_, HashMap<Digest, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are that creates start from.
    pub fn ready(&self) -> usize {
        self.known().values().filter(|known| matches!(known, Known::Ready(_))).count()
    }

    /// The name of the booted `template` on machines of `spec`. Blocks: reads the VMM's program once.
    pub(super) fn shape(
        &self,
        template: &Template,
        spec: &Spec,
        vmm_program: &Path,
        seal: &str,
    ) -> Result<Digest, Error> {
        let vmm = if let Some(vmm) = self.vmm.get() {
            vmm
        } else {
            let digest = File::open(vmm_program).and_then(|file| content_digest(&file, file.metadata()?.len()));
            let digest =
                digest.map_err(|source| Error::Local { action: "read the VMM's program".to_owned(), source })?;
            self.vmm.get_or_init(|| digest)
        };
        let cpu = cpu_of(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default());
        Ok(shape(template, spec, vmm, &cpu, seal))
    }

    /// It cannot be restored here.
    pub(super) fn give_up(&self, shape: Digest) {
        self.known().insert(shape, Known::Failed(Instant::now()));
    }

    /// Whether the caller is to make it: nobody else does, and no recent try failed.
    fn claim(&self, shape: Digest) -> bool {
        let mut known = self.known();
        let free = match known.get(&shape) {
            None => true,
            Some(Known::Failed(at)) => at.elapsed() > RETRY_AFTER,
            Some(Known::Making | Known::Ready(_)) => false,
        };
        if free {
            known.insert(shape, Known::Making);
        }
        free
    }
}

impl Core {
    /// The booted template of this shape, if there is one.
    pub(super) async fn golden(self: &Arc<Self>, shape: Digest) -> Option<Arc<Golden>> {
        match self.goldens.known().get(&shape) {
            Some(Known::Ready(golden)) => return Some(golden.clone()),
            Some(Known::Making | Known::Failed(_)) => return None,
            None => {}
        }
        match self.fetch_golden(shape).await {
            Ok(golden) => {
                let golden = Arc::new(golden?.0);
                self.sign_ahead(&golden.known);
                self.goldens.known().insert(shape, Known::Ready(golden.clone()));
                Some(golden)
            }
            Err(error) => {
                tracing::warn!(%shape, error = error.chain(), "a booted template cannot be used");
                None
            }
        }
    }

    async fn fetch_golden(&self, shape: Digest) -> Result<Option<(Golden, Manifest)>, Error> {
        let key = manifest_key(&Owner::template(shape));
        let object = match self.store.objects().get(&key).await {
            Err(StoreError { kind: ErrorKind::NotFound, .. }) => return Ok(None),
            other => other.doing("fetch a booted template")?,
        };
        // Nothing else names its digest: its sections have their own, and its seal says that it is ours.
        let named = ManifestRef { key, digest: Digest::of(&object.bytes) };
        let (manifest, keys) = self.open_manifest(&named, &object.bytes)?;
        let known = Arc::new(KnownPacks::of(&manifest, keys));
        Ok(Some((Golden { manifest: named, bytes: object.bytes, known }, manifest)))
    }

    /// Makes the booted template of this shape in the background, unless somebody does or did.
    pub(super) fn make_golden(self: &Arc<Self>, template: Template, spec: &Spec, shape: Digest) {
        if !self.goldens.claim(shape) {
            return;
        }
        let core = self.clone();
        let (env_vars, network_policy) = (std::collections::BTreeMap::new(), None);
        let spec = Spec { env_vars, network_policy, authority: None, ..spec.clone() };
        tokio::spawn(async move {
            tokio::time::sleep(MAKE_AFTER).await;
            let _one = core.goldens.one_at_a_time.lock().await;
            let begun = Instant::now();
            let known = match boot_and_capture(&core, &template, spec, shape).await {
                Ok(golden) => {
                    let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                    tracing::info!(template = template.name, %shape, ms, "the template was booted and captured");
                    core.sign_ahead(&golden.known);
                    Known::Ready(Arc::new(golden))
                }
                Err(error) => {
                    tracing::warn!(template = template.name, error = error.chain(), "sandboxes of this template boot");
                    Known::Failed(Instant::now())
                }
            };
            core.goldens.known().insert(shape, known);
        });
    }
}

fn manifest_key(owner: &Owner) -> String {
    format!("{}manifest", owner.prefix())
}

async fn boot_and_capture(core: &Arc<Core>, template: &Template, spec: Spec, shape: Digest) -> Result<Golden, Error> {
    // A sandbox in name only: neither registry nor journal knows it, so a restarted supervisor ends its VMM.
    let mut record = Record::new(SandboxId::new(&core.sources), String::new(), spec);
    record.data_key = core.draw_data_key();
    let sandbox = Sandbox::unlisted(record);
    let vm = Arc::new(core.idle_vmm(&core.run_dir(sandbox.id.as_str()), &sandbox).await?);
    let outcome = capture_booted(core, &sandbox, &vm, template, shape).await;
    vm.let_go();
    close_memory(vm.take_memory());
    outcome
}

async fn capture_booted(
    core: &Arc<Core>,
    sandbox: &Sandbox,
    vm: &Vmm,
    template: &Template,
    shape: Digest,
) -> Result<Golden, Error> {
    core.boot(sandbox, vm, template, None, None).await?;
    let stopped = vm.client.pause().await.map_err(vmm_error(sandbox, vm, "stop the guest"))?;
    reach(Point::GuestParked);
    let owner = Owner::template(shape);
    let commit = core.commit_id();
    let generation = owner.generation(1, 1, commit);
    let size =
        Size { packs_needed: stopped.packs_needed, pages: stopped.dirty_memory_pages + stopped.dirty_disk_blocks };
    let grants = core.grant_packs(&generation, size, true).await?;
    let granted: Vec<_> = grants.objects.iter().map(|object| object.key.clone()).collect();
    let (draft, _) = core.capture(sandbox, vm, grants, CaptureMode::Stopped, &mut Timing::default()).await?;
    let lineage = Lineage { sandbox: sandbox.id.to_string(), seq: 1, epoch: 1, commit, parent: None };
    let place = (&owner, &generation, manifest_key(&owner));
    let published = core.publish(sandbox, &draft, lineage, place, &KnownPacks::default()).await;
    // What is in the store decides: a reply may be lost, and somebody else may have been faster.
    match (core.fetch_golden(shape).await?, published) {
        (Some((golden, manifest)), published) => {
            let ours = manifest.packs.iter().any(|pack| pack.key.starts_with(generation.prefix()));
            let known = KnownPacks::of(&manifest, Vec::new());
            let unwritten: Vec<_> = granted.into_iter().filter(|key| !known.names(key)).collect();
            let leftovers = if ours { published.map(|p| p.leftovers).unwrap_or_default() } else { unwritten.clone() };
            core.clean_up(leftovers, unwritten);
            Ok(golden)
        }
        (None, Ok(_)) => Err(Error::Damaged { object: manifest_key(&owner), source: "it is gone again".into() }),
        // It may yet land, so its packs stay.
        (None, Err(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;
    use crate::template::Ready;
    use std::path::PathBuf;

    fn template() -> Template {
        Template {
            name: "t".to_owned(),
            kernel: PathBuf::new(),
            initramfs: None,
            rootfs: None,
            disk_mib: 0,
            cmdline: String::new(),
            ready: Ready::Agent,
            min_memory_mib: 64,
            exit_counter: false,
            port: None,
            digest: "d".repeat(64),
            rootfs_digest: None,
            upload: None,
        }
    }

    #[test]
    fn whatever_a_capture_depends_on_is_in_its_name() {
        let (template, spec) = (template(), sample("sbx-a").spec);
        let name = shape(&template, &spec, "vmm", "cpu", "");
        assert_eq!(name, shape(&Template { name: "u".to_owned(), ..template.clone() }, &spec, "vmm", "cpu", ""));
        let others = [
            shape(&Template { digest: "e".repeat(64), ..template.clone() }, &spec, "vmm", "cpu", ""),
            shape(&Template { ready: Ready::Serial("R".to_owned()), ..template.clone() }, &spec, "vmm", "cpu", ""),
            shape(&template, &Spec { memory_mib: spec.memory_mib + 2, ..spec.clone() }, "vmm", "cpu", ""),
            shape(&template, &Spec { vcpu: spec.vcpu + 1, ..spec.clone() }, "vmm", "cpu", ""),
            shape(&template, &spec, "vmm2", "cpu", ""),
            shape(&template, &spec, "vmm", "cpu2", ""),
            shape(&template, &spec, "vmm", "cpu", "sealed"),
            shape(&template, &Spec { network: true, ..spec.clone() }, "vmm", "cpu", ""),
        ];
        assert!(others.iter().all(|other| *other != name));
        assert_eq!(shape(&template, &Spec { timeout_s: 1, ..spec }, "vmm", "cpu", ""), name);
        assert_ne!(cpu_of("vendor_id : A\nflags : x\n"), cpu_of("vendor_id : A\nflags : y\n"));
    }

    #[test]
    fn one_makes_it_and_a_failure_is_not_repeated_at_once() {
        let goldens = Goldens::default();
        let one = Digest::of(b"1");
        assert!(goldens.claim(one));
        assert!(!goldens.claim(one));
        goldens.give_up(one);
        assert!(!goldens.claim(one));
        assert!(goldens.claim(Digest::of(b"2")));
        assert_eq!(goldens.ready(), 0);
    }
}
