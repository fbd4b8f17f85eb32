//! The manifest's outer bytes. All numbers are little endian.
//!
//! ```text
//! manifest = header table section*          nothing between, nothing after
//!
//! header (64 bytes; this layout never changes)
//!    0  magic "stasismf"
//!    8  format version u16                1; of a sealed manifest 2 (`seal`, "object")
//!   10  architecture u16                   1 = x86-64
//!   12  number of sections u32
//!   16  bytes of the whole manifest u64
//!   24  BLAKE3 of the table
//!   56  first 8 bytes of the BLAKE3 of bytes 0..56
//!
//! table entry (56 bytes)
//!    0  kind u32
//!    4  version u16
//!    6  flags u16                          bit 0: a reader that does not know the kind must refuse the manifest
//!    8  offset u64
//!   16  length u64
//!   24  BLAKE3 of the section
//! ```

use super::{Arch, FORMAT_VERSION, HEADER_LEN, Header, MAX_LEN, ManifestError};
use crate::ids::Digest;

const MAGIC: &[u8; 8] = b"stasismf";
const ENTRY_LEN: usize = 56;
const MAX_SECTIONS: u32 = 64;
const REQUIRED: u16 = 1;

/// A kind of section: what this build knows of it.
#[derive(Debug)]
pub(super) struct Kind {
    pub(super) number: u32,
    pub(super) name: &'static str,
    pub(super) version: u16,
    pub(super) required: bool,
}

const fn kind(number: u32, name: &'static str, required: bool) -> Kind {
    Kind { number, name, version: 1, required }
}

pub(super) static PLATFORM: Kind = kind(1, "platform", true);
pub(super) static SPEC: Kind = kind(2, "spec", true);
pub(super) static RECORD: Kind = kind(3, "record", false);
pub(super) static LINEAGE: Kind = kind(4, "lineage", false);
pub(super) static PACKS: Kind = kind(5, "packs", true);
pub(super) static IMAGES: Kind = kind(6, "images", true);
pub(super) static STATE: Kind = kind(7, "state", true);
pub(super) static BOOT: Kind = kind(8, "boot", false);
/// Only where something is encrypted: a reader that does not know it must not take ciphertext for pages.
pub(super) static KEYS: Kind = kind(9, "keys", true);
/// Likewise.
pub(super) static SEALED_STATE: Kind = kind(10, "sealed state", true);

static KINDS: [&Kind; 10] = [&PLATFORM, &SPEC, &RECORD, &LINEAGE, &PACKS, &IMAGES, &STATE, &BOOT, &KEYS, &SEALED_STATE];

/// Puts header, table and sections together.
pub(super) fn write(arch: Arch, sections: &[(&'static Kind, Vec<u8>)]) -> Result<Vec<u8>, ManifestError> {
    let table_len = sections.len() * ENTRY_LEN;
    let len = HEADER_LEN + table_len + sections.iter().map(|(_, body)| body.len()).sum::<usize>();
    if len as u64 > MAX_LEN {
        return Err(ManifestError::TooLarge(len as u64));
    }
    let mut table = Vec::with_capacity(table_len);
    let mut offset = HEADER_LEN + table_len;
    for (kind, body) in sections {
        table.extend_from_slice(&kind.number.to_le_bytes());
        table.extend_from_slice(&kind.version.to_le_bytes());
        table.extend_from_slice(&(u16::from(kind.required) * REQUIRED).to_le_bytes());
        table.extend_from_slice(&(offset as u64).to_le_bytes());
        table.extend_from_slice(&(body.len() as u64).to_le_bytes());
        table.extend_from_slice(&Digest::of(body).0);
        offset += body.len();
    }
    let arch = match arch {
        Arch::X86_64 => 1,
    };
    let mut bytes = Vec::with_capacity(len);
    bytes.extend_from_slice(&header(FORMAT_VERSION, arch, sections.len() as u32, len as u64, Digest::of(&table)));
    bytes.extend_from_slice(&table);
    for (_, body) in sections {
        bytes.extend_from_slice(body);
    }
    Ok(bytes)
}

/// A header: what `parts` counts and `digest` covers is the version's to say.
pub(super) fn header(version: u16, arch: u16, parts: u32, len: u64, digest: Digest) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&arch.to_le_bytes());
    bytes.extend_from_slice(&parts.to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&digest.0);
    let check = header_check(&bytes);
    bytes.extend_from_slice(&check);
    bytes
}

fn header_check(covered: &[u8]) -> [u8; 8] {
    let mut check = [0; 8];
    check.copy_from_slice(&Digest::of(covered).0[..8]);
    check
}

