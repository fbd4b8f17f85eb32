//! Packs: the objects that hold page bytes, made of frames. A frame is the unit of compression, digest and fetch.
//!
//! ```text
//! pack   = header frame*
//! header = "stasispk" version:u16 reserved:[u8; 6]      little endian
//! frame  = the stored bytes of 1 to 64 pages, compressed together; then encrypted, and a tag of 16 bytes, where the pack is sealed
//! ```
//!
//! A pack does not describe its frames: the manifest does, and its digests are checked before anything is decoded. Digests are of what is
//! stored, so that they can be checked without a key.

use std::borrow::Cow;

use bytes::Bytes;
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use serde::{Deserialize, Serialize};

use crate::{
    ids::Digest,
    page::PAGE_SIZE,
    seal::{DataKeyId, FrameInfo, PackCipher, TAG},
};

const MAGIC: &[u8; 8] = b"stasispk";
const VERSION: u16 = 1;
const ZSTD_LEVEL: i32 = 1;

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
    /// The data key under which its frames are encrypted, where they are.
    pub sealed: Option<DataKeyId>,
}

/// What is wrong with a pack or a frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PackError {
    #[error("not a pack: the first bytes are not the pack magic")]
    Magic,
    #[error("pack is format version {0}; this build reads {VERSION}")]
    Version(u16),
    #[error("{got} bytes, expected {expected}")]
    Length { got: u64, expected: u64 },
    #[error("digest does not match")]
    Digest,
    #[error("{codec:?} data does not decode to {pages} pages")]
    Decode { codec: Codec, pages: u32 },
    #[error("it does not open: it was tampered with, or belongs elsewhere")]
    Sealed,
    #[error("it is encrypted under data key {0}, which was not given")]
    NoKey(DataKeyId),
}

/// Target size of a pack when `total` bytes go over `connections` connections.
pub fn pack_size(total: u64, connections: u16) -> u64 {
    (total / u64::from(connections.max(1))).clamp(MIN_PACK, MAX_PACK)
}

/// A frame ready to be stored.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    /// How it is stored.
    pub codec: Codec,
    /// Pages it holds.
    pub pages: u32,
    /// BLAKE3 of the stored bytes.
    pub digest: Digest,
    /// Begins with the stored bytes. What follows is left over: a buffer that serves again is not cleared.
    buffer: Vec<u8>,
    len: usize,
}

impl EncodedFrame {
    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }

    /// The buffer, for another frame.
    pub(crate) fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

/// Compresses whole pages into a frame; stores them raw where `codec` gains less than 12 %, or fails.
pub fn encode_frame(codec: Codec, pages: &[u8]) -> EncodedFrame {
    FrameEncoder::default().encode(codec, pages, Vec::new(), true)
}

