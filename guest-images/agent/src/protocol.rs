//! HTTP/1.1 with JSON over vsock. The agent listens on port [`AGENT_PORT`]; connections do not survive a pause.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/health` | – | [`Health`] |
//! | `POST /v1/exec` | [`ExecRequest`] | [`ExecReply`]; 400 [`AgentError`] when it could not be started |
//! | `POST /v1/wake` | [`WakeRequest`] | [`WakeReply`] |
//! | `POST /v1/clock` | [`ClockRequest`] | [`WakeReply`] |
//! | `POST /v1/image` | [`ImageRequest`] | [`ImageReply`] |
//! | `GET /v1/system` | – | [`System`] |
//! | `POST /v1/files/…` | see [`files`] | |
//! | `POST /v1/git` | [`git::GitRequest`] | [`ExecReply`] |
//! | `POST /v1/terminals/…` | see [`terminals`] | |
//! | `POST /v1/trust` | [`trust::TrustRequest`] | [`trust::TrustReply`] |
//!
//! Refusals: 400, 403, 404, 409, 413, 500 or 507 with an [`AgentError`].
//!
//! Fields may be added (both sides ignore what they do not know); a change of meaning is a new [`PROTOCOL`].
//!
//! On [`FORWARD_PORT`] the agent leads connections to TCP ports of the guest's loopback. The supervisor writes one line that names a port
//! ([`forward_line`]), the agent answers with one line ([`Forwarded`]); after `OK` the connection is the TCP connection, half-closes included.

pub mod files;
pub mod git;
pub mod terminals;
pub mod trust;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::num::NonZeroU16;

/// vsock port of the agent.
pub const AGENT_PORT: u32 = 1;
/// vsock port of the agent's forwarder.
pub const FORWARD_PORT: u32 = 2;
/// Longest line of the forwarder's protocol without its line feed, bytes.
pub const MAX_FORWARD_LINE: usize = 256;
/// Protocol version in [`Health`].
pub const PROTOCOL: u32 = 1;

/// Answer of `GET /v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// [`PROTOCOL`] of the agent.
    pub protocol: u32,
    /// Version of the agent.
    pub version: String,
    /// The guest kernel's boot id: the same after a wake, another after a reboot.
    pub boot_id: String,
}

/// Body of `POST /v1/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Run by `/bin/sh -c`.
    pub command: String,
    /// Working directory; the user's own when absent.
    pub cwd: Option<String>,
    /// User to run as: a name of the guest's `/etc/passwd` or a number; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Added to the agent's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The command's process group is killed after this long, ms.
    pub timeout_ms: u64,
    /// Bytes kept of each of stdout and stderr; the rest is read and dropped.
    pub output_limit: usize,
}

/// Answer of `POST /v1/exec`. It comes when the command's own process has ended, whatever it left running in the background.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecReply {
    /// Exit status; 128 + n when signal n ended it; 124 when it timed out.
    pub exit_code: i32,
    /// Base64.
    pub stdout: String,
    /// Base64.
    pub stderr: String,
    /// Bytes of stdout that were dropped.
    pub stdout_dropped: u64,
    /// Bytes of stderr that were dropped.
    pub stderr_dropped: u64,
    /// The time limit ended it.
    pub timed_out: bool,
}

/// Body of `POST /v1/wake`, sent after every restore before any other request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeRequest {
    /// The host's wall clock now, nanoseconds since the epoch.
    pub unix_time_ns: u64,
    /// Base64 of 32 fresh random bytes, mixed into the guest's pool before it is reseeded.
    pub entropy: String,
    /// Who the guest is from now on: sent once, to a clone of a template or of a named snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<Identity>,
}

/// What tells a guest from others that began as the same capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name: 1 to 63 letters, digits and `-`.
    pub hostname: String,
    /// machine-id(5): 32 lower-case hexadecimal digits, not all zero.
    pub machine_id: String,
}

/// Body of `POST /v1/clock`, sent after a wake whose request was under way for long.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockRequest {
    /// The host's wall clock now, nanoseconds since the epoch.
    pub unix_time_ns: u64,
}

