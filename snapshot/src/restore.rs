//! Restore, eagerly: every page of the images from packs into a target that starts out zero.

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    granted::PackSource,
    image::PageRef,
    manifest::{ImageKind, Manifest},
    pack::{self, FrameEntry, PackError},
    page::PAGE_SIZE,
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
    Manifest(#[source] crate::manifest::ManifestError),
    #[error("cannot fetch from pack {key:?}")]
    Fetch { key: String, source: StoreError },
    #[error("pack {key:?}, frame {frame}")]
    Pack { key: String, frame: u32, source: PackError },
    #[error("cannot write pages from {first_page} on of {image}")]
    Write { image: String, first_page: u64, source: io::Error },
    #[error("a restore thread failed")]
    Thread(#[source] tokio::task::JoinError),
}

/// Pages of one frame and where they go.
struct Placement {
    image: usize,
    first_page: u64,
    pages: u64,
    index: u32,
}

/// A frame that is needed.
struct Wanted {
    number: u32,
    entry: FrameEntry,
    placements: Vec<Placement>,
}

/// Frames that lie next to each other in a pack, fetched with one GET.
struct Fetch {
    key: String,
    range: Range<u64>,
    frames: Vec<Wanted>,
}

/// What to fetch, in pack order; and what needs no pack.
#[derive(Default)]
struct Plan {
    fetches: Vec<Fetch>,
    /// Image, first page, first block, pages.
    base: Vec<(usize, u64, u64, u64)>,
    stats: Stats,
}

fn plan(manifest: &Manifest, request_bytes: u64) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<(u32, u32), Vec<Placement>> = BTreeMap::new();
    for (image, input) in manifest.images.iter().enumerate() {
        for run in input.map.runs() {
            match run.at {
                PageRef::Zero => plan.stats.zero_pages += run.pages,
                PageRef::Base { block } => {
                    plan.stats.base_pages += run.pages;
                    plan.base.push((image, run.start, block, run.pages));
                }
                PageRef::Pack { pack, frame, index } => {
                    plan.stats.pack_pages += run.pages;
                    wanted.entry((pack, frame)).or_default().push(Placement {
                        image,
                        first_page: run.start,
                        pages: run.pages,
                        index,
                    });
                }
            }
        }
    }
    let mut last_pack = None;
    for ((pack, number), placements) in wanted {
        // The manifest was checked: the pack and the frame exist.
        let Some((key, entry)) = manifest.packs.get(pack as usize).and_then(|found| {
            let frame = found.frames.get(number as usize)?;
            Some((&found.key, frame.clone()))
        }) else {
            continue;
        };
        let start = u64::from(entry.offset);
        let end = start + u64::from(entry.stored_len);
        let frame = Wanted { number, entry, placements };
        match plan.fetches.last_mut() {
            Some(fetch)
                if last_pack == Some(pack) && fetch.range.end == start && end - fetch.range.start <= request_bytes =>
            {
                fetch.range.end = end;
                fetch.frames.push(frame);
            }
            _ => plan.fetches.push(Fetch { key: key.clone(), range: start..end, frames: vec![frame] }),
        }
        last_pack = Some(pack);
    }
    plan
}

/// Where pages go, and what the images are called.
#[derive(Clone)]
struct Targets {
    writers: Arc<Vec<Arc<dyn PageWriter>>>,
    kinds: Arc<Vec<ImageKind>>,
}

impl Targets {
    fn failed(&self, image: usize, first_page: u64, source: io::Error) -> RestoreError {
        RestoreError::Write { image: self.kinds[image].to_string(), first_page, source }
    }

    fn write_base(&self, runs: &[(usize, u64, u64, u64)]) -> Result<(), RestoreError> {
        for &(image, first_page, first_block, pages) in runs {
            self.writers[image]
                .write_base(first_page, first_block, pages)
                .map_err(|source| self.failed(image, first_page, source))?;
        }
        Ok(())
    }

    /// Checks and decodes the frames of one GET and writes their pages.
    fn write_frames(&self, fetch: &Fetch, bytes: &[u8]) -> Result<(), RestoreError> {
        for frame in &fetch.frames {
            let in_pack = |source| RestoreError::Pack { key: fetch.key.clone(), frame: frame.number, source };
            let start = (u64::from(frame.entry.offset) - fetch.range.start) as usize;
            let end = start + frame.entry.stored_len as usize;
            let stored = bytes.get(start..end).ok_or_else(|| {
                in_pack(PackError::Length {
                    got: bytes.len().saturating_sub(start) as u64,
                    expected: u64::from(frame.entry.stored_len),
                })
            })?;
            let pages = pack::decode_frame(&frame.entry, stored).map_err(in_pack)?;
            for placement in &frame.placements {
                let start = placement.index as usize * PAGE_SIZE;
                let end = start + placement.pages as usize * PAGE_SIZE;
                let bytes = pages
                    .get(start..end)
                    .ok_or_else(|| in_pack(PackError::Length { got: pages.len() as u64, expected: end as u64 }))?;
                self.writers[placement.image]
                    .write(placement.first_page, bytes)
                    .map_err(|source| self.failed(placement.image, placement.first_page, source))?;
            }
        }
        Ok(())
    }
}

/// Restores every image of the manifest; `writers` are in the order of its images. When it returns, whatever comes of it, no
/// writer is called any more.
pub async fn restore(
    manifest: &Manifest,
    writers: &[Arc<dyn PageWriter>],
    source: Arc<dyn PackSource>,
    options: Options,
    cancel: &CancellationToken,
) -> Result<Stats, RestoreError> {
    if writers.len() != manifest.images.len() {
        return Err(RestoreError::Writers { writers: writers.len(), images: manifest.images.len() });
    }
    manifest.check().map_err(RestoreError::Manifest)?;
    let targets = Targets {
        writers: Arc::new(writers.to_vec()),
        kinds: Arc::new(manifest.images.iter().map(|image| image.kind).collect()),
    };
    let Plan { fetches, base, mut stats } = plan(manifest, options.request_bytes);
    stats.requests = fetches.len() as u64;
    stats.fetched_bytes = fetches.iter().map(|fetch| fetch.range.end - fetch.range.start).sum();

    // Stops the others when one fails; a child, so that a caller's cancellation stops all.
    let stop = cancel.child_token();
    let mut tasks = JoinSet::new();
    let to_base = targets.clone();
    tasks.spawn_blocking(move || to_base.write_base(&base));
    let mut fetches = fetches.into_iter();
    let mut result = Ok(());
    loop {
        while tasks.len() < usize::from(options.connections.max(1))
            && result.is_ok()
            && let Some(fetch) = fetches.next()
        {
            tasks.spawn(fetch_and_write(fetch, Arc::clone(&source), targets.clone(), stop.clone()));
        }
        let Some(done) = tasks.join_next().await else {
            return result.map(|()| stats);
        };
        if let Err(error) = done.map_err(RestoreError::Thread).flatten()
            && result.is_ok()
        {
            result = Err(error);
            stop.cancel();
        }
    }
}

async fn fetch_and_write(
    fetch: Fetch,
    source: Arc<dyn PackSource>,
    targets: Targets,
    stop: CancellationToken,
) -> Result<(), RestoreError> {
    let bytes = tokio::select! {
        biased;
        () = stop.cancelled() => return Err(RestoreError::Cancelled),
        bytes = source.get_range(&fetch.key, fetch.range.clone()) => bytes,
    }
    .map_err(|source| RestoreError::Fetch { key: fetch.key.clone(), source })?;
    spawn_blocking(move || targets.write_frames(&fetch, &bytes)).await.map_err(RestoreError::Thread)?
}
