//! From a [`Command`] to a running process.
//!
//! The new process and this thread take turns over a socket pair: the process waits until it is written down which one it is, so that
//! nothing runs that the next start would not find; then it goes through the steps of `child`, stopping once for its ids to be mapped; the
//! pair closes when its program runs. Each wait has a deadline.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};

use super::child::{self, Jail, Plan, Step, word};
use super::{Command, FIRST_DESCRIPTOR, Network, Walls, forbidden};
use crate::message;

/// How long a process may take from its beginning to its program.
const DEADLINE: Duration = Duration::from_secs(10);
/// Descriptors of a plan are at this number or above, out of the way of those that the process is given.
const OUT_OF_THE_WAY: i32 = 64;

/// Linux `include/uapi/linux/sched.h`; the one of the libc crate is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A process that was started.
#[derive(Debug)]
pub struct Process {
    /// Which one.
    pub note: ProcessNote,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

/// Which process it is, for whoever finds its run directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessNote {
    /// Process id, as the one who started it sees it.
    pub pid: i32,
    /// When it was started, in clock ticks since the boot: tells it from a later process with its id.
    pub started_ticks: u64,
    /// The file that this was written to ([`file_of`]): a copy of a run directory has no process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<(u64, u64)>,
    /// How it ended, when that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// By itself, with this status.
    Code(i32),
    /// By a signal: that of a kill, of its own fault, or of a system call that its filter does not have (`SIGSYS`).
    Signal(i32),
}

