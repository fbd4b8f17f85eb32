//! COM1: a 16550 with state save and restore, over `vm-superio`.
//!
//! Output goes to a writer of the VMM, byte by byte, from the vCPU thread that wrote it: the writer must not block. Input waits in a
//! bounded backlog here until the 64-byte receive FIFO has room.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

/// Input bytes that wait beyond the FIFO; more are refused.
pub const BACKLOG_BYTES: usize = 4096;

const DATA: u8 = 0;
const IIR_NONE: u8 = 1;

/// Why a serial port could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The receive FIFO or the backlog of the state is larger than the device's.
    #[error("the saved serial port holds {0} bytes of input, more than the device can")]
    TooMuchInput(usize),
    /// The UART model refused the state, or its interrupt could not be raised.
    #[error("cannot restore the serial port: {0}")]
    Uart(String),
}

/// Saved state of a [`Serial`]: the registers of the 16550 and the input that the guest has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register: the only place where a pending transmitter-empty interrupt lives.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Receive FIFO, oldest byte first.
    pub fifo: Vec<u8>,
    /// Input that has not fitted in the FIFO yet.
    pub backlog: Vec<u8>,
}

impl SerialState {
    /// Version of this structure.
    pub const VERSION: u16 = 1;
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Clone, Default)]
struct Counter(Arc<AtomicU64>);

impl SerialEvents for Counter {
    fn buffer_read(&self) {}
    fn out_byte(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    // A byte that the writer refused was still written by the guest.
    fn tx_lost_byte(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn in_buffer_empty(&self) {}
}

/// The device.
pub struct Serial {
    uart: Uart<Irq, Counter, Box<dyn Write + Send>>,
    backlog: VecDeque<u8>,
    written: Counter,
}

impl Serial {
    /// A port after power-on. `irq` is GSI 4's irqfd.
    pub fn new(irq: EventFd, out: Box<dyn Write + Send>) -> Self {
        let written = Counter::default();
        Self { uart: Uart::with_events(Irq(irq), written.clone(), out), backlog: VecDeque::new(), written }
    }

    /// An 8-bit IN at `offset` from the port's base; other sizes do not exist on a 16550.
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        if offset == DATA {
            self.fill_fifo();
        }
        value
    }

    /// An 8-bit OUT. A byte that the writer refuses is lost, as on a line that nobody listens to.
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.uart.write(offset, value) {
            tracing::debug!(%error, "serial output lost");
        }
    }

    /// Queues input for the guest and answers how many bytes were taken; the rest did not fit.
    pub fn enqueue(&mut self, input: &[u8]) -> usize {
        let taken = input.len().min(BACKLOG_BYTES - self.backlog.len());
        self.backlog.extend(&input[..taken]);
        self.fill_fifo();
        taken
    }

