//! Restore, eagerly: every page of the images from packs into a target that starts out zero.

use std::{io, sync::Arc};

use tokio_util::sync::CancellationToken;

use crate::{granted::PackSource, manifest::Manifest, pack::PackError, store::StoreError};

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
        Self {
            connections: 8,
            request_bytes: 4 << 20,
        }
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
    Manifest(#[source] crate::manifest::ManifestError),
    #[error("cannot fetch from pack {key:?}")]
    Fetch { key: String, source: StoreError },
    #[error("pack {key:?}, frame {frame}")]
    Pack {
        key: String,
        frame: u32,
        source: PackError,
    },
    #[error("cannot write pages from {first_page} on of {image}")]
    Write {
        image: String,
        first_page: u64,
        source: io::Error,
    },
    #[error("a restore thread failed")]
    Thread(#[source] tokio::task::JoinError),
}

/// Restores every image of the manifest; `writers` are in the order of its images.
pub async fn restore(
    manifest: &Manifest,
    writers: &[Arc<dyn PageWriter>],
    source: Arc<dyn PackSource>,
    options: Options,
    cancel: &CancellationToken,
) -> Result<Stats, RestoreError> {
    let _ = (manifest, writers, source, options, cancel);
    todo!()
}
