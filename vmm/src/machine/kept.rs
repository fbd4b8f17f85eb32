//! Notes on a memory file that outlives its VMM: which pages are in place in it, and their digests. Made when the machine stands still for
//! the last time, handed to the supervisor with the snapshot, and given back with the file when that very snapshot is restored on this
//! host. They never leave the host, and are of no use to another build: an unknown version is no notes.

use std::io::{self, Read, Seek, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stasis_snapshot::capture::PageDigests;

use super::Machine;
use crate::pages::PageSet;

const VERSION: u16 = 1;

/// What the notes begin with, after its own length (u32, little endian). The digests follow it, to the end.
#[derive(Serialize, Deserialize)]
struct Head {
    version: u16,
    pages: u64,
    /// Pages in place, as runs: first, count.
    present: Vec<(u64, u64)>,
}

/// Why notes are refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error("the notes on kept memory cannot be read or written")]
    File(#[source] io::Error),
    #[error("the notes on kept memory cannot be understood")]
    Encoding(#[source] postcard::Error),
    #[error("the notes on kept memory are of version {0}; this build reads {VERSION}")]
    Version(u16),
    #[error("the notes on kept memory name pages past its end")]
    Beyond,
    #[error("the digests of kept memory cannot be taken over")]
    Digests(#[source] io::Error),
}

/// What is in a memory file.
pub(crate) struct Kept {
    pub(crate) present: PageSet,
    pub(crate) digests: Option<Arc<PageDigests>>,
}

impl Kept {
    /// Of an empty file.
    pub(crate) fn nothing(pages: u64) -> Self {
        Self { present: PageSet::new(pages), digests: None }
    }

    /// From notes, read to their end.
    pub(crate) fn read(from: &mut impl Read) -> Result<Self, KeptError> {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).map_err(KeptError::File)?;
        let cut_off = || KeptError::File(io::ErrorKind::UnexpectedEof.into());
        let (len, rest) = bytes.split_first_chunk().ok_or_else(cut_off)?;
        let (head, digests) = rest.split_at_checked(u32::from_le_bytes(*len) as usize).ok_or_else(cut_off)?;
        let notes: Head = postcard::from_bytes(head).map_err(KeptError::Encoding)?;
        if notes.version != VERSION {
            return Err(KeptError::Version(notes.version));
        }
        if notes.pages > stasis_snapshot::image::MAX_PAGES {
            return Err(KeptError::Beyond);
        }
        let mut present = PageSet::new(notes.pages);
        for (first, count) in notes.present {
            let end = first.checked_add(count).filter(|end| *end <= notes.pages).ok_or(KeptError::Beyond)?;
            present.insert(first..end);
        }
        let digests = PageDigests::import(notes.pages, digests).map_err(KeptError::Digests)?;
        Ok(Self { present, digests: Some(Arc::new(digests)) })
    }
}

impl Machine {
    /// Writes notes on this machine's memory file, for a restore of what was captured last, from the start of `file`, where the next reader
    /// begins. The machine stands still and does not run again.
    pub(crate) fn keep(&self, file: &mut (impl Write + Seek)) -> Result<(), KeptError> {
        let present = self.presence.present();
        let runs = present.runs().into_iter().map(|run| (run.start, run.end - run.start)).collect();
        let head = Head { version: VERSION, pages: self.ram.pages(), present: runs };
        let head = postcard::to_stdvec(&head).map_err(KeptError::Encoding)?;
        let len = u32::try_from(head.len()).map_err(|e| KeptError::File(io::Error::other(e)))?;
        for part in [&len.to_le_bytes()[..], &head, &self.memory_digests().export()] {
            file.write_all(part).map_err(KeptError::File)?;
        }
        file.rewind().map_err(KeptError::File)
    }
}
