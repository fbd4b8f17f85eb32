//! The pager: brings the pages of a manifest's images in lazily: on demand, in a recorded order, and by a sweep.
//!
//! It knows no userfaultfd and no devices: [`PageTarget`]s place pages. What is fetched, checked and decoded at once is a frame; all
//! pages that refer to it are then placed, and each page of an image at most once.
//!
//! | file | what |
//! | --- | --- |
//! | `table.rs` | which frame holds which pages; never changes |
//! | `units.rs` | which frames are placed, who brings one in, who waits |
//! | `gate.rs` | who may use a connection: demand first |
//! | `fetch.rs` | bringing frames in: base, cache, store |
//! | `fill.rs` | the background: recorded order and sweep |
//! | `cache.rs`, [`cache_dir`] | frames on the local disk, and the directory that bounds them |
//!
//! # Threads
//!
//! A [`Pager`] may be used from any thread. GETs are tasks of the runtime it was given; checking, decoding and placing happen on its
//! blocking threads, and on the thread that calls [`Pager::fetch_blocking`] for what the base or the cache has.
//!
//! # Failure
//!
//! A demand that cannot be met, and a page that cannot be placed, end the pager: everybody who waits, then or later, gets that
//! error. What fails in the background fails the call of [`Pager::fill`] alone; a demand may try again.

mod cache;
pub mod cache_dir;
mod fetch;
mod fill;
mod gate;
mod stats;
mod table;
mod units;

use std::{
    io,
    ops::Range,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
    time,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    granted::PackSource,
    manifest::{Manifest, Touch},
    pack::PackError,
    seal::{DataKeyId, DataKeys},
    store::StoreError,
};

use fetch::Shared;
use fill::{Attempts, UnitSet};
use gate::{Gate, Limits};
use table::Table;
use units::{Signal, Units};

pub use cache::PackCache;
pub use stats::{ByUrgency, PagerStats, Traffic};

/// Where pages of one image go. Called from the pager's threads, concurrently; each page at most once per pager. Starts out zero: zero
/// pages are not placed. Nor are pages of a disk that equal the base block of the same number: it reads its base there.
pub trait PageTarget: Send + Sync {
    /// Whole pages from `first_page` on, their bytes checked.
    fn place(&self, first_page: u64, bytes: &[u8]) -> io::Result<()>;

    /// Pages that equal base blocks from `first_block` on.
    fn place_base(&self, first_page: u64, first_block: u64, pages: u64) -> io::Result<()>;
}

/// Where packs come from.
#[derive(Clone)]
pub struct Sources {
    /// Has everything. Tries again and hedges by itself.
    pub store: Arc<dyn PackSource>,
    /// Asked first. Has what the store has: of encrypted packs ciphertext.
    pub cache: Option<Arc<PackCache>>,
    /// The data keys of encrypted packs.
    pub keys: DataKeys,
}

/// Where a pager's work runs.
#[derive(Clone, Debug)]
pub struct Threads {
    /// Tasks, and what somebody waits for.
    pub runtime: Handle,
    /// Blocking work of the background. A runtime of its own can give it threads of a lower priority.
    pub background: Handle,
}

impl From<Handle> for Threads {
    fn from(runtime: Handle) -> Self {
        Self { background: runtime.clone(), runtime }
    }
}

/// How urgent a fetch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Urgency {
    /// Somebody waits. Overtakes everything that is not sent yet.
    Demand,
    /// Somebody will soon.
    WorkingSet,
    /// Nobody is known to.
    Sweep,
}

/// How to fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// GETs in flight at most. A source may send one of its own accord a second time.
    pub connections: u16,
    /// Of these, kept for demand.
    pub demand_connections: u16,
    /// Of the rest, for the sweep at most.
    pub sweep_connections: u16,
    /// Bytes of one GET of the background at most, and of one read of the cache.
    pub request_bytes: u64,
    /// Bytes of one GET of a demand at most: a larger one goes over several connections.
    pub demand_bytes: u64,
    /// Bytes between two wanted frames that are fetched along rather than sending two GETs.
    pub hole_bytes: u64,
    /// Fetched bytes of the background that are held at most.
    pub buffer_bytes: u64,
    /// Bytes that the sweep moves a second at most; not bounded without.
    pub sweep_bytes_per_second: Option<u64>,
    /// Attempts of a fetch at most, each of which the source may make several of.
    pub attempts: u32,
    /// Wait before the second attempt; doubles each time.
    pub backoff: Duration,
    /// Of one GET, and of one wait for pages.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connections: 16,
            demand_connections: 4,
            sweep_connections: 2,
            request_bytes: 4 << 20,
            demand_bytes: 1 << 20,
            hole_bytes: 64 << 10,
            buffer_bytes: 16 << 20,
            sweep_bytes_per_second: None,
            attempts: 2,
            backoff: Duration::from_millis(200),
            deadline: Duration::from_secs(150),
        }
    }
}

