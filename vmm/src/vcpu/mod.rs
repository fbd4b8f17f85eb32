//! A vCPU: its thread, how it is stopped, and what it does on an exit.
//!
//! Each vCPU has one thread that owns its [`VcpuFd`]. The thread is either *parked*, taking [`Command`]s, or *running* the guest. It leaves
//! the guest for good only when KVM answers `EINTR`. That is what completes every exit: KVM finishes a handled port or MMIO access at the
//! beginning of the next `KVM_RUN`, before it looks at `immediate_exit`. A vCPU stopped between "handled" and that next entry would be
//! saved with the access half done, and a restored guest would do it twice.
//!
//! To stop vCPUs: [`Vcpu::kick`] all of them, then [`Vcpu::await_parked`] each. A kick sets `immediate_exit` in the shared `kvm_run` page
//! and then signals the thread, so it cannot be lost between the thread's last look and its entry into KVM.

pub(crate) mod cpuid;
mod msr;
pub(crate) mod registers;
pub(crate) mod state;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, Once};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

pub(crate) use msr::saved_indices;
use state::{Context, VcpuState};

use crate::bus::{Bus, Outcome, lock};
use crate::kvm::KvmError;
use crate::seccomp::{self, Role};

/// How long a vCPU may take to answer a command or a kick. It only has to leave the guest and finish one exit.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// Why a vCPU left the guest and will not go back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest asked for the end of its machine: power-off, reset, triple fault.
    ByGuest(String),
    /// KVM or the VMM cannot go on.
    Failed(String),
    /// A page of a restored guest cannot be had: it is never shown another.
    PageLost(String),
}

/// A vCPU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// Its thread could not be started.
    #[error("cannot start the thread of vCPU {index}")]
    Start {
        /// Which vCPU.
        index: u8,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// It did not answer in time, or its thread is gone.
    #[error("vCPU {index} does not answer ({what})")]
    Silent {
        /// Which vCPU.
        index: u8,
        /// What was asked.
        what: &'static str,
    },
    /// A KVM call on it failed.
    #[error("vCPU {index}")]
    Kvm {
        /// Which vCPU.
        index: u8,
        /// The call.
        #[source]
        source: KvmError,
    },
}

enum Command {
    Run,
    Save(SyncSender<Result<VcpuState, KvmError>>),
    Quit,
}

/// What all vCPUs of a machine share.
pub(crate) struct Shared {
    pub(crate) bus: Bus,
    pub(crate) xsave_size: usize,
    pub(crate) msr_indices: Vec<u32>,
    pub(crate) allowed_msrs: Vec<u32>,
    /// Told once for each vCPU that leaves the guest for good.
    pub(crate) ended: Arc<dyn Fn(Ended) + Send + Sync>,
    pub(crate) exits: ExitCounts,
}

/// Exits by reason, since the VMM started.
#[derive(Default)]
pub(crate) struct ExitCounts {
    io: AtomicU64,
    mmio: AtomicU64,
    kicked: AtomicU64,
    other: AtomicU64,
}

impl ExitCounts {
    pub(crate) fn snapshot(&self) -> BTreeMap<String, u64> {
        [("io", &self.io), ("mmio", &self.mmio), ("kicked", &self.kicked), ("other", &self.other)]
            .into_iter()
            .map(|(name, count)| (name.to_owned(), count.load(Ordering::Relaxed)))
            .collect()
    }
}

/// The `immediate_exit` byte of a vCPU's `kvm_run` page.
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is shared memory made for being written by other threads, and it is only touched atomically.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn set(&self, value: u8) {
        // SAFETY: points into the kvm_run mapping of a VcpuFd that its thread keeps until the thread is joined, and the `Vcpu` that
        // holds this pointer joins the thread before it goes.
        unsafe { &*self.0 }.store(value, Ordering::SeqCst);
    }
}

