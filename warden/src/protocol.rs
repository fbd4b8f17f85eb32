//! What the supervisor and the warden say to each other: one request and one reply at a time over a unix socket of kind `SOCK_SEQPACKET`,
//! each a single message of JSON with the descriptors it speaks of beside it (`SCM_RIGHTS`), in the order that its type names.
//!
//! Both come in one version: the two programs are installed together, and [`Request::Hello`] tells when they were not.

use serde::{Deserialize, Serialize};

use crate::jail::limits::Size;
use crate::jail::start::ProcessNote;

/// The version of everything in this module.
pub const VERSION: u32 = 2;
/// Bytes of a message at most.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Descriptors beside one message at most.
pub const MAX_DESCRIPTORS: usize = 16;
/// Octets of one argument of a program at most.
pub const MAX_ARGUMENT: usize = 512;

/// What is asked of the warden.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Which version it speaks and what it can do here. Answered with [`Reply::Hello`].
    Hello {
        /// The asker's [`VERSION`].
        version: u32,
    },
    /// Start one of the warden's programs behind walls. With it come: its log, the file for its [`ProcessNote`], and what it inherits.
    /// Answered with [`Reply::Started`].
    Start(StartRequest),
    /// Kill the process whose descriptor comes along: it is another user's. Answered with [`Reply::Done`].
    Kill,
    /// Give the VMM whose descriptor comes along the limits of this size. Answered with [`Reply::Done`].
    Resize {
        /// Of its sandbox.
        size: Size,
    },
    /// Something of sandboxes' networks. Answered with [`Reply::Network`].
    Network(crate::network::serve::Request),
    /// End, for another warden to take over. Not answered. What it has started goes on.
    Retire,
}

/// A program to start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// Which one. Where it is was said to the warden when it was started: whoever asks cannot have another one run.
    pub program: Program,
    /// Arguments before those that name descriptors.
    pub arguments: Vec<String>,
    /// Names of the inherited descriptors, in their order. Devices are added to a VMM's.
    pub names: Vec<String>,
    /// The size of a VMM's sandbox, where it is known.
    pub size: Option<Size>,
}

/// What a warden starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Program {
    /// A VMM: no network, the devices that it needs.
    Vmm,
    /// The dialler: the host's network, and what it takes to resolve names.
    Dialler,
    /// The unpacker of container images: nothing but its descriptors.
    Unpacker,
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// The warden's [`VERSION`].
        version: u32,
        /// Its process id, as it sees it.
        pid: u32,
        /// Walls that this host has not, each with the reason.
        missing: Vec<String>,
        /// Fingerprints of its programs: a change of one on disk takes a new warden.
        programs: Vec<String>,
    },
    /// To [`Request::Start`]; with it comes the process's descriptor.
    Started(ProcessNote),
    /// It is done.
    Done,
    /// To [`Request::Network`].
    Network(crate::network::serve::Reply),
    /// It was not done.
    Refused(Refusal),
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(deny_unknown_fields)]
#[error("{message}")]
pub struct Refusal {
    /// What the asker may conclude.
    pub code: RefusalCode,
    /// The reason for people, with its causes.
    pub message: String,
}

/// Kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The request makes no sense: a bug of the asker, or another version.
    BadRequest,
    /// What it names is not there.
    NotFound,
    /// This host cannot do it.
    Unsupported,
    /// The kernel refused a step.
    Failed,
}

impl Refusal {
    /// A refusal with the chain of causes of `error` as its message.
    pub fn of(code: RefusalCode, error: &dyn std::error::Error) -> Self {
        let causes = std::iter::successors(Some(error), |error| error.source());
        let message = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        Self { code, message }
    }
}
