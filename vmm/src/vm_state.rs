//! State of the VM itself: interrupt controllers, timer, clock. Saved after the vCPUs, restored after them.

use kvm_bindings as k;
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{During, KvmError};
use crate::mirror::mirror;

/// Version of [`VmState`] in snapshots.
pub(crate) const VERSION: u16 = 1;

mirror!(
    /// One channel of the interval timer.
    PitChannel = k::kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8, read_state: u8, write_state: u8,
        write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8, count_load_time: i64,
    }
);

mirror!(
    /// The interval timer.
    Pit = k::kvm_pit_state2 { channels: [PitChannel; 3], flags: u32 }
);

mirror!(
    /// One of the two 8259 interrupt controllers.
    Pic = k::kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8, read_reg_select: u8, poll: u8, special_mask: u8,
        init_state: u8, auto_eoi: u8, rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8, elcr_mask: u8,
    }
);

/// The I/O APIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IoApic {
    base_address: u64,
    ioregsel: u32,
    id: u32,
    irr: u32,
    /// Redirection entries as the guest reads them, 64 bits each.
    redirections: [u64; 24],
}

/// Everything KVM keeps for the VM as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmState {
    pit: Pit,
    /// kvmclock at the save, ns since the guest's boot.
    clock_ns: u64,
    /// The host's wall clock at the same moment, ns since the epoch.
    pub(crate) wall_ns: u64,
    /// The host's TSC at the same moment: with it the vCPUs' TSC offsets become counter values.
    pub(crate) host_tsc: u64,
    pics: [Pic; 2],
    ioapic: IoApic,
}

fn irqchip(vm: &VmFd, chip_id: u32) -> Result<k::kvm_irqchip, KvmError> {
    let mut chip = k::kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).during("read an interrupt controller")?;
    Ok(chip)
}

/// Saves the VM. All vCPUs and devices stand still.
pub(crate) fn save(vm: &VmFd, wall_ns: u64) -> Result<VmState, KvmError> {
    let pit = Pit::from(&vm.get_pit2().during("read the interval timer")?);
    let clock_ns = vm.get_clock().during("read kvmclock")?.clock;
    let host_tsc = host_tsc();
    let (master, slave, io) = (
        irqchip(vm, k::KVM_IRQCHIP_PIC_MASTER)?,
        irqchip(vm, k::KVM_IRQCHIP_PIC_SLAVE)?,
        irqchip(vm, k::KVM_IRQCHIP_IOAPIC)?,
    );
    // SAFETY: KVM filled the arm that the chip id asks for; every arm is plain integers.
    let (master, slave, io) = unsafe { (master.chip.pic, slave.chip.pic, io.chip.ioapic) };
    let redirections = std::array::from_fn(|i| {
        // SAFETY: both arms of the entry are the same 64 bits.
        unsafe { io.redirtbl[i].bits }
    });
    let ioapic = IoApic { base_address: io.base_address, ioregsel: io.ioregsel, id: io.id, irr: io.irr, redirections };
    Ok(VmState { pit, clock_ns, wall_ns, host_tsc, pics: [Pic::from(&master), Pic::from(&slave)], ioapic })
}

/// Restores the VM. The vCPUs are restored already: an interrupt line that is asserted now must reach a restored local APIC.
///
/// kvmclock goes on at `clock + (wall_ns - saved wall clock)`: the guest's clocks, which follow it, tell the host's time again. A wall clock
/// that went backwards leaves kvmclock where it stood.
pub(crate) fn restore(vm: &VmFd, state: &VmState, wall_ns: u64) -> Result<(), KvmError> {
    vm.set_pit2(&(&state.pit).into()).during("write the interval timer")?;
    let clock = k::kvm_clock_data { clock: clock_at(state, wall_ns), ..Default::default() };
    vm.set_clock(&clock).during("write kvmclock")?;
    for (chip_id, pic) in [k::KVM_IRQCHIP_PIC_MASTER, k::KVM_IRQCHIP_PIC_SLAVE].into_iter().zip(&state.pics) {
        let mut chip = k::kvm_irqchip { chip_id, ..Default::default() };
        chip.chip.pic = pic.into();
        vm.set_irqchip(&chip).during("write an interrupt controller")?;
    }
    let mut io = k::kvm_ioapic_state {
        base_address: state.ioapic.base_address,
        ioregsel: state.ioapic.ioregsel,
        id: state.ioapic.id,
        irr: state.ioapic.irr,
        ..Default::default()
    };
    for (entry, bits) in io.redirtbl.iter_mut().zip(state.ioapic.redirections) {
        entry.bits = bits;
    }
    let mut chip = k::kvm_irqchip { chip_id: k::KVM_IRQCHIP_IOAPIC, ..Default::default() };
    chip.chip.ioapic = io;
    vm.set_irqchip(&chip).during("write the I/O APIC")
}

fn clock_at(state: &VmState, wall_ns: u64) -> u64 {
    state.clock_ns.saturating_add(wall_ns.saturating_sub(state.wall_ns))
}

/// This host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux leaves it enabled for user space.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvmclock_advances_by_the_time_asleep_and_never_goes_back() {
        let state = VmState { clock_ns: 1_000, wall_ns: 50_000, ..Default::default() };
        for (now, clock) in [(50_000, 1_000), (53_000, 4_000), (49_000, 1_000), (0, 1_000)] {
            assert_eq!(clock_at(&state, now), clock);
        }
    }
}
