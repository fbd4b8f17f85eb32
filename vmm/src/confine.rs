//! The walls that a VMM puts up around itself, whether or not it was started in a jail: they take no privileges. Before there are other
//! threads, which inherit them.

use std::fs::File;
use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use crate::seccomp::{self, SeccompError};

/// A wall cannot be put up.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// One of the kernel's settings of a process.
    #[error("cannot {what}")]
    Process {
        /// Which.
        what: &'static str,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// Landlock.
    #[error("cannot give up files and networks (landlock)")]
    Landlock(#[from] landlock::RulesetError),
    /// Filters of system calls.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// Confines the process, which has one thread yet and has opened all that it opens. Violations are noted in `exit_note`.
pub fn process(exit_note: &File) -> Result<(), ConfineError> {
    let failed = |what| move |error: rustix::io::Errno| ConfineError::Process { what, source: error.into() };
    rustix::thread::set_no_new_privs(true).map_err(failed("give up new privileges"))?;
    // A dump would hold the guest's secrets, and one who may be dumped may be traced by its own user.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(failed("forbid core dumps"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("forbid traces"))?;
    // The first look at a clock finds out what the kernel told the process at its start, on an old one by opening a file.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    no_paths()?;
    Ok(seccomp::prepare(exit_note)?)
}

/// No file may be opened, no port bound or connected to, no process outside signalled, as far as this kernel can forbid it.
fn no_paths() -> Result<(), landlock::RulesetError> {
    let confined = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    if confined.ruleset == RulesetStatus::NotEnforced {
        tracing::info!("this kernel has no landlock");
    }
    Ok(())
}
