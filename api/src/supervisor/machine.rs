//! VMMs of sandboxes: started, booted until ready, told of a wake, watched, lost.

use super::Core;
use super::files::{Disks, duplicate, guest_memory};
use super::network;
use super::start::StoredDisks;
use crate::agent_client::Agent;
use crate::error::Error;
use crate::fail_points::{Point, reach};
use crate::registry::{OperationGuard, Sandbox};
use crate::run_ahead::Spent;
use crate::states::{Event, State};
use crate::template::{Ready, Template};
use crate::vmm_process::Vmm;
use stasis_vmm::control::CONSOLE_LOG;
use stasis_vmm::control::client::ClientError;
use stasis_vmm::control::types::{BootRequest, FdToken, MachineConfig, PrepareRequest, VmState};
use stasis_warden::jail::limits::Size;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Context id of every guest: the vsock device is ours alone, so ids need not differ.
const GUEST_CID: u32 = 3;
/// Bytes of a console's last line that an error repeats.
const LAST_WORDS: usize = 200;
/// Bytes of JSON around a command's output.
const ANSWER_SLACK: usize = 64 << 10;

impl Core {
    /// Takes a VMM from the pool for a sandbox, or starts one, writes down which process it is, and watches it.
    pub(super) async fn start_vmm(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<Arc<Vmm>, Error> {
        let run_dir = self.run_dir(sandbox.id.as_str());
        let vm = self.idle_vmm(&run_dir, sandbox).await?;
        reach(Point::VmmStarted);
        let vm = Arc::new(vm);
        let identity = vm.identity().clone();
        if let Err(error) = self.registry.amend(sandbox, |record| record.vmm = Some(identity)) {
            vm.end().await;
            return Err(error);
        }
        self.attach(sandbox, &vm);
        Ok(vm)
    }

    /// A VMM without a machine for `sandbox`, from the pool or started now.
    pub(super) async fn idle_vmm(&self, run_dir: &Path, sandbox: &Sandbox) -> Result<Vmm, Error> {
        let spec = sandbox.record().spec;
        let size = PrepareRequest { vcpus: spec.vcpu, memory_mib: spec.memory_mib };
        match self.pool.take(run_dir, size) {
            Some(vm) => Ok(vm),
            None => Vmm::spawn(&self.launcher, sandbox.id.as_str(), run_dir, self.config.deadlines.control())
                .await
                .map_err(|source| Error::Local { action: "start a VMM".to_owned(), source }),
        }
    }

    /// Makes `vm` the sandbox's and watches it.
    pub(super) fn attach(self: &Arc<Self>, sandbox: &Arc<Sandbox>, vm: &Arc<Vmm>) {
        sandbox.set_vm(Some(vm.clone()));
        sandbox.ahead(|spent| *spent = Spent::default());
        let (spec, held) = (sandbox.record().spec, vm.clone());
        let capture_mib = u32::try_from(self.config.limits.capture_memory_mib).unwrap_or(u32::MAX);
        let size = Size { vcpus: spec.vcpu, memory_mib: spec.memory_mib, capture_mib };
        // Until it is done those of the largest sandbox hold: a wake does not wait for it.
        tokio::task::spawn_blocking(move || held.resize(size));
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
            reach(Point::VmmEnded);
            self.disconnect(sandbox, &vm);
            sandbox.set_vm(None);
            close_memory(vm.take_memory());
        }
        if let Err(error) = self.registry.amend(sandbox, |record| record.vmm = None) {
            tracing::error!(id = %sandbox.id, error = error.chain(), "cannot note that a VMM is gone");
        }
    }