/// Why pages do not come.
#[derive(Clone, Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum PagerError {
    #[error("{targets} page targets for {images} images")]
    Targets { targets: usize, images: usize },
    #[error("manifest cannot be paged: {0}")]
    Manifest(&'static str),
    #[error("pack {key:?} is encrypted under data key {id}, which was not given")]
    NoKey { key: String, id: DataKeyId },
    #[error("image {image} has no pages {start}..{end}")]
    NoSuchPages { image: usize, start: u64, end: u64 },
    #[error("cannot fetch from pack {key:?}")]
    Fetch { key: String, source: Arc<StoreError> },
    #[error("pack {key:?}, frame {frame}")]
    Pack { key: String, frame: u32, source: PackError },
    #[error("cannot place pages from {first_page} on of {image}")]
    Place { image: String, first_page: u64, source: Arc<io::Error> },
    #[error("pages did not come within {0:?}")]
    Deadline(Duration),
    #[error("the fill was cancelled")]
    Cancelled,
    #[error("the pager was stopped")]
    Stopped,
    #[error("a task or thread of the pager ended before its work was done")]
    Ended,
}

impl PagerError {
    /// Whether the same may succeed later.
    fn is_retryable(&self) -> bool {
        match self {
            Self::Fetch { source, .. } => source.is_retryable(),
            Self::Deadline(_) => true,
            _ => false,
        }
    }
}

/// The pager of one restored machine. A handle: clones are the same pager.
#[derive(Clone)]
pub struct Pager {
    shared: Arc<Shared>,
}

