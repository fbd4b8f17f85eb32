//! The writing side of a capture: compression on blocking threads, packs put together in order, PUTs in flight.
//!
//! One task owns the pack being built and the PUTs. A frame's memory permits travel with it until its pack is durable; what compression
//! saved is given back at once. There are always permits for one full pack and a frame, so the pack being built can fill up whatever the
//! bound, and with it the capture goes on.

use std::num::NonZeroUsize;
use std::sync::Arc;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet};

use super::outcome::{Content, Outcome, Packed};
use super::scan::{RawFrame, Scanned, Scanner};
use super::{CaptureError, CaptureFailed, CaptureRequest, Captured, Stats};
use crate::pack::{Codec, EncodedFrame, FRAME_PAGES, MAX_BOOT_PACK, PackBuilder, encode_frame, pack_size};
use crate::page::PAGE_SIZE;
use crate::store::StoreError;

/// Frames that may wait between two stages.
const BACKLOG: usize = 4;

/// A compressed frame.
struct Frame {
    image: usize,
    pages: Vec<u64>,
    boot: bool,
    encoded: EncodedFrame,
    permit: OwnedSemaphorePermit,
}

/// A PUT that ended.
struct Put {
    packed: Packed,
    pages: u64,
    result: Result<String, StoreError>,
}

pub(super) async fn run(request: CaptureRequest) -> Result<Captured, CaptureFailed> {
    let CaptureRequest { images, parent_packs, sink, options, cancel, progress } = request;
    let images: Arc<[_]> = images.into();
    let look_at: u64 = images.iter().flat_map(|image| &image.look_at).map(|range| range.end - range.start).sum();
    let target = pack_size(look_at.saturating_mul(PAGE_SIZE as u64), options.connections);
    let largest = if options.boot_pages > 0 { MAX_BOOT_PACK } else { target };
    let least = largest / PAGE_SIZE as u64 + u64::from(FRAME_PAGES);
    let permits = (options.memory / PAGE_SIZE as u64).max(least).min(Semaphore::MAX_PERMITS as u64) as usize;
    let permits = Arc::new(Semaphore::new(permits));
    let (frames_in, frames) = mpsc::channel(BACKLOG);
    let scanner = Scanner {
        images: Arc::clone(&images),
        boot_pages: options.boot_pages,
        permits: Arc::clone(&permits),
        frames: frames_in,
        cancel: cancel.clone(),
        runtime: Handle::current(),
    };
    let scan = tokio::task::spawn_blocking(move || scanner.run());
    let mut writer = Writer {
        sink,
        target,
        connections: usize::from(options.connections.max(1)),
        builder: PackBuilder::new(),
        contents: Vec::new(),
        held: Vec::new(),
        boot: false,
        next: 0,
        puts: JoinSet::new(),
        durable: Vec::new(),
        stats: Stats::default(),
        progress,
    };
    let written = {
        let mut encoded = std::pin::pin!(encode(frames, options.codec));
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(CaptureError::Cancelled),
            written = writer.write_all(&mut encoded) => written,
        }
        // The channel closes here: a scanner that still runs finds nobody to send to.
    };
    permits.close();
    let error = match written {
        Ok(()) => None,
        Err(error) => {
            // What was confirmed in the meantime counts; the rest was never referred to.
            writer.take_finished();
            writer.puts.abort_all();
            Some(error)
        }
    };
    let scanned = scan
        .await
        .unwrap_or_else(|e| Scanned { plain: vec![Vec::new(); images.len()], error: Some(CaptureError::Thread(e)), ..Scanned::default() });
    let outcome = Outcome { scanned, durable: writer.durable, stats: writer.stats, error };
    outcome.conclude(&images, parent_packs)
}

