//! The capturing task: has chunks scanned and frames compressed on blocking threads, takes both back in order, puts frames into packs,
//! keeps PUTs in flight.
//!
//! Memory: a chunk holds permits for all its pages while it is scanned, a frame for its pages until it is compressed, then for its stored
//! bytes until its pack is durable and copied. Only this task takes permits, chunk by chunk in order, so what waits for memory waits for
//! something that is on its way out. The bound is at least one pack, a frame and a chunk, so that a pack that is being filled can always be
//! finished. What workers need beside pages, and the room that the open pack and a spare
//! buffer do not use yet, is put aside beforehand.

use std::{
    collections::{BTreeMap, VecDeque},
    future::pending,
    iter::Peekable,
    mem,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, future::OptionFuture, stream::FuturesOrdered};
use rustix::time::{ClockId, clock_gettime};
use tokio::{
    runtime::Handle,
    sync::{AcquireError, OwnedSemaphorePermit, Semaphore, watch},
    task::{JoinError, JoinHandle, JoinSet, spawn_blocking},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    CaptureError, CaptureFailed, CaptureRequest, Captured, CodecChoice, ImageInput, Stats,
    buffer::Buffers,
    encode::{Frame, Framer, Workshop, frame_overhead},
    outcome::{Durable, Outcome, Placed},
    ranges::joined,
    rates::Meter,
    scan::{Chunk, Chunks, Scanned, Settled, Stop, scan},
    sizing::{Sizing, Standing},
};
use crate::{
    granted::PackSink,
    ids::Digest,
    image::MapError,
    pack::{FRAME_PAGES, HEADER_LEN, MAX_BOOT_PACK, PackBuilder},
    page::{self, PAGE_SIZE},
    seal::{DataKey, PackCipher, TAG},
};

/// Pages scanned together: 2 MiB, if memory allows.
const CHUNK: u64 = 512;
/// Threads at most: one capture is not to take a large host for itself.
const MAX_WORKERS: usize = 8;
/// Packs that wait for a connection before workers are stopped: one to send at once when a PUT ends, and one on the way.
const READY: usize = 2;
/// PUTs in flight at first, for each worker: with a store that is near, more only hold memory, and fresh memory costs as much as compressing what
/// goes into it.
const FIRST_PUTS: usize = 2;
/// When packs have waited so long for a connection while workers stood idle, twice as many PUTs may be in flight: the store is slow to answer.
const STALLED: Duration = Duration::from_millis(8);
/// How long local copies may hold up a capture that has stored everything.
const COPIES: Duration = Duration::from_secs(2);

/// A pack that is being filled, or ready to be sent.
struct OpenPack {
    builder: PackBuilder,
    placed: Vec<Placed>,
    boot: bool,
    permit: Option<OwnedSemaphorePermit>,
}

/// A pack whose PUT was confirmed, and its bytes.
struct Stored {
    n: u32,
    durable: Durable,
    bytes: Bytes,
    permit: Option<OwnedSemaphorePermit>,
    took: Duration,
}

impl OpenPack {
    fn new(buffer: Vec<u8>, boot: bool, sealed: bool) -> Self {
        Self { builder: PackBuilder::within(buffer, sealed), placed: Vec::new(), boot, permit: None }
    }

    /// Adds a frame and returns its buffer.
    fn push(&mut self, frame: Frame) -> Vec<u8> {
        let number = self.builder.push(&frame.encoded);
        let mut digests = frame.digests.into_iter();
        let mut index = 0;
        for span in frame.spans {
            let pages = span.end - span.start;
            self.placed.push(Placed {
                image: frame.image,
                start: span.start,
                pages,
                frame: number,
                index,
                digests: digests.by_ref().take(pages as usize).collect(),
            });
            index += pages as u32;
        }
        match (&mut self.permit, frame.permit) {
            (Some(permit), Some(more)) => permit.merge(more),
            (none, more) => *none = more,
        }
        frame.encoded.into_buffer()
    }

