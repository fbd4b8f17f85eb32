//! Packs: the objects that hold page bytes, made of frames. A frame is the unit of compression, digest and fetch.
//!
//! ```text
//! pack   = header frame*
//! header = "stasispk" version:u16 reserved:[u8; 6]      little endian
//! frame  = the stored bytes of 1 to 64 pages, compressed together
//! ```
//!
//! A pack does not describe its frames: the manifest does, and its digests are checked before anything is decoded.

use serde::{Deserialize, Serialize};

use crate::{ids::Digest, page::PAGE_SIZE};

/// Bytes of the pack header.
pub const HEADER_LEN: u64 = 16;
/// Pages of a frame at most (256 KiB).
pub const FRAME_PAGES: u32 = 64;
/// Pages of a frame of the boot pack at most (64 KiB): a fault on one page should not wait for many.
pub const BOOT_FRAME_PAGES: u32 = 16;
/// Smallest target size of a pack, bytes.
pub const MIN_PACK: u64 = 1 << 20;
/// Largest target size of a pack, bytes. A pack may exceed it by less than a frame.
pub const MAX_PACK: u64 = 8 << 20;
/// Bytes the boot pack has at most.
pub const MAX_BOOT_PACK: u64 = 16 << 20;

/// How the bytes of a frame are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    /// As they are.
    Raw,
    /// LZ4 block format.
    #[default]
    Lz4,
    /// Zstandard, written at level 1: when the upload is the bottleneck.
    Zstd,
}

/// One frame of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameEntry {
    /// Where its stored bytes begin in the pack.
    pub offset: u32,
    /// How many stored bytes.
    pub stored_len: u32,
    /// Pages it holds, 1 to [`FRAME_PAGES`].
    pub pages: u32,
    /// How they are stored.
    pub codec: Codec,
    /// BLAKE3 of the stored bytes.
    pub digest: Digest,
}

/// One pack, as a manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackEntry {
    /// Store key.
    pub key: String,
    /// Bytes of the object.
    pub size: u32,
    /// BLAKE3 of the whole object.
    pub digest: Digest,
    /// Its frames, in order and without gaps.
    pub frames: Vec<FrameEntry>,
}

/// What is wrong with a pack or a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PackError {
    #[error("not a pack: the first bytes are not the pack magic")]
    Magic,
    #[error("pack is format version {0}; this build reads 1")]
    Version(u16),
    #[error("{got} bytes, expected {expected}")]
    Length { got: u64, expected: u64 },
    #[error("digest does not match")]
    Digest,
    #[error("{codec:?} data does not decode to {pages} pages")]
    Decode { codec: Codec, pages: u32 },
}

/// Target size of a pack when `total` bytes go over `connections` connections.
pub fn pack_size(total: u64, connections: u16) -> u64 {
    (total / u64::from(connections.max(1))).clamp(MIN_PACK, MAX_PACK)
}

/// A frame ready to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedFrame {
    /// How it is stored.
    pub codec: Codec,
    /// Pages it holds.
    pub pages: u32,
    /// BLAKE3 of `bytes`.
    pub digest: Digest,
    /// The stored bytes.
    pub bytes: Vec<u8>,
}

/// Compresses whole pages into a frame; stores them raw where `codec` gains less than 12 %.
pub fn encode_frame(codec: Codec, pages: &[u8]) -> EncodedFrame {
    let _ = (codec, pages, PAGE_SIZE);
    todo!()
}

/// The pages of a frame from its stored bytes: length and digest are checked first, the decoded length after.
pub fn decode_frame(entry: &FrameEntry, stored: &[u8]) -> Result<Vec<u8>, PackError> {
    let _ = (entry, stored);
    todo!()
}

/// Checks a pack's header.
pub fn check_header(bytes: &[u8]) -> Result<(), PackError> {
    let _ = bytes;
    todo!()
}
