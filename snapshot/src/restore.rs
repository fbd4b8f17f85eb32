//! Restore, eagerly: every page of the images from packs into a target that starts out zero.

use std::{collections::BTreeMap, io, ops::Range, sync::Arc};

use futures::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use crate::{
    granted::PackSource,
    image::{PageRef, Run},
    manifest::Manifest,
    pack::{FrameEntry, PackError, decode_frame},
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

/// Restores every image of the manifest; `writers` are in the order of its images.
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
    let (requests, mut stats) = plan(manifest, options.request_bytes);
    // Cancelled by the caller, or by the first failure.
    let stop = cancel.child_token();
    write_bases(manifest, writers, cancel).await?;
    let names: Arc<[String]> = manifest.images.iter().map(|image| image.kind.to_string()).collect();
    let writers: Arc<[Arc<dyn PageWriter>]> = writers.into();
    let fetches = requests.into_iter().map(|request| {
        let (source, writers, names) = (Arc::clone(&source), Arc::clone(&writers), Arc::clone(&names));
        let key = manifest.packs[request.pack as usize].key.clone();
        let stop = stop.clone();
        async move {
            let got = tokio::select! {
                biased;
                () = stop.cancelled() => return Err(RestoreError::Cancelled),
                got = source.get_range(&key, request.range.clone()) => got,
            };
            let stored = got.map_err(|source| RestoreError::Fetch { key: key.clone(), source })?;
            let fetched = stored.len() as u64;
            tokio::task::spawn_blocking(move || place(&request, &stored, &key, &writers, &names))
                .await
                .map_err(RestoreError::Thread)??;
            Ok(fetched)
        }
    });
    let mut fetches = stream::iter(fetches).buffer_unordered(usize::from(options.connections.max(1)));
    let mut failed = None;
    while let Some(fetched) = fetches.next().await {
        match fetched {
            Ok(bytes) => {
                stats.fetched_bytes += bytes;
                stats.requests += 1;
            }
            // All are waited for: no writer is called after this function has returned.
            Err(error) => {
                stop.cancel();
                failed = failed.or(Some(error));
            }
        }
    }
    failed.map_or(Ok(stats), Err)
}

/// Pages of one frame that belong to one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    image: usize,
    start: u64,
    index: u32,
    pages: u64,
}

/// A frame that is needed, and where its pages go.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    number: u32,
    entry: FrameEntry,
    places: Vec<Place>,
}

/// One ranged GET: neighbouring frames of one pack.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Request {
    pack: u32,
    range: Range<u64>,
    frames: Vec<Wanted>,
}

/// Which bytes to fetch, and what of the statistics is known beforehand. The manifest has been checked: its references exist.
fn plan(manifest: &Manifest, request_bytes: u64) -> (Vec<Request>, Stats) {
    let mut stats = Stats::default();
    let mut wanted: BTreeMap<(u32, u32), Vec<Place>> = BTreeMap::new();
    for (image, description) in manifest.images.iter().enumerate() {
        for run in description.map.runs() {
            match run.at {
                PageRef::Zero => stats.zero_pages += run.pages,
                PageRef::Base { .. } => stats.base_pages += run.pages,
                PageRef::Pack { pack, frame, index } => {
                    stats.pack_pages += run.pages;
                    let place = Place { image, start: run.start, index, pages: run.pages };
                    wanted.entry((pack, frame)).or_default().push(place);
                }
            }
        }
    }
    let mut requests: Vec<Request> = Vec::new();
    for ((pack, number), places) in wanted {
        let entry = manifest.packs[pack as usize].frames[number as usize].clone();
        let range = u64::from(entry.offset)..u64::from(entry.offset) + u64::from(entry.stored_len);
        let frame = Wanted { number, entry, places };
        match requests.last_mut() {
            Some(last)
                if last.pack == pack
                    && last.range.end == range.start
                    && range.end - last.range.start <= request_bytes =>
            {
                last.range.end = range.end;
                last.frames.push(frame);
            }
            _ => requests.push(Request { pack, range, frames: vec![frame] }),
        }
    }
    (requests, stats)
}

/// Hands base pages to their writers, which copy them or leave them to the base.
async fn write_bases(
    manifest: &Manifest,
    writers: &[Arc<dyn PageWriter>],
    cancel: &CancellationToken,
) -> Result<(), RestoreError> {
    for (image, writer) in manifest.images.iter().zip(writers) {
        let runs: Vec<Run> =
            image.map.runs().iter().filter(|run| matches!(run.at, PageRef::Base { .. })).copied().collect();
        if runs.is_empty() {
            continue;
        }
        let (writer, name, cancel) = (Arc::clone(writer), image.kind.to_string(), cancel.clone());
        tokio::task::spawn_blocking(move || {
            for run in runs {
                if cancel.is_cancelled() {
                    return Err(RestoreError::Cancelled);
                }
                if let PageRef::Base { block } = run.at {
                    let written = writer.write_base(run.start, block, run.pages);
                    written.map_err(|source| RestoreError::Write {
                        image: name.clone(),
                        first_page: run.start,
                        source,
                    })?;
                }
            }
            Ok(())
        })
        .await
        .map_err(RestoreError::Thread)??;
    }
    Ok(())
}

/// Checks, decodes and writes the frames of one request.
fn place(
    request: &Request,
    stored: &[u8],
    key: &str,
    writers: &[Arc<dyn PageWriter>],
    names: &[String],
) -> Result<(), RestoreError> {
    let damaged = |frame, source| RestoreError::Pack { key: key.to_owned(), frame, source };
    for frame in &request.frames {
        let start = (u64::from(frame.entry.offset) - request.range.start) as usize;
        let end = start + frame.entry.stored_len as usize;
        let expected = request.range.end - request.range.start;
        let bytes = stored
            .get(start..end)
            .ok_or_else(|| damaged(frame.number, PackError::Length { got: stored.len() as u64, expected }))?;
        let pages = decode_frame(&frame.entry, bytes).map_err(|source| damaged(frame.number, source))?;
        for place in &frame.places {
            let from = place.index as usize * PAGE_SIZE;
            let part = &pages[from..from + place.pages as usize * PAGE_SIZE];
            writers[place.image].write(place.start, part).map_err(|source| RestoreError::Write {
                image: names[place.image].clone(),
                first_page: place.start,
                source,
            })?;
        }
    }
    Ok(())
}
