//! What the process gives up before it reads the first byte, with or without a jail around it: none of it takes privileges. It has its three
//! descriptors by then, so that what is left is reading, writing, memory and time.
//!
//! | given up | by |
//! | --- | --- |
//! | privileges, now and by programs | capabilities cleared, `no_new_privs` |
//! | being looked into | `PR_SET_DUMPABLE`, core size 0 |
//! | the file system, ports, signals | landlock without a rule, where the kernel has it |
//! | new descriptors, threads and processes, more memory or time than an image takes, a longer disk | resource limits |
//! | every other system call | seccomp, which kills the process |
//!
//! The list is what the allocator, the Rust runtime, zlib and zstd call for one thread that reads and writes. A call that is missing shows as a
//! death by SIGSYS.

use std::collections::BTreeMap;
use std::io;

use landlock::{ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, Scope};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getpid, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

/// Octets of memory at most. A tree has 256 MiB of names at most (`tree`), zstd holds 128 MiB; the rest is for half a million inodes, several
/// times over.
const MEMORY: u64 = 2 << 30;
/// Seconds of processor time at most. What a disk of 10 GiB is made from takes one or two minutes.
const PROCESSOR_S: u64 = 20 * 60;

/// The process cannot be confined, so it must not run.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A system call.
    #[error("cannot {doing}")]
    System {
        /// What.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// landlock is there, and does not work.
    #[error("cannot give up the file system")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter.
    #[error("cannot filter system calls")]
    Seccomp(#[from] seccompiler::Error),
    /// The filter's program.
    #[error("cannot make a filter of system calls")]
    Filter(#[from] seccompiler::BackendError),
}

fn system(doing: &'static str) -> impl FnOnce(rustix::io::Errno) -> ConfineError {
    move |errno| ConfineError::System { doing, source: errno.into() }
}

/// Gives up everything but system calls. No file will become longer than so many octets.
pub fn limit(length: u64) -> Result<(), ConfineError> {
    set_no_new_privs(true).map_err(system("give up new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(system("give up being dumped"))?;
    let nothing = CapabilitySet::empty();
    let sets = CapabilitySets { effective: nothing, permitted: nothing, inheritable: nothing };
    set_capabilities(None, sets).map_err(system("give up capabilities"))?;
    Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    for (resource, most) in [
        (Resource::As, MEMORY),
        (Resource::Cpu, PROCESSOR_S),
        (Resource::Fsize, length),
        (Resource::Core, 0),
        // Those that it has stay open.
        (Resource::Nofile, 0),
        (Resource::Nproc, 0),
    ] {
        let both = Rlimit { current: Some(most), maximum: Some(most) };
        setrlimit(resource, both).map_err(system("limit its resources"))?;
    }
    Ok(())
}

/// Takes every other system call from the process, which has one thread, for good.
pub fn filter_calls() -> Result<(), ConfineError> {
    Ok(apply_filter(&filter()?)?)
}

/// Calls that are allowed whatever their arguments.
const ALLOWED: &[libc::c_long] = &[
    // Requests and replies, layers, the disk.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_close,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // The process itself: locks, keys of hash tables, the end of it, a panic's too.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

fn filter() -> Result<BpfProgram, ConfineError> {
    let only = |argument, op, value: i32| -> Result<SeccompRule, seccompiler::BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            op,
            value.unsigned_abs().into(),
        )?])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Memory that is executable is never made.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let bit = SeccompCmpOp::MaskedEq(libc::PROT_EXEC.unsigned_abs().into());
        rules.insert(call, vec![only(2, bit, 0)?]);
    }
    // What the standard library asks of a descriptor before it closes it, in builds with assertions.
    rules.insert(libc::SYS_fcntl, vec![only(1, SeccompCmpOp::Eq, libc::F_GETFD)?]);
    // What upper layers take away.
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    rules.insert(libc::SYS_fallocate, vec![only(1, SeccompCmpOp::Eq, hole)?]);
    // An abort: a signal to itself and to nobody else.
    rules.insert(libc::SYS_tgkill, vec![only(0, SeccompCmpOp::Eq, getpid().as_raw_nonzero().get())?]);
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
    Ok(filter.try_into()?)
}
