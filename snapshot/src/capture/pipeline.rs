//! The capturing task: takes frames from the scanning thread, has them compressed, puts them into packs, keeps PUTs in flight.
//!
//! Memory: each frame holds permits for its pages, then for its stored bytes until its pack is durable. The bound is at least one pack and
//! two frames, so that a pack that is being filled can always be finished.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use futures::{Stream, StreamExt, stream};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{JoinError, JoinHandle, JoinSet, spawn_blocking},
};

use super::{
    CaptureError, CaptureFailed, CaptureRequest, Captured, CodecChoice, ImageInput, Partial, Stats,
    scan::{Counters, RawFrame, Scan, ScanEnd, Stop},
};
use crate::{
    granted::PackSink,
    image::{ImageMap, MapError, PageRef, Run},
    pack::{self, Codec, EncodedFrame, MAX_BOOT_PACK, PackBuilder, PackEntry},
    page::{self, PAGE_SIZE},
    store::StoreError,
};

/// A compressed frame and which pages it holds.
struct Frame {
    encoded: EncodedFrame,
    image: usize,
    spans: Vec<Range<u64>>,
    boot: bool,
    permit: OwnedSemaphorePermit,
}

/// Pages of one image within a pack.
struct Placed {
    image: usize,
    start: u64,
    pages: u64,
    frame: u32,
    index: u32,
}

/// A pack that is being filled, or ready to be sent.
struct OpenPack {
    builder: PackBuilder,
    placed: Vec<Placed>,
    boot: bool,
    permits: Vec<OwnedSemaphorePermit>,
}

/// A pack whose PUT was confirmed.
struct Durable {
    entry: PackEntry,
    placed: Vec<Placed>,
    boot: bool,
}

impl OpenPack {
    fn new(boot: bool) -> Self {
        Self { builder: PackBuilder::new(), placed: Vec::new(), boot, permits: Vec::new() }
    }

    fn push(&mut self, frame: Frame) {
        let number = self.builder.push(&frame.encoded);
        let mut index = 0;
        for span in frame.spans {
            let pages = span.end - span.start;
            self.placed.push(Placed { image: frame.image, start: span.start, pages, frame: number, index });
            index += pages as u32;
        }
        self.permits.push(frame.permit);
    }

    async fn store(self, n: u32, sink: Arc<dyn PackSink>) -> Result<(u32, Durable), CaptureError> {
        let builder = self.builder;
        let (bytes, mut entry) = spawn_blocking(move || builder.finish()).await.map_err(CaptureError::Thread)?;
        let failed = |source: StoreError| CaptureError::Store { n, source };
        entry.key = sink.put(n, bytes).await.map_err(failed)?;
        drop(self.permits);
        let durable = Durable { entry, placed: self.placed, boot: self.boot };
        Ok((n, durable))
    }
}

/// Compresses frames on blocking threads, several at a time, and yields them in order.
fn compressed(
    mut frames: mpsc::Receiver<RawFrame>,
    codec: Codec,
    workers: usize,
) -> impl Stream<Item = Result<Frame, JoinError>> + Unpin {
    stream::poll_fn(move |context| frames.poll_recv(context))
        .map(move |raw| {
            spawn_blocking(move || {
                let RawFrame { bytes, image, spans, boot, mut permit } = raw;
                let encoded = pack::encode_frame(codec, &bytes);
                let spare = permit.num_permits().saturating_sub(encoded.bytes.len());
                drop(permit.split(spare));
                Frame { encoded, image, spans, boot, permit }
            })
        })
        .buffered(workers)
}

/// What is known of the capture so far.
struct Progress {
    request: CaptureRequest,
    counters: Arc<Counters>,
    durable: BTreeMap<u32, Durable>,
}

