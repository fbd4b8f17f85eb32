//! Starting a process with what it needs and nothing else. The one way in which VMMs are started, jailed or not.
//!
//! | module | what |
//! | --- | --- |
//! | [`start`] | the process: from the descriptors it inherits to the moment it runs its program |
//! | `child` | what the new process does to itself in between, step by step |
//! | [`tree`] | the file system that a jailed program sees |
//! | [`children`] | what becomes of it |
//! | [`limits`], [`cgroup`] | how much it may use, by size; the control group that holds it to that |
//! | `forbidden` | system calls that no jailed process may use, whatever its own filters allow |
//!
//! A jailed process has a user id of its own, derived from its process id ([`Users`]), user, mount, process, IPC, UTS, network and control
//! group namespaces of its own (the user namespace owns none of the others, so that even all capabilities in it are worth nothing
//! outside), no capabilities, an empty environment, and a read-only tree without devices. It outlives whoever started it.

pub mod cgroup;
mod child;
pub mod children;
mod forbidden;
pub mod limits;
pub mod start;
pub mod tree;

use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;

use limits::Limits;
use tree::Tree;

/// The first number that a named descriptor gets: those below are the standard ones.
pub const FIRST_DESCRIPTOR: i32 = 3;

/// What is to be started.
#[derive(Debug)]
pub struct Command {
    /// The program. For a jailed process its place in the tree.
    pub program: CString,
    /// Its arguments after the program's name. `--fd NAME=NUMBER` is added for each descriptor.
    pub arguments: Vec<CString>,
    /// Its environment, as `NAME=VALUE`.
    pub environment: Vec<CString>,
    /// Where its standard output and error go.
    pub log: OwnedFd,
    /// What it inherits.
    pub descriptors: Vec<(String, OwnedFd)>,
    /// Where [`start::ProcessNote`] is written before the program runs.
    pub note: File,
}

/// The user ids of jailed processes: the first one plus the process id, which nobody else has as long as the process lives (and, with the
/// same first one, no process of another warden of this host).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Users {
    /// The id before that of process 1.
    pub first: u32,
}

impl Users {
    /// Process ids end below it on 64-bit Linux (`PID_MAX_LIMIT`).
    const MOST_PROCESSES: u32 = 4 << 20;

    /// The id of the process `pid`.
    pub fn of(self, pid: i32) -> u32 {
        self.first + pid.unsigned_abs()
    }

    /// Whether `uid` is one of them.
    pub fn contains(self, uid: u32) -> bool {
        (self.first..self.first + Self::MOST_PROCESSES).contains(&uid)
    }
}

impl Default for Users {
    /// systemd lists 1879048192 to 2147483647 as unused by anybody (Users, Groups, UIDs and GIDs on systemd systems).
    fn default() -> Self {
        Self { first: 1_879_048_192 }
    }
}

/// Which network a jailed process has.
#[derive(Clone, Copy, Debug)]
pub enum Network<'a> {
    /// One of its own, without an interface that is up.
    Empty,
    /// The one that this descriptor names.
    Joined(std::os::fd::BorrowedFd<'a>),
    /// The host's.
    Host,
}

/// The walls around a process.
#[derive(Debug)]
pub struct Walls<'a> {
    /// What it sees of files.
    pub tree: &'a Tree,
    /// Its user ids.
    pub users: Users,
    /// Its network.
    pub network: Network<'a>,
    /// How much it may use by itself.
    pub limits: Limits,
    /// Its control group, where there is one.
    pub cgroup: Option<std::os::fd::BorrowedFd<'a>>,
}
