//! The keyboard controller, reduced to the one thing a microVM guest uses it for: the reset line.
//!
//! The status register always reads "output buffer full, input buffer empty". A driver that flushes the controller while probing
//! sees a buffer that never drains and concludes at once that there is no controller, instead of waiting out a time limit for each
//! command. A kernel that reboots through the controller waits only for "input buffer empty".

/// Offset of the data register from port 0x60.
pub const DATA: u16 = 0;
/// Offset of the command and status register (port 0x64) from port 0x60.
pub const COMMAND: u16 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const PULSE_RESET: u8 = 0xfe;

/// The guest asked for a reset of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct ResetRequested;

/// The device. It has no state to save.
#[derive(Clone, Copy, Debug, Default)]
pub struct I8042;

impl I8042 {
    /// An 8-bit IN at `offset` from port 0x60.
    pub fn read(self, offset: u16) -> u8 {
        if offset == COMMAND { STATUS_OUTPUT_FULL } else { 0 }
    }

    /// An 8-bit OUT at `offset` from port 0x60.
    pub fn write(self, offset: u16, value: u8) -> Option<ResetRequested> {
        (offset == COMMAND && value == PULSE_RESET).then_some(ResetRequested)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_on_the_command_port_resets() {
        assert_eq!(I8042.write(COMMAND, 0xfe), Some(ResetRequested));
        assert_eq!(I8042.write(DATA, 0xfe), None);
        assert_eq!(I8042.write(COMMAND, 0xd1), None);
    }

    #[test]
    fn a_reboot_never_waits_for_the_input_buffer() {
        const INPUT_FULL: u8 = 1 << 1;
        assert_eq!(I8042.read(COMMAND) & INPUT_FULL, 0);
    }
}