    /// Lets a parked VM run, whatever a request that was given up left it in.
    pub(super) async fn unpark(&self, sandbox: &Sandbox, vm: &Vmm) -> Result<(), Error> {
        let limit = self.config.deadlines.control();
        let unpark = async {
            self.raise_network(sandbox, vm).await?;
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
            Ok(outcome) => outcome.inspect(|()| reach(Point::GuestRuns)),
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
        let event = sandbox.record().lost();
        let committed = event != Event::Lost;
        let reason = match event {
            Event::LostStored => {
                format!("{reason}; what ran since the last stop is lost, the sandbox is back at that stop")
            }
            Event::LostCommitted => {
                format!("{reason}; what ran since the last pause is lost, the sandbox is back at that pause")
            }
            _ => format!("{reason}; it was never paused, so nothing is left of it"),
        };
        tracing::error!(id = %sandbox.id, reason, "a sandbox was lost");
        let moved = self.registry.record(sandbox, event, Some(&reason), |record| record.reason = Some(reason.clone()));
        if moved.is_ok() && committed {
            self.lay_to_rest(sandbox).await;
        } else if let Err(error) = self.bury(sandbox).await {
            tracing::warn!(id = %sandbox.id, error = error.chain(), "a lost sandbox has no tombstone");
        }
    }

    /// Somebody else owns the sandbox: its guest must not run here any more. It is back at the last commit that is known here.
    pub(super) async fn give_way(
        &self,
        sandbox: &Sandbox,
        fenced: &Error,
        _guard: &OperationGuard,
    ) -> Result<(), Error> {
        self.end_vm(sandbox).await;
        let note = fenced.chain();
        tracing::error!(id = %sandbox.id, note, "a sandbox was taken over");
        let lost = sandbox.record().lost();
        self.registry.record(sandbox, lost, Some(&note), |record| record.reason = Some(note.clone())).map(drop)
    }

    /// Whether a guest that ran on without a supervisor is still ours: one that was away may have been taken for dead. A store that cannot
    /// be asked now is asked at the next commit.
    pub(super) async fn check_owner(self: Arc<Self>, sandbox: Arc<Sandbox>) {
        let Some(vm) = sandbox.vm() else { return };
        let head = match self.register(&sandbox) {
            Ok(register) => register.read().await,
            Err(error) => return tracing::error!(id = %sandbox.id, error = error.chain(), "it has no head"),
        };
        let head = match head {
            Ok(Some(current)) if current.head.owner != self.owner => current.head,
            Ok(_) => return,
            Err(error) => {
                let error = crate::error::chain(&error);
                return tracing::warn!(id = %sandbox.id, error, "whether it is still ours is not known yet");
            }
        };
        let guard = sandbox.lock().await;
        if sandbox.state() == State::Running && sandbox.vm().is_some_and(|now| Arc::ptr_eq(&now, &vm)) {
            sandbox.set_head(None);
            let fenced = Error::Fenced { id: sandbox.id.clone(), owner: head.owner, epoch: head.epoch };
            if let Err(error) = self.give_way(&sandbox, &fenced, &guard).await {
                tracing::error!(id = %sandbox.id, error = error.chain(), "after a take-over");
            }
        }
    }

    /// Where the sockets of a sandbox's VMM are.
    pub(super) fn run_dir(&self, id: &str) -> PathBuf {
        self.run_root().join(id)
    }

    /// What all run directories are under.
    pub(super) fn run_root(&self) -> PathBuf {
        self.config.data_dir.join(super::RUN)
    }

    /// Boots `template` in `vm` and waits until the guest is ready. Its network, if the machine has a device for one, is `tap`; its disks hold what they held at the stop that `stored` is from, where
    /// there was one.
    pub(super) async fn boot(
        &self,
        sandbox: &Sandbox,
        vm: &Vmm,
        template: &Template,
        tap: Option<File>,
        stored: Option<StoredDisks>,
    ) -> Result<(), Error> {
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
        let memory = self.memory_to_keep()?;
        let memory_token = memory.as_deref().map(|file| self.enclose(&mut files, file)).transpose()?;
        let tap = tap.map(|tap| {
            let token = self.store.token();
            files.push((token, tap));
            token
        });
        let disks_from = stored.map(|stored| stored.enclose(self, &mut files));
        let request = BootRequest {
            machine: MachineConfig {
                vcpus: spec.vcpu,
                memory_mib: spec.memory_mib,
                vsock_cid: spec.agent.then_some(GUEST_CID),
                exit_counter: template.exit_counter,
                network: if spec.network { network::device(self.config.network.limits()) } else { None },
            },
            kernel,
            initramfs,
            cmdline: if spec.network { network::on_command_line(&template.cmdline) } else { template.cmdline.clone() },
            disks,
            memory: memory_token,
            tap,
            disks_from,
            id: Some(sandbox.id.to_string()),
        };
        let limit = self.config.deadlines.boot();
        let booted = async {
            vm.client.send_files(files).await.map_err(vmm_error(sandbox, vm, "hand it the files to boot from"))?;
            vm.client.boot(&request).await.map_err(vmm_error(sandbox, vm, "boot it"))?;
            if let Some(memory) = memory {
                vm.hold_memory(memory);
            }
            self.ready(sandbox, vm, &template.ready).await
        };
        match tokio::time::timeout(limit, booted).await {
            Ok(outcome) => outcome.inspect(|()| reach(Point::GuestReady)),
            Err(_) => Err(Error::Deadline { id: sandbox.id.clone(), what: "the boot", ms: limit.as_millis() }),
        }
    }

    /// Whether the memory of `vm` will stay on this host when its sandbox pauses, as far as there is room.
    pub(super) fn will_keep(&self, vm: &Vmm) -> bool {
        self.kept.is_on() && vm.has_memory()
    }

    /// The memory file of a new guest, where memory is kept on this host; otherwise the VMM makes its own.
    pub(super) fn memory_to_keep(&self) -> Result<Option<Arc<File>>, Error> {
        if self.kept.is_on() { guest_memory().map(Some) } else { Ok(None) }
    }

    /// Adds another descriptor of `file` to what is sent, under the token that comes back.
    pub(super) fn enclose(&self, files: &mut Vec<(FdToken, File)>, file: &File) -> Result<FdToken, Error> {
        let token = self.store.token();
        files.push((token, duplicate(file)?));
        Ok(token)
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
                () = vm.wait_ended() => {
                    let said = last_words(&console).map(|line| format!("; its console ends with {line:?}"));
                    let reason = vm.exit_reason() + said.as_deref().unwrap_or_default();
                    return Err(Error::VmmEnded { id: sandbox.id.clone(), reason });
                }
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(100)),
            }
        }
    }

    /// The agent in `vm`.
    pub(super) fn agent(&self, vm: &Vmm) -> Agent {
        // Both streams in base64.
        Agent::new(vm.run_dir(), self.config.limits.output_bytes * 2 * 4 / 3 + ANSWER_SLACK)
    }
}

/// Closes a memory file that is not kept, where freeing its pages may take its time.
pub(super) fn close_memory(memory: Option<Arc<File>>) {
    if memory.is_some() {
        tokio::task::spawn_blocking(move || drop(memory));
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
                ClientError::Refused { store, .. } => *store,
                ClientError::Unreachable { .. } | ClientError::Deadline { .. } | ClientError::Answer { .. } => None,
            };
            Error::Vmm { id: sandbox.id.clone(), action, store, source }
        }
    }
}

/// The last line of a console that says something.
fn last_words(console: &Path) -> Option<String> {
    let text = std::fs::read(console).ok()?;
    let line = text.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).rfind(|line| !line.is_empty())?;
    Some(String::from_utf8_lossy(&line[..line.len().min(LAST_WORDS)]).into_owned())
}

/// Whether the file holds `text`; a file that is not there yet does not.
fn tail_contains(path: &Path, text: &str) -> io::Result<bool> {
    match std::fs::read(path) {
        Ok(content) => Ok(content.windows(text.len().max(1)).any(|window| window == text.as_bytes())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
