//! VMMs of sandboxes: started, booted until ready, told of a wake, watched, lost.

use super::Core;
use crate::agent_client::{Agent, AgentFailure};
use crate::error::{Error, store_kind_in};
use crate::record::Spec;
use crate::registry::{OperationGuard, Sandbox};
use crate::states::{Event, State};
use crate::template::{Ready, Template};
use crate::vmm_process::Vmm;
use base64::Engine as _;
use stasis_agent::protocol::WakeRequest;
use stasis_vmm::control::CONSOLE_LOG;
use stasis_vmm::control::client::ClientError;
use stasis_vmm::control::types::{BootRequest, DiskConfig, FdToken, MachineConfig, VmState};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Context id of every guest: the vsock device is ours alone, so ids need not differ.
const GUEST_CID: u32 = 3;
/// Bytes of JSON around a command's output.
const ANSWER_SLACK: usize = 64 << 10;

/// Files to send to a VMM and the disks that name them.
#[derive(Debug, Default)]
pub(super) struct Disks {
    pub(super) files: Vec<(FdToken, File)>,
    pub(super) disks: Vec<DiskConfig>,
}

impl Core {
    /// Starts the VMM of a sandbox, writes down which process it is, and watches it.
    pub(super) async fn start_vmm(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<Arc<Vmm>, Error> {
        let run_dir = self.run_dir(sandbox.id.as_str());
        let vm = Vmm::spawn(&self.vmm_program, &sandbox.id, &run_dir, self.config.deadlines.control())
            .await
            .map_err(|source| Error::Local { action: "start a VMM".to_owned(), source })?;
        let vm = Arc::new(vm);
        let identity = vm.identity().clone();
        if let Err(error) = self.registry.amend(sandbox, |record| record.vmm = Some(identity)) {
            vm.end().await;
            return Err(error);
        }
        self.attach(sandbox, &vm);
        Ok(vm)
    }

    /// Makes `vm` the sandbox's and watches it.
    pub(super) fn attach(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: &Arc<Vmm>) {
        sandbox.set_vm(Some(vm.clone()));
        let (core, sandbox, vm) = (self.clone(), sandbox.clone(), vm.clone());
        tokio::spawn(async move {
            vm.wait_ended().await;
            if vm.was_dismissed() {
                return;
            }
            tracing::warn!(id = %sandbox.id, reason = vm.exit_reason(), "a VMM ended by itself");
            // An operation under way notices the death itself and decides; what it leaves `running` is decided here.
            let guard = sandbox.lock().await;
            let still_ours = sandbox.vm().is_some_and(|now| Arc::ptr_eq(&now, &vm));
            if still_ours && sandbox.state() == State::Running {
                core.lose(&sandbox, &guard).await;
            }
        });
    }

    /// Ends the VM of a sandbox, if it has one, and leaves nothing of it.
    pub(super) async fn end_vm(&self, sandbox: &Sandbox) {
        if let Some(vm) = sandbox.vm() {
            vm.end().await;
            sandbox.set_vm(None);
        }
        if let Err(error) = self.registry.amend(sandbox, |record| record.vmm = None) {
            tracing::error!(id = %sandbox.id, error = error.chain(), "cannot note that a VMM is gone");
        }
    }

    /// Lets a parked VM run, whatever a request that was given up left it in.
    pub(super) async fn unpark(&self, sandbox: &Sandbox, vm: &Vmm) -> Result<(), Error> {
        let limit = self.config.deadlines.control();
        let unpark = async {
            loop {
                match vm.client.status().await.map_err(vmm_error(sandbox, vm, "ask for its state"))?.state {
                    VmState::Running => return Ok(()),
                    VmState::Paused => {
                        return vm.client.resume().await.map(drop).map_err(vmm_error(sandbox, vm, "let it run again"));
                    }
                    VmState::Empty => return Err(Error::Bug("a running sandbox whose VM is empty")),
                    VmState::Capturing => {
                        vm.client.cancel_capture().await.map_err(vmm_error(sandbox, vm, "cancel the capture"))?;
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        };
        match tokio::time::timeout(limit, unpark).await {
            Ok(outcome) => outcome,
            Err(_) => {
                Err(Error::Deadline { id: sandbox.id.clone(), what: "letting it run again", ms: limit.as_millis() })
            }
        }
    }

    /// The VM of a sandbox that has one died: it goes back to its last commit, or is lost.
    pub(super) async fn lose(&self, sandbox: &Sandbox, _guard: &OperationGuard) {
        let reason = sandbox.vm().map_or_else(
            || "its VMM was gone when the supervisor came back".to_owned(),
            |vm| format!("its VMM ended: {}", vm.exit_reason()),
        );
        self.end_vm(sandbox).await;
        let committed = sandbox.record().commit.is_some();
        let (event, reason) = if committed {
            (
                Event::LostCommitted,
                format!("{reason}; what ran since the last pause is lost, the sandbox is back at that pause"),
            )
        } else {
            (Event::Lost, format!("{reason}; it was never paused, so nothing is left of it"))
        };
        tracing::error!(id = %sandbox.id, reason, "a sandbox was lost");
        let moved = self.registry.record(sandbox, event, Some(&reason), |record| record.reason = Some(reason.clone()));
        if moved.is_ok() && committed {
            self.lay_to_rest(sandbox).await;
        } else if let Err(error) = self.bury(sandbox).await {
            tracing::warn!(id = %sandbox.id, error = error.chain(), "a lost sandbox has no tombstone");
        }
    }

    /// Where the sockets of a sandbox's VMM are.
    pub(super) fn run_dir(&self, id: &str) -> PathBuf {
        self.run_root().join(id)
    }

    /// What all run directories are under.
    pub(super) fn run_root(&self) -> PathBuf {
        self.config.data_dir.join("run")
    }

    /// An empty, unlinked, sparse file for the writes of a disk: gone with the last process that holds it.
    fn overlay(&self) -> Result<File, Error> {
        let dir = self.config.data_dir.join("scratch");
        let local = |source| Error::Local { action: format!("make an overlay file in {}", dir.display()), source };
        std::fs::create_dir_all(&dir).map_err(local)?;
        let tmpfile = i32::try_from(rustix::fs::OFlags::TMPFILE.bits()).unwrap_or(0);
        match OpenOptions::new().read(true).write(true).custom_flags(tmpfile).open(&dir) {
            Ok(file) => Ok(file),
            // File systems without O_TMPFILE answer one of these.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)) =>
            {
                let path = dir.join(self.sources.word(20));
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(local)?;
                std::fs::remove_file(&path).map_err(local)?;
                Ok(file)
            }
            Err(e) => Err(local(e)),
        }
    }

    /// The disks of a sandbox over this root file system.
    pub(super) fn disks(&self, spec: &Spec, rootfs: Option<&Path>) -> Result<Disks, Error> {
        let mut out = Disks::default();
        if spec.disk_mib == 0 {
            return Ok(out);
        }
        let overlay = self.store.token();
        out.files.push((overlay, self.overlay()?));
        let mut base = None;
        if let Some(rootfs) = rootfs {
            let token = self.store.token();
            let file = File::open(rootfs).map_err(|source| Error::Local {
                action: format!("open the root file system {}", rootfs.display()),
                source,
            })?;
            out.files.push((token, file));
            base = Some(token);
        }
        let base_digest = spec.rootfs_digest.clone().filter(|_| base.is_some());
        out.disks.push(DiskConfig {
            base,
            base_digest,
            overlay: Some(overlay),
            size_mib: spec.disk_mib,
            read_only: false,
        });
        Ok(out)
    }

    /// Boots `template` in `vm` and waits until the guest is ready.
    pub(super) async fn boot(&self, sandbox: &Sandbox, vm: &Vmm, template: &Template) -> Result<(), Error> {
        let spec = sandbox.record().spec;
        let open = |part: &'static str, path: &Path| {
            File::open(path)
                .map_err(|source| Error::Local { action: format!("open the {part} {}", path.display()), source })
        };
        let Disks { mut files, disks } = self.disks(&spec, template.rootfs.as_deref())?;
        let kernel = self.store.token();
        files.push((kernel, open("kernel", &template.kernel)?));
        let initramfs = match &template.initramfs {
            None => None,
            Some(path) => {
                let token = self.store.token();
                files.push((token, open("initramfs", path)?));
                Some(token)
            }
        };
        let request = BootRequest {
            machine: MachineConfig {
                vcpus: spec.vcpu,
                memory_mib: spec.memory_mib,
                vsock_cid: spec.agent.then_some(GUEST_CID),
                exit_counter: template.exit_counter,
            },
            kernel,
            initramfs,
            cmdline: template.cmdline.clone(),
            disks,
            memory: None,
            id: None,
        };
        let limit = self.config.deadlines.boot();
        let booted = async {
            vm.client.send_files(files).await.map_err(vmm_error(sandbox, vm, "hand it the files to boot from"))?;
            vm.client.boot(&request).await.map_err(vmm_error(sandbox, vm, "boot it"))?;
            self.ready(sandbox, vm, &template.ready).await
        };
        match tokio::time::timeout(limit, booted).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Deadline { id: sandbox.id.clone(), what: "the boot", ms: limit.as_millis() }),
        }
    }

    async fn ready(&self, sandbox: &Sandbox, vm: &Vmm, ready: &Ready) -> Result<(), Error> {
        let agent = self.agent(vm);
        let console = vm.run_dir().join(CONSOLE_LOG);
        let mut pause = Duration::from_millis(2);
        loop {
            let is_ready = match ready {
                Ready::Agent => agent.health(Duration::from_secs(5)).await.is_ok(),
                Ready::Serial(text) => tail_contains(&console, text)
                    .map_err(|source| Error::Local { action: format!("read {}", console.display()), source })?,
            };
            if is_ready {
                return Ok(());
            }
            tokio::select! {
                () = vm.wait_ended() => return Err(Error::VmmEnded { id: sandbox.id.clone(), reason: vm.exit_reason() }),
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(100)),
            }
        }
    }

