//! The device status machine, virtio 1.2 §2.1 and §3.1: what a write to the Status register does.
//!
//! A driver sets bits in the order of [`STEPS`], each after the ones before it, and never clears one but by a reset. A bit that comes
//! too early is ignored: the driver reads the register back and sees it missing.

use virtio_bindings::virtio_config as s;

pub(super) const DRIVER_OK: u32 = s::VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FEATURES_OK: u32 = s::VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const NEEDS_RESET: u32 = s::VIRTIO_CONFIG_S_NEEDS_RESET;
const ACKNOWLEDGE: u32 = s::VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = s::VIRTIO_CONFIG_S_DRIVER;
const FAILED: u32 = s::VIRTIO_CONFIG_S_FAILED;

/// Bits in the order in which a driver sets them.
const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// What a write to the Status register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StatusChange {
    /// Back to power-on.
    Reset,
    /// The status is this from now on; it may be the same as before.
    To(u32),
}

/// Plans a write of `written` when the status is `current`. FEATURES_OK is taken only if `features_acceptable`.
pub(super) fn plan(current: u32, written: u32, features_acceptable: bool) -> StatusChange {
    if written == 0 {
        return StatusChange::Reset;
    }
    let mut next = current | written & FAILED;
    // A broken device goes nowhere but to a reset.
    if next & (FAILED | NEEDS_RESET) == 0 {
        for step in STEPS {
            if next & step != 0 {
                continue;
            }
            if written & step == 0 || step == FEATURES_OK && !features_acceptable {
                break;
            }
            next |= step;
        }
    }
    StatusChange::To(next)
}

/// Queues are processed.
pub(super) fn is_active(status: u32) -> bool {
    status & (DRIVER_OK | FAILED | NEEDS_RESET) == DRIVER_OK
}

/// The driver may write its features.
pub(super) fn may_negotiate(status: u32) -> bool {
    status & DRIVER != 0 && status & (FEATURES_OK | FAILED) == 0
}

/// The driver may configure queues.
pub(super) fn may_set_up_queues(status: u32) -> bool {
    status & FEATURES_OK != 0 && status & (DRIVER_OK | FAILED | NEEDS_RESET) == 0
}

/// Whether some sequence of writes and faults leads to `status`.
pub(super) fn is_reachable(status: u32) -> bool {
    // Faults come from queue set-up and from processing.
    if status & (FEATURES_OK | NEEDS_RESET) == NEEDS_RESET {
        return false;
    }
    let steps = status & !(FAILED | NEEDS_RESET);
    let mut reached = 0;
    if steps == reached {
        return true;
    }
    STEPS.iter().any(|step| {
        reached |= step;
        reached == steps
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_follows_the_order_gets_every_bit() {
        let mut status = 0;
        for (written, expected) in [(1, 1), (3, 3), (11, 11), (15, 15)] {
            assert_eq!(plan(status, written, true), StatusChange::To(expected));
            status = expected;
        }
        assert!(is_active(status));
        assert_eq!(plan(status, 0, true), StatusChange::Reset);
    }

    #[test]
    fn bits_out_of_order_are_not_taken_and_none_is_cleared() {
        assert_eq!(plan(0, DRIVER_OK, true), StatusChange::To(0));
        assert_eq!(plan(3, 3 | DRIVER_OK, true), StatusChange::To(3));
        assert_eq!(plan(15, 1, true), StatusChange::To(15));
        assert_eq!(plan(3, 11, false), StatusChange::To(3), "features that were not offered");
        assert_eq!(plan(3, 15, false), StatusChange::To(3));
    }

    #[test]
    fn a_failed_or_broken_device_only_resets() {
        for broken in [NEEDS_RESET | 3, FAILED | 3] {
            assert_eq!(plan(broken, 15, true), StatusChange::To(broken));
            assert_eq!(plan(broken, 0, true), StatusChange::Reset);
        }
        assert_eq!(plan(15, 15 | FAILED, true), StatusChange::To(15 | FAILED));
        assert!(!is_active(15 | FAILED) && !is_active(15 | NEEDS_RESET));
        // The driver cannot set the device's own bit.
        assert_eq!(plan(15, 15 | NEEDS_RESET, true), StatusChange::To(15));
    }

    #[test]
    fn reachable_states_are_exactly_those_a_walk_finds() {
        let mut seen = std::collections::BTreeSet::from([0]);
        let mut todo = vec![0];
        while let Some(status) = todo.pop() {
            let mut successors: Vec<u32> = (0..256)
                .flat_map(|written| [plan(status, written, true), plan(status, written, false)])
                .map(|change| if let StatusChange::To(next) = change { next } else { 0 })
                .collect();
            // Faults come from queue set-up and from processing.
            if may_set_up_queues(status) || is_active(status) {
                successors.push(status | NEEDS_RESET);
            }
            for next in successors {
                if seen.insert(next) {
                    todo.push(next);
                }
            }
        }
        for status in 0..1024 {
            assert_eq!(is_reachable(status), seen.contains(&status), "{status:#x}");
        }
    }
}
