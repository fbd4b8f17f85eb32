//! The processes that this warden has started: reaped when they end, which ends their control group with them, and what is known of their
//! end is written into their notes. One thread; those of an earlier warden are reaped by the system's first process.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::epoll;
use rustix::process::{WaitId, WaitIdOptions, waitid};

use super::cgroup::Group;
use super::start::{End, ProcessNote};

/// One of them.
#[derive(Debug)]
pub struct Child {
    /// Which one.
    pub note: ProcessNote,
    /// Where that is written down.
    pub written: File,
    /// Its descriptor.
    pub pidfd: OwnedFd,
    /// Its control group.
    pub group: Option<Group>,
}

/// All of them.
#[derive(Clone, Debug)]
pub struct Children {
    epoll: Arc<OwnedFd>,
    living: Arc<Mutex<HashMap<u64, Child>>>,
}

impl Children {
    /// None yet; the thread runs.
    pub fn new() -> io::Result<Self> {
        let children = Self { epoll: Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?), living: Arc::default() };
        let reaper = children.clone();
        std::thread::Builder::new().name("reaper".to_owned()).spawn(move || reaper.reap())?;
        Ok(children)
    }

    /// How many live.
    pub fn count(&self) -> usize {
        self.living.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Watches one.
    pub fn add(&self, child: Child) -> io::Result<()> {
        let key = u64::from(child.note.pid.unsigned_abs());
        let mut living = self.living.lock().unwrap_or_else(PoisonError::into_inner);
        epoll::add(&self.epoll, &child.pidfd, epoll::EventData::new_u64(key), epoll::EventFlags::IN)?;
        living.insert(key, child);
        Ok(())
    }

    fn reap(&self) {
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "cannot wait for processes"),
            }
            for event in &events {
                let key = event.data.u64();
                let child = self.living.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
                if let Some(child) = child {
                    let _ = epoll::delete(&self.epoll, &child.pidfd);
                    bury(child);
                }
            }
        }
    }
}

fn bury(child: Child) {
    let status = waitid(WaitId::PidFd(child.pidfd.as_fd()), WaitIdOptions::EXITED);
    if let Ok(Some(status)) = status {
        let note = ProcessNote { end: end_of(&status), ..child.note };
        let written =
            serde_json::to_vec(&note).map_err(io::Error::other).and_then(|json| child.written.write_all_at(&json, 0));
        if let Err(error) = written {
            tracing::debug!(%error, pid = note.pid, "cannot note the end of a process");
        }
    }
    if let Some(group) = child.group {
        group.remove();
    }
}

/// How a process ended, from the kernel's answer to whoever waited for it.
pub fn end_of(status: &rustix::process::WaitIdStatus) -> Option<End> {
    match (status.terminating_signal(), status.exit_status()) {
        (Some(signal), _) => Some(End::Signal(signal)),
        (None, Some(code)) => Some(End::Code(code)),
        (None, None) => None,
    }
}