    /// Bytes the guest has written; readable without the port's lock. Not part of the saved state.
    pub fn bytes_written(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.written.0)
    }

    /// Raises the interrupt again if one is pending. On every resume: an edge may have been lost with the old interrupt controller.
    pub fn kick(&mut self) {
        if self.uart.state().interrupt_identification & IIR_NONE == 0
            && let Err(error) = self.uart.interrupt_evt().trigger()
        {
            tracing::warn!(%error, "cannot raise the serial interrupt");
        }
    }

    /// The state for a snapshot.
    pub fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            baud_divisor_low: uart.baud_divisor_low,
            baud_divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            backlog: self.backlog.iter().copied().collect(),
        }
    }

    /// A port in `state`. Raises the interrupt when the state has one pending; [`kick`](Self::kick) does so again.
    pub fn restore(state: &SerialState, irq: EventFd, out: Box<dyn Write + Send>) -> Result<Self, SerialError> {
        if state.backlog.len() > BACKLOG_BYTES {
            return Err(SerialError::TooMuchInput(state.backlog.len()));
        }
        let registers = vm_superio::SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let written = Counter::default();
        let uart = Uart::from_state(&registers, Irq(irq), written.clone(), out).map_err(|error| match error {
            vm_superio::serial::Error::FullFifo => SerialError::TooMuchInput(state.fifo.len()),
            other => SerialError::Uart(other.to_string()),
        })?;
        let mut serial = Self { uart, backlog: state.backlog.iter().copied().collect(), written };
        serial.kick();
        Ok(serial)
    }

    fn fill_fifo(&mut self) {
        let room = self.uart.fifo_capacity().min(self.backlog.len());
        if room == 0 {
            return;
        }
        let chunk: Vec<u8> = self.backlog.iter().take(room).copied().collect();
        // In loopback mode the UART takes nothing: the input stays here.
        match self.uart.enqueue_raw_bytes(&chunk) {
            Ok(taken) => drop(self.backlog.drain(..taken)),
            Err(error) => tracing::warn!(%error, "serial input refused"),
        }
    }
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("backlog", &self.backlog.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const IER: u8 = 1;
    const IIR: u8 = 2;
    const LSR: u8 = 5;
    const SCRATCH: u8 = 7;
    const RECEIVED: u8 = 1;
    const TRANSMITTER_EMPTY: u8 = 2;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, EventFd, Output) {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let output = Output::default();
        (Serial::new(irq.try_clone().unwrap(), Box::new(output.clone())), irq, output)
    }

    fn restored(serial: &Serial) -> (Serial, EventFd) {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let bytes = postcard::to_stdvec(&serial.save()).unwrap();
        let state: SerialState = postcard::from_bytes(&bytes).unwrap();
        (Serial::restore(&state, irq.try_clone().unwrap(), Box::new(std::io::sink())).unwrap(), irq)
    }

    #[test]
    fn output_reaches_the_writer_and_is_counted() {
        let (mut serial, _, output) = port();
        let count = serial.bytes_written();
        for byte in b"tick 1\n" {
            serial.write(DATA, *byte);
        }
        assert_eq!(*output.0.lock().unwrap(), b"tick 1\n");
        assert_eq!(count.load(Ordering::Relaxed), 7);
    }

    #[test]
    fn input_beyond_the_fifo_waits_and_comes_in_order_across_a_restore() {
        let (mut serial, _, _) = port();
        let input: Vec<u8> = (0..200).collect();
        assert_eq!(serial.enqueue(&input), 200);
        let mut seen: Vec<u8> = (0..10).map(|_| serial.read(DATA)).collect();
        let (mut serial, _) = restored(&serial);
        while serial.read(LSR) & 1 != 0 {
            seen.push(serial.read(DATA));
        }
        assert_eq!(seen, input);
    }

    #[test]
    fn the_backlog_is_bounded() {
        let (mut serial, _, _) = port();
        assert_eq!(serial.enqueue(&vec![0; 10_000]), BACKLOG_BYTES);
        // 64 of them went on to the FIFO.
        assert_eq!(serial.enqueue(&[0; 100]), 64);
        assert_eq!(serial.enqueue(&[0; 1]), 0);
    }

    #[test]
    fn registers_survive_and_a_pending_interrupt_is_raised_again() {
        let (mut serial, irq, _) = port();
        serial.write(SCRATCH, 0x5a);
        serial.write(IER, RECEIVED | TRANSMITTER_EMPTY);
        serial.write(DATA, b'x');
        serial.enqueue(b"y");
        assert!(irq.read().is_ok());
        let (mut serial, irq) = restored(&serial);
        assert!(irq.read().is_ok(), "IIR shows an interrupt");
        serial.kick();
        assert!(irq.read().is_ok());
        assert_eq!((serial.read(SCRATCH), serial.read(IER)), (0x5a, 3));
        assert_eq!(serial.read(IIR) & 0xf, 6, "transmitter empty and data received");
        serial.kick();
        assert!(irq.read().is_err(), "acknowledged");
    }

    #[test]
    fn an_idle_port_restores_without_an_interrupt() {
        let (serial, _, _) = port();
        assert!(restored(&serial).1.read().is_err());
    }

    #[test]
    fn states_with_too_much_input_are_refused() {
        let (serial, irq, _) = port();
        for state in [
            SerialState { fifo: vec![0; 65], ..serial.save() },
            SerialState { backlog: vec![0; BACKLOG_BYTES + 1], ..serial.save() },
        ] {
            let refused = Serial::restore(&state, irq.try_clone().unwrap(), Box::new(std::io::sink()));
            assert!(matches!(refused, Err(SerialError::TooMuchInput(_))));
        }
    }
}
