//! The CPUID that a guest sees: what KVM supports, with the topology of this machine, and the check before a restore.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};
use kvm_ioctls::{Kvm, VcpuFd};

use super::registers::CpuidLeaf;
use crate::kvm::{During, KvmError};

const FEATURES: u32 = 0x1;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const HYPERVISOR_BIT: u32 = 1 << 31;
const TSC_DEADLINE_BIT: u32 = 1 << 24;
/// VMX in leaf 1, SVM in leaf 0x8000_0001: guests do not nest.
const VMX_BIT: u32 = 1 << 5;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const SVM_BIT: u32 = 1 << 2;

/// What KVM on this host can offer.
pub(crate) fn supported(kvm: &Kvm) -> Result<Vec<CpuidLeaf>, KvmError> {
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).during("ask for the supported CPUID")?;
    Ok(cpuid.as_slice().iter().map(CpuidLeaf::from).collect())
}

/// What a configured vCPU has. Read back, since a KVM may give a guest other leaves than it says it supports.
pub(crate) fn of_vcpu(vcpu: &VcpuFd) -> Result<Vec<CpuidLeaf>, KvmError> {
    let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).during("read cpuid")?;
    // A KVM that does not count what it wrote leaves empty entries behind.
    Ok(cpuid.as_slice().iter().map(CpuidLeaf::from).filter(|leaf| *leaf != CpuidLeaf::default()).collect())
}

/// The CPUID of vCPU `index` of `count`: one socket, one thread a core.
pub(crate) fn for_vcpu(supported: &[CpuidLeaf], index: u8, count: u8) -> Result<CpuId, KvmError> {
    let mut leaves = supported.to_vec();
    let apic_id = u32::from(index);
    // Bits of an APIC id that tell the cores of a package apart.
    let core_bits = u32::from(count).next_power_of_two().trailing_zeros();
    for leaf in &mut leaves {
        match leaf.function {
            FEATURES => {
                leaf.ebx = (leaf.ebx & 0x0000_ffff) | (u32::from(count) << 16) | (apic_id << 24);
                leaf.ecx = (leaf.ecx | HYPERVISOR_BIT | TSC_DEADLINE_BIT) & !VMX_BIT;
            }
            EXTENDED_FEATURES => leaf.ecx &= !SVM_BIT,
            TOPOLOGY | TOPOLOGY_V2 => {
                let (shift, processors, kind) = match leaf.index {
                    0 => (0, 1, 1),
                    1 => (core_bits, u32::from(count), 2),
                    _ => (0, 0, 0),
                };
                leaf.eax = shift;
                leaf.ebx = processors;
                leaf.ecx = leaf.index | (kind << 8);
                leaf.edx = apic_id;
                leaf.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            }
            _ => {}
        }
    }
    let leaves: Vec<_> = leaves.iter().map(Into::into).collect();
    CpuId::from_entries(&leaves)
        .map_err(|e| KvmError { what: "hold cpuid", source: std::io::Error::other(format!("{e:?}")) })
}

/// The vendor string of leaf 0.
pub(crate) fn vendor(leaves: &[CpuidLeaf]) -> String {
    let Some(leaf) = leaves.iter().find(|l| l.function == 0) else { return "unknown".to_owned() };
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
}

/// Registers of leaves that hold feature bits: a guest that was given a bit may rely on it for ever.
const FEATURE_REGISTERS: &[(u32, u32, &[Register])] = &[
    (FEATURES, 0, &[Register::Ecx, Register::Edx]),
    (0x7, 0, &[Register::Ebx, Register::Ecx, Register::Edx]),
    (0x7, 1, &[Register::Eax]),
    (0xd, 0, &[Register::Eax]),
    (0xd, 1, &[Register::Eax]),
    (EXTENDED_FEATURES, 0, &[Register::Ecx, Register::Edx]),
    (0x8000_0007, 0, &[Register::Edx]),
    (0x8000_0008, 0, &[Register::Ebx]),
];

