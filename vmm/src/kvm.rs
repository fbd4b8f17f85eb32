//! The few KVM calls that kvm-ioctls does not wrap, and what is asked of `/dev/kvm` before a machine is made.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr, kvm_sregs2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// Request numbers of the calls below (Linux `include/uapi/linux/kvm.h`).
mod request {
    use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_sregs2, kvm_xsave};
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

    ioctl_io_nr!(KVM_CHECK_EXTENSION, KVMIO, 0x03);
    ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
    ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use request::{
    KVM_CHECK_EXTENSION, KVM_CLEAR_DIRTY_LOG, KVM_GET_DEVICE_ATTR, KVM_GET_SREGS2, KVM_GET_XSAVE, KVM_GET_XSAVE2,
    KVM_SET_DEVICE_ATTR, KVM_SET_SREGS2, KVM_SET_XSAVE,
};

/// A KVM call failed.
#[derive(Debug, thiserror::Error)]
#[error("KVM: cannot {what}")]
pub struct KvmError {
    /// The operation, as "cannot …" continues.
    pub what: &'static str,
    /// The kernel's answer.
    #[source]
    pub source: std::io::Error,
}

/// Turns an ioctl result into a [`KvmError`] that names the operation.
pub(crate) trait During<T> {
    fn during(self, what: &'static str) -> Result<T, KvmError>;
}

impl<T, E: Into<std::io::Error>> During<T> for Result<T, E> {
    fn during(self, what: &'static str) -> Result<T, KvmError> {
        self.map_err(|e| KvmError { what, source: e.into() })
    }
}

/// Capabilities without which no guest is started.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "use the in-kernel interrupt controllers (KVM_CAP_IRQCHIP)"),
    (Cap::Ioeventfd, "use ioeventfd (KVM_CAP_IOEVENTFD)"),
    (Cap::Irqfd, "use irqfd (KVM_CAP_IRQFD)"),
    (Cap::UserMemory, "use user memory (KVM_CAP_USER_MEMORY)"),
    (Cap::ImmediateExit, "leave a vCPU at once (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// Checks that `/dev/kvm`, which is open, has what every machine needs.
pub fn checked(device: OwnedFd) -> Result<Kvm, KvmError> {
    // SAFETY: an open descriptor of ours, which the `Kvm` owns from here on. One of another device answers the first request with an error.
    let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    for (cap, what) in REQUIRED {
        if !kvm.check_extension(*cap) {
            return Err(KvmError { what, source: std::io::ErrorKind::Unsupported.into() });
        }
    }
    // kvm-ioctls has no name for this one.
    // SAFETY: KVM_CHECK_EXTENSION takes a number and touches no memory.
    let manual = unsafe {
        vmm_sys_util::ioctl::ioctl_with_val(&kvm, KVM_CHECK_EXTENSION(), KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into())
    };
    if manual <= 0 {
        let what = "clear the dirty log by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)";
        return Err(KvmError { what, source: std::io::ErrorKind::Unsupported.into() });
    }
    Ok(kvm)
}

fn check(ret: i32) -> std::io::Result<()> {
    if ret < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Clears dirty bits of a slot: bit `i` of `bitmap` is page `first_page + i`; write-protects those pages again.
/// `first_page` and (except at the slot's end) `pages` are multiples of 64.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u32, bitmap: &[u64]) -> Result<(), KvmError> {
    const WHAT: &str = "clear the dirty log";
    if (bitmap.len() as u64) * 64 < u64::from(pages) {
        return Err(KvmError { what: WHAT, source: std::io::ErrorKind::InvalidInput.into() });
    }
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr().cast_mut().cast() },
    };
    // SAFETY: the kernel reads `pages` bits from `bitmap`, whose length was checked above, and writes nothing.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) }).during(WHAT)
}

/// Reads the segment and control registers with the PDPTRs.
pub fn get_sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, KvmError> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes exactly one kvm_sregs2 into `sregs`.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) }).during("read sregs2")?;
    Ok(sregs)
}

/// Writes the segment and control registers with the PDPTRs.
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), KvmError> {
    // SAFETY: the kernel reads exactly one kvm_sregs2 from `sregs`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) }).during("write sregs2")
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// The vCPU's TSC minus the host's, where the kernel tells it (Linux 5.16 and later).
pub fn tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0_u64;
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: the kernel writes one u64 to `attr.addr`, which points to `offset`, alive across the call.
    let ret = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attr) };
    (ret == 0).then_some(offset)
}

/// Sets the vCPU's TSC minus the host's. Unlike a write of the TSC MSR this is exact on every vCPU, whenever it happens.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    let attr = tsc_offset_attr(&mut offset);
    // SAFETY: the kernel reads one u64 from `attr.addr`, which points to `offset`, alive across the call.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attr) }).during("set the TSC offset")
}

/// Bytes of a vCPU's XSAVE area: more than a page where the guest may use AMX.
pub fn xsave_size(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(size_of::<kvm_bindings::kvm_xsave>())
}

/// Reads the XSAVE area: `size` is [`xsave_size`] of the VM.
pub fn get_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u32>, KvmError> {
    let mut area = vec![0_u32; size.div_ceil(4)];
    let request = if size > size_of::<kvm_bindings::kvm_xsave>() { KVM_GET_XSAVE2() } else { KVM_GET_XSAVE() };
    // SAFETY: the kernel writes as many bytes as KVM_CAP_XSAVE2 of this VM says (a page without it); `area` has them.
    check(unsafe { vmm_sys_util::ioctl::ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) }).during("read xsave")?;
    Ok(area)
}

/// Writes the XSAVE area. A snapshot's area may be shorter than this host's (components that the guest never had are zero), never longer.
pub fn set_xsave(vcpu: &VcpuFd, size: usize, area: &[u32]) -> Result<(), KvmError> {
    const WHAT: &str = "write xsave";
    let words = size.div_ceil(4);
    if area.len() > words {
        let bytes = area.len() * 4;
        let source = std::io::Error::other(format!("the snapshot's area has {bytes} bytes, this host's {size}"));
        return Err(KvmError { what: WHAT, source });
    }
    let mut whole = area.to_vec();
    whole.resize(words, 0);
    // SAFETY: the kernel reads `size` bytes, and `whole` has them.
    check(unsafe { vmm_sys_util::ioctl::ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), whole.as_ptr()) }).during(WHAT)
}
