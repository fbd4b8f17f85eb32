//! The complete state of one vCPU: what is saved, and the two orders.
//!
//! [`SAVE_ORDER`] and [`RESTORE_ORDER`] are the tables; [`save`] and [`restore`] walk them. A step's reason stands beside it. The caller
//! guarantees that no vCPU of the machine runs and that the last exit was completed (see [`super`]).

use kvm_bindings::{CpuId, kvm_lapic_state, kvm_mp_state, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::cpuid;
use super::msr::{self, IA32_TSC, IA32_TSC_DEADLINE};
use super::registers::{CpuidLeaf, DebugRegs, Events, Msr, Regs, Sregs, Xcr};
use crate::kvm::{self, During, KvmError};

/// Version of [`VcpuState`] in snapshots.
pub(crate) const VERSION: u16 = 1;

/// Everything a vCPU is, besides memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    pub(crate) mp_state: u32,
    pub(crate) regs: Regs,
    pub(crate) sregs: Sregs,
    /// XSAVE area as the CPU lays it out (Intel SDM 1 §13.4), 32-bit words.
    pub(crate) xsave: Vec<u32>,
    pub(crate) xcrs: Vec<Xcr>,
    pub(crate) debug_regs: DebugRegs,
    /// Local APIC register page (Intel SDM 3 §10.4.1), 1024 bytes.
    pub(crate) lapic: Vec<u8>,
    pub(crate) tsc_khz: u32,
    /// Guest TSC minus host TSC, where the kernel tells it.
    pub(crate) tsc_offset: Option<u64>,
    pub(crate) cpuid: Vec<CpuidLeaf>,
    pub(crate) msrs: Vec<Msr>,
    pub(crate) events: Events,
}

/// What a step needs besides the vCPU.
pub(crate) struct Context<'a> {
    /// [`kvm::xsave_size`] of the VM.
    pub(crate) xsave_size: usize,
    /// [`msr::saved_indices`] of the machine.
    pub(crate) msr_indices: &'a [u32],
    /// MSRs that may be refused on restore (`--allow-msr`).
    pub(crate) allowed_msrs: &'a [u32],
    /// Added to each saved TSC offset: saved host TSC minus this host's, so that the guest's counter goes on where it stood.
    pub(crate) tsc_shift: u64,
}

/// One line of an order table: its name in errors, what it does, why it stands where it stands.
struct Step<F> {
    run: F,
    #[cfg_attr(not(test), expect(dead_code, reason = "for people, and for the test of the table"))]
    why: &'static str,
}

