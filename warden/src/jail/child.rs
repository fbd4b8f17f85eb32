//! What a new process does to itself before it runs its program.
//!
//! It is a copy of a process that may have had other threads, so until its program runs it allocates nothing, takes no lock and calls
//! only what is a system call and no more. Everything that it needs is made beforehand ([`Plan`]).

use std::ffi::{CStr, CString, c_char};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount};
use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};
use seccompiler::BpfProgram;

use super::FIRST_DESCRIPTOR;

/// The steps, in their order. What went wrong is told by its step and the kernel's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Session,
    Descriptors,
    Cgroup,
    Network,
    Mounts,
    Proc,
    Root,
    Limits,
    User,
    Identity,
    Capabilities,
    Filter,
    Program,
}

impl Step {
    const ALL: [(Self, &'static str); 13] = [
        (Self::Session, "begin a session of its own"),
        (Self::Descriptors, "put its descriptors in order"),
        (Self::Cgroup, "enter a control group namespace"),
        (Self::Network, "enter its network namespace"),
        (Self::Mounts, "separate its mounts"),
        (Self::Proc, "mount its /proc"),
        (Self::Root, "enter its tree"),
        (Self::Limits, "limit its resources"),
        (Self::User, "enter a user namespace"),
        (Self::Identity, "become its user"),
        (Self::Capabilities, "drop its capabilities"),
        (Self::Filter, "install the filter of system calls"),
        (Self::Program, "run its program"),
    ];

    /// The one with this number.
    pub(super) fn of(number: u8) -> Option<(Self, &'static str)> {
        Self::ALL.iter().copied().find(|(step, _)| *step as u8 == number)
    }
}

/// Words between the new process (first) and its parent.
pub(super) mod word {
    /// The child is in its user namespace and waits for its ids.
    pub(crate) const MAP: u8 = 1;
    /// A step failed: two more fields follow, the step and the error number, little-endian.
    pub(crate) const FAILED: u8 = 2;
}

/// Everything that the child needs.
pub(super) struct Plan {
    pub(super) program: CString,
    /// Pointers into strings that the maker of the plan keeps, closed by a null.
    pub(super) arguments: Vec<*const c_char>,
    pub(super) environment: Vec<*const c_char>,
    pub(super) null: OwnedFd,
    pub(super) log: OwnedFd,
    /// Each above every number that one of them is to get.
    pub(super) descriptors: Vec<OwnedFd>,
    /// To the parent.
    pub(super) parent: OwnedFd,
    pub(super) jail: Option<Jail>,
}

/// What is done to a jailed one.
pub(super) struct Jail {
    pub(super) root: CString,
    /// Where `/proc` goes, in names of the parent's root.
    pub(super) proc: Option<CString>,
    pub(super) network: Option<OwnedFd>,
    pub(super) threads: u64,
    pub(super) descriptors: u64,
    pub(super) filter: BpfProgram,
}

type Failure = (Step, Errno);

fn at(step: Step) -> impl FnOnce(Errno) -> Failure {
    move |error| (step, error)
}

/// Never returns: becomes the program, or says why not and ends.
pub(super) fn run(plan: &Plan) -> ! {
    let (step, error) = match become_program(plan) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    let number = error.raw_os_error().to_le_bytes();
    let said = [word::FAILED, step as u8, number[0], number[1], number[2], number[3]];
    let _ = rustix::net::send(&plan.parent, &said, rustix::net::SendFlags::NOSIGNAL);
    // SAFETY: ends the process; no destructor of the copied process may run here.
    unsafe { libc::_exit(127) }
}

fn become_program(plan: &Plan) -> Result<std::convert::Infallible, Failure> {
    rustix::process::setsid().map_err(at(Step::Session))?;
    // The parent has written down which process this is.
    let mut uid = [0; 4];
    hear(&plan.parent, &mut uid).map_err(at(Step::Session))?;
    let uid = u32::from_le_bytes(uid);
    place_descriptors(plan).map_err(at(Step::Descriptors))?;
    if let Some(jail) = &plan.jail {
        enter(jail, plan, uid)?;
    }
    // SAFETY: both arrays end with a null and point to strings that live in this copy of the parent's memory.
    unsafe { libc::execve(plan.program.as_ptr(), plan.arguments.as_ptr(), plan.environment.as_ptr()) };
    Err((Step::Program, last_error()))
}

fn last_error() -> Errno {
    // SAFETY: the calling thread's own error number.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// A whole message of the parent; none comes any more when it is gone.
fn hear(parent: &OwnedFd, into: &mut [u8]) -> Result<(), Errno> {
    let expected = into.len();
    let (got, _) =
        rustix::io::retry_on_intr(|| rustix::net::recv(parent, &mut *into, rustix::net::RecvFlags::empty()))?;
    if got == expected { Ok(()) } else { Err(Errno::PIPE) }
}

fn place(from: BorrowedFd<'_>, number: i32) -> Result<(), Errno> {
    // SAFETY: two numbers; what `number` was before is no longer used by this process.
    if unsafe { libc::dup2(from.as_raw_fd(), number) } < 0 { Err(last_error()) } else { Ok(()) }
}

fn place_descriptors(plan: &Plan) -> Result<(), Errno> {
    place(plan.null.as_fd(), 0)?;
    place(plan.log.as_fd(), 1)?;
    place(plan.log.as_fd(), 2)?;
    let mut number = FIRST_DESCRIPTOR;
    for descriptor in &plan.descriptors {
        place(descriptor.as_fd(), number)?;
        number += 1;
    }
    // Everything else goes when the program runs.
    // SAFETY: sets a flag of descriptors.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, number.unsigned_abs(), u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done < 0 { Err(last_error()) } else { Ok(()) }
}

/// All walls. Namespaces other than the user's come first and are owned by the host's user namespace: capabilities in the process's own
/// reach none of them.
fn enter(jail: &Jail, plan: &Plan, uid: u32) -> Result<(), Failure> {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // From within the control group, which is the root of the namespace then.
    // SAFETY: these namespaces do not concern memory or descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWCGROUP) }.map_err(at(Step::Cgroup))?;
    if let Some(network) = &jail.network {
        rustix::thread::move_into_link_name_space(network.as_fd(), None).map_err(at(Step::Network))?;
    }
    let sysctls = open_directory(c"/proc/sys").ok();
    enter_tree(jail)?;
    // While that is a host's privilege: some are higher than what we have.
    limit(jail).map_err(at(Step::Limits))?;
    rustix::thread::set_thread_groups(&[]).map_err(at(Step::Identity))?;
    // SAFETY: as above.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }.map_err(at(Step::User))?;
    rustix::net::send(&plan.parent, &[word::MAP], rustix::net::SendFlags::NOSIGNAL).map_err(at(Step::User))?;
    hear(&plan.parent, &mut [0]).map_err(at(Step::User))?;
    let user = rustix::fs::Uid::from_raw(uid);
    let group = rustix::fs::Gid::from_raw(uid);
    rustix::thread::set_thread_res_gid(group, group, group).map_err(at(Step::Identity))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(at(Step::Identity))?;
    if let Some(sysctls) = sysctls {
        // No user namespaces below this one. A kernel without the setting has the filter.
        let _ = forbid_nesting(&sysctls);
    }
    drop_capabilities().map_err(at(Step::Capabilities))?;
    rustix::thread::set_no_new_privs(true).map_err(at(Step::Filter))?;
    seccompiler::apply_filter(&jail.filter).map_err(|_| (Step::Filter, last_error()))
}

fn open_directory(path: &CStr) -> Result<OwnedFd, Errno> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn forbid_nesting(sysctls: &OwnedFd) -> Result<(), Errno> {
    use rustix::fs::{Mode, OFlags};
    let setting =
        rustix::fs::openat(sysctls, c"user/max_user_namespaces", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&setting, b"0").map(drop)
}

fn enter_tree(jail: &Jail) -> Result<(), Failure> {
    // Nothing that is mounted here shows anywhere else.
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(at(Step::Mounts))?;
    if let Some(place) = &jail.proc {
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // Its own process namespace, of it only processes, and only those it may look into.
        let options = Some(c"subset=pid,hidepid=2");
        mount(c"proc", place.as_c_str(), c"proc", flags, options).map_err(at(Step::Proc))?;
    }
    rustix::process::chdir(jail.root.as_c_str()).map_err(at(Step::Root))?;
    // The old root comes to lie on the new one and is taken away.
    rustix::process::pivot_root(c".", c".").map_err(at(Step::Root))?;
    unmount(c".", UnmountFlags::DETACH).map_err(at(Step::Root))?;
    rustix::process::chdir(c"/").map_err(at(Step::Root))
}

fn limit(jail: &Jail) -> Result<(), Errno> {
    let set = |resource, most: u64| {
        // A host where root may not raise its limits gives what it has.
        let most = rustix::process::getrlimit(resource).maximum.map_or(most, |now| most.min(now));
        rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
    };
    set(Resource::Core, 0)?;
    set(Resource::Nofile, jail.descriptors)?;
    set(Resource::Nproc, jail.threads)?;
    set(Resource::Memlock, 64 << 10)?;
    set(Resource::Msgqueue, 0)?;
    set(Resource::Nice, 0)?;
    set(Resource::Rtprio, 0)?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    Ok(())
}

fn drop_capabilities() -> Result<(), Errno> {
    use CapabilitiesSecureBits as Bits;
    const ME: Option<Pid> = None;
    rustix::thread::clear_ambient_capability_set()?;
    for capability in 0..64 {
        // SAFETY: takes numbers. The first one that the kernel does not know ends the list.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } < 0 {
            break;
        }
    }
    rustix::thread::set_capabilities_secure_bits(
        Bits::NO_ROOT
            | Bits::NO_ROOT_LOCKED
            | Bits::NO_SETUID_FIXUP
            | Bits::NO_SETUID_FIXUP_LOCKED
            | Bits::KEEP_CAPS_LOCKED
            | Bits::NO_CAP_AMBIENT_RAISE
            | Bits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(ME, CapabilitySets { effective: none, permitted: none, inheritable: none })
}

/// A place on the stack for what the kernel writes.
pub(super) fn zeroed<T: Copy>() -> T {
    // SAFETY: only used for kernel structs of plain numbers, for which zeroes are a value.
    unsafe { MaybeUninit::<T>::zeroed().assume_init() }
}