    async fn store(self, n: u32, sink: Arc<dyn PackSink>, seal: Option<DataKey>) -> Result<Stored, CaptureError> {
        let sealed = seal.as_ref().map(DataKey::id);
        let builder = match seal {
            None => self.builder,
            Some(key) => {
                // A key of its own for each name, which is never granted twice: what is sent again is the same bytes.
                let cipher = PackCipher::new(&key, &sink.key(n).ok_or(CaptureError::Nameless { n })?);
                let mut builder = self.builder;
                let seal = spawn_blocking(move || {
                    builder.seal(&cipher);
                    builder
                });
                seal.await.map_err(CaptureError::Thread)?
            }
        };
        let (bytes, mut entry) = builder.finish();
        entry.sealed = sealed;
        let started = Instant::now();
        // Only the manifest needs the digest: the PUT does not wait for it.
        let digest = {
            let bytes = bytes.clone();
            spawn_blocking(move || Digest::of(&bytes))
        };
        let key = sink.put(n, bytes.clone()).await;
        let took = started.elapsed();
        entry.key = key.map_err(|source| CaptureError::Store { n, source })?;
        entry.digest = digest.await.map_err(CaptureError::Thread)?;
        let durable = Durable { entry, placed: self.placed, boot: self.boot };
        Ok(Stored { n, durable, bytes, permit: self.permit, took })
    }
}

pub(super) async fn run(mut request: CaptureRequest) -> Result<Captured, CaptureFailed> {
    let mut images = mem::take(&mut request.images);
    for image in &mut images {
        image.rewrite = joined(mem::take(&mut image.rewrite));
    }
    let images = Arc::new(images);
    let parent_packs = mem::take(&mut request.parent_packs);
    let mut pipeline = Pipeline::new(request, Arc::clone(&images));
    let result = match check(&images) {
        Ok(()) => pipeline.run().await,
        Err(error) => Err(error),
    };
    let Pipeline { settled, durable, stats, .. } = pipeline;
    let outcome = Outcome { parent_packs, settled, durable, stats };
    match result {
        Ok(()) => outcome.captured(&images),
        Err(error) => Err(outcome.failed(&images, error)),
    }
}

/// Whether all pages to look at are within their images.
fn check(images: &[ImageInput]) -> Result<(), CaptureError> {
    for image in images {
        let pages = image.parent.pages();
        for range in &image.look_at {
            if range.end > pages {
                let start = range.start;
                return Err(CaptureError::Map {
                    image: image.kind.to_string(),
                    source: MapError::Beyond { start, pages },
                });
            }
        }
    }
    Ok(())
}

type Job<T> = JoinHandle<Result<T, Stop>>;
type Acquire = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

struct Pipeline {
    request: CaptureRequest,
    images: Arc<Vec<ImageInput>>,
    workers: usize,
    /// PUTs in flight at most, whatever happens.
    connections: usize,
    /// And at most for now.
    in_flight: usize,
    /// Since when workers are idle because packs wait for a connection.
    stalled: Option<Instant>,
    sizing: Sizing,
    meter: Meter,
    memory: Arc<Semaphore>,
    looked_at: u64,

    // What blocking threads do, in order. The tracker knows of all of them, those without a handle included.
    jobs: TaskTracker,
    /// Processor time of those that have ended, µs.
    cpu_us: Arc<AtomicU64>,
    threads: Handle,
    stop: CancellationToken,
    chunks: Peekable<Chunks>,
    /// Memory for the next chunk.
    acquire: Option<Acquire>,
    scans: FuturesOrdered<Job<Scanned>>,
    framer: Framer,
    encodes: FuturesOrdered<Job<Frame>>,
    workshop: Arc<Workshop>,

    open: Option<OpenPack>,
    ready: VecDeque<OpenPack>,
    puts: JoinSet<Result<Stored, CaptureError>>,
    copies: JoinSet<()>,
    buffers: Buffers,
    closed: u64,
    started: u32,
    /// Bytes of pages in packs, and what they became.
    placed: u64,
    stored: u64,

    settled: Vec<Settled>,
    durable: BTreeMap<u32, Durable>,
    stats: Stats,
}