/// The handle of a vCPU and its thread.
pub(crate) struct Vcpu {
    index: u8,
    commands: SyncSender<Command>,
    /// Behind a lock only so that a machine can be looked at from several threads; one at a time waits.
    parked: Mutex<Receiver<()>>,
    immediate_exit: ImmediateExit,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread, parked.
    pub(crate) fn start(index: u8, mut fd: VcpuFd, shared: Arc<Shared>) -> Result<Self, VcpuError> {
        install_kick_handler().map_err(|source| VcpuError::Start { index, source })?;
        let run = std::ptr::from_mut(fd.get_kvm_run());
        // SAFETY: `run` points to the mapped kvm_run page of `fd`; `&raw` takes the field's address without reading it.
        let byte = unsafe { &raw const (*run).immediate_exit };
        let immediate_exit = ImmediateExit(byte.cast());
        let (commands, inbox) = sync_channel(1);
        let (parked_tx, parked) = sync_channel(1);
        let own_byte = ImmediateExit(byte.cast());
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                seccomp::enter(Role::Vcpu);
                Thread { index, fd, shared, immediate_exit: own_byte }.serve(&inbox, &parked_tx);
            })
            .map_err(|source| VcpuError::Start { index, source })?;
        Ok(Self { index, commands, parked: Mutex::new(parked), immediate_exit, thread: Some(thread) })
    }

    fn send(&self, command: Command, what: &'static str) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Silent { index: self.index, what })
    }

    /// Lets the parked vCPU run the guest.
    pub(crate) fn run(&self) -> Result<(), VcpuError> {
        self.send(Command::Run, "run")
    }

    /// Asks the running vCPU to park. Returns at once; kick all vCPUs before waiting for any.
    pub(crate) fn kick(&self) {
        self.immediate_exit.set(1);
        if let Some(thread) = &self.thread {
            // It fails only when the thread is gone, and then await_parked says so.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Waits until the kicked vCPU has completed its last exit and parked.
    pub(crate) fn await_parked(&self) -> Result<(), VcpuError> {
        match lock(&self.parked).recv_timeout(ANSWER_DEADLINE) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(VcpuError::Silent { index: self.index, what: "park" })
            }
        }
    }

    /// Saves the parked vCPU.
    pub(crate) fn save(&self) -> Result<VcpuState, VcpuError> {
        let (reply, answer) = sync_channel(1);
        self.send(Command::Save(reply), "save")?;
        answer
            .recv_timeout(ANSWER_DEADLINE)
            .map_err(|_| VcpuError::Silent { index: self.index, what: "save" })?
            .map_err(|source| VcpuError::Kvm { index: self.index, source })
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.kick();
        let _ = self.commands.send(Command::Quit);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Thread {
    index: u8,
    fd: VcpuFd,
    shared: Arc<Shared>,
    immediate_exit: ImmediateExit,
}

impl Thread {
    fn serve(mut self, inbox: &Receiver<Command>, parked: &SyncSender<()>) {
        while let Ok(command) = inbox.recv() {
            match command {
                Command::Run => {
                    if let Some(ended) = self.run_guest() {
                        tracing::info!(vcpu = self.index, ?ended, "vCPU ended");
                        (self.shared.ended)(ended);
                        // A kick may be on its way: it must find its answer. The VM as a whole ends by what `ended` started.
                    }
                    self.immediate_exit.set(0);
                    if parked.send(()).is_err() {
                        return;
                    }
                }
                Command::Save(reply) => {
                    let _ = reply.send(state::save(&self.fd, &self.context()));
                }
                Command::Quit => return,
            }
        }
    }

    fn context(&self) -> Context<'_> {
        Context {
            xsave_size: self.shared.xsave_size,
            msr_indices: &self.shared.msr_indices,
            allowed_msrs: &self.shared.allowed_msrs,
            tsc_shift: 0,
        }
    }

    /// Runs the guest until a kick (`None`) or an end.
    fn run_guest(&mut self) -> Option<Ended> {
        let counts = &self.shared.exits;
        loop {
            let outcome = match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    counts.io.fetch_add(1, Ordering::Relaxed);
                    self.shared.bus.port_write(port, data)
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    counts.io.fetch_add(1, Ordering::Relaxed);
                    self.shared.bus.port_read(port, data)
                }
                Ok(VcpuExit::MmioWrite(gpa, data)) => {
                    counts.mmio.fetch_add(1, Ordering::Relaxed);
                    self.shared.bus.mmio_write(gpa, data)
                }
                Ok(VcpuExit::MmioRead(gpa, data)) => {
                    counts.mmio.fetch_add(1, Ordering::Relaxed);
                    self.shared.bus.mmio_read(gpa, data)
                }
                Ok(VcpuExit::Shutdown) => Outcome::End("triple fault".to_owned()),
                Ok(VcpuExit::SystemEvent(kind, _)) => Outcome::End(format!("system event {kind}")),
                Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::Intr) => {
                    counts.other.fetch_add(1, Ordering::Relaxed);
                    Outcome::Continue
                }
                Ok(VcpuExit::InternalError) => return Some(Ended::Failed(self.internal_error())),
                Ok(other) => {
                    return Some(Ended::Failed(format!("KVM left the guest for a reason not handled: {other:?}")));
                }
                Err(e) if e.errno() == libc::EINTR => {
                    counts.kicked.fetch_add(1, Ordering::Relaxed);
                    if self.fd.get_kvm_run().immediate_exit != 0 {
                        return None;
                    }
                    Outcome::Continue
                }
                Err(e) if e.errno() == libc::EAGAIN => Outcome::Continue,
                Err(e) => return Some(Ended::Failed(format!("KVM_RUN: {e}"))),
            };
            if let Outcome::End(reason) = outcome {
                return Some(Ended::ByGuest(reason));
            }
        }
    }

    /// Describes KVM_EXIT_INTERNAL_ERROR: the sub-error, where the guest was, and the instruction bytes where KVM hands them over.
    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so `internal` is the valid arm of the union.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let data: Vec<String> = internal
            .data
            .iter()
            .take((internal.ndata as usize).min(internal.data.len()))
            .map(|d| format!("{d:#x}"))
            .collect();
        let rip = self.fd.get_regs().map(|r| r.rip).unwrap_or_default();
        let hint = if internal.suberror == kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
            "KVM cannot emulate an instruction of this guest; without hardware virtualization stock kernels need tests/rig"
        } else {
            "KVM internal error"
        };
        format!("{hint} (suberror {}, rip {rip:#x}, data [{}])", internal.suberror, data.join(", "))
    }
}

/// A handler that does nothing: the signal's only work is to interrupt KVM_RUN.
fn install_kick_handler() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = register_signal_handler(SIGRTMIN(), nothing).map_err(Into::into));
    result
}