/// What compressing takes, kept from frame to frame: allocating it for each would cost more than the compression.
#[derive(Default)]
pub(crate) struct FrameEncoder {
    lz4: CompressTable,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl FrameEncoder {
    /// As [`encode_frame`], into `buffer`, whose content is lost. What will be encrypted needs no `digest` yet.
    pub(crate) fn encode(&mut self, codec: Codec, pages: &[u8], mut buffer: Vec<u8>, digest: bool) -> EncodedFrame {
        let room = match codec {
            Codec::Raw => 0,
            Codec::Lz4 => get_maximum_output_size(pages.len()),
            Codec::Zstd => zstd::zstd_safe::compress_bound(pages.len()),
        };
        if buffer.len() < room.max(pages.len()) {
            buffer.resize(room.max(pages.len()), 0);
        }
        let done = match codec {
            Codec::Raw => None,
            Codec::Lz4 => compress_into_with_table(pages, &mut buffer, &mut self.lz4).ok(),
            Codec::Zstd => self.zstd(pages, &mut buffer),
        };
        let (codec, len) = if let Some(len) = done.filter(|len| len * 100 <= pages.len() * 88) {
            (codec, len)
        } else {
            buffer[..pages.len()].copy_from_slice(pages);
            (Codec::Raw, pages.len())
        };
        let digest = if digest { Digest::of(&buffer[..len]) } else { Digest([0; 32]) };
        EncodedFrame { codec, pages: (pages.len() / PAGE_SIZE) as u32, digest, buffer, len }
    }

    fn zstd(&mut self, pages: &[u8], buffer: &mut [u8]) -> Option<usize> {
        let compressor = match &mut self.zstd {
            Some(compressor) => compressor,
            none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
        };
        compressor.compress_to_buffer(pages, buffer).ok()
    }
}

/// Checks the length and the digest of a frame's stored bytes.
pub fn check_frame(entry: &FrameEntry, stored: &[u8]) -> Result<(), PackError> {
    if stored.len() as u64 != u64::from(entry.stored_len) {
        return Err(PackError::Length { got: stored.len() as u64, expected: u64::from(entry.stored_len) });
    }
    if Digest::of(stored) == entry.digest { Ok(()) } else { Err(PackError::Digest) }
}

/// The pages of a frame from its stored bytes: length and digest are checked first, then it is decrypted by `cipher` where it is encrypted, the
/// decoded length is checked after. `number` is its place in its pack.
pub fn decode_frame(
    entry: &FrameEntry,
    number: u32,
    stored: &[u8],
    cipher: Option<&PackCipher>,
) -> Result<Vec<u8>, PackError> {
    let mut decoder = FrameDecoder::default();
    decoder.decode(entry, number, stored, cipher)?;
    Ok(decoder.pages)
}

/// What decoding takes, kept from frame to frame.
#[derive(Default)]
pub struct FrameDecoder {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pages: Vec<u8>,
}

impl FrameDecoder {
    /// As [`decode_frame`].
    pub fn decode(
        &mut self,
        entry: &FrameEntry,
        number: u32,
        stored: &[u8],
        cipher: Option<&PackCipher>,
    ) -> Result<&[u8], PackError> {
        check_frame(entry, stored)?;
        let stored = match cipher {
            None => Cow::Borrowed(stored),
            Some(cipher) => {
                let info = FrameInfo { number, pages: entry.pages, codec: entry.codec };
                Cow::Owned(cipher.open(info, stored).ok_or(PackError::Sealed)?)
            }
        };
        let failed = PackError::Decode { codec: entry.codec, pages: entry.pages };
        if entry.pages == 0 || entry.pages > FRAME_PAGES {
            return Err(failed);
        }
        let len = entry.pages as usize * PAGE_SIZE;
        self.pages.resize(len, 0);
        let decoded = match entry.codec {
            Codec::Raw if stored.len() == len => {
                self.pages.copy_from_slice(&stored);
                Some(len)
            }
            Codec::Raw => None,
            Codec::Lz4 => lz4_flex::block::decompress_into(&stored, &mut self.pages).ok(),
            Codec::Zstd => self.zstd(&stored),
        };
        if decoded == Some(len) { Ok(&self.pages) } else { Err(failed) }
    }

    fn zstd(&mut self, stored: &[u8]) -> Option<usize> {
        let decompressor = match &mut self.zstd {
            Some(decompressor) => decompressor,
            none => none.insert(zstd::bulk::Decompressor::new().ok()?),
        };
        decompressor.decompress_to_buffer(stored, &mut self.pages[..]).ok()
    }
}

/// Checks a pack's header.
pub fn check_header(bytes: &[u8]) -> Result<(), PackError> {
    let header = bytes
        .first_chunk::<{ HEADER_LEN as usize }>()
        .ok_or(PackError::Length { got: bytes.len() as u64, expected: HEADER_LEN })?;
    if &header[..8] != MAGIC {
        return Err(PackError::Magic);
    }
    match u16::from_le_bytes([header[8], header[9]]) {
        VERSION => Ok(()),
        version => Err(PackError::Version(version)),
    }
}

/// A pack being put together in memory.
#[derive(Debug)]
pub(crate) struct PackBuilder {
    bytes: Vec<u8>,
    frames: Vec<FrameEntry>,
    /// Bytes of room after each frame.
    tag: usize,
}

impl PackBuilder {
    /// With a buffer that grows.
    #[cfg(test)]
    pub(crate) fn new() -> Self {
        Self::within(Vec::new(), false)
    }

