//! The parts of a machine that nothing of its guest is needed for: the VM with its interrupt controllers, its memslots and its vCPUs.
//!
//! The kernel takes some milliseconds for them (each memslot waits for a grace period), so an idle VMM makes them before it knows whose
//! machine it will be ([`Bare::new`] on `PUT /v1/vm/prepare`). The memslots name addresses behind which a memory file of its own is; another
//! one takes its place when it is known ([`Bare::with_memory`]).

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::MachineError;
use crate::dirty;
use crate::inherited::HostFiles;
use crate::kvm::{self, During, KvmError};
use crate::layout;
use crate::memory::{GuestRam, ReservedRam};
use crate::presence::Presence;
use crate::vcpu::cpuid;

/// What a bare machine has to be made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
}

/// A machine that knows nothing of its guest. The VM is dropped before the addresses that its memslots name.
pub(crate) struct Bare {
    kvm: Kvm,
    vcpus: Vec<VcpuFd>,
    vm: VmFd,
    ram: ReservedRam,
    size: Size,
}

/// A machine with memory, all of it present, its vCPUs as after a reset, without devices.
pub(crate) struct BareMachine {
    pub(crate) kvm: Kvm,
    pub(crate) vm: VmFd,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) presence: Arc<Presence>,
}

impl Bare {
    /// Makes one.
    pub(crate) fn new(size: Size, files: &HostFiles) -> Result<Self, MachineError> {
        let device = HostFiles::duplicate(&files.kvm).during("have /dev/kvm once more")?;
        let kvm = kvm::checked(device)?;
        let supported = cpuid::supported(&kvm)?;
        let vm = create_vm(&kvm)?;
        vm.set_tss_address(layout::KVM_TSS as usize).during("place the TSS")?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).during("place the identity map")?;
        vm.create_irq_chip().during("create the interrupt controllers")?;
        vm.create_pit2(kvm_pit_config::default()).during("create the interval timer")?;
        let manual = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&manual).during("clear the dirty log by hand")?;
        let ram = ReservedRam::new(size.memory_bytes)?;
        dirty::set_memslots(&vm, &ram.slots(), false)?;
        let vcpus = (0..size.vcpus)
            .map(|index| {
                let fd = vm.create_vcpu(u64::from(index)).during("create a vCPU")?;
                fd.set_cpuid2(&cpuid::for_vcpu(&supported, index, size.vcpus)?).during("write cpuid")?;
                Ok(fd)
            })
            .collect::<Result<_, MachineError>>()?;
        Ok(Self { kvm, vcpus, vm, ram, size })
    }

    /// What it was made for.
    pub(crate) fn size(&self) -> Size {
        self.size
    }

    /// Maps the memory file (the own, empty one when absent) where the memslots say. vCPUs apart, each for its thread.
    pub(crate) fn with_memory(
        self,
        file: Option<File>,
        files: &HostFiles,
    ) -> Result<(BareMachine, Vec<VcpuFd>), MachineError> {
        let ram = Arc::new(self.ram.map(file)?);
        let presence = Arc::new(Presence::new(ram.clone(), files));
        Ok((BareMachine { kvm: self.kvm, vm: self.vm, ram, presence }, self.vcpus))
    }
}

/// Creates the VM. A pending signal makes the kernel answer EINTR here, which means nothing but "again".
fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    const TRIES: usize = 5;
    let mut last = None;
    for _ in 0..TRIES {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => last = Some(e),
            other => return other.during("create a VM"),
        }
    }
    Err(last.unwrap_or_else(|| kvm_ioctls::Error::new(libc::EINTR))).during("create a VM")
}
