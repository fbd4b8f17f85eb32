//! One deadline of a device, as a descriptor that its event loop can watch.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// A timer that reports once at its deadline, if it has one.
pub(super) struct Timer {
    fd: OwnedFd,
    deadline: Option<Instant>,
}

impl Timer {
    /// Without a deadline.
    pub(super) fn new() -> io::Result<Self> {
        let fd =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self { fd, deadline: None })
    }

    /// Lets the timer report at `deadline`, or not at all.
    pub(super) fn wake_at(&mut self, deadline: Option<Instant>, now: Instant) -> io::Result<()> {
        if self.deadline == deadline {
            return Ok(());
        }
        // A value of zero would stop the timer.
        let wait = deadline.map_or(Duration::ZERO, |at| at.saturating_duration_since(now).max(Duration::from_nanos(1)));
        let it_value = Timespec { tv_sec: wait.as_secs().cast_signed(), tv_nsec: wait.subsec_nanos().into() };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::time::timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &Itimerspec { it_interval, it_value })?;
        self.deadline = deadline;
        Ok(())
    }

    /// Takes note that the timer has reported; it is silent until [`wake_at`](Self::wake_at) is called again.
    pub(super) fn acknowledge(&mut self) {
        let mut expirations = [0; 8];
        // Fails when the timer was set anew meanwhile.
        let _ = rustix::io::read(&self.fd, &mut expirations);
        self.deadline = None;
    }
}

impl AsRawFd for Timer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