    /// In `bytes`, which is empty. One that is to be `sealed` has room for the tags.
    pub(crate) fn within(mut bytes: Vec<u8>, sealed: bool) -> Self {
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.resize(HEADER_LEN as usize, 0);
        Self { bytes, frames: Vec::new(), tag: if sealed { TAG } else { 0 } }
    }

    /// Stored bytes of frames so far, without tags: so that sealed packs are as many as others.
    pub(crate) fn stored(&self) -> u64 {
        (self.bytes.len() - self.frames.len() * self.tag) as u64 - HEADER_LEN
    }

    /// Adds a frame and returns its position.
    pub(crate) fn push(&mut self, frame: &EncodedFrame) -> u32 {
        self.frames.push(FrameEntry {
            offset: self.bytes.len() as u32,
            stored_len: (frame.len + self.tag) as u32,
            pages: frame.pages,
            codec: frame.codec,
            digest: frame.digest,
        });
        self.bytes.extend_from_slice(frame.bytes());
        self.bytes.resize(self.bytes.len() + self.tag, 0);
        self.frames.len() as u32 - 1
    }

    /// Encrypts the frames of a pack that is to be sealed. Once, and nothing is pushed afterwards.
    pub(crate) fn seal(&mut self, cipher: &PackCipher) {
        for (number, frame) in (0..).zip(&mut self.frames) {
            let range = frame.offset as usize..(frame.offset + frame.stored_len) as usize;
            let bytes = &mut self.bytes[range];
            cipher.seal(FrameInfo { number, pages: frame.pages, codec: frame.codec }, bytes);
            frame.digest = Digest::of(bytes);
        }
    }

    /// Gives back the room that nothing comes into any more: only what is stored is counted, however many packs wait or are on their way. One
    /// that is nearly full keeps its buffer for the next pack.
    pub(crate) fn fit(&mut self) {
        if self.bytes.len() < self.bytes.capacity() / 8 * 7 {
            self.bytes.shrink_to_fit();
        }
    }

