//! A machine: its KVM objects, memory, vCPUs and devices, made by booting or by restoring, and stopped and started as one.
//!
//! | file | what |
//! | --- | --- |
//! | `bare` | VM, memslots and vCPUs, which can be made before the rest is known |
//! | `spec` | the machine's shape and the codec of its parts' states |
//! | `disk` | one disk, as the block device, the capture and the restore share it |
//! | `devices` | the device set, its place on the bus, its interrupts |
//! | `staging` | a copy of pages, so that the guest need not stand still while they are sent |
//! | `capture` | from a machine to what a capture needs, and to the draft of a manifest |
//! | `restore` | from a manifest to a paused machine |
//! | `reboot` | a boot over the disks of a manifest |
//! | `kept` | what a memory file that outlives its VMM holds |
//!
//! One thread at a time uses a [`Machine`] (the control server's lock). It stops in the order vCPUs, then device thread, and starts in the
//! reverse order: devices may still raise interrupts while vCPUs stand, but no vCPU may ring a device that is being saved.

pub(crate) mod bare;
pub(crate) mod capture;
mod devices;
pub(crate) mod disk;
pub(crate) mod kept;
pub(crate) mod reboot;
pub(crate) mod restore;
mod spec;
pub(crate) mod staging;

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::boot::{self, BootError};
use crate::control::types::{ExitCounts, MachineConfig, Metrics};
use crate::dirty::{DirtyError, DirtyTracker};
use crate::inherited::HostFiles;
use crate::io_thread::{Closed, IoThread, IoThreadError};
use crate::kvm::{self, KvmError};
use crate::limits::Limits;
use crate::memory::{GuestRam, MemoryError};
use crate::paging::{Paging, PagingError, WorkingSet};
use crate::presence::Presence;
use crate::vcpu::registers::CpuidLeaf;
use crate::vcpu::{self, Ended, Vcpu, VcpuError, cpuid};
pub(crate) use bare::Bare;
use bare::BareMachine;
pub use devices::DeviceError;
use devices::DeviceSet;
pub use disk::{BaseGiven, Disk, DiskError};
use spec::MachineSpec;
pub use spec::SpecError;