pub(super) async fn run(mut request: CaptureRequest) -> Result<Captured, CaptureFailed> {
    let images = Arc::new(std::mem::take(&mut request.images));
    let mut progress = Progress { request, counters: Arc::default(), durable: BTreeMap::new() };
    if let Err(error) = check(&images) {
        let settled = vec![Vec::new(); images.len()];
        return Err(progress.failed(&images, &settled, error));
    }
    let (settled, result) = progress.pump(&images).await;
    match result {
        Ok(()) => progress.captured(&images, &settled),
        Err(error) => Err(progress.failed(&images, &settled, error)),
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

impl Progress {
    /// Runs the pipeline to its end. Whatever that is, the scanning thread and all PUTs have ended when this returns.
    async fn pump(&mut self, images: &Arc<Vec<ImageInput>>) -> (Vec<Vec<Run>>, Result<(), CaptureError>) {
        let options = self.request.options;
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let looked_at =
            images.iter().flat_map(|image| &image.look_at).map(|range| range.end.saturating_sub(range.start)).sum();
        let target = pack::pack_size(page::bytes(looked_at), options.connections);
        let boot_pages = options.boot_pages.min(MAX_BOOT_PACK / PAGE_SIZE as u64);
        let least = target.max(page::bytes(boot_pages)) + 2 * page::bytes(pack::FRAME_PAGES.into());
        let memory = Arc::new(Semaphore::new((options.memory.max(least) as usize).min(Semaphore::MAX_PERMITS)));
        let codec = match options.codec {
            CodecChoice::Fixed(codec) => codec,
            CodecChoice::Adaptive => Codec::Lz4,
        };
        let (sender, receiver) = mpsc::channel(workers);
        let scan = Scan {
            images: Arc::clone(images),
            boot_pages,
            frames: sender,
            memory: Arc::clone(&memory),
            counters: Arc::clone(&self.counters),
            runtime: Handle::current(),
        };
        let mut scan = Some(spawn_blocking(move || scan.run()));
        let mut settled = vec![Vec::new(); images.len()];
        let mut puts = JoinSet::new();
        let frames = compressed(receiver, codec, workers);

        let mut result = self.assemble(frames, target, &mut puts, &mut scan, &mut settled).await;
        // On failure: no more frames (the stream is gone), no more memory, no more PUTs; then wait until all have noticed.
        memory.close();
        puts.abort_all();
        while let Some(put) = puts.join_next().await {
            if let Ok(Ok((n, durable))) = put {
                self.durable.insert(n, durable);
            }
        }
        if let Some(scan) = scan {
            let ended = ended(scan.await, &mut settled);
            result = result.and(ended);
        }
        (settled, result)
    }

    async fn assemble(
        &mut self,
        mut frames: impl Stream<Item = Result<Frame, JoinError>> + Unpin,
        target: u64,
        puts: &mut JoinSet<Result<(u32, Durable), CaptureError>>,
        scan: &mut Option<JoinHandle<ScanEnd>>,
        settled: &mut Vec<Vec<Run>>,
    ) -> Result<(), CaptureError> {
        let cancel = self.request.cancel.clone();
        let connections = usize::from(self.request.options.connections.max(1));
        let mut next = 0;
        let mut open: Option<OpenPack> = None;
        let mut ready: VecDeque<OpenPack> = VecDeque::new();
        let mut more = true;
        loop {
            while puts.len() < connections
                && let Some(pack) = ready.pop_front()
            {
                puts.spawn(pack.store(next, Arc::clone(&self.request.sink)));
                next += 1;
            }
            if !more && puts.is_empty() {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(CaptureError::Cancelled),
                Some(put) = puts.join_next() => {
                    let (n, durable) = put.map_err(CaptureError::Thread)??;
                    self.durable.insert(n, durable);
                    self.tell();
                }
                frame = frames.next(), if more && ready.is_empty() => {
                    if let Some(frame) = frame {
                        let frame = frame.map_err(CaptureError::Thread)?;
                        // The boot pack ends with the first frame that is not for it.
                        if let Some(other) = open.take_if(|open| open.boot != frame.boot) {
                            ready.push_back(other);
                        }
                        let pack = open.get_or_insert_with(|| OpenPack::new(frame.boot));
                        pack.push(frame);
                        if !pack.boot && pack.builder.len() >= target {
                            ready.extend(open.take());
                        }
                    } else {
                        more = false;
                        if let Some(scan) = scan.take() {
                            ended(scan.await, settled)?;
                        }
                        ready.extend(open.take());
                        self.tell();
                    }
                }
            }
        }
    }

    fn stats(&self) -> Stats {
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let entries = || self.durable.values().map(|durable| &durable.entry);
        Stats {
            scanned_pages: count(&self.counters.scanned),
            zero_pages: count(&self.counters.zero),
            base_pages: count(&self.counters.base),
            unchanged_pages: 0,
            sent_pages: entries().flat_map(|entry| &entry.frames).map(|frame| u64::from(frame.pages)).sum(),
            sent_bytes: entries().map(|entry| u64::from(entry.size)).sum(),
            packs: self.durable.len() as u32,
        }
    }

    fn tell(&self) {
        if let Some(progress) = &self.request.progress {
            progress.send_replace(self.stats());
        }
    }

    /// For each image, the runs of what needs no pack and of what is in durable packs.
    fn runs(&self, settled: &[Vec<Run>]) -> Vec<Vec<Run>> {
        let mut runs = settled.to_vec();
        let first = self.request.parent_packs.len() as u32;
        for (pack, durable) in (first..).zip(self.durable.values()) {
            for placed in &durable.placed {
                runs[placed.image].push(Run {
                    start: placed.start,
                    pages: placed.pages,
                    at: PageRef::Pack { pack, frame: placed.frame, index: placed.index },
                });
            }
        }
        runs
    }

    fn packs(&self) -> Vec<PackEntry> {
        let new = self.durable.values().map(|durable| &durable.entry);
        self.request.parent_packs.iter().chain(new).cloned().collect()
    }

    fn captured(self, images: &[ImageInput], settled: &[Vec<Run>]) -> Result<Captured, CaptureFailed> {
        let runs = self.runs(settled);
        match overlaid(images, &runs) {
            Ok(maps) => Ok(Captured {
                packs: self.packs(),
                maps,
                boot_pack: self
                    .durable
                    .values()
                    .position(|durable| durable.boot)
                    .map(|at| (self.request.parent_packs.len() + at) as u32),
                stats: self.stats(),
            }),
            Err(error) => Err(self.failed(images, &vec![Vec::new(); images.len()], error)),
        }
    }

    fn failed(&self, images: &[ImageInput], settled: &[Vec<Run>], error: CaptureError) -> CaptureFailed {
        let runs = self.runs(settled);
        let partial = match overlaid(images, &runs) {
            Ok(maps) => Partial {
                packs: self.packs(),
                maps,
                done: runs.iter().map(|runs| covered(runs)).collect(),
                stats: self.stats(),
            },
            // Nothing of it can be used again.
            Err(_) => Partial {
                packs: self.request.parent_packs.clone(),
                maps: images.iter().map(|image| image.parent.clone()).collect(),
                done: vec![Vec::new(); images.len()],
                stats: self.stats(),
            },
        };
        CaptureFailed { error, partial: Box::new(partial) }
    }
}

/// Takes what the scanning thread settled, and how it ended.
fn ended(scan: Result<ScanEnd, JoinError>, settled: &mut Vec<Vec<Run>>) -> Result<(), CaptureError> {
    let end = scan.map_err(CaptureError::Thread)?;
    *settled = end.settled;
    match end.result {
        // Unwanted only ever follows another failure, which is the one to report.
        Ok(()) | Err(Stop::Unwanted) => Ok(()),
        Err(Stop::Failed(error)) => Err(error),
    }
}

fn overlaid(images: &[ImageInput], runs: &[Vec<Run>]) -> Result<Vec<ImageMap>, CaptureError> {
    images
        .iter()
        .zip(runs)
        .map(|(image, runs)| {
            image.parent.overlay(runs).map_err(|source| CaptureError::Map { image: image.kind.to_string(), source })
        })
        .collect()
}

/// The pages of the runs as sorted, disjoint ranges.
fn covered(runs: &[Run]) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = runs.iter().map(|run| run.start..run.end()).collect();
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
