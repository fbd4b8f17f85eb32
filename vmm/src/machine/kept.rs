//! Notes on a memory file that outlives its VMM: which pages are in place in it, and their digests. Made when the machine stands still for
//! the last time, handed to the supervisor with the snapshot, and given back with the file when that very snapshot is restored on this
//! host. They never leave the host, and are of no use to another build: an unknown version is no notes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use stasis_snapshot::capture::PageDigests;

use super::Machine;
use crate::pages::PageSet;

const VERSION: u16 = 1;

/// The notes as bytes.
#[derive(Serialize, Deserialize)]
struct Notes {
    version: u16,
    pages: u64,
    /// Pages in place, as runs: first, count.
    present: Vec<(u64, u64)>,
    digests: Vec<u8>,
}

/// Why notes are refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeptError {
    #[error("the notes on kept memory cannot be read")]
    Encoding(#[source] postcard::Error),
    #[error("the notes on kept memory are of version {0}; this build reads {VERSION}")]
    Version(u16),
    #[error("the notes on kept memory name pages past its end")]
    Beyond,
    #[error("the digests of kept memory cannot be taken over")]
    Digests(#[source] std::io::Error),
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

    /// From notes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, KeptError> {
        let notes: Notes = postcard::from_bytes(bytes).map_err(KeptError::Encoding)?;
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
        let digests = PageDigests::import(notes.pages, &notes.digests).map_err(KeptError::Digests)?;
        Ok(Self { present, digests: Some(Arc::new(digests)) })
    }
}

impl Machine {
    /// Notes on this machine's memory file, for a restore of what was captured last. The machine stands still and does not run again.
    pub(crate) fn keep(&self) -> Result<Vec<u8>, KeptError> {
        let present = self.presence.present();
        let runs = present.runs().into_iter().map(|run| (run.start, run.end - run.start)).collect();
        let digests = self.memory_digests().export();
        let notes = Notes { version: VERSION, pages: self.ram.pages(), present: runs, digests };
        postcard::to_stdvec(&notes).map_err(KeptError::Encoding)
    }
}