/// A machine cannot be made, stopped or started.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum MachineError {
    #[error("the machine cannot be made as asked")]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Devices(#[from] DeviceError),
    #[error(transparent)]
    IoThread(#[from] IoThreadError),
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    #[error(transparent)]
    Paging(#[from] PagingError),
    #[error("cannot copy what changed")]
    Staging(#[source] std::io::Error),
    #[error("cannot draw a key for page digests")]
    Digests(#[source] std::io::Error),
}

/// What a machine needs from the process around it.
pub struct Host {
    /// Opened files of the host.
    pub files: Arc<HostFiles>,
    /// MSRs that a restore may leave out.
    pub allowed_msrs: Vec<u32>,
    /// What the guest may ask of the host.
    pub limits: Limits,
    /// Told when a vCPU ends for good.
    pub ended: Arc<dyn Fn(Ended) + Send + Sync>,
}

/// What the machine's devices stand on.
pub struct Backends {
    /// In window order.
    pub disks: Vec<Disk>,
    /// Of the network device, if there is one and it is connected.
    pub tap: Option<OwnedFd>,
}

/// Files to boot from.
pub struct BootFiles {
    /// ELF vmlinux or bzImage.
    pub kernel: File,
    /// Initial RAM file system.
    pub initramfs: Option<File>,
    /// Kernel command line.
    pub cmdline: String,
    /// The memory file, empty; a new one when absent.
    pub memory: Option<File>,
}

/// A machine. The fields are dropped in this order: vCPU and device threads end before what they use.
pub struct Machine {
    vcpus: Vec<Vcpu>,
    /// Held while the machine is paused.
    gate: Option<Closed>,
    io: IoThread,
    devices: DeviceSet,
    shared: Arc<vcpu::Shared>,
    vm: VmFd,
    /// Of a restored machine whose pages arrive later. Before `ram`: its threads use it.
    paging: Option<Arc<Paging>>,
    presence: Arc<Presence>,
    ram: Arc<GuestRam>,
    dirty: DirtyTracker,
    /// What is touched first after this wake.
    working_set: Arc<WorkingSet>,
    /// Pages that are durable outside the parent: see [`capture`].
    base: capture::Parent,
    spec: MachineSpec,
    /// CPUID as this host gives it to guests.
    offered: Vec<CpuidLeaf>,
    files: Arc<HostFiles>,
}

/// What a machine goes on from.
struct Origin {
    dirty: DirtyTracker,
    base: capture::Parent,
    working_set: Arc<WorkingSet>,
    paging: Option<Arc<Paging>>,
}

/// Makes what a machine of this size needs before anything else of it is known.
pub(crate) fn make_ready(vcpus: u8, memory_mib: u32, files: &HostFiles) -> Result<Bare, MachineError> {
    Bare::new(MachineSpec::size(vcpus, memory_mib)?, files)
}

impl Machine {
    /// Boots a machine, in `ready` if that fits; its vCPUs run when this returns.
    pub(crate) fn boot(
        config: &MachineConfig,
        ready: Option<Bare>,
        mut files: BootFiles,
        backends: Backends,
        host: Host,
    ) -> Result<Self, MachineError> {
        let spec = MachineSpec::new(config, backends.disks.iter().map(Disk::spec).collect())?;
        let (bare, fds) = spec.bare(ready, &host.files)?.with_memory(files.memory.take(), &host.files)?;
        Self::boot_on(spec, (bare, fds), files, backends, host, capture::Parent::none)
    }

    /// Boots on `bare`; `base` says what the pages are compared with.
    fn boot_on(
        spec: MachineSpec,
        (bare, fds): (BareMachine, Vec<VcpuFd>),
        files: BootFiles,
        backends: Backends,
        host: Host,
        base: impl FnOnce(&GuestRam, &DeviceSet) -> Result<capture::Parent, MachineError>,
    ) -> Result<Self, MachineError> {
        let devices = DeviceSet::new(&spec, backends, &bare.ram, &bare.vm, &host)?;
        let memory = bare.ram.guest_memory();
        crate::acpi::write(memory, spec.vcpus, devices.windows())
            .map_err(|e| BootError::Write { what: "ACPI tables", source: Box::new(e) })?;
        let entry = boot::load(memory, spec.memory_bytes(), files.kernel, files.initramfs, &files.cmdline)?;
        if let Some(first) = fds.first() {
            boot::set_entry(first, memory, entry)?;
        }
        let dirty = DirtyTracker::for_boot(bare.ram.pages());
        let base = base(&bare.ram, &devices)?;
        let working_set = Arc::new(WorkingSet::unknown(bare.ram.pages()));
        let origin = Origin { dirty, base, working_set, paging: None };
        let machine = Self::assemble(bare, spec, fds, devices, origin, host)?;
        machine.run_all()?;
        Ok(machine)
    }

    /// Starts the threads, parked; the gate is open.
    fn assemble(
        bare: BareMachine,
        spec: MachineSpec,
        fds: Vec<VcpuFd>,
        devices: DeviceSet,
        origin: Origin,
        host: Host,
    ) -> Result<Self, MachineError> {
        // Which MSRs exist depends on the CPUID, which is set by now.
        let msr_indices = fds.first().map(|fd| vcpu::saved_indices(&bare.kvm, fd)).transpose()?.unwrap_or_default();
        let offered = fds.first().map(cpuid::of_vcpu).transpose()?.unwrap_or_default();
        let shared = Arc::new(vcpu::Shared {
            bus: devices.bus(),
            xsave_size: kvm::xsave_size(&bare.vm),
            msr_indices,
            allowed_msrs: host.allowed_msrs,
            ended: host.ended,
            exits: vcpu::ExitCounts::default(),
        });
        let io = IoThread::start(devices.virtio())?;
        let vcpus = fds
            .into_iter()
            .zip(0..)
            .map(|(fd, index)| Vcpu::start(index, fd, shared.clone()))
            .collect::<Result<Vec<_>, _>>()?;
        let BareMachine { vm, ram, presence, .. } = bare;
        let Origin { dirty, base, working_set, paging } = origin;
        Ok(Self {
            vcpus,
            gate: None,
            io,
            devices,
            shared,
            vm,
            paging,
            presence,
            ram,
            dirty,
            working_set,
            base,
            spec,
            offered,
            files: host.files,
        })
    }

    fn run_all(&self) -> Result<(), VcpuError> {
        self.vcpus.iter().try_for_each(Vcpu::run)
    }

    /// The machine's shape.
    pub fn config(&self) -> MachineConfig {
        self.spec.config()
    }

    /// Nothing runs: vCPUs and device thread are parked.
    pub fn is_paused(&self) -> bool {
        self.gate.is_some()
    }

    /// Stops vCPUs, then devices, and answers how long that took. Idempotent. On an error some may stand: [`resume`](Self::resume) starts those again.
    pub fn pause(&mut self) -> Result<Duration, MachineError> {
        if self.is_paused() {
            return Ok(Duration::ZERO);
        }
        let started = Instant::now();
        // All kicks before any wait: the vCPUs stop together.
        self.vcpus.iter().for_each(Vcpu::kick);
        self.vcpus.iter().try_for_each(Vcpu::await_parked)?;
        self.gate = Some(self.io.close_gate()?);
        let stopped = started.elapsed();
        self.close_working_set();
        Ok(stopped)
    }

    /// Closes the gate of a machine whose vCPUs have never run.
    fn hold(&mut self) -> Result<(), IoThreadError> {
        self.gate = Some(self.io.close_gate()?);
        Ok(())
    }

    /// Starts devices, then vCPUs. Notifications and interrupts that were on their way when the machine stopped (or was saved) are made up
    /// for: each device looks at its queues and raises its interrupt once.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        let Some(gate) = self.gate.take() else { return Ok(()) };
        self.devices.kick();
        drop(gate);
        self.run_all()?;
        if let Some(paging) = &self.paging {
            paging.fill();
        }
        Ok(())
    }

    /// Ends the recording of the working set: some time after a wake, or with the first pause. Idempotent.
    pub(crate) fn close_working_set(&self) {
        if !self.working_set.is_open() {
            return;
        }
        match self.presence.touched() {
            Ok(touched) => self.working_set.close(&touched),
            Err(error) => tracing::warn!(%error, "the working set is not known"),
        }
    }

    /// Input for the guest's serial port; answers how many bytes fitted.
    pub fn console_input(&self, input: &[u8]) -> usize {
        self.devices.console_input(input)
    }

    /// Counters.
    pub fn metrics(&self) -> Metrics {
        let exit_counter =
            self.devices.exit_counts().map(|c| ExitCounts { outs: c.outs, ins: c.ins, out_gaps: c.out_gaps });
        Metrics {
            exits: self.shared.exits.snapshot(),
            console_bytes: self.devices.console_bytes(),
            console_lost: self.devices.console_lost(),
            block_requests: self.devices.block_requests(),
            overhead_kib: self.files.status.as_ref().map_or(0, overhead_kib),
            exit_counter,
            paging: self.paging.as_ref().map(|paging| paging.metrics()),
            huge_kib: self.presence.huge_kib(),
            network: self.devices.network(),
        }
    }
}

/// Resident memory of this process outside guest memory, KiB. 0 where the kernel does not tell.
fn overhead_kib(mut status: &File) -> u64 {
    let mut text = String::new();
    if status.rewind().and_then(|()| status.read_to_string(&mut text)).is_err() {
        return 0;
    }
    outside_guest_memory(&text)
}

/// Guest memory is the only shared memory, so the totals do: to add up mappings the kernel walks their page tables, which takes longer than a
/// scrape is worth.
fn outside_guest_memory(status: &str) -> u64 {
    let parts =
        status.lines().filter_map(|line| line.strip_prefix("RssAnon:").or_else(|| line.strip_prefix("RssFile:")));
    parts.filter_map(|size| size.trim().trim_end_matches(" kB").parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::{outside_guest_memory, overhead_kib};
    use std::fs::File;

    #[test]
    fn guest_memory_is_no_overhead() {
        let status = "VmRSS:\t  412 kB\nRssAnon:\t     8 kB\nRssFile:\t     4 kB\nRssShmem:\t   400 kB\n";
        assert_eq!(outside_guest_memory(status), 12);
        assert_eq!(outside_guest_memory(""), 0);
        assert!(overhead_kib(&File::open("/proc/self/status").unwrap()) > 0);
    }
}
