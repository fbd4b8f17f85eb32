//! Which model-specific registers a snapshot holds, and reading and writing them.
//!
//! The rule is the kernel's own list minus a deny list: an allow list forgets registers that a later CPU or kernel adds. What cannot be
//! read is found on a configured vCPU when the machine is made, so that a register that vanishes later is an error and not a gap.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::registers::Msr;
use crate::kvm::{During, KvmError};

/// The time stamp counter: written through its offset (`kvm::set_tsc_offset`) where the kernel can.
pub(crate) const IA32_TSC: u32 = 0x10;
/// The local APIC's deadline timer: written after all others.
pub(crate) const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Registers never saved, with the reason.
const DENIED: &[(u32, &str)] = &[
    (0x17b, "IA32_MCG_CTL: refused by KVM unless the machine-check banks say so"),
    (0x1b, "IA32_APIC_BASE: part of sregs"),
    (0xc000_0080, "EFER: part of sregs"),
    (0x3a, "IA32_FEATURE_CONTROL: gates nested VMX, which is never offered"),
];

/// KVM takes at most this many in one call.
const CHUNK: usize = 256;

/// The registers worth saving for this vCPU: listed by the kernel, not denied, and readable. Sorted.
pub(crate) fn saved_indices(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().during("list the MSRs")?;
    let mut indices: Vec<u32> =
        list.as_slice().iter().copied().filter(|i| DENIED.iter().all(|(denied, _)| denied != i)).collect();
    indices.sort_unstable();
    indices.dedup();
    let mut readable = Vec::with_capacity(indices.len());
    let mut rest = &indices[..];
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(CHUNK)];
        let got = read_some(vcpu, part)?;
        readable.extend_from_slice(&part[..got.len()]);
        // KVM stops at the first register it cannot read: leave that one out and go on behind it.
        let skip = usize::from(got.len() < part.len());
        rest = &rest[got.len() + skip..];
    }
    Ok(readable)
}

/// Reads all of `indices`; a register that cannot be read is an error that names it.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut all = Vec::with_capacity(indices.len());
    for part in indices.chunks(CHUNK) {
        let got = read_some(vcpu, part)?;
        if let Some(missing) = part.get(got.len()) {
            let source = std::io::Error::other(format!("MSR {missing:#x} cannot be read any more"));
            return Err(KvmError { what: "read the MSRs", source });
        }
        all.extend(got);
    }
    Ok(all)
}

fn read_some(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let entries: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = wrap(&entries)?;
    let read = vcpu.get_msrs(&mut msrs).during("read the MSRs")?;
    Ok(msrs.as_slice().iter().take(read).map(|e| Msr { index: e.index, value: e.data }).collect())
}

/// Writes `msrs` in their order. The first one that KVM refuses is an error that names it and its value, unless its index is in `allowed`.
pub(crate) fn write(vcpu: &VcpuFd, msrs: &[Msr], allowed: &[u32]) -> Result<(), KvmError> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let part = &rest[..rest.len().min(CHUNK)];
        let entries: Vec<_> =
            part.iter().map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() }).collect();
        let written = vcpu.set_msrs(&wrap(&entries)?).during("write the MSRs")?;
        let mut skip = 0;
        if let Some(refused) = part.get(written) {
            if !allowed.contains(&refused.index) {
                let source = std::io::Error::other(format!(
                    "this host refuses MSR {:#x} = {:#x} (start the VMM with --allow-msr {:#x} to leave it out)",
                    refused.index, refused.value, refused.index
                ));
                return Err(KvmError { what: "write the MSRs", source });
            }
            skip = 1;
        }
        rest = &rest[written + skip..];
    }
    Ok(())
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|e| KvmError { what: "hold the MSRs", source: std::io::Error::other(format!("{e:?}")) })
}