/// Compresses and digests frames on all cores, in order.
fn encode(frames: mpsc::Receiver<RawFrame>, codec: Codec) -> impl Stream<Item = Result<Frame, JoinError>> {
    let workers = std::thread::available_parallelism().map_or(2, NonZeroUsize::get);
    stream::unfold(frames, |mut frames| async move { Some((frames.recv().await?, frames)) })
        .map(move |raw| {
            tokio::task::spawn_blocking(move || {
                let RawFrame { image, pages, bytes, boot, mut permit } = raw;
                let encoded = encode_frame(codec, &bytes);
                let kept = encoded.bytes.len().div_ceil(PAGE_SIZE);
                drop(permit.split(pages.len().saturating_sub(kept)));
                Frame { image, pages, boot, encoded, permit }
            })
        })
        .buffered(workers)
}

struct Writer {
    sink: Arc<dyn crate::granted::PackSink>,
    target: u64,
    connections: usize,
    builder: PackBuilder,
    contents: Vec<Content>,
    held: Vec<OwnedSemaphorePermit>,
    boot: bool,
    next: u32,
    puts: JoinSet<Put>,
    durable: Vec<Packed>,
    stats: Stats,
    progress: Option<tokio::sync::watch::Sender<Stats>>,
}

impl Writer {
    async fn write_all(
        &mut self,
        frames: &mut (impl Stream<Item = Result<Frame, JoinError>> + Unpin),
    ) -> Result<(), CaptureError> {
        loop {
            tokio::select! {
                Some(put) = self.puts.join_next() => self.finished(put)?,
                frame = frames.next() => match frame {
                    Some(frame) => self.add(frame.map_err(CaptureError::Thread)?).await?,
                    None => break,
                },
            }
        }
        self.flush().await?;
        while let Some(put) = self.puts.join_next().await {
            self.finished(put)?;
        }
        Ok(())
    }

    async fn add(&mut self, frame: Frame) -> Result<(), CaptureError> {
        let limit = if self.boot { MAX_BOOT_PACK } else { self.target };
        let grows_to = self.builder.len() + frame.encoded.bytes.len() as u64;
        if self.boot != frame.boot || (self.boot && grows_to > limit) {
            self.flush().await?;
        }
        self.boot = frame.boot;
        let number = self.builder.push(&frame.encoded);
        self.contents.push(Content { image: frame.image, frame: number, pages: frame.pages });
        self.held.push(frame.permit);
        if !self.boot && self.builder.len() >= self.target {
            self.flush().await?;
        }
        Ok(())
    }

    /// Sends the pack being built, when there is a free connection.
    async fn flush(&mut self) -> Result<(), CaptureError> {
        if self.contents.is_empty() {
            return Ok(());
        }
        while self.puts.len() >= self.connections {
            if let Some(put) = self.puts.join_next().await {
                self.finished(put)?;
            }
        }
        let (bytes, entry): (Bytes, _) = std::mem::replace(&mut self.builder, PackBuilder::new()).finish();
        let contents = std::mem::take(&mut self.contents);
        let held = std::mem::take(&mut self.held);
        let pages = contents.iter().map(|content| content.pages.len() as u64).sum();
        let packed = Packed { n: self.next, entry, boot: self.boot, contents };
        self.next += 1;
        let sink = Arc::clone(&self.sink);
        self.puts.spawn(async move {
            let result = sink.put(packed.n, bytes).await;
            drop(held);
            Put { packed, pages, result }
        });
        Ok(())
    }

    fn finished(&mut self, put: Result<Put, JoinError>) -> Result<(), CaptureError> {
        let Put { mut packed, pages, result } = put.map_err(CaptureError::Thread)?;
        packed.entry.key = result.map_err(|source| CaptureError::Store { n: packed.n, source })?;
        self.stats.packs += 1;
        self.stats.sent_pages += pages;
        self.stats.sent_bytes += u64::from(packed.entry.size);
        self.durable.push(packed);
        if let Some(progress) = &self.progress {
            progress.send_replace(self.stats);
        }
        Ok(())
    }

    /// Takes over the PUTs that have ended, without waiting for any.
    fn take_finished(&mut self) {
        while let Some(put) = self.puts.try_join_next() {
            // The first failure is the one that is reported.
            let _ = self.finished(put);
        }
    }
}