type Save = fn(&VcpuFd, &Context<'_>, &mut VcpuState) -> Result<(), KvmError>;
type Restore = fn(&VcpuFd, &Context<'_>, &VcpuState) -> Result<(), KvmError>;

const SAVE_ORDER: &[Step<Save>] = &[
    Step {
        why: "first: reading it makes KVM accept a pending INIT or SIPI, which changes CS and RIP",
        run: save_mp_state,
    },
    Step { why: "after mp_state", run: save_regs },
    Step { why: "after mp_state", run: save_sregs },
    Step { why: "no order of its own", run: save_xsave },
    Step { why: "no order of its own", run: save_xcrs },
    Step { why: "no order of its own", run: save_debug_regs },
    Step { why: "devices were saved before, so no interrupt arrives any more", run: save_lapic },
    Step { why: "before the MSRs, which are read against it", run: save_tsc },
    Step {
        why: "read back from KVM, never from what was set: a second generation must see the same timer mode",
        run: save_cpuid,
    },
    Step {
        why: "after cpuid and lapic: values depend on the first, the deadline's meaning on the second",
        run: save_msrs,
    },
    Step { why: "last: the reads above can move pending state into it", run: save_events },
];

const RESTORE_ORDER: &[Step<Restore>] = &[
    Step { why: "first: KVM accepts MSRs and XSAVE areas by it", run: restore_cpuid },
    Step { why: "before regs, as a reset vCPU", run: restore_mp_state },
    Step { why: "before events: writing regs drops a pending exception", run: restore_regs },
    Step { why: "before lapic: it carries the APIC base", run: restore_sregs },
    Step { why: "before xcrs, as the CPU's own reset value of XCR0 accepts any area", run: restore_xsave },
    Step { why: "no order of its own", run: restore_xcrs },
    Step { why: "no order of its own", run: restore_debug_regs },
    Step {
        why: "before MSRs: KVM drops a deadline, and says it was taken, unless the timer is in deadline mode",
        run: restore_lapic,
    },
    Step { why: "before MSRs: a deadline is compared with the counter", run: restore_tsc },
    Step { why: "TSC before all, TSC_DEADLINE after all", run: restore_msrs },
    Step { why: "last but one: everything above may clear it", run: restore_events },
    Step {
        why: "tells the guest's watchdogs that it stood still; lost if said before the clock page is up to date",
        run: restore_clock_note,
    },
];

/// Reads the whole state.
pub(crate) fn save(vcpu: &VcpuFd, context: &Context<'_>) -> Result<VcpuState, KvmError> {
    let mut state = VcpuState::default();
    for step in SAVE_ORDER {
        (step.run)(vcpu, context, &mut state)?;
    }
    Ok(state)
}

/// Writes the whole state into a fresh vCPU.
pub(crate) fn restore(vcpu: &VcpuFd, context: &Context<'_>, state: &VcpuState) -> Result<(), KvmError> {
    for step in RESTORE_ORDER {
        (step.run)(vcpu, context, state)?;
    }
    Ok(())
}

fn save_mp_state(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.mp_state = vcpu.get_mp_state().during("read mp_state")?.mp_state;
    Ok(())
}

fn save_regs(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.regs = Regs::from(&vcpu.get_regs().during("read regs")?);
    Ok(())
}

fn save_sregs(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.sregs = Sregs::from(&kvm::get_sregs2(vcpu)?);
    Ok(())
}

fn save_xsave(vcpu: &VcpuFd, c: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.xsave = kvm::get_xsave(vcpu, c.xsave_size)?;
    Ok(())
}

fn save_xcrs(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    let xcrs = vcpu.get_xcrs().during("read xcrs")?;
    s.xcrs = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).map(|x| Xcr { index: x.xcr, value: x.value }).collect();
    Ok(())
}

fn save_debug_regs(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.debug_regs = DebugRegs::from(&vcpu.get_debug_regs().during("read debug registers")?);
    Ok(())
}

fn save_lapic(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.lapic = vcpu.get_lapic().during("read the local APIC")?.regs.iter().map(|b| b.cast_unsigned()).collect();
    Ok(())
}

#[expect(clippy::unnecessary_wraps, reason = "a step of the table")]
fn save_tsc(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    // A KVM that cannot tell its frequency cannot scale it either; 0 says so.
    s.tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    s.tsc_offset = kvm::tsc_offset(vcpu);
    Ok(())
}

fn save_cpuid(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.cpuid = cpuid::of_vcpu(vcpu)?;
    Ok(())
}

fn save_msrs(vcpu: &VcpuFd, c: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    let mut msrs = msr::read(vcpu, c.msr_indices)?;
    rearm_expired_deadline(&mut msrs, &s.lapic);
    s.msrs = msrs;
    Ok(())
}

fn save_events(vcpu: &VcpuFd, _: &Context<'_>, s: &mut VcpuState) -> Result<(), KvmError> {
    s.events = Events::from(&vcpu.get_vcpu_events().during("read pending events")?);
    Ok(())
}

/// A deadline that has just expired reads as 0 although its interrupt may not have been delivered: left at 0 the timer never fires again.
/// The counter's present value instead makes it fire at once; for a timer that was really idle that is one spurious interrupt.
fn rearm_expired_deadline(msrs: &mut [Msr], lapic: &[u8]) {
    const LVT_TIMER: usize = 0x320;
    const TIMER_MODE: u32 = 0b11 << 17;
    const TSC_DEADLINE_MODE: u32 = 0b10 << 17;
    let lvt = lapic.get(LVT_TIMER..LVT_TIMER + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    if lvt & TIMER_MODE != TSC_DEADLINE_MODE {
        return;
    }
    let Some(now) = msrs.iter().find(|m| m.index == IA32_TSC).map(|m| m.value) else { return };
    if let Some(deadline) = msrs.iter_mut().find(|m| m.index == IA32_TSC_DEADLINE && m.value == 0) {
        deadline.value = now;
    }
}

fn restore_cpuid(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    let leaves: Vec<_> = s.cpuid.iter().map(Into::into).collect();
    let cpuid = CpuId::from_entries(&leaves)
        .map_err(|e| KvmError { what: "hold cpuid", source: std::io::Error::other(format!("{e:?}")) })?;
    vcpu.set_cpuid2(&cpuid).during("write cpuid")
}

fn restore_mp_state(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    vcpu.set_mp_state(kvm_mp_state { mp_state: s.mp_state }).during("write mp_state")
}

fn restore_regs(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    vcpu.set_regs(&(&s.regs).into()).during("write regs")
}

fn restore_sregs(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    kvm::set_sregs2(vcpu, &(&s.sregs).into())
}

fn restore_xsave(vcpu: &VcpuFd, c: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    kvm::set_xsave(vcpu, c.xsave_size, &s.xsave)
}

fn restore_xcrs(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: s.xcrs.len() as u32, ..Default::default() };
    if s.xcrs.len() > xcrs.xcrs.len() {
        return Err(KvmError { what: "write xcrs", source: std::io::ErrorKind::InvalidData.into() });
    }
    for (to, from) in xcrs.xcrs.iter_mut().zip(&s.xcrs) {
        to.xcr = from.index;
        to.value = from.value;
    }
    vcpu.set_xcrs(&xcrs).during("write xcrs")
}

fn restore_debug_regs(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    vcpu.set_debug_regs(&(&s.debug_regs).into()).during("write debug registers")
}

fn restore_lapic(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    let mut lapic = kvm_lapic_state::default();
    if s.lapic.len() != lapic.regs.len() {
        return Err(KvmError { what: "write the local APIC", source: std::io::ErrorKind::InvalidData.into() });
    }
    for (to, from) in lapic.regs.iter_mut().zip(&s.lapic) {
        *to = from.cast_signed();
    }
    vcpu.set_lapic(&lapic).during("write the local APIC")
}

fn restore_tsc(vcpu: &VcpuFd, c: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    const TOLERANCE_PPM: u64 = 250;
    let host = vcpu.get_tsc_khz().unwrap_or(0);
    let apart = u64::from(host.abs_diff(s.tsc_khz)) * 1_000_000;
    if s.tsc_khz != 0 && host != 0 && apart > u64::from(s.tsc_khz) * TOLERANCE_PPM {
        vcpu.set_tsc_khz(s.tsc_khz).during("give the guest its TSC frequency (this host cannot scale it)")?;
    }
    match s.tsc_offset {
        // One shift for all vCPUs keeps their counters together; written as MSRs they would drift apart by the time between two writes.
        Some(offset) if kvm::tsc_offset(vcpu).is_some() => kvm::set_tsc_offset(vcpu, offset.wrapping_add(c.tsc_shift)),
        _ => match s.msrs.iter().find(|m| m.index == IA32_TSC) {
            Some(tsc) => msr::write(vcpu, &[*tsc], c.allowed_msrs),
            None => Ok(()),
        },
    }
}

fn restore_msrs(vcpu: &VcpuFd, c: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    let (last, first): (Vec<Msr>, Vec<Msr>) =
        s.msrs.iter().filter(|m| m.index != IA32_TSC).partition(|m| m.index == IA32_TSC_DEADLINE);
    msr::write(vcpu, &first, c.allowed_msrs)?;
    msr::write(vcpu, &last, c.allowed_msrs)
}

fn restore_events(vcpu: &VcpuFd, _: &Context<'_>, s: &VcpuState) -> Result<(), KvmError> {
    vcpu.set_vcpu_events(&(&s.events).into()).during("write pending events")
}

fn restore_clock_note(vcpu: &VcpuFd, _: &Context<'_>, _: &VcpuState) -> Result<(), KvmError> {
    // A guest that does not use kvmclock has no page to note it in; KVM says EINVAL then, and nothing is lost.
    match vcpu.kvmclock_ctrl() {
        Err(e) if e.errno() != libc::EINVAL => Err(KvmError { what: "note the pause in kvmclock", source: e.into() }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    fn msr(index: u32, value: u64) -> Msr {
        Msr { index, value }
    }

    fn lapic_in_mode(mode: u32) -> Vec<u8> {
        let mut page = vec![0; 1024];
        page[0x320..0x324].copy_from_slice(&(mode << 17).to_le_bytes());
        page
    }

    #[test]
    fn an_expired_deadline_fires_after_the_restore() {
        let mut msrs = [msr(IA32_TSC, 500), msr(IA32_TSC_DEADLINE, 0)];
        rearm_expired_deadline(&mut msrs, &lapic_in_mode(0b10));
        assert_eq!(msrs[1].value, 500);
    }

    #[test]
    fn an_armed_deadline_and_other_timer_modes_stay() {
        let mut armed = [msr(IA32_TSC, 500), msr(IA32_TSC_DEADLINE, 900)];
        rearm_expired_deadline(&mut armed, &lapic_in_mode(0b10));
        assert_eq!(armed[1].value, 900);
        for mode in [0b00, 0b01] {
            let mut off = [msr(IA32_TSC, 500), msr(IA32_TSC_DEADLINE, 0)];
            rearm_expired_deadline(&mut off, &lapic_in_mode(mode));
            assert_eq!(off[1].value, 0);
        }
    }

    /// A VM with one configured vCPU, as a machine makes it; `None` (said on standard error) where there is no KVM.
    fn kvm_vcpu() -> Option<(kvm_ioctls::Kvm, kvm_ioctls::VmFd, VcpuFd)> {
        let device = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        let kvm = match device {
            Ok(device) => kvm::checked(device.into()).unwrap(),
            Err(error) => {
                eprintln!("left out: {error}");
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let supported = cpuid::supported(&kvm).unwrap();
        vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, 0, 1).unwrap()).unwrap();
        Some((kvm, vm, vcpu))
    }

    /// Debug registers, registers, the timer's mode and a deadline far away arrive in another VM as they were, and a second save equals the first.
    #[test]
    fn a_vcpu_with_an_armed_deadline_arrives_whole_in_another_vm() {
        const LVT_TIMER: usize = 0x320;
        const FAR: u64 = 1 << 60;
        let Some((kvm, vm, vcpu)) = kvm_vcpu() else { return };
        let indices = msr::saved_indices(&kvm, &vcpu).unwrap();
        let context =
            Context { xsave_size: kvm::xsave_size(&vm), msr_indices: &indices, allowed_msrs: &[], tsc_shift: 0 };
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rax, regs.rip, regs.rflags) = (0x1234_5678_9abc, 0x10_0000, 2);
        vcpu.set_regs(&regs).unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        // Software-enabled, timer in deadline mode on vector 0x40.
        lapic.regs[0xf0..0xf4].copy_from_slice(&[0xff_u8.cast_signed(), 1, 0, 0]);
        for (to, from) in lapic.regs[LVT_TIMER..LVT_TIMER + 4].iter_mut().zip((0x40_u32 | 0b10 << 17).to_le_bytes()) {
            *to = from.cast_signed();
        }
        vcpu.set_lapic(&lapic).unwrap();
        msr::write(&vcpu, &[msr(IA32_TSC_DEADLINE, FAR)], &[]).unwrap();

        let saved = save(&vcpu, &context).unwrap();
        let deadline = |s: &VcpuState| s.msrs.iter().find(|m| m.index == IA32_TSC_DEADLINE).map(|m| m.value);
        assert_eq!(deadline(&saved), Some(FAR), "KVM keeps the deadline");
        let (_kvm, _vm, other) = kvm_vcpu().unwrap();
        restore(&other, &context, &saved).unwrap();
        let mut again = save(&other, &context).unwrap();
        assert_eq!(deadline(&again), Some(FAR));
        // What counts time, or is rounded to a host boundary by KVM, differs; all else is the same.
        let timeless = |s: &mut VcpuState| {
            s.tsc_offset = None;
            s.msrs.retain(|m| m.index != IA32_TSC);
        };
        let mut first = saved;
        timeless(&mut first);
        timeless(&mut again);
        assert_eq!(first, again);
    }

    /// A snapshot's state is untrusted: whatever it says is refused, by us or by KVM, or set.
    #[test]
    fn changed_states_never_panic() {
        let Some((kvm, vm, vcpu)) = kvm_vcpu() else { return };
        let indices = msr::saved_indices(&kvm, &vcpu).unwrap();
        let context =
            Context { xsave_size: kvm::xsave_size(&vm), msr_indices: &indices, allowed_msrs: &[], tsc_shift: 0 };
        let encoded = postcard::to_stdvec(&save(&vcpu, &context).unwrap()).unwrap();
        let (_kvm, _vm, other) = kvm_vcpu().unwrap();
        let mut rng = SmallRng::seed_from_u64(7);
        let (mut not_read, mut not_set, mut set) = (0, 0, 0);
        for _ in 0..3000 {
            let mut bytes = encoded.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..bytes.len());
                match rng.random_range(0..4) {
                    0 => bytes[at] = rng.random(),
                    1 => drop(bytes.drain(at..(at + 8).min(bytes.len()))),
                    _ => bytes[at] ^= 1 << rng.random_range(0..8),
                }
            }
            match postcard::from_bytes::<VcpuState>(&bytes) {
                Err(_) => not_read += 1,
                Ok(state) if restore(&other, &context, &state).is_err() => not_set += 1,
                Ok(_) => set += 1,
            }
        }
        assert!(not_read > 20 && not_set > 20 && set > 20, "{not_read} not read, {not_set} not set, {set} set");
    }

    #[test]
    fn the_tables_name_a_reason_for_every_step() {
        assert!(SAVE_ORDER.iter().all(|s| !s.why.is_empty()));
        assert!(RESTORE_ORDER.iter().all(|s| !s.why.is_empty()));
    }
}