    /// The agent in `vm`.
    pub(super) fn agent(&self, vm: &Vmm) -> Agent {
        // Both streams in base64.
        Agent::new(vm.run_dir(), self.config.limits.output_bytes * 2 * 4 / 3 + ANSWER_SLACK)
    }

    /// Tells the guest that it was asleep: clock and entropy. Retried, since the agent's listener needs a moment after the transport reset.
    pub(super) async fn tell_wake(&self, sandbox: &Sandbox, vm: &Vmm, spec: &Spec) -> Result<(), Error> {
        if !spec.agent {
            return Ok(());
        }
        let agent = self.agent(vm);
        let failed = |what: String| Error::Agent { id: sandbox.id.clone(), action: "be told of the wake", what };
        let tell = async {
            let mut pause = Duration::from_millis(1);
            loop {
                // Anew each time: the clock goes on, and entropy is never sent twice.
                let request = WakeRequest {
                    unix_time_ns: u64::try_from(self.sources.now_ms()).unwrap_or(0).saturating_mul(1_000_000),
                    entropy: base64::engine::general_purpose::STANDARD.encode(self.sources.random::<32>()),
                };
                match agent.wake(&request, Duration::from_secs(10)).await {
                    Ok(_) => return Ok(()),
                    Err(AgentFailure::Refused { status, message }) => {
                        return Err(failed(format!("{status} {message}")));
                    }
                    Err(AgentFailure::Nonsense(what)) => return Err(failed(what)),
                    Err(AgentFailure::Connection(_) | AgentFailure::Deadline(_)) => {}
                }
                tokio::select! {
                    () = vm.wait_ended() => return Err(Error::VmmEnded { id: sandbox.id.clone(), reason: vm.exit_reason() }),
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(100)),
                }
            }
        };
        let limit = self.config.deadlines.wake();
        match tokio::time::timeout(limit, tell).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Deadline {
                id: sandbox.id.clone(),
                what: "the agent's answer to the wake",
                ms: limit.as_millis(),
            }),
        }
    }
}

/// A control error, or the death of the VMM when that is the cause.
pub(super) fn vmm_error<'a>(
    sandbox: &'a Sandbox,
    vm: &'a Vmm,
    action: &'static str,
) -> impl FnOnce(ClientError) -> Error + 'a {
    move |source| {
        let unreachable = matches!(source, ClientError::Unreachable { .. } | ClientError::Answer { .. });
        if unreachable && vm.has_ended() {
            Error::VmmEnded { id: sandbox.id.clone(), reason: vm.exit_reason() }
        } else {
            let store = match &source {
                ClientError::Refused { message, .. } => store_kind_in(message),
                ClientError::Unreachable { .. } | ClientError::Deadline { .. } | ClientError::Answer { .. } => None,
            };
            Error::Vmm { id: sandbox.id.clone(), action, store, source }
        }
    }
}

/// Whether the file holds `text`; a file that is not there yet does not.
fn tail_contains(path: &Path, text: &str) -> io::Result<bool> {
    match std::fs::read(path) {
        Ok(content) => Ok(content.windows(text.len().max(1)).any(|window| window == text.as_bytes())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