impl Pipeline {
    fn new(request: CaptureRequest, images: Arc<Vec<ImageInput>>) -> Self {
        let options = request.options;
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
        let looked_at =
            images.iter().flat_map(|image| &image.look_at).map(|range| range.end.saturating_sub(range.start)).sum();
        let sizing = Sizing::new(looked_at, &options);
        let boot_pages = options.boot_pages.min(MAX_BOOT_PACK / PAGE_SIZE as u64);
        let frame = page::bytes(FRAME_PAGES.into());
        let aside = (workers + 2) as u64 * frame_overhead() + 2 * room(&sizing);
        let least = sizing.full.max(page::bytes(boot_pages)) + 3 * frame;
        let pages = options.memory.saturating_sub(aside).max(least);
        let chunk =
            (pages.saturating_sub(least) / (workers as u64 + 2) / PAGE_SIZE as u64).clamp(FRAME_PAGES.into(), CHUNK);
        let permits = usize::try_from(pages).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        let mut pipeline = Self {
            workers,
            connections: usize::from(options.connections.max(1)),
            in_flight: FIRST_PUTS * workers,
            stalled: None,
            sizing,
            meter: Meter::new(workers),
            memory: Arc::new(Semaphore::new(permits)),
            looked_at,
            jobs: TaskTracker::new(),
            cpu_us: Arc::default(),
            threads: request.threads.clone().unwrap_or_else(Handle::current),
            stop: CancellationToken::new(),
            chunks: Chunks::new(Arc::clone(&images), chunk, boot_pages).peekable(),
            acquire: None,
            scans: FuturesOrdered::new(),
            framer: Framer::default(),
            encodes: FuturesOrdered::new(),
            workshop: Arc::new(Workshop::new(workers + 2, request.seal.is_none())),
            open: None,
            ready: VecDeque::new(),
            puts: JoinSet::new(),
            copies: JoinSet::new(),
            buffers: Buffers::new(room(&sizing)),
            closed: 0,
            started: 0,
            placed: 0,
            stored: 0,
            settled: vec![Settled::default(); images.len()],
            durable: BTreeMap::new(),
            stats: Stats::default(),
            request,
            images,
        };
        pipeline.set_connections();
        pipeline
    }

    /// To the end, whatever that is: when this returns, no thread reads and no PUT is in flight.
    async fn run(&mut self) -> Result<(), CaptureError> {
        let result = self.pump().await;
        self.stop.cancel();
        self.memory.close();
        self.puts.abort_all();
        while let Some(put) = self.puts.join_next().await {
            if let Ok(Ok(stored)) = put {
                self.keep(stored.n, stored.durable);
            }
        }
        self.jobs.close();
        self.jobs.wait().await;
        self.stats.cpu_us = self.cpu_us.load(Ordering::Relaxed);
        if result.is_ok() {
            let cancel = self.request.cancel.clone();
            let copied = async { while self.copies.join_next().await.is_some() {} };
            tokio::select! {
                () = copied => {}
                () = tokio::time::sleep(COPIES) => tracing::warn!("local copies of packs are too slow and are given up"),
                () = cancel.cancelled() => {}
            }
        }
        self.copies.abort_all();
        self.tell();
        result
    }