/// The number at `at`; the caller has checked the length.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut number = [0; N];
    number.copy_from_slice(&bytes[at..at + N]);
    number
}

/// Reads and checks the header alone.
pub(super) fn read_header(bytes: &[u8]) -> Result<Header, ManifestError> {
    if !bytes.starts_with(MAGIC) && !MAGIC.starts_with(bytes) {
        return Err(ManifestError::Magic);
    }
    if bytes.len() < HEADER_LEN {
        return Err(ManifestError::Truncated { got: bytes.len() as u64, expected: HEADER_LEN as u64 });
    }
    if header_check(&bytes[..56]) != number(bytes, 56) {
        return Err(ManifestError::HeaderCheck);
    }
    Ok(Header {
        version: u16::from_le_bytes(number(bytes, 8)),
        arch: u16::from_le_bytes(number(bytes, 10)),
        sections: u32::from_le_bytes(number(bytes, 12)),
        len: u64::from_le_bytes(number(bytes, 16)),
        table_digest: Digest(number(bytes, 24)),
    })
}

/// The sections of a manifest, each with its digest already checked.
pub(super) struct Sections<'a> {
    pub(super) arch: Arch,
    known: Vec<(&'static Kind, &'a [u8])>,
}

impl<'a> Sections<'a> {
    /// Checks header, table and every digest; refuses unknown required sections and unknown versions.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, ManifestError> {
        let header = read_header(bytes)?;
        if header.version != FORMAT_VERSION {
            return Err(ManifestError::Version(header.version));
        }
        let arch = match header.arch {
            1 => Arch::X86_64,
            other => return Err(ManifestError::Arch(other)),
        };
        if header.len > MAX_LEN {
            return Err(ManifestError::TooLarge(header.len));
        }
        let got = bytes.len() as u64;
        if got < header.len {
            return Err(ManifestError::Truncated { got, expected: header.len });
        }
        if got > header.len {
            return Err(ManifestError::Trailing(got - header.len));
        }
        if header.sections > MAX_SECTIONS {
            return Err(ManifestError::Table("it has more than 64 sections"));
        }
        let table_len = header.sections as usize * ENTRY_LEN;
        let (table, mut rest) = bytes[HEADER_LEN..]
            .split_at_checked(table_len)
            .ok_or(ManifestError::Table("it does not fit in the manifest"))?;
        if Digest::of(table) != header.table_digest {
            return Err(ManifestError::TableDigest);
        }
        let mut known: Vec<(&'static Kind, &[u8])> = Vec::new();
        let mut seen = Vec::new();
        for entry in table.chunks_exact(ENTRY_LEN) {
            let number_of_kind = u32::from_le_bytes(number(entry, 0));
            let version = u16::from_le_bytes(number(entry, 4));
            let flags = u16::from_le_bytes(number(entry, 6));
            let offset = u64::from_le_bytes(number(entry, 8));
            let len = u64::from_le_bytes(number(entry, 16));
            if offset != got - rest.len() as u64 {
                return Err(ManifestError::Table("sections overlap or leave a gap"));
            }
            let (body, after) = usize::try_from(len)
                .ok()
                .and_then(|len| rest.split_at_checked(len))
                .ok_or(ManifestError::Table("a section ends beyond the manifest"))?;
            rest = after;
            if seen.contains(&number_of_kind) {
                return Err(ManifestError::Table("a section appears twice"));
            }
            seen.push(number_of_kind);
            let kind = KINDS.iter().find(|kind| kind.number == number_of_kind);
            if Digest::of(body).0 != number::<32>(entry, 24) {
                return Err(ManifestError::SectionDigest(
                    kind.map_or_else(|| number_of_kind.to_string(), |kind| kind.name.to_owned()),
                ));
            }
            match kind {
                Some(kind) if kind.version == version => known.push((kind, body)),
                Some(kind) => {
                    return Err(ManifestError::SectionVersion { section: kind.name, version, reads: kind.version });
                }
                None if flags & REQUIRED != 0 => {
                    return Err(ManifestError::UnknownSection(number_of_kind));
                }
                None => {}
            }
        }
        if rest.is_empty() { Ok(Self { arch, known }) } else { Err(ManifestError::Table("bytes belong to no section")) }
    }

    /// The section's bytes, where it is there.
    pub(super) fn get(&self, kind: &Kind) -> Option<&'a [u8]> {
        self.known.iter().find(|(known, _)| known.number == kind.number).map(|(_, body)| *body)
    }

    /// The section's bytes; an error where it is missing.
    pub(super) fn need(&self, kind: &Kind) -> Result<&'a [u8], ManifestError> {
        self.get(kind).ok_or(ManifestError::MissingSection(kind.name))
    }
}
