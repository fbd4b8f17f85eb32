//! The body of each section.
//!
//! Packs and image maps are written by hand: they are large, and their offsets and page numbers follow from the order. The small
//! sections are our own structs in postcard, which is positional; a change of such a struct is a new section version.

use serde::{Serialize, de::DeserializeOwned};

use super::{
    Base, Image, ImageKind, ManifestError,
    wire::{Reader, WireError, put_bytes, put_varint},
};
use crate::{
    image::{ImageMap, MapError, PageRef, Run},
    pack::{self, Codec, FrameEntry, PackEntry},
    seal::DataKeyId,
};

pub(super) fn put_small<T: Serialize>(section: &'static str, value: &T) -> Result<Vec<u8>, ManifestError> {
    postcard::to_stdvec(value).map_err(|error| ManifestError::Malformed { section, what: error.to_string() })
}

pub(super) fn small<T: DeserializeOwned>(section: &'static str, bytes: &[u8]) -> Result<T, ManifestError> {
    let malformed = |what: String| ManifestError::Malformed { section, what };
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|e| malformed(e.to_string()))?;
    if rest.is_empty() { Ok(value) } else { Err(malformed(WireError::Trailing(rest.len()).to_string())) }
}

pub(super) fn put_packs(packs: &[PackEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_varint(&mut bytes, packs.len() as u64);
    for entry in packs {
        put_bytes(&mut bytes, entry.key.as_bytes());
        put_varint(&mut bytes, u64::from(entry.size));
        bytes.extend_from_slice(&entry.digest.0);
        put_varint(&mut bytes, entry.frames.len() as u64);
        for frame in &entry.frames {
            put_varint(&mut bytes, u64::from(frame.stored_len));
            put_varint(&mut bytes, u64::from(frame.pages));
            bytes.push(match frame.codec {
                Codec::Raw => 0,
                Codec::Lz4 => 1,
                Codec::Zstd => 2,
            });
            bytes.extend_from_slice(&frame.digest.0);
        }
    }
    bytes
}

pub(super) fn packs(bytes: &[u8]) -> Result<Vec<PackEntry>, WireError> {
    let mut reader = Reader::new(bytes);
    let count = reader.count(1 + 1 + 32 + 1)?;
    let mut packs = Vec::with_capacity(count);
    for _ in 0..count {
        let key = reader.text()?.to_owned();
        let size = reader.varint32()?;
        let digest = reader.digest()?;
        let frames = reader.count(1 + 1 + 1 + 32)?;
        let mut entry = PackEntry { key, size, digest, frames: Vec::with_capacity(frames), sealed: None };
        let mut offset = pack::HEADER_LEN as u32;
        for _ in 0..frames {
            let stored_len = reader.varint32()?;
            let pages = reader.varint32()?;
            let codec = match reader.byte()? {
                0 => Codec::Raw,
                1 => Codec::Lz4,
                2 => Codec::Zstd,
                tag => return Err(WireError::Tag(tag.into())),
            };
            entry.frames.push(FrameEntry { offset, stored_len, pages, codec, digest: reader.digest()? });
            offset = offset.checked_add(stored_len).ok_or(WireError::Number)?;
        }
        packs.push(entry);
    }
    reader.end()?;
    Ok(packs)
}

/// The data keys, each once; then for each pack 0, or which of them counted from 1.
pub(super) fn put_keys(packs: &[PackEntry]) -> Vec<u8> {
    let mut ids: Vec<DataKeyId> = packs.iter().filter_map(|pack| pack.sealed).collect();
    ids.sort_unstable();
    ids.dedup();
    let mut bytes = Vec::new();
    put_varint(&mut bytes, ids.len() as u64);
    ids.iter().for_each(|id| bytes.extend_from_slice(&id.0));
    for pack in packs {
        let at = pack.sealed.and_then(|id| ids.binary_search(&id).ok());
        put_varint(&mut bytes, at.map_or(0, |at| at as u64 + 1));
    }
    bytes
}

pub(super) fn keys(bytes: &[u8], packs: &mut [PackEntry]) -> Result<(), WireError> {
    let mut reader = Reader::new(bytes);
    let count = reader.count(16)?;
    let ids = (0..count).map(|_| reader.id().map(DataKeyId)).collect::<Result<Vec<_>, _>>()?;
    for pack in packs {
        pack.sealed = match reader.varint()? {
            0 => None,
            n => Some(*usize::try_from(n - 1).ok().and_then(|n| ids.get(n)).ok_or(WireError::Number)?),
        };
    }
    reader.end()
}

// A run is a number that holds its length and kind, then the place. Where it starts follows from those before it.
const ZERO: u64 = 0;
const PACK: u64 = 1;
const BASE: u64 = 2;

pub(super) fn put_images(images: &[Image]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_varint(&mut bytes, images.len() as u64);
    for image in images {
        match image.kind {
            ImageKind::Memory => put_varint(&mut bytes, 0),
            ImageKind::Disk(n) => put_varint(&mut bytes, 1 + u64::from(n)),
        }
        match image.base {
            None => bytes.push(0),
            Some(base) => {
                bytes.push(1);
                bytes.extend_from_slice(&base.digest.0);
                put_varint(&mut bytes, base.blocks);
            }
        }
        put_varint(&mut bytes, image.map.pages());
        put_varint(&mut bytes, image.map.runs().len() as u64);
        for run in image.map.runs() {
            match run.at {
                PageRef::Zero => put_varint(&mut bytes, run.pages << 2 | ZERO),
                PageRef::Pack { pack, frame, index } => {
                    put_varint(&mut bytes, run.pages << 2 | PACK);
                    put_varint(&mut bytes, pack.into());
                    put_varint(&mut bytes, frame.into());
                    put_varint(&mut bytes, index.into());
                }
                PageRef::Base { block } => {
                    put_varint(&mut bytes, run.pages << 2 | BASE);
                    put_varint(&mut bytes, block);
                }
            }
        }
    }
    bytes
}

pub(super) fn images(bytes: &[u8]) -> Result<Vec<Image>, ManifestError> {
    let wire = |error: WireError| ManifestError::Malformed { section: "images", what: error.to_string() };
    let mut reader = Reader::new(bytes);
    let count = reader.count(4).map_err(wire)?;
    let mut images = Vec::with_capacity(count);
    for _ in 0..count {
        images.push(image(&mut reader).map_err(|error| match error {
            ImageError::Wire(error) => wire(error),
            ImageError::Map(kind, source) => ManifestError::Map { image: kind.to_string(), source },
        })?);
    }
    reader.end().map_err(wire)?;
    Ok(images)
}

enum ImageError {
    Wire(WireError),
    Map(ImageKind, MapError),
}

impl From<WireError> for ImageError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

fn image(reader: &mut Reader<'_>) -> Result<Image, ImageError> {
    let kind = match reader.varint()? {
        0 => ImageKind::Memory,
        n => ImageKind::Disk(u32::try_from(n - 1).map_err(|_| WireError::Number)?),
    };
    let base = match reader.byte()? {
        0 => None,
        1 => Some(Base { digest: reader.digest()?, blocks: reader.varint()? }),
        tag => return Err(WireError::Tag(tag.into()).into()),
    };
    let pages = reader.varint()?;
    let count = reader.count(1)?;
    // Straight into the map, which joins what is one run: a run of one byte here takes forty there.
    let (mut start, mut failed) = (0, None);
    let runs = (0..count).map_while(|_| match run(reader, start) {
        Ok(run) => {
            start = run.end();
            Some(run)
        }
        Err(error) => {
            failed = Some(error);
            None
        }
    });
    let map = ImageMap::from_runs(pages, runs);
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(Image { kind, map: map.map_err(|source| ImageError::Map(kind, source))?, base }),
    }
}

fn run(reader: &mut Reader<'_>, start: u64) -> Result<Run, WireError> {
    let head = reader.varint()?;
    let at = match head & 3 {
        ZERO => PageRef::Zero,
        PACK => PageRef::Pack { pack: reader.varint32()?, frame: reader.varint32()?, index: reader.varint32()? },
        BASE => PageRef::Base { block: reader.varint()? },
        tag => return Err(WireError::Tag(tag)),
    };
    Ok(Run { start, pages: head >> 2, at })
}