/// Answer of `POST /v1/wake` and `POST /v1/clock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WakeReply {
    /// How far the wall clock was stepped, ns.
    pub stepped_ns: i64,
}

/// Body of `POST /v1/image`, sent after a boot of a container image, or after a restore of what was captured before it was sent. Sent again,
/// it changes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    /// Environment of every command.
    pub env: BTreeMap<String, String>,
    /// Who commands run as: `user` or `user:group`, names or numbers; root when absent.
    pub user: Option<String>,
    /// Where they start; absolute.
    pub workdir: String,
    /// The program to start and its arguments; empty when there is none.
    pub command: Vec<String>,
    /// Its environment, over `env`.
    pub command_env: BTreeMap<String, String>,
}

/// Answer of `POST /v1/image`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReply {
    /// The program was started.
    pub started: bool,
    /// Why it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Answer of `GET /v1/system`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct System {
    /// Home directory of the user that commands run as.
    pub home: String,
    /// Where commands start, and what relative paths are relative to.
    pub workdir: String,
}

/// Body of a refusal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentError {
    /// What happened, to what, and why. With a `field`: the end of a sentence that starts with it.
    pub message: String,
    /// With status 400: the field of the request that is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// The line that asks the forwarder for a TCP port of the guest, with its line feed.
pub fn forward_line(port: NonZeroU16) -> String {
    format!("TCP {port}\n")
}

/// The port that a line (without its line feed) asks for.
pub fn parse_forward_line(line: &[u8]) -> Option<NonZeroU16> {
    let port = line.strip_prefix(b"TCP ")?;
    // `parse` alone would take a sign.
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(port).ok()?.parse().ok()
}

/// What the forwarder answers, in one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// From here on bytes go to and from the port.
    Connected,
    /// Nobody listens on the port.
    Refused,
    /// Something else went wrong.
    Failed(String),
}

impl Forwarded {
    /// The line, with its line feed.
    pub fn line(&self) -> String {
        match self {
            Self::Connected => "OK\n".to_owned(),
            Self::Refused => "REFUSED\n".to_owned(),
            Self::Failed(why) => {
                let mut line: String =
                    format!("FAILED {why}").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
                while line.len() > MAX_FORWARD_LINE {
                    line.pop();
                }
                line + "\n"
            }
        }
    }

    /// Reads a line without its line feed; none when it is no answer of a forwarder.
    pub fn parse(line: &[u8]) -> Option<Self> {
        match line {
            b"OK" => Some(Self::Connected),
            b"REFUSED" => Some(Self::Refused),
            _ => line.strip_prefix(b"FAILED ").map(|why| Self::Failed(String::from_utf8_lossy(why).into_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forward_lines_read_back_and_nothing_else_does() {
        for port in [1, 80, 65535].map(|port| NonZeroU16::new(port).unwrap()) {
            let line = forward_line(port);
            assert_eq!(parse_forward_line(line.trim_end().as_bytes()), Some(port));
        }
        for line in ["", "TCP", "TCP ", "TCP 0", "TCP 65536", "TCP +1", "TCP -1", "TCP 1 ", "tcp 1", "UDP 1", "TCP 1\r"]
        {
            assert_eq!(parse_forward_line(line.as_bytes()), None, "{line:?}");
        }
    }

    #[test]
    fn forwarders_answers_read_back_and_fit_a_line() {
        for answer in [Forwarded::Connected, Forwarded::Refused, Forwarded::Failed("no route".to_owned())] {
            let line = answer.line();
            assert_eq!(Forwarded::parse(line.strip_suffix('\n').unwrap().as_bytes()), Some(answer));
        }
        let long = Forwarded::Failed(format!("a\nb{}", "ä".repeat(500))).line();
        assert!(long.len() <= MAX_FORWARD_LINE + 1 && long.find('\n') == Some(long.len() - 1), "{long:?}");
        assert_eq!(Forwarded::parse(b"ok"), None);
    }
}
