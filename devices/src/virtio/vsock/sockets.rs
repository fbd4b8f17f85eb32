//! The host's sockets of a vsock device, watched by an epoll of the device's own.
//!
//! The event loop watches that one epoll, so connections come and go without the loop's knowledge, from whichever call made them.
//! Each socket is watched for one event at a time (EPOLLONESHOT): a socket whose bytes the guest has no room for stays silent instead
//! of waking the loop again and again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Instant;

use event_manager::EventSet;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::super::timer::Timer;

/// Names a watched descriptor.
pub(super) type Token = u64;
/// The listener.
pub(super) const LISTENER: Token = 0;
/// The timer.
pub(super) const TIMER: Token = 1;
/// Sockets of clients and connections have this token or a higher one.
pub(super) const FIRST_SOCKET: Token = 2;

/// Events handled in one call.
const EVENTS: usize = 64;

/// The epoll with its two permanent members.
pub(super) struct Sockets {
    epoll: Epoll,
    listener: UnixListener,
    timer: Timer,
}

impl Sockets {
    /// Watches nothing yet.
    pub(super) fn new(listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let sockets = Self { epoll: Epoll::new()?, listener, timer: Timer::new()? };
        sockets.epoll.ctl(ControlOperation::Add, sockets.timer.as_raw_fd(), EpollEvent::new(EventSet::IN, TIMER))?;
        // Silent: a one-shot that has had its shot. Hang-ups and errors do not happen to a listener.
        sockets.epoll.ctl(
            ControlOperation::Add,
            sockets.listener.as_raw_fd(),
            EpollEvent::new(EventSet::empty(), LISTENER),
        )?;
        Ok(sockets)
    }

    /// The descriptor that the event loop watches.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// What happened, at most a bounded number of events.
    pub(super) fn poll(&self) -> Vec<(Token, EventSet)> {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    tracing::warn!(%error, "cannot poll vsock sockets");
                }
                0
            }
        };
        events[..count].iter().map(|event| (event.data(), EventSet::from_bits_truncate(event.events()))).collect()
    }

    /// Begins to watch a new socket for one event.
    pub(super) fn add(&self, fd: RawFd, token: Token, interest: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest | EventSet::ONE_SHOT, token))
    }

    /// Watches a socket for its next event. A socket leaves when it is closed.
    pub(super) fn rearm(&self, fd: RawFd, token: Token, interest: EventSet) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(interest | EventSet::ONE_SHOT, token))
    }

    /// Watches the listener for its next client, or stops doing so.
    pub(super) fn listen(&self, on: bool) -> io::Result<()> {
        self.rearm(self.listener.as_raw_fd(), LISTENER, if on { EventSet::IN } else { EventSet::empty() })
    }

    /// The next client; none when none waits.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            // A client that gave up while it waited.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Lets the timer report at `deadline`, or not at all.
    pub(super) fn wake_at(&mut self, deadline: Option<Instant>, now: Instant) -> io::Result<()> {
        self.timer.wake_at(deadline, now)
    }

    /// Takes note that the timer has reported; it is silent until [`wake_at`](Self::wake_at) is called again.
    pub(super) fn acknowledge_timer(&mut self) {
        self.timer.acknowledge();
    }
}

/// Connects to the unix socket at `path` without blocking; fails at once when nobody listens or the listener's backlog is full.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket.into())
}
