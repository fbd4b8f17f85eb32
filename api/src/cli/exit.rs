//! Exit codes: a documented interface.

/// How the program ends. `stasis exec` without `--json` ends with the command's own exit status instead, when the command ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Done.
    Ok = 0,
    /// Anything that has no code of its own.
    Other = 1,
    /// The command line, the configuration or the request is wrong.
    Usage = 2,
    /// There is no such sandbox.
    NotFound = 3,
    /// The state of the sandbox forbids it now.
    WrongState = 4,
    /// The server or its store cannot be reached or is not able to; try again.
    Unavailable = 5,
    /// It is not known whether it was done. Ask for the state before trying again.
    OutcomeUnknown = 6,
    /// Something in the bucket is damaged or missing.
    Damaged = 7,
    /// Interrupted.
    Interrupted = 130,
}

/// For the help.
pub(super) const HELP: &str = "Exit codes:
  0    done
  1    anything that has no code of its own
  2    the command line, the configuration or the request is wrong
  3    there is no such sandbox
  4    the state of the sandbox forbids it now
  5    the server or its store is unavailable; try again
  6    it is not known whether it was done; ask for the state before trying again
  7    something in the bucket is damaged or missing
  130  interrupted
`stasis exec` without --json, and with -t, ends with the command's own exit status when the command ran.";

impl ExitStatus {
    /// What an HTTP status means here; `code` is the `stasis-error` header.
    pub(super) fn of(status: u16, code: &str) -> Self {
        if code == crate::error::OUTCOME_UNKNOWN {
            return Self::OutcomeUnknown;
        }
        match status {
            200..=299 => Self::Ok,
            400 | 413 => Self::Usage,
            404 => Self::NotFound,
            409 => Self::WrongState,
            429 | 502..=504 | 507 => Self::Unavailable,
            _ => Self::Other,
        }
    }
}

impl From<ExitStatus> for std::process::ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_outcome_is_told_from_a_late_answer() {
        assert_eq!(ExitStatus::of(504, "outcome-unknown"), ExitStatus::OutcomeUnknown);
        assert_eq!(ExitStatus::of(504, "deadline"), ExitStatus::Unavailable);
        assert_eq!(ExitStatus::of(409, "wrong-state"), ExitStatus::WrongState);
        assert_eq!(ExitStatus::of(404, "not-found"), ExitStatus::NotFound);
        assert_eq!(ExitStatus::of(500, "internal"), ExitStatus::Other);
    }

    #[test]
    fn the_help_names_every_code() {
        use ExitStatus::{Damaged, Interrupted, NotFound, Ok, Other, OutcomeUnknown, Unavailable, Usage, WrongState};
        for status in [Ok, Other, Usage, NotFound, WrongState, Unavailable, OutcomeUnknown, Damaged, Interrupted] {
            assert!(HELP.lines().any(|l| l.trim().starts_with(&format!("{} ", status as u8))), "{status:?}");
        }
    }
}