/// A process was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Before there was one.
    #[error("cannot {what}")]
    Prepare {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It could not do a step.
    #[error("the process could not {step}")]
    Step {
        /// The step, as "could not …" continues.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// It ended or fell silent before it ran its program.
    #[error("the process ended before it ran its program")]
    Silent(#[source] io::Error),
}

fn preparing<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> StartError {
    move |source| StartError::Prepare { what, source: source.into() }
}

/// Starts `command`, behind `walls` if they are given, and returns when its program runs.
pub fn start(command: &Command, walls: Option<&Walls<'_>>) -> Result<Process, StartError> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(preparing("make a socket pair"))?;
    for end in [&ours, &theirs] {
        message::set_deadline(end.as_fd(), DEADLINE).map_err(preparing("set a deadline"))?;
    }
    let jail = walls.map(jail).transpose()?;
    let strings = arguments(command);
    let plan = plan(command, jail, &strings, theirs.as_fd())?;
    // The plan has a copy of its own: when that is closed, nobody here keeps the pair open.
    drop(theirs);
    let mut flags = libc::CLONE_PIDFD.unsigned_abs();
    if let Some(walls) = walls {
        flags |= (libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS).unsigned_abs();
        if matches!(walls.network, Network::Empty) {
            flags |= libc::CLONE_NEWNET.unsigned_abs();
        }
    }
    let (pid, pidfd) = clone(u64::from(flags), walls.and_then(|walls| walls.cgroup), &plan)?;
    // The child has its copy: when it ends, ours is closed.
    drop(plan);
    let process = accompany(pid, pidfd, command, walls, &ours);
    process.map_err(|(pidfd, error)| {
        let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        error
    })
}

/// `--fd` for each descriptor behind the command's own arguments.
fn arguments(command: &Command) -> Vec<CString> {
    let own = std::iter::once(&command.program).chain(&command.arguments).cloned();
    let descriptors = command.descriptors.iter().zip(FIRST_DESCRIPTOR..);
    // A name with a NUL in it is no name that a program knows.
    let named =
        descriptors.map(|((name, _), number)| CString::new(format!("--fd={name}={number}")).unwrap_or_default());
    own.chain(named).collect()
}

fn out_of_the_way(descriptor: BorrowedFd<'_>) -> Result<OwnedFd, StartError> {
    rustix::io::fcntl_dupfd_cloexec(descriptor, OUT_OF_THE_WAY).map_err(preparing("duplicate a descriptor"))
}

fn plan(
    command: &Command,
    jail: Option<Jail>,
    strings: &[CString],
    parent: BorrowedFd<'_>,
) -> Result<Plan, StartError> {
    let null = File::open("/dev/null").map_err(preparing("open /dev/null"))?;
    let end = [std::ptr::null()];
    Ok(Plan {
        program: command.program.clone(),
        arguments: strings.iter().map(|text| text.as_ptr()).chain(end).collect(),
        environment: command.environment.iter().map(|text| text.as_ptr()).chain(end).collect(),
        null: out_of_the_way(null.as_fd())?,
        log: out_of_the_way(command.log.as_fd())?,
        descriptors: command
            .descriptors
            .iter()
            .map(|(_, descriptor)| out_of_the_way(descriptor.as_fd()))
            .collect::<Result<_, _>>()?,
        parent: out_of_the_way(parent)?,
        jail,
    })
}

fn jail(walls: &Walls<'_>) -> Result<Jail, StartError> {
    let network = match walls.network {
        Network::Joined(network) => Some(out_of_the_way(network)?),
        Network::Empty | Network::Host => None,
    };
    let filter = forbidden::filter().map_err(|error| StartError::Prepare {
        what: "compile the filter of system calls",
        source: io::Error::other(error),
    })?;
    Ok(Jail {
        root: walls.tree.root().to_owned(),
        proc: walls.tree.proc().map(ToOwned::to_owned),
        network,
        threads: walls.limits.threads,
        descriptors: walls.limits.descriptors,
        filter,
    })
}

/// `clone3` without sharing anything: the child runs [`child::run`].
fn clone(flags: u64, cgroup: Option<BorrowedFd<'_>>, plan: &Plan) -> Result<(i32, OwnedFd), StartError> {
    let mut pidfd = -1_i32;
    let mut arguments: libc::clone_args = child::zeroed();
    arguments.flags = flags;
    arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    arguments.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: like fork: nothing is shared with the child, which only makes system calls on what was prepared (see `child`).
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    match pid {
        0 => child::run(plan),
        ..0 => Err(preparing("create a process in namespaces of its own")(io::Error::last_os_error())),
        pid => {
            // SAFETY: the kernel has made it for us (CLONE_PIDFD).
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid =
                i32::try_from(pid).map_err(|_| preparing("number a process")(io::Error::other("its id is large")))?;
            Ok((pid, pidfd))
        }
    }
}

fn accompany(
    pid: i32,
    pidfd: OwnedFd,
    command: &Command,
    walls: Option<&Walls<'_>>,
    child: &OwnedFd,
) -> Result<Process, (OwnedFd, StartError)> {
    let walk = || -> Result<ProcessNote, StartError> {
        let started_ticks = start_ticks(pid).map_err(preparing("see when a process was started"))?;
        let file = file_of(&command.note).map_err(preparing("look at the file for which process it is"))?;
        let note = ProcessNote { pid, started_ticks, file: Some(file), end: None };
        let json = serde_json::to_vec(&note).map_err(preparing("write down which process it is"))?;
        command.note.write_all_at(&json, 0).map_err(preparing("write down which process it is"))?;
        let uid = walls.map_or(0, |walls| walls.users.of(pid));
        tell(child, &uid.to_le_bytes())?;
        loop {
            let mut said = [0; 6];
            let heard = rustix::io::retry_on_intr(|| rustix::net::recv(child, &mut said, RecvFlags::empty()));
            let (len, _) = heard.map_err(|error| StartError::Silent(error.into()))?;
            match said {
                // Closed by the program's start. An end that came before any word shows in the pidfd.
                _ if len == 0 => return Ok(note),
                [word::MAP, ..] if len == 1 => {
                    map_ids(pid, uid).map_err(preparing("map its user"))?;
                    tell(child, &[0])?;
                }
                [word::FAILED, step, number @ ..] if len == said.len() => {
                    let step = Step::of(step).map_or("do what it was to", |(_, text)| text);
                    return Err(StartError::Step {
                        step,
                        source: io::Error::from_raw_os_error(i32::from_le_bytes(number)),
                    });
                }
                _ => return Err(StartError::Silent(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    };
    match walk() {
        Ok(note) => Ok(Process { note, pidfd }),
        Err(error) => Err((pidfd, error)),
    }
}

fn tell(child: &OwnedFd, word: &[u8]) -> Result<(), StartError> {
    rustix::net::send(child, word, SendFlags::NOSIGNAL).map_err(|error| StartError::Silent(error.into())).map(drop)
}

/// The one user and the one group of a process that waits in its new user namespace, under the same numbers inside and outside.
fn map_ids(pid: i32, uid: u32) -> io::Result<()> {
    let map = format!("{uid} {uid} 1");
    std::fs::write(format!("/proc/{pid}/uid_map"), &map)?;
    std::fs::write(format!("/proc/{pid}/gid_map"), &map)
}

/// Device and inode: which file it is, whatever its name.
pub fn file_of(file: &File) -> io::Result<(u64, u64)> {
    let found = rustix::fs::fstat(file)?;
    Ok((found.st_dev, found.st_ino))
}

/// When the process was started, in clock ticks since the boot.
pub fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; field 3 follows the last parenthesis, the start time is field 22.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// A descriptor of the process that a note is about; none when that process is gone.
pub fn find(note: &ProcessNote) -> Option<OwnedFd> {
    let pidfd = rustix::process::pidfd_open(Pid::from_raw(note.pid)?, rustix::process::PidfdFlags::NONBLOCK).ok()?;
    // Compared after the pidfd was opened: from here on the id cannot be given to another process.
    (start_ticks(note.pid).ok()? == note.started_ticks).then_some(pidfd)
}