    /// The object, and its entry without key and digest: both can wait until the object is on its way.
    pub(crate) fn finish(self) -> (Bytes, PackEntry) {
        let entry = PackEntry {
            key: String::new(),
            size: self.bytes.len() as u32,
            digest: Digest([0; 32]),
            frames: self.frames,
            sealed: None,
        };
        (self.bytes.into(), entry)
    }
}

/// An entry that passes the manifest's checks, with frames of these many pages.
#[cfg(test)]
pub(crate) fn test_entry(key: &str, frames: &[u32]) -> PackEntry {
    let mut pack = PackBuilder::new();
    for &pages in frames {
        let bytes: Vec<u8> = (0..pages as usize * PAGE_SIZE).map(|i| (i / 7 % 251) as u8).collect();
        pack.push(&encode_frame(Codec::Lz4, &bytes));
    }
    let (bytes, mut entry) = pack.finish();
    entry.digest = Digest::of(&bytes);
    key.clone_into(&mut entry.key);
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(frame: &EncodedFrame) -> FrameEntry {
        FrameEntry {
            offset: 0,
            stored_len: frame.bytes().len() as u32,
            pages: frame.pages,
            codec: frame.codec,
            digest: frame.digest,
        }
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn frames_come_back_with_every_codec() {
        let compressible: Vec<u8> = (0..8 * PAGE_SIZE).map(|i| (i / 64) as u8).collect();
        for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
            let frame = encode_frame(codec, &compressible);
            assert_eq!(frame.codec, codec);
            assert_eq!(frame.pages, 8);
            assert_eq!(decode_frame(&entry(&frame), 0, frame.bytes(), None), Ok(compressible.clone()));
        }
    }

    #[test]
    fn an_encoder_leaves_nothing_of_the_frame_before() {
        let mut encoder = FrameEncoder::default();
        let mut buffer = Vec::new();
        let long: Vec<u8> = (0..64 * PAGE_SIZE).map(|i| (i / 64) as u8).collect();
        for codec in [Codec::Lz4, Codec::Zstd, Codec::Raw, Codec::Zstd, Codec::Lz4] {
            for pages in [&long[..], &noise(3 * PAGE_SIZE), &long[PAGE_SIZE..2 * PAGE_SIZE]] {
                let frame = encoder.encode(codec, pages, buffer, true);
                assert_eq!(decode_frame(&entry(&frame), 0, frame.bytes(), None).as_deref(), Ok(pages));
                let fresh = encode_frame(codec, pages);
                assert_eq!((frame.codec, frame.digest, frame.bytes()), (fresh.codec, fresh.digest, fresh.bytes()));
                buffer = frame.into_buffer();
            }
        }
    }

    #[test]
    fn what_does_not_compress_is_stored_raw() {
        for codec in [Codec::Lz4, Codec::Zstd] {
            let frame = encode_frame(codec, &noise(16 * PAGE_SIZE));
            assert_eq!(frame.codec, Codec::Raw);
        }
        // 7/8 noise gains at most 12.5 %, and what the codec adds takes more than the half per cent between.
        let mut pages = noise(16 * PAGE_SIZE);
        pages[14 * PAGE_SIZE + PAGE_SIZE / 4..].fill(0);
        assert_eq!(encode_frame(Codec::Lz4, &pages).codec, Codec::Raw);
        pages[13 * PAGE_SIZE..].fill(0);
        assert_eq!(encode_frame(Codec::Lz4, &pages).codec, Codec::Lz4);
    }

    #[test]
    fn damage_is_found_before_decoding() {
        let frame = encode_frame(Codec::Lz4, &vec![7; 4 * PAGE_SIZE]);
        let good = entry(&frame);
        let mut damaged = frame.bytes().to_vec();
        damaged[3] ^= 1;
        assert_eq!(decode_frame(&good, 0, &damaged, None), Err(PackError::Digest));
        assert!(matches!(decode_frame(&good, 0, &frame.bytes()[1..], None), Err(PackError::Length { .. })));
        for pages in [0, 3, 5, FRAME_PAGES + 1, u32::MAX] {
            let lying = FrameEntry { pages, ..good.clone() };
            assert!(matches!(decode_frame(&lying, 0, frame.bytes(), None), Err(PackError::Decode { .. })));
        }
    }

    #[test]
    fn headers_are_checked() {
        let (bytes, entry) = PackBuilder::new().finish();
        assert_eq!(u64::from(entry.size), HEADER_LEN);
        assert_eq!(check_header(&bytes), Ok(()));
        assert!(matches!(check_header(&bytes[1..]), Err(PackError::Length { .. })));
        let mut other = bytes.to_vec();
        other[8] = 9;
        assert_eq!(check_header(&other), Err(PackError::Version(9)));
        other[0] ^= 1;
        assert_eq!(check_header(&other), Err(PackError::Magic));
    }

    #[test]
    fn packs_are_sized_to_the_connections() {
        assert_eq!(pack_size(0, 8), MIN_PACK);
        assert_eq!(pack_size(16 << 20, 8), 2 << 20);
        assert_eq!(pack_size(1 << 30, 8), MAX_PACK);
        assert_eq!(pack_size(4 << 20, 0), 4 << 20);
    }
}