impl Pager {
    /// A pager for the images of a manifest, with a target for each. Fetches nothing yet.
    pub fn new(
        manifest: &Manifest,
        targets: Vec<Arc<dyn PageTarget>>,
        sources: Sources,
        options: Options,
        threads: impl Into<Threads>,
    ) -> Result<Self, PagerError> {
        if targets.len() != manifest.images.len() {
            return Err(PagerError::Targets { targets: targets.len(), images: manifest.images.len() });
        }
        let table = Table::new(manifest, &sources.keys)?;
        let threads = threads.into();
        let all = usize::from(options.connections.max(1));
        let background = all.saturating_sub(options.demand_connections.into()).max(1);
        let sweep = background.min(options.sweep_connections.max(1).into());
        let parallelism = thread::available_parallelism().map_or(1, usize::from);
        let shared = Shared {
            units: Arc::new(Units::new(table.units())),
            table,
            targets,
            sources,
            options,
            gate: Arc::new(Gate::new(Limits { all, background, sweep })),
            counters: stats::Counters::default(),
            runtime: threads.runtime,
            background: threads.background,
            tracker: TaskTracker::new(),
            workers: Arc::new(Semaphore::new(parallelism)),
            parallelism,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Completes when every page of `pages` of image `image` is placed. Dropped, it gives up; what was begun for it goes on.
    pub async fn fetch(&self, image: usize, pages: Range<u64>, urgency: Urgency) -> Result<(), PagerError> {
        let units = self.missing(image, &pages)?;
        if units.is_empty() {
            return Ok(());
        }
        let shared = &self.shared;
        if urgency != Urgency::Demand {
            return shared.drive(&units, urgency, &CancellationToken::new()).await;
        }
        let deadline = shared.options.deadline;
        let _demand = shared.gate.demand();
        let started = Instant::now();
        let mut attempts = Attempts::new(&shared.options);
        loop {
            let (signal, done) = oneshot::channel();
            let Some(_waiting) = shared.units.wait_for(&units, Signal::Task(signal))? else { break };
            shared.demand(&units, false);
            let result = match time::timeout(deadline, done).await {
                Ok(result) => result.unwrap_or(Err(PagerError::Ended)),
                Err(_) => return Err(self.end(PagerError::Deadline(deadline))),
            };
            let Err(error) = result else { break };
            let Some(wait) = attempts.after(&error) else { return Err(self.end(error)) };
            shared.pause(wait).await;
        }
        shared.counters.waited(started.elapsed());
        Ok(())
    }

    /// The same from a thread outside the runtime, which it blocks: a fault handler, a device's thread.
    pub fn fetch_blocking(&self, image: usize, pages: Range<u64>, urgency: Urgency) -> Result<(), PagerError> {
        if urgency != Urgency::Demand {
            return self.shared.runtime.block_on(self.fetch(image, pages, urgency));
        }
        let units = self.missing(image, &pages)?;
        if units.is_empty() {
            return Ok(());
        }
        let shared = &self.shared;
        let deadline = shared.options.deadline;
        let _demand = shared.gate.demand();
        let started = Instant::now();
        let mut attempts = Attempts::new(&shared.options);
        loop {
            let (signal, done) = mpsc::sync_channel(1);
            let Some(_waiting) = shared.units.wait_for(&units, Signal::Thread(signal))? else { break };
            shared.demand(&units, true);
            let result = match done.recv_timeout(deadline) {
                Ok(result) => result,
                Err(mpsc::RecvTimeoutError::Disconnected) => Err(PagerError::Ended),
                Err(mpsc::RecvTimeoutError::Timeout) => return Err(self.end(PagerError::Deadline(deadline))),
            };
            let Err(error) = result else { break };
            let Some(wait) = attempts.after(&error) else { return Err(self.end(error)) };
            shared.runtime.block_on(shared.pause(wait));
        }
        shared.counters.waited(started.elapsed());
        Ok(())
    }

    /// Pages whose bytes come from packs or the base and are not placed yet, as sorted ranges with gaps between them. For a
    /// capture: these are references to the parent, and stay what they are.
    pub fn absent(&self, image: usize) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for placement in self.shared.table.all_placements(image) {
            if self.shared.units.is_placed(placement.unit) {
                continue;
            }
            let range = placement.range();
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// Whether every page of `pages` of image `image` is placed, zero ones trivially. Cheap, and takes no lock.
    pub fn is_placed(&self, image: usize, pages: Range<u64>) -> bool {
        let placements = self.shared.table.placements(image, &pages);
        placements.is_some_and(|placements| placements.iter().all(|one| self.shared.units.is_placed(one.unit)))
    }

    /// Brings in the pages of `order`, first touched first; then, if `sweep`, all the others. Returns when they are placed, and on
    /// a failure that outlasts the attempts: the pager goes on, and this may be called again. Dropped or cancelled, it sends
    /// nothing more.
    pub async fn fill(&self, order: &[Touch], sweep: bool, cancel: &CancellationToken) -> Result<(), PagerError> {
        let shared = &self.shared;
        let mut seen = UnitSet::new(shared.table.units());
        let mut first = Vec::new();
        for touch in order {
            let (image, end) = (touch.image as usize, touch.start.saturating_add(touch.pages));
            let placements = shared.table.placements(image, &(touch.start..end)).ok_or(PagerError::NoSuchPages {
                image,
                start: touch.start,
                end,
            })?;
            first.extend(placements.iter().map(|placement| placement.unit).filter(|&unit| seen.insert(unit)));
        }
        shared.drive(&first, Urgency::WorkingSet, cancel).await?;
        if sweep {
            let all: Vec<u32> = (0..shared.table.units()).collect();
            shared.drive(&all, Urgency::Sweep, cancel).await?;
        }
        Ok(())
    }

    /// What was done so far.
    pub fn stats(&self) -> PagerStats {
        self.shared.counters.get()
    }

    /// Why the pager has ended, if it has.
    pub fn failure(&self) -> Option<PagerError> {
        self.shared.units.failure()
    }

    /// Ends the pager: whoever waits gets [`PagerError::Stopped`], and no frame is placed any more but those being placed now.
    pub fn stop(&self) {
        self.shared.units.fail(PagerError::Stopped);
    }

    /// After [`Pager::stop`]: completes when no target is called any more.
    pub async fn stopped(&self) {
        self.shared.tracker.close();
        self.shared.tracker.wait().await;
    }

    /// Units of these pages that are not placed, ascending.
    fn missing(&self, image: usize, pages: &Range<u64>) -> Result<Vec<u32>, PagerError> {
        let placements = self.shared.table.placements(image, pages).ok_or(PagerError::NoSuchPages {
            image,
            start: pages.start,
            end: pages.end,
        })?;
        let unplaced = placements.iter().map(|one| one.unit).filter(|&unit| !self.shared.units.is_placed(unit));
        let mut units: Vec<u32> = unplaced.collect();
        units.sort_unstable();
        units.dedup();
        Ok(units)
    }

    fn end(&self, error: PagerError) -> PagerError {
        self.shared.units.fail(error);
        self.shared.ended()
    }
}

#[cfg(test)]
mod tests;
