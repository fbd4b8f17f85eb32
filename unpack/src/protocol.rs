//! What the supervisor and the unpacker say to each other: one request and one reply at a time over a socket of kind `SOCK_SEQPACKET`, each a
//! single message of JSON. The bytes of the layers go through a pipe beside it.
//!
//! [`Request::Begin`], then [`Request::Layer`] for each layer from the lowest up, then [`Request::Finish`]. Each is answered with
//! [`Reply::Done`] when it is done; after [`Reply::Refused`] the process ends, as it does when the socket is closed. The supervisor takes a
//! reply for untrusted: the process may be whatever an image has made of it.

use serde::{Deserialize, Serialize};

/// The version of everything in this module.
pub const VERSION: u32 = 1;
/// Bytes of a message at most.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Characters of a text in a reply at most.
pub const MAX_TEXT: usize = 4 << 10;

/// Names of the descriptors that the process is started with, as `--fd=NAME=NUMBER`.
pub mod names {
    /// Requests come and replies go.
    pub const CONTROL: &str = "control";
    /// The bytes of the layers, one behind the other.
    pub const INPUT: &str = "input";
    /// The disk: a file of its whole size, empty.
    pub const DISK: &str = "disk";
}

/// What is asked of the unpacker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The bounds of the image.
    Begin {
        /// The asker's [`VERSION`].
        version: u32,
        /// Octets that the archives of all layers may have.
        bytes: u64,
        /// Entries that they may have.
        entries: usize,
    },
    /// A layer, whose bytes come now.
    Layer {
        /// From 1, the lowest first.
        number: usize,
        /// How many bytes.
        bytes: u64,
        /// `sha256:…` of its archive.
        diff_id: String,
    },
    /// There are no more layers: write the file system.
    Finish {
        /// The working directory that the image's configuration names.
        working_dir: Option<String>,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// The image cannot be unpacked.
    Refused {
        /// The entry of a layer's archive, when it is one entry's fault.
        entry: Option<String>,
        /// Why not.
        what: String,
    },
}