    async fn pump(&mut self) -> Result<(), CaptureError> {
        let cancel = self.request.cancel.clone();
        let mut connections = self.request.connections.take();
        loop {
            self.finish_packs();
            self.start_puts();
            self.start_jobs();
            if self.idle() {
                return Ok(());
            }
            let stalled = self.look_for_stall();
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(CaptureError::Cancelled),
                more = changed(&mut connections) => self.connections = usize::from(more.max(1)),
                Some(put) = self.puts.join_next() => self.stored(put.map_err(CaptureError::Thread)??),
                Some(_) = self.copies.join_next() => {}
                () = at(stalled) => {
                    (self.in_flight, self.stalled) = (self.in_flight * 2, None);
                }
                Some(frame) = self.encodes.next() => {
                    let frame = finished(frame)?;
                    self.pack(frame);
                }
                Some(scanned) = self.scans.next() => {
                    let scanned = finished(scanned)?;
                    self.scanned(scanned);
                }
                Some(permit) = OptionFuture::from(self.acquire.as_mut()) => {
                    self.acquire = None;
                    // Nobody closes it while this runs.
                    let permit = permit.map_err(|_| CaptureError::Cancelled)?;
                    if let Some(chunk) = self.chunks.next() {
                        self.start_scan(chunk, permit);
                    }
                }
            }
        }
    }

    /// When more PUTs are to be in flight, if nothing happens until then.
    fn look_for_stall(&mut self) -> Option<Instant> {
        let stalled = self.ready.len() >= READY && self.encodes.is_empty() && self.in_flight < self.connections;
        self.stalled = if stalled { self.stalled.or_else(|| Some(Instant::now())) } else { None };
        self.stalled.map(|since| since + STALLED)
    }

    /// PUTs in flight at most. With nothing left to compress, as many as there are packs.
    fn most_puts(&self, over: bool) -> usize {
        if over { self.connections } else { self.connections.min(self.in_flight) }
    }

    fn set_connections(&mut self) {
        if let Some(connections) = &self.request.connections {
            self.connections = usize::from((*connections.borrow()).max(1));
        }
    }

    /// Whether all that was to be done is done.
    fn idle(&mut self) -> bool {
        self.puts.is_empty()
            && self.ready.is_empty()
            && self.open.is_none()
            && self.encodes.is_empty()
            && self.framer.ready.is_empty()
            && self.scans.is_empty()
            && self.chunks.peek().is_none()
    }

    fn start_puts(&mut self) {
        let over = self.all_compressed();
        while self.puts.len() < self.most_puts(over)
            && let Some(pack) = self.ready.pop_front()
        {
            let seal = self.request.seal.clone();
            self.puts.spawn(pack.store(self.started, Arc::clone(&self.request.sink), seal));
            self.started += 1;
        }
    }

    /// Keeps workers busy while packs can be sent: frames first, then chunks as far as frames run short.
    fn start_jobs(&mut self) {
        while self.ready.len() < READY
            && self.encodes.len() < self.workers + 2
            && let Some(raw) = self.framer.ready.pop_front()
        {
            let codec = match self.request.options.codec {
                CodecChoice::Fixed(codec) => codec,
                CodecChoice::Adaptive => self.meter.rates().choose(),
            };
            let (workshop, images) = (Arc::clone(&self.workshop), Arc::clone(&self.images));
            let job = self.spawn(move || workshop.encode(&images, raw, codec));
            self.encodes.push_back(job);
        }
        if self.framer.ready.len() < self.workers
            && self.scans.len() <= self.workers
            && self.acquire.is_none()
            && let Some(chunk) = self.chunks.peek()
        {
            let bytes = page::bytes(chunk.pages) as u32;
            self.acquire = Some(Box::pin(Arc::clone(&self.memory).acquire_many_owned(bytes)));
        }
    }

    fn start_scan(&mut self, chunk: Chunk, permit: OwnedSemaphorePermit) {
        let (images, stop, workshop) = (Arc::clone(&self.images), self.stop.clone(), Arc::clone(&self.workshop));
        let job = self.spawn(move || scan(&images, chunk, permit, &workshop, &stop));
        self.scans.push_back(job);
    }

    /// Has a blocking thread do this, and counts its processor time.
    fn spawn<T: Send + 'static>(&self, job: impl FnOnce() -> Result<T, Stop> + Send + 'static) -> Job<T> {
        let cpu_us = Arc::clone(&self.cpu_us);
        let counted = move || {
            let before = thread_cpu();
            let done = job();
            let took = thread_cpu().saturating_sub(before);
            cpu_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
            done
        };
        self.jobs.spawn_blocking_on(counted, &self.threads)
    }

    fn scanned(&mut self, scanned: Scanned) {
        let Scanned { image, boot, counts, settled, blocks } = scanned;
        self.stats.scanned_pages += counts.scanned;
        self.stats.zero_pages += counts.zero;
        self.stats.base_pages += counts.base;
        self.stats.unchanged_pages += counts.unchanged;
        self.settled[image].append(settled);
        for block in blocks {
            self.framer.push(image, boot, block);
        }
        if self.stats.scanned_pages == self.looked_at {
            self.framer.flush();
        }
    }

    /// Puts a frame into the open pack.
    fn pack(&mut self, frame: Frame) {
        let pages = frame.encoded.pages as usize * PAGE_SIZE;
        let bytes = frame.encoded.bytes().len();
        self.meter.encoded(frame.codec, pages, bytes, frame.took);
        // The boot pack ends with the first frame that is not for it.
        if let Some(other) = self.open.take_if(|open| open.boot != frame.boot) {
            self.close(other);
        }
        self.placed += pages as u64;
        self.stored += bytes as u64;
        let boot = frame.boot;
        let mut open = match self.open.take() {
            Some(open) => open,
            None => OpenPack::new(self.buffers.take(), boot, self.request.seal.is_some()),
        };
        self.workshop.give_back(open.push(frame));
        let settled = self.stats.zero_pages + self.stats.base_pages + self.stats.unchanged_pages;
        let standing = Standing {
            open: open.builder.stored(),
            closed: self.closed,
            scanned: page::bytes(self.stats.scanned_pages),
            sendable: page::bytes(self.stats.scanned_pages - settled),
            placed: self.placed,
            stored: self.stored,
            idle: self.puts.len() + self.ready.len() < self.most_puts(false),
        };
        if !boot && self.sizing.close(standing) {
            self.close(open);
        } else {
            self.open = Some(open);
        }
    }

    /// Sends what is left once nothing more can come.
    fn finish_packs(&mut self) {
        if self.all_compressed()
            && let Some(open) = self.open.take()
        {
            self.close(open);
        }
    }

    /// Whether no frame will come any more.
    fn all_compressed(&mut self) -> bool {
        self.chunks.peek().is_none() && self.scans.is_empty() && self.framer.ready.is_empty() && self.encodes.is_empty()
    }

    fn close(&mut self, mut pack: OpenPack) {
        self.closed += 1;
        pack.builder.fit();
        self.ready.push_back(pack);
    }

    fn stored(&mut self, stored: Stored) {
        let Stored { n, durable, bytes, permit, took } = stored;
        self.meter.stored(bytes.len(), took, self.puts.len() + 1, self.connections);
        self.keep(n, durable);
        if self.request.sink.keeps_copies() {
            let sink = Arc::clone(&self.request.sink);
            self.copies.spawn(async move {
                sink.keep_copy(n, bytes).await;
                drop(permit);
            });
        } else {
            drop(permit);
            self.buffers.give_back(bytes);
        }
        self.tell();
    }

    fn keep(&mut self, n: u32, durable: Durable) {
        self.stats.packs += 1;
        self.stats.sent_bytes += u64::from(durable.entry.size);
        self.stats.sent_pages += durable.entry.frames.iter().map(|frame| u64::from(frame.pages)).sum::<u64>();
        self.durable.insert(n, durable);
    }

    fn tell(&self) {
        if let Some(progress) = &self.request.progress {
            progress.send_replace(self.stats);
        }
    }
}

/// Processor time of this thread so far.
fn thread_cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    // It only grows from zero.
    Duration::try_from(now).unwrap_or_default()
}

/// What a pack's buffer has room for.
fn room(sizing: &Sizing) -> u64 {
    HEADER_LEN + sizing.full + page::bytes(FRAME_PAGES.into()) + TAG as u64
}

/// What a job answered. Unwanted only ever follows the end of the capture.
fn finished<T>(job: Result<Result<T, Stop>, JoinError>) -> Result<T, CaptureError> {
    match job.map_err(CaptureError::Thread)? {
        Ok(done) => Ok(done),
        Err(Stop::Failed(error)) => Err(error),
        Err(Stop::Unwanted) => Err(CaptureError::Cancelled),
    }
}

/// That moment, if there is one; never otherwise.
async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => pending().await,
    }
}

/// The next number of connections; never, when nobody will say another.
async fn changed(connections: &mut Option<watch::Receiver<u16>>) -> u16 {
    if let Some(receiver) = connections {
        if receiver.changed().await.is_ok() {
            return *receiver.borrow_and_update();
        }
        *connections = None;
    }
    pending().await
}