#[derive(Clone, Copy, Debug)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, leaf: &CpuidLeaf) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }
}

/// The index of a leaf means something only where the kernel says so; elsewhere it may hold anything.
fn is(leaf: &CpuidLeaf, function: u32, index: u32) -> bool {
    let significant = leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    leaf.function == function && (leaf.index == index || !significant)
}

/// The feature registers as text, for a snapshot's platform section.
pub(crate) fn feature_list(leaves: &[CpuidLeaf]) -> Vec<String> {
    let mut list = Vec::new();
    for &(function, index, registers) in FEATURE_REGISTERS {
        for leaf in leaves.iter().filter(|l| is(l, function, index)) {
            list.extend(
                registers.iter().map(|r| format!("{function:#x}.{index}.{r:?}={:#x}", r.of(leaf)).to_lowercase()),
            );
        }
    }
    list
}

/// Feature bits that the guest has and this host lacks, one text each ("leaf 0x7.0 ebx lacks 0x20"). Empty: the guest can run here.
pub(crate) fn missing_features(guest: &[CpuidLeaf], host: &[CpuidLeaf]) -> Vec<String> {
    // Bits that KVM or this VMM set whatever the hardware has, or that follow from a control register.
    const NOT_HARDWARE: u32 = HYPERVISOR_BIT | TSC_DEADLINE_BIT | OSXSAVE_BIT;
    const OSXSAVE_BIT: u32 = 1 << 27;
    let find = |leaves: &[CpuidLeaf], function, index| {
        leaves.iter().find(|l| is(l, function, index)).cloned().unwrap_or_default()
    };
    let mut missing = Vec::new();
    for &(function, index, registers) in FEATURE_REGISTERS {
        let (ours, theirs) = (find(host, function, index), find(guest, function, index));
        for &register in registers {
            let mut lacks = register.of(&theirs) & !register.of(&ours);
            if function == FEATURES && matches!(register, Register::Ecx) {
                lacks &= !NOT_HARDWARE;
            }
            if function == 0x7 && matches!(register, Register::Ecx) {
                // OSPKE follows CR4.
                lacks &= !(1 << 4);
            }
            if lacks != 0 {
                missing.push(format!("leaf {function:#x}.{index} {register:?} lacks {lacks:#x}").to_lowercase());
            }
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ebx: u32, ecx: u32) -> CpuidLeaf {
        CpuidLeaf { function, index, ebx, ecx, ..Default::default() }
    }

    #[test]
    fn each_vcpu_gets_its_own_apic_id_and_the_shared_topology() {
        let supported = [leaf(FEATURES, 0, 0xdead_beef, VMX_BIT), leaf(TOPOLOGY, 0, 0, 0), leaf(TOPOLOGY, 1, 0, 0)];
        for index in 0..3 {
            let cpuid = for_vcpu(&supported, index, 3).unwrap();
            let leaves = cpuid.as_slice();
            assert_eq!(leaves[0].ebx >> 24, u32::from(index));
            assert_eq!(leaves[0].ebx >> 16 & 0xff, 3);
            assert_eq!(leaves[0].ecx, HYPERVISOR_BIT | TSC_DEADLINE_BIT);
            assert_eq!((leaves[1].eax, leaves[1].ebx), (0, 1));
            assert_eq!((leaves[2].eax, leaves[2].ebx, leaves[2].edx), (2, 3, u32::from(index)));
        }
    }

    #[test]
    fn a_missing_feature_is_named_and_a_richer_host_is_fine() {
        let guest = [leaf(0x7, 0, 0b1010, 0)];
        assert!(missing_features(&guest, &[leaf(0x7, 0, 0b1111, 0)]).is_empty());
        assert_eq!(missing_features(&guest, &[leaf(0x7, 0, 0b0010, 0)]), ["leaf 0x7.0 ebx lacks 0x8"]);
    }
}
