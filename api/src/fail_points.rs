//! Fail points: the steps at which a test has the supervisor kill itself, to see what its next start makes of what is left.
//!
//! Off, and then no more than one load each, unless `STASIS_FAIL_POINTS` names a directory when `stasis serve` starts. Then each step that is
//! reached is noted in the directory's file `reached`, one name a line. The file `kill` may hold `<name> <n>`: who reaches that step for the n-th
//! time since the file said so ends itself with SIGKILL, so that nothing is flushed and nothing is undone.
//!
//! [`Point::ALL`] is the list of the steps. Tests go through it, so a new point needs no new test, but some operation of theirs must reach it.

use rustix::process::{Signal, getpid, kill_process};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};

/// The variable that switches them on.
pub const VARIABLE: &str = "STASIS_FAIL_POINTS";
/// Names of the steps that were reached, in the directory.
pub const REACHED: &str = "reached";
/// Name and number of the step that is the last one, in the directory.
pub const KILL: &str = "kill";

macro_rules! points {
    ($($id:ident $name:literal $what:literal)*) => {
        /// A step.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Point {
            $(#[doc = $what] $id),*
        }

        impl Point {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$id),*];

            /// Its name in the files.
            pub fn name(self) -> &'static str {
                match self { $(Self::$id => $name),* }
            }
        }
    };
}

points! {
    Begin "begin" "The journal is about to take the begin of an operation."
    Begun "begun" "It has taken it."
    Propose "propose" "The journal is about to take head proposals."
    Proposed "proposed" "It has taken them."
    Withdraw "withdraw" "The journal is about to note that none of the proposals can land any more."
    Withdrawn "withdrawn" "It has noted that."
    Move "move" "The journal is about to take a move of a state machine."
    Moved "moved" "It has taken it."
    Amend "amend" "The journal is about to take a record that did not move."
    Amended "amended" "It has taken it."
    End "end" "The journal is about to take the end of an operation."
    Ended "ended" "It has taken it."
    VmmStarted "vmm-started" "A VMM has its run directory, and no record names it yet."
    GuestReady "guest-ready" "A booted guest is ready for requests."
    Restored "restored" "A VM holds what its manifest says, and stands still."
    GuestRuns "guest-runs" "Its vCPUs run, for the first time or again."
    GuestTold "guest-told" "A woken guest knows that it is awake."
    GuestParked "guest-parked" "Its vCPUs stand still."
    PacksSent "packs-sent" "A capture is in the store."
    ManifestStored "manifest-stored" "Its manifest is in the store, and no head names it."
    HeadSends "head-sends" "A head is about to be sent."
    HeadSettled "head-settled" "It is known what became of it."
    VmmLetGo "vmm-let-go" "A VMM was killed whose commit has won."
    VmmEnded "vmm-ended" "A VMM has ended, and its record still names it."
    Swept "swept" "A restarted supervisor knows what to do with every sandbox."
}

#[derive(Debug)]
struct FailPoints {
    dir: PathBuf,
    /// What the file `kill` said last, and how often its step was reached since.
    counted: Mutex<(String, u32)>,
}

static ON: OnceLock<FailPoints> = OnceLock::new();

/// Switches them on with the files of `dir`.
pub fn switch_on(dir: PathBuf) {
    // A second start in one process keeps the first one's directory.
    let _ = ON.set(FailPoints { dir, counted: Mutex::default() });
}

/// This process is at `point`; does not return if that is its last one.
pub fn reach(point: Point) {
    let Some(on) = ON.get() else { return };
    // Held over the file accesses: the order of the lines is the order of the steps.
    let mut counted = on.counted.lock().unwrap_or_else(PoisonError::into_inner);
    let noted = File::options().create(true).append(true).open(on.dir.join(REACHED));
    if let Err(error) = noted.and_then(|mut file| writeln!(file, "{}", point.name())) {
        tracing::error!(%error, "a fail point cannot be noted");
    }
    let wanted = fs::read_to_string(on.dir.join(KILL)).unwrap_or_default();
    if counted.0 != wanted {
        *counted = (wanted, 0);
    }
    let (name, number) = counted.0.trim().split_once(' ').unwrap_or_default();
    if name == point.name() {
        let is_last = number.parse() == Ok(counted.1 + 1);
        counted.1 += 1;
        if is_last {
            let _ = kill_process(getpid(), Signal::KILL);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_one_word_each_and_differ() {
        let names: BTreeSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        assert!(names.iter().all(|name| !name.contains(char::is_whitespace)));
    }

    #[test]
    fn nothing_happens_while_they_are_off() {
        Point::ALL.iter().copied().for_each(reach);
    }
}
