//! What the process gives up before it reads a stranger's first byte. It has opened its control socket by then and gets every other descriptor
//! over it, so that it needs no file, no new program and no privilege: what is left is sockets, memory and time.
//!
//! | given up | by |
//! | --- | --- |
//! | privileges, now and by programs | capabilities cleared, `no_new_privs` |
//! | being looked into, dumps of secrets | `PR_SET_DUMPABLE`, core size 0 |
//! | the file system | landlock without a rule, where the kernel has it; no call that opens a path is on the list below |
//! | every other system call | seccomp, which kills the process, for every thread |
//!
//! The list is what tokio, the allocator and the Rust runtime call on Linux with glibc, once their threads are there: no more are made. A call
//! that is missing shows as a death by SIGSYS.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter_all_threads,
};

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

/// Gives up privileges and the file system, before threads are started: they inherit it. Answers by what the process is confined, for people.
pub fn limit() -> Result<Vec<String>, ConfineError> {
    set_no_new_privs(true).map_err(system("give up new privileges"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(system("give up being dumped"))?;
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    setrlimit(Resource::Core, none).map_err(system("give up core dumps"))?;
    // A sandbox has two descriptors for each connection.
    let open = getrlimit(Resource::Nofile);
    let all = Rlimit { current: open.maximum, maximum: open.maximum };
    setrlimit(Resource::Nofile, all).map_err(system("take all descriptors"))?;
    let nothing = CapabilitySet::empty();
    let sets = CapabilitySets { effective: nothing, permitted: nothing, inheritable: nothing };
    set_capabilities(None, sets).map_err(system("give up capabilities"))?;
    let mut by = vec!["no_new_privs".to_owned(), "capabilities".to_owned()];
    if without_files()? {
        by.push("landlock".to_owned());
    }
    Ok(by)
}

/// Takes every other system call from all threads that there are, for good. None can be started afterwards.
pub fn filter_calls() -> Result<(), ConfineError> {
    Ok(apply_filter_all_threads(&filter()?)?)
}

/// No path can be opened any more by this thread and those that it starts; false when the kernel has no landlock.
fn without_files() -> Result<bool, ConfineError> {
    use landlock::{ABI, Access as _, AccessFs, Ruleset, RulesetAttr as _, RulesetStatus};
    let ruleset = Ruleset::default().handle_access(AccessFs::from_all(ABI::V5))?.create()?;
    Ok(ruleset.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

/// Calls that are allowed whatever their arguments.
const ALLOWED: &[libc::c_long] = &[
    // Sockets.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_close,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
    // Waiting.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // The process itself, its threads and signals.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_geteuid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
];

fn filter() -> Result<BpfProgram, ConfineError> {
    let argument = |index, op, value| SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value);
    let rule = |conditions: Vec<SeccompCondition>| SeccompRule::new(conditions);
    // Flags stand in the same argument.
    let socket = |domain: libc::c_int, kind: libc::c_int| -> Result<SeccompRule, seccompiler::BackendError> {
        let domain = argument(0, SeccompCmpOp::Eq, domain.unsigned_abs().into())?;
        rule(vec![domain, argument(1, SeccompCmpOp::MaskedEq(0xf), kind.unsigned_abs().into())?])
    };
    let flag = |index, command: libc::c_int| -> Result<SeccompRule, seccompiler::BackendError> {
        rule(vec![argument(index, SeccompCmpOp::Eq, command.unsigned_abs().into())?])
    };
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // IPv4 and IPv6 (name servers), TCP and UDP: no netlink, no raw and no unix sockets.
    let mut sockets = Vec::new();
    for domain in [libc::AF_INET, libc::AF_INET6] {
        sockets.extend([socket(domain, libc::SOCK_STREAM)?, socket(domain, libc::SOCK_DGRAM)?]);
    }
    rules.insert(libc::SYS_socket, sockets);
    rules.insert(
        libc::SYS_fcntl,
        vec![flag(1, libc::F_GETFL)?, flag(1, libc::F_SETFL)?, flag(1, libc::F_GETFD)?, flag(1, libc::F_SETFD)?],
    );
    // Non-blocking mode of sockets, which the standard library sets this way.
    rules.insert(libc::SYS_ioctl, vec![rule(vec![argument(1, SeccompCmpOp::Eq, libc::FIONBIO)?])?]);
    // Names of threads.
    rules.insert(libc::SYS_prctl, vec![flag(0, libc::PR_SET_NAME)?, flag(0, libc::PR_SET_VMA)?]);
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
    Ok(filter.try_into()?)
}
