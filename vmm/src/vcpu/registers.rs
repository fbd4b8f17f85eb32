//! The persisted form of a vCPU's registers, field by field (see [`crate::mirror`]).

use crate::mirror::mirror;
use kvm_bindings as k;

mirror!(
    /// General registers.
    Regs = k::kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }
);

mirror!(
    /// A segment register with its hidden part.
    Segment = k::kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8, l: u8, g: u8, avl: u8, unusable: u8,
    }
);

mirror!(
    /// A descriptor table register.
    DescriptorTable = k::kvm_dtable { base: u64, limit: u16 }
);

mirror!(
    /// Segments, control registers, APIC base and PDPTRs.
    Sregs = k::kvm_sregs2 {
        cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment, tr: Segment, ldt: Segment,
        gdt: DescriptorTable, idt: DescriptorTable,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64, flags: u64, pdptrs: [u64; 4],
    }
);

mirror!(
    /// Debug registers.
    DebugRegs = k::kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 }
);

mirror!(
    /// An exception being delivered.
    Exception = k::kvm_vcpu_events__bindgen_ty_1 { injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32 }
);

mirror!(
    /// An interrupt being delivered.
    Interrupt = k::kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 }
);

mirror!(
    /// Non-maskable interrupt state.
    Nmi = k::kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 }
);

mirror!(
    /// System management mode state.
    Smi = k::kvm_vcpu_events__bindgen_ty_4 { smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8 }
);

mirror!(
    /// A triple fault not yet reported.
    TripleFault = k::kvm_vcpu_events__bindgen_ty_5 { pending: u8 }
);

mirror!(
    /// Events in flight.
    Events = k::kvm_vcpu_events {
        exception: Exception, interrupt: Interrupt, nmi: Nmi, sipi_vector: u32, flags: u32, smi: Smi, triple_fault: TripleFault,
        exception_has_payload: u8, exception_payload: u64,
    }
);

mirror!(
    /// One CPUID leaf as the guest sees it.
    CpuidLeaf = k::kvm_cpuid_entry2 { function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32 }
);

/// One extended control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Xcr {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Msr {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kept_field_survives_the_round_trip() {
        let mut kernel = k::kvm_vcpu_events::default();
        kernel.exception.error_code = 7;
        kernel.interrupt.shadow = 1;
        kernel.nmi.masked = 1;
        kernel.smi.latched_init = 1;
        kernel.exception_payload = 0x1234;
        assert_eq!(k::kvm_vcpu_events::from(&Events::from(&kernel)), kernel);

        let mut sregs = k::kvm_sregs2 { cr3: 1, pdptrs: [1, 2, 3, 4], ..Default::default() };
        sregs.tr.type_ = 11;
        sregs.gdt.limit = 47;
        assert_eq!(k::kvm_sregs2::from(&Sregs::from(&sregs)), sregs);
    }
}
