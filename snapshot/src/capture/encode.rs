//! From blocks to frames, and frames compressed: on several threads at once, with buffers that are used again.

use std::{
    collections::VecDeque,
    mem,
    ops::Range,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::OwnedSemaphorePermit;

use super::{
    ImageInput,
    scan::{Block, Stop, unreadable, viewed},
};
use crate::{
    pack::{BOOT_FRAME_PAGES, Codec, EncodedFrame, FRAME_PAGES, FrameEncoder},
    page::{self, PAGE_SIZE},
};

/// Blocks that make one frame.
pub(super) struct RawFrame {
    pub(super) image: usize,
    pub(super) boot: bool,
    pub(super) pages: u64,
    blocks: Vec<Block>,
}

/// Joins blocks to frames, in order. Blocks are not split: a frame may be shorter than it could be.
#[derive(Default)]
pub(super) struct Framer {
    open: Option<RawFrame>,
    pub(super) ready: VecDeque<RawFrame>,
}

impl Framer {
    pub(super) fn push(&mut self, image: usize, boot: bool, block: Block) {
        let limit = u64::from(if boot { BOOT_FRAME_PAGES } else { FRAME_PAGES });
        let fits = |open: &RawFrame| open.image == image && open.boot == boot && open.pages + block.pages <= limit;
        if self.open.as_ref().is_some_and(|open| !fits(open)) {
            self.flush();
        }
        let open = self.open.get_or_insert_with(|| RawFrame { image, boot, pages: 0, blocks: Vec::new() });
        open.pages += block.pages;
        open.blocks.push(block);
        if open.pages == limit {
            self.flush();
        }
    }

    /// No block follows.
    pub(super) fn flush(&mut self) {
        self.ready.extend(self.open.take());
    }
}

/// A compressed frame and which pages it holds.
pub(super) struct Frame {
    pub(super) encoded: EncodedFrame,
    pub(super) image: usize,
    pub(super) boot: bool,
    pub(super) spans: Vec<Range<u64>>,
    pub(super) digests: Vec<u128>,
    pub(super) permit: Option<OwnedSemaphorePermit>,
    /// What was asked for.
    pub(super) codec: Codec,
    pub(super) took: Duration,
}

/// What one frame is compressed with.
#[derive(Default)]
struct Bench {
    encoder: FrameEncoder,
    gathered: Vec<u8>,
}

/// Benches and buffers that are free. The allocator would map and unmap such buffers each time, which costs more than to fill them.
pub(super) struct Workshop {
    /// Frames get their digests here, and not when they are encrypted.
    digests: bool,
    /// As many of each as are kept.
    most: usize,
    benches: Mutex<Vec<Bench>>,
    /// For compressed bytes.
    buffers: Mutex<Vec<Vec<u8>>>,
    /// For pages of a whole block.
    blocks: Mutex<Vec<Vec<u8>>>,
}

impl Workshop {
    /// For so many frames at once.
    pub(super) fn new(most: usize, digests: bool) -> Self {
        Self { digests, most, benches: Mutex::default(), buffers: Mutex::default(), blocks: Mutex::default() }
    }

    /// A buffer for the pages of a block.
    pub(super) fn block(&self) -> Vec<u8> {
        let mut buffer = take(&self.blocks);
        buffer.reserve_exact(page::bytes(FRAME_PAGES.into()) as usize);
        buffer
    }

    /// Takes back the buffer of a block.
    pub(super) fn give_back_block(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() as u64 >= page::bytes(FRAME_PAGES.into()) {
            buffer.clear();
            put(&self.blocks, buffer, self.most);
        }
    }

    /// Takes back the buffer of a frame.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        put(&self.buffers, buffer, self.most);
    }

    /// Compresses a frame. Blocking.
    pub(super) fn encode(&self, images: &[ImageInput], frame: RawFrame, codec: Codec) -> Result<Frame, Stop> {
        let mut bench = take(&self.benches);
        let encoded = self.encode_with(&mut bench, &images[frame.image], frame, codec);
        put(&self.benches, bench, self.most);
        encoded
    }

    fn encode_with(&self, bench: &mut Bench, image: &ImageInput, frame: RawFrame, codec: Codec) -> Result<Frame, Stop> {
        let RawFrame { image: number, boot, mut blocks, .. } = frame;
        let mut permit: Option<OwnedSemaphorePermit> = None;
        for more in blocks.iter_mut().filter_map(|block| block.permit.take()) {
            match &mut permit {
                Some(permit) => permit.merge(more),
                none => *none = Some(more),
            }
        }
        let started = Instant::now();
        let pages = match &blocks[..] {
            [Block { bytes, .. }] if !bytes.is_empty() => Some(&bytes[..]),
            [Block { spans, .. }] if let [span] = &spans[..] => viewed(&*image.reader, span),
            _ => None,
        };
        let pages = match pages {
            Some(pages) => pages,
            None => gather(image, &blocks, &mut bench.gathered)?,
        };
        let encoded = bench.encoder.encode(codec, pages, take(&self.buffers), self.digests);
        let took = started.elapsed();
        if let Some(permit) = &mut permit {
            drop(permit.split(permit.num_permits().saturating_sub(encoded.bytes().len())));
        }
        let spans = blocks.iter_mut().flat_map(|block| mem::take(&mut block.spans)).collect();
        for block in &mut blocks {
            self.give_back_block(mem::take(&mut block.bytes));
        }
        let digests = blocks.iter_mut().flat_map(|block| mem::take(&mut block.digests)).collect();
        Ok(Frame { encoded, image: number, boot, spans, digests, permit, codec, took })
    }
}

/// The bytes of blocks one after the other.
fn gather<'a>(image: &ImageInput, blocks: &[Block], into: &'a mut Vec<u8>) -> Result<&'a [u8], Stop> {
    into.clear();
    for block in blocks {
        if !block.bytes.is_empty() {
            into.extend_from_slice(&block.bytes);
            continue;
        }
        for span in &block.spans {
            if let Some(view) = viewed(&*image.reader, span) {
                into.extend_from_slice(view);
            } else {
                let at = into.len();
                into.resize(at + (span.end - span.start) as usize * PAGE_SIZE, 0);
                let read = image.reader.read(span.start, &mut into[at..]);
                read.map_err(|source| unreadable(image, span.start, source))?;
            }
        }
    }
    Ok(into)
}

fn take<T: Default>(free: &Mutex<Vec<T>>) -> T {
    free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
}

fn put<T>(free: &Mutex<Vec<T>>, it: T, most: usize) {
    let mut free = free.lock().unwrap_or_else(PoisonError::into_inner);
    if free.len() < most {
        free.push(it);
    }
}

/// Bytes that one frame on its way through a worker takes beside its pages: a buffer to gather them in, one to compress them into, one that
/// is free.
pub(super) fn frame_overhead() -> u64 {
    3 * page::bytes(FRAME_PAGES.into()) + page::bytes(FRAME_PAGES.into()) / 8
}
