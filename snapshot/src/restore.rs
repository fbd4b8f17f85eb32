//! Restore, eagerly: a [`Pager`] that fetches everything at once, into targets that start out zero. For whoever wants a whole image: a
//! sandbox that wakes uses the pager itself.

use std::{io, sync::Arc};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::{
    granted::PackSource,
    image::PageRef,
    manifest::{ImageKind, Manifest, ManifestError},
    pack::PackError,
    pager::{self, PageTarget, Pager, PagerError, Sources},
    seal::DataKeys,
    store::StoreError,
};

/// Takes pages. Called from blocking threads, several at a time, each page once. Zero pages are not written.
pub trait PageWriter: Send + Sync {
    /// Whole pages from `first_page` on.
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()>;

    /// Pages that equal base blocks from `first_block` on. A disk that falls through to its base has nothing to do where the two numbers are the same.
    fn write_base(&self, first_page: u64, first_block: u64, pages: u64) -> io::Result<()>;
}

/// How to restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// GETs in flight at most.
    pub connections: u16,
    /// Bytes of one ranged GET at most.
    pub request_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { connections: 8, request_bytes: 4 << 20 }
    }
}

/// What a restore did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Bytes fetched.
    pub fetched_bytes: u64,
    /// Requests sent.
    pub requests: u64,
    /// Pages written from packs.
    pub pack_pages: u64,
    /// Pages left to the base.
    pub base_pages: u64,
    /// Pages left zero.
    pub zero_pages: u64,
}

/// Why a restore failed. The target is then worthless.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum RestoreError {
    #[error("restore was cancelled")]
    Cancelled,
    #[error("{writers} page writers for {images} images")]
    Writers { writers: usize, images: usize },
    #[error("manifest is not consistent")]
    Manifest(#[source] ManifestError),
    #[error("cannot fetch from pack {key:?}")]
    Fetch { key: String, source: Arc<StoreError> },
    #[error("pack {key:?}, frame {frame}")]
    Pack { key: String, frame: u32, source: PackError },
    #[error("cannot write pages from {first_page} on of {image}")]
    Write { image: String, first_page: u64, source: Arc<io::Error> },
    #[error("pages did not come")]
    Pager(#[source] PagerError),
}

impl From<PagerError> for RestoreError {
    fn from(error: PagerError) -> Self {
        match error {
            PagerError::Cancelled => Self::Cancelled,
            PagerError::Targets { targets, images } => Self::Writers { writers: targets, images },
            PagerError::Fetch { key, source } => Self::Fetch { key, source },
            PagerError::Pack { key, frame, source } => Self::Pack { key, frame, source },
            PagerError::Place { image, first_page, source } => Self::Write { image, first_page, source },
            other => Self::Pager(other),
        }
    }
}

struct Writer(Arc<dyn PageWriter>);

impl PageTarget for Writer {
    fn place(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(first_page, bytes)
    }

    fn place_base(&self, first_page: u64, first_block: u64, pages: u64) -> io::Result<()> {
        self.0.write_base(first_page, first_block, pages)
    }
}

/// Restores every image of the manifest, with the data keys that it needs; `writers` are in the order of its images. When it returns, whatever comes of it, no
/// writer is called any more.
pub async fn restore(
    manifest: &Manifest,
    writers: &[Arc<dyn PageWriter>],
    (source, keys): (Arc<dyn PackSource>, DataKeys),
    options: Options,
    cancel: &CancellationToken,
) -> Result<Stats, RestoreError> {
    if writers.len() != manifest.images.len() {
        return Err(RestoreError::Writers { writers: writers.len(), images: manifest.images.len() });
    }
    manifest.check().map_err(RestoreError::Manifest)?;
    let targets = writers.iter().map(|writer| Arc::new(Writer(Arc::clone(writer))) as Arc<dyn PageTarget>).collect();
    let options = pager::Options {
        connections: options.connections,
        demand_connections: 0,
        sweep_connections: options.connections,
        request_bytes: options.request_bytes,
        // The source has its own patience, and nobody else waits.
        attempts: 1,
        ..pager::Options::default()
    };
    let pager =
        Pager::new(manifest, targets, Sources { store: source, cache: None, keys }, options, Handle::current())?;
    let filled = pager.fill(&[], true, cancel).await;
    let failed = pager.failure();
    pager.stop();
    pager.stopped().await;
    failed.map_or(filled, Err)?;

    let mut stats = Stats::default();
    for (image, writer) in manifest.images.iter().zip(writers) {
        for run in image.map.runs() {
            match run.at {
                PageRef::Zero => stats.zero_pages += run.pages,
                PageRef::Pack { .. } => stats.pack_pages += run.pages,
                PageRef::Base { block } => {
                    stats.base_pages += run.pages;
                    // The pager leaves these to the disk.
                    if matches!(image.kind, ImageKind::Disk(_)) && block == run.start {
                        writer.write_base(run.start, block, run.pages).map_err(|source| RestoreError::Write {
                            image: image.kind.to_string(),
                            first_page: run.start,
                            source: Arc::new(source),
                        })?;
                    }
                }
            }
        }
    }
    let fetched = pager.stats().from_store();
    Ok(Stats { fetched_bytes: fetched.bytes, requests: fetched.requests, ..stats })
}
