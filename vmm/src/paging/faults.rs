//! The threads that serve faults on absent memory. Each takes one fault at a time and blocks until it is served; the others go on.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;

use super::Shared;
use crate::seccomp::{self, Role};

/// Running threads; dropping this ends them, which waits for the faults that are being served.
pub(super) struct FaultThreads {
    stop: EventFd,
    threads: Vec<JoinHandle<()>>,
}

impl FaultThreads {
    pub(super) fn start(shared: &Arc<Shared>, count: usize) -> io::Result<Self> {
        let stop = EventFd::new(libc::EFD_NONBLOCK)?;
        let mut threads = Vec::new();
        for n in 0..count.max(1) {
            let (shared, stop) = (shared.clone(), stop.try_clone()?);
            let thread = std::thread::Builder::new().name(format!("faults{n}")).spawn(move || {
                seccomp::enter(Role::Faults);
                run(&shared, &stop);
            })?;
            threads.push(thread);
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for FaultThreads {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok() {
            for thread in self.threads.drain(..) {
                let _ = thread.join();
            }
        }
    }
}

fn run(shared: &Shared, stop: &EventFd) {
    let Some(uffd) = shared.presence.uffd() else { return };
    // SAFETY: `stop` is open as long as this thread borrows it.
    let stop = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(stop)) };
    loop {
        let mut fds =
            [PollFd::from_borrowed_fd(uffd.as_fd(), PollFlags::IN), PollFd::from_borrowed_fd(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::error!(%error, "cannot wait for faults"),
        }
        if fds[1].revents().contains(PollFlags::IN) {
            return;
        }
        match uffd.next_fault() {
            Ok(Some(address)) => shared.serve(address),
            // Another thread took it.
            Ok(None) => {}
            Err(error) => return tracing::error!(%error, "cannot read faults"),
        }
    }
}
