//! Port and MMIO accesses of the guest, dispatched to devices. Called from vCPU threads; each device is behind its own lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stasis_devices::exit_counter::ExitCounter;
use stasis_devices::i8042::I8042;
use stasis_devices::serial::Serial;
use stasis_devices::virtio::mmio::MmioDevice;

use crate::layout;
use crate::turns::Turns;

/// What an access means for the vCPU that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It goes on.
    Continue,
    /// The guest ended its machine, for this reason.
    End(String),
}

/// The devices that vCPUs reach, by address.
pub(crate) struct Bus {
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) exit_counter: Option<Arc<Mutex<ExitCounter>>>,
    /// In window order, see [`layout::VIRTIO_MMIO_BASE`].
    pub(crate) virtio: Vec<Arc<Turns<MmioDevice>>>,
}

/// Locks a device. A device whose lock a panicking thread held is used as it is: the panic ends the process anyway.
pub(crate) fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) -> Outcome {
        // What nobody answers reads as all ones, as on a bus without a device.
        data.fill(0xff);
        if layout::SERIAL_PORTS.contains(&port) {
            for byte in data.iter_mut() {
                *byte = lock(&self.serial).read((port - layout::SERIAL_PORTS.start) as u8);
            }
        } else if port == layout::EXIT_COUNTER_IN
            && let (Some(counter), Ok(word)) = (&self.exit_counter, <&mut [u8; 4]>::try_from(&mut *data))
        {
            *word = lock(counter).read().to_le_bytes();
        } else if layout::I8042_PORTS.contains(&port)
            && let [byte] = data
        {
            *byte = I8042.read(port - layout::I8042_PORTS.start);
        } else if port == layout::SLEEP_STATUS_PORT {
            data.fill(0);
        }
        Outcome::Continue
    }

    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Outcome {
        // SLP_EN and SLP_TYP of the sleep control register (ACPI 6.5 §4.8.3.7).
        const SLEEP_S5: u8 = (1 << 5) | (layout::SLEEP_TYPE_S5 << 2);
        if layout::SERIAL_PORTS.contains(&port) {
            for byte in data {
                lock(&self.serial).write((port - layout::SERIAL_PORTS.start) as u8, *byte);
            }
        } else if port == layout::EXIT_COUNTER_OUT
            && let (Some(counter), Ok(word)) = (&self.exit_counter, <[u8; 4]>::try_from(data))
        {
            lock(counter).write(u32::from_le_bytes(word));
        } else if layout::I8042_PORTS.contains(&port)
            && let [byte] = data
            && I8042.write(port - layout::I8042_PORTS.start, *byte).is_some()
        {
            return Outcome::End("reset through the keyboard controller".to_owned());
        } else if port == layout::RESET_PORT && data == [layout::RESET_VALUE] {
            return Outcome::End("reset through ACPI".to_owned());
        } else if port == layout::SLEEP_CONTROL_PORT && data == [SLEEP_S5] {
            return Outcome::End("power-off through ACPI".to_owned());
        }
        Outcome::Continue
    }

    fn window(&self, gpa: u64) -> Option<(&Turns<MmioDevice>, u64)> {
        let offset = gpa.checked_sub(layout::VIRTIO_MMIO_BASE)?;
        let window = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((self.virtio.get(window)?, offset % layout::VIRTIO_MMIO_SIZE))
    }

    pub(crate) fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> Outcome {
        match self.window(gpa) {
            Some((device, offset)) => device.lock().read(offset, data),
            None => data.fill(0xff),
        }
        Outcome::Continue
    }

    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) -> Outcome {
        if let Some((device, offset)) = self.window(gpa) {
            device.lock().write(offset, data);
        }
        Outcome::Continue
    }
}
