//! What the event loop watches for a network device: an epoll of the device's own, with the tap and a timer in it.
//!
//! The tap is watched only for what the device can use now. A tap whose frames no buffer waits for stays silent instead of waking the loop
//! again and again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use event_manager::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::super::timer::Timer;

const TIMER: u64 = 0;
const TAP: u64 = 1;

/// What happened since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Happened {
    /// The tap can be written again.
    pub(super) writable: bool,
    /// The tap is gone for good.
    pub(super) gone: bool,
}

/// The epoll and its members.
pub(super) struct Watch {
    epoll: Epoll,
    timer: Timer,
    tap: Option<RawFd>,
    interest: EventSet,
}

impl Watch {
    /// Watches nothing yet. The tap must live as long as this, or until [`forget_tap`](Self::forget_tap).
    pub(super) fn new(tap: Option<RawFd>) -> io::Result<Self> {
        let watch = Self { epoll: Epoll::new()?, timer: Timer::new()?, tap, interest: EventSet::empty() };
        watch.epoll.ctl(ControlOperation::Add, watch.timer.as_raw_fd(), EpollEvent::new(EventSet::IN, TIMER))?;
        Ok(watch)
    }

    /// The descriptor that the event loop watches.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// What happened.
    pub(super) fn poll(&mut self) -> io::Result<Happened> {
        let mut events = [EpollEvent::default(); 2];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            other => other.unwrap_or(0),
        };
        let mut happened = Happened::default();
        for event in &events[..count] {
            if event.data() == TIMER {
                self.timer.acknowledge();
                continue;
            }
            let set = EventSet::from_bits_truncate(event.events());
            happened.writable |= set.contains(EventSet::OUT);
            happened.gone |= set.intersects(EventSet::ERROR | EventSet::HANG_UP);
        }
        Ok(happened)
    }

    /// Watches the tap for frames and for room, as asked, and the time.
    pub(super) fn set(&mut self, frames: bool, room: bool, wake: Option<Instant>, now: Instant) -> io::Result<()> {
        self.timer.wake_at(wake, now)?;
        let Some(tap) = self.tap else { return Ok(()) };
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, frames);
        interest.set(EventSet::OUT, room);
        if interest == self.interest {
            return Ok(());
        }
        // A member is told of hang-ups whatever it is watched for: a tap that nothing is wanted from is none.
        let operation = match (self.interest.is_empty(), interest.is_empty()) {
            (true, _) => ControlOperation::Add,
            (false, true) => ControlOperation::Delete,
            (false, false) => ControlOperation::Modify,
        };
        self.epoll.ctl(operation, tap, EpollEvent::new(interest, TAP))?;
        self.interest = interest;
        Ok(())
    }

    /// The tap is about to be closed.
    pub(super) fn forget_tap(&mut self) {
        if let Some(tap) = self.tap.take()
            && !self.interest.is_empty()
            && let Err(error) = self.epoll.ctl(ControlOperation::Delete, tap, EpollEvent::default())
        {
            tracing::debug!(%error, "a tap that nobody watches");
        }
        self.interest = EventSet::empty();
    }
}
