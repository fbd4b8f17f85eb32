//! A disk of the machine, as the block device, the capture and the restore share it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use stasis_devices::overlay::{Overlay, OverlayError};
use stasis_snapshot::capture::{BlockIndex, PageReader};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::page::PAGE_SIZE;

use super::spec::DiskSpec;

/// A disk cannot be opened.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum DiskError {
    #[error("cannot look at a disk's base")]
    Base(#[source] std::io::Error),
    #[error("a disk that takes writes needs an overlay, a read-only one needs a base")]
    Incomplete,
    #[error(transparent)]
    Overlay(#[from] OverlayError),
}

/// A base as it was handed over.
pub struct BaseGiven {
    /// The blocks.
    pub file: File,
    /// Names it in snapshots.
    pub digest: Digest,
    /// Its encoded [`BlockIndex`].
    pub index: Option<File>,
}

/// The read-only base of a disk: a template's root file system.
#[derive(Clone)]
pub(crate) struct BaseFile {
    file: Arc<File>,
    bytes: u64,
    index: Option<Arc<File>>,
    /// Names it in snapshots.
    pub(crate) digest: Digest,
}

impl BaseFile {
    /// Its length in 4 KiB blocks, the last one padded with zeros.
    pub(crate) fn blocks(&self) -> u64 {
        self.bytes.div_ceil(PAGE_SIZE as u64)
    }

    /// Its blocks by content, where an index was given. Read anew each time: it is large, and wanted only while a capture runs.
    pub(crate) fn index(&self) -> Option<Arc<BlockIndex>> {
        let file = self.index.as_ref()?;
        let read = || {
            let mut bytes = vec![0; usize::try_from(file.metadata()?.len()).map_err(std::io::Error::other)?];
            file.read_exact_at(&mut bytes, 0)?;
            BlockIndex::decode(&bytes, self.digest).ok_or_else(|| std::io::Error::other("it is no index of this base"))
        };
        match read() {
            Ok(index) => Some(Arc::new(index)),
            Err(error) => {
                tracing::warn!(%error, "memory is not compared with the blocks of the template");
                None
            }
        }
    }
}

impl PageReader for BaseFile {
    fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        let offset = first_page * PAGE_SIZE as u64;
        let there = self.bytes.saturating_sub(offset).min(into.len() as u64) as usize;
        let (backed, beyond) = into.split_at_mut(there);
        beyond.fill(0);
        self.file.read_exact_at(backed, offset)
    }
}

/// A disk: private writes over a read-only base.
#[derive(Clone)]
pub struct Disk {
    pub(crate) overlay: Arc<Overlay>,
    pub(crate) base: Option<BaseFile>,
}

impl Disk {
    /// A disk of `size` bytes over `base`; `overlay` takes the writes, and without one the disk is read-only.
    pub fn new(base: Option<BaseGiven>, overlay: Option<File>, size: u64) -> Result<Self, DiskError> {
        let opened = |BaseGiven { file, digest, index }: BaseGiven| {
            let bytes = file.metadata()?.len();
            Ok((file.try_clone()?, BaseFile { file: Arc::new(file), bytes, index: index.map(Arc::new), digest }))
        };
        let (file, base) = base.map(opened).transpose().map_err(DiskError::Base)?.unzip();
        let overlay = match (file, overlay) {
            (file, Some(overlay)) => Overlay::new(file, overlay, size)?,
            (Some(file), None) => Overlay::read_only(file, size)?,
            (None, None) => return Err(DiskError::Incomplete),
        };
        Ok(Self { overlay: Arc::new(overlay), base })
    }

    pub(crate) fn spec(&self) -> DiskSpec {
        DiskSpec { blocks: self.blocks(), read_only: self.overlay.is_read_only() }
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.overlay.block_count()
    }

    pub(crate) fn base_blocks(&self) -> u64 {
        self.base.as_ref().map_or(0, BaseFile::blocks)
    }
}

impl PageReader for Disk {
    fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.overlay.read_blocks(first_page, into).map_err(std::io::Error::other)
    }
}
