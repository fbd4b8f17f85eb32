//! Filters of system calls: what each kind of thread may ask of the kernel ([`Role`], `table`), and what happens when one asks for more.
//!
//! A thread enters its role as the first thing it does, before the guest runs. A filter is inherited, so threads that a worker starts have
//! the worker's filter as well; that one is the widest. It is a wall against a thread that a guest has taken over through a device or a
//! vCPU exit: those roles are narrow, and none of them may open, connect, start or map anything executable.
//!
//! A call that is not in the table is not made: the process leaves its exit note, which names the call and the role, and ends. The handler
//! that does so cannot be replaced, since changing it is such a call.

mod table;
mod violation;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::OnceLock;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a vCPU and handles its exits.
    Vcpu,
    /// Runs the devices.
    Devices,
    /// Serves faults of absent guest memory.
    Faults,
    /// Receives opened files.
    Receiver,
    /// Serves control requests: boot, restore, capture, and their blocking work.
    Worker,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Vcpu, Self::Devices, Self::Faults, Self::Receiver, Self::Worker];

    /// Its name in exit notes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Devices => "devices",
            Self::Faults => "faults",
            Self::Receiver => "receiver",
            Self::Worker => "worker",
        }
    }
}

/// Filters cannot be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// A table makes no filter: a bug.
    #[error("cannot compile the filter of {role}")]
    Compile {
        /// Of which role.
        role: &'static str,
        /// Why.
        #[source]
        source: seccompiler::BackendError,
    },
    /// The kernel refused.
    #[error("cannot install a filter of system calls")]
    Install(#[source] seccompiler::Error),
    /// The handler of violations cannot be installed.
    #[error("cannot prepare for a violation")]
    Handler(#[source] std::io::Error),
}

static FILTERS: OnceLock<Vec<BpfProgram>> = OnceLock::new();

thread_local! {
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// Makes all filters and installs what concerns every thread. Called once, while the process has one thread; without it [`enter`] does
/// nothing. The exit note of a violation goes into `exit_note`.
pub fn prepare(exit_note: &File) -> Result<(), SeccompError> {
    violation::install(exit_note).map_err(SeccompError::Handler)?;
    let filters = Role::ALL.into_iter().map(compile).collect::<Result<Vec<_>, _>>()?;
    seccompiler::apply_filter(&answered()?).map_err(SeccompError::Install)?;
    // A second call would find the first one's filters, which are the same.
    let _ = FILTERS.set(filters);
    Ok(())
}

/// Confines the calling thread to its role, from here to its end. A thread that cannot be confined ends the process.
pub fn enter(role: Role) {
    let Some(filter) = FILTERS.get().and_then(|filters| filters.get(role as usize)) else { return };
    ROLE.set(Some(role));
    if let Err(error) = seccompiler::apply_filter(filter) {
        tracing::error!(%error, role = role.name(), "a thread cannot be confined");
        std::process::abort();
    }
}

/// The table of a role as a filter. A worker's has those of all others in it, since their threads inherit it. So has that of a thread
/// that serves faults: it decodes what it can by itself and starts blocking threads of the runtime for the rest, which inherit it, too. It
/// never looks at anything of the guest's but the address of a fault.
fn compile(role: Role) -> Result<BpfProgram, SeccompError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let roles: &[Role] = match role {
        Role::Worker | Role::Faults => &Role::ALL,
        Role::Vcpu | Role::Devices | Role::Receiver => &[role],
    };
    let failed = |source| SeccompError::Compile { role: role.name(), source };
    for entry in table::EVERY.iter().chain(roles.iter().flat_map(|role| table::of(*role))) {
        let conditions = conditions(entry.only).map_err(failed)?;
        match rules.entry(entry.call) {
            std::collections::btree_map::Entry::Vacant(vacant) => drop(vacant.insert(conditions)),
            // A call without conditions in one table is without in all.
            std::collections::btree_map::Entry::Occupied(mut there) => {
                if conditions.is_empty() {
                    there.get_mut().clear();
                } else if !there.get().is_empty() {
                    there.get_mut().extend(conditions);
                }
            }
        }
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(failed)
}

/// Any of these makes the call one of the table; without any it always is.
fn conditions(only: table::Only) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let rule = |argument, op, value| {
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)?])
    };
    match only {
        table::Only::Always => Ok(Vec::new()),
        table::Only::Is { argument, values } => values.iter().map(|(value, _)| rule(argument, Eq, *value)).collect(),
        table::Only::Bits { argument, mask, value } => Ok(vec![rule(argument, MaskedEq(mask), value)?]),
        // Type and number: the size of the argument is the kernel's matter.
        table::Only::Ioctls(numbers) => numbers.iter().map(|(number, _)| rule(1, MaskedEq(0xffff), *number)).collect(),
    }
}

/// Calls that nobody needs but that libraries make, and do without: `clone3`, whose arguments lie in memory, where no filter looks, and
/// `openat`, by which the standard library looks for limits of the number of processors. They are answered that the kernel has no such
/// call. A role that may make them gets this answer; in any other role they are a violation.
fn answered() -> Result<BpfProgram, SeccompError> {
    let rules = [(libc::SYS_clone3, Vec::new()), (libc::SYS_openat, Vec::new())].into_iter().collect();
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, missing, TargetArch::x86_64)
        .and_then(TryInto::try_into)
        .map_err(|source| SeccompError::Compile { role: "all", source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_has_a_filter_that_fits_the_kernel() {
        for role in Role::ALL {
            let filter = compile(role).unwrap();
            assert!(filter.len() > 20 && filter.len() < 4096, "{role:?}: {}", filter.len());
        }
        assert!(!answered().unwrap().is_empty());
    }

    #[test]
    fn no_guest_facing_role_may_open_connect_or_start_anything() {
        let forbidden = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_clone,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_memfd_create,
        ];
        for role in [Role::Vcpu, Role::Devices, Role::Receiver] {
            let has = |call: &i64| table::EVERY.iter().chain(table::of(role)).any(|entry| entry.call == *call);
            assert!(!forbidden.iter().any(has), "{role:?}");
        }
        for call in [libc::SYS_execve, libc::SYS_execveat, libc::SYS_socket, libc::SYS_connect, libc::SYS_ptrace] {
            assert!(!table::of(Role::Worker).iter().any(|entry| entry.call == call));
        }
    }

    #[test]
    fn every_entry_has_a_reason_and_each_table_names_a_call_once() {
        for table in Role::ALL.into_iter().map(table::of).chain([table::EVERY]) {
            let mut calls: Vec<_> = table.iter().map(|entry| entry.call).collect();
            calls.sort_unstable();
            assert!(calls.windows(2).all(|pair| pair[0] != pair[1]), "{calls:?}");
            assert!(table.iter().all(|entry| !entry.reason.is_empty()));
        }
    }
}
