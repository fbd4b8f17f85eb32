//! The scanning thread: reads pages in the order given, keeps what is zero or equal to the base as runs, hands the rest on in frames.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};

use super::{BaseInput, CaptureError, ImageInput};
use crate::{
    image::{PageRef, Run},
    pack::{BOOT_FRAME_PAGES, FRAME_PAGES},
    page::{PAGE_SIZE, is_zero},
};

/// Pages read in one call.
const CHUNK: u64 = FRAME_PAGES as u64;

/// Pages on their way to a pack.
pub(super) struct RawFrame {
    pub(super) bytes: Vec<u8>,
    pub(super) image: usize,
    /// Which pages, in the order of `bytes`.
    pub(super) spans: Vec<Range<u64>>,
    pub(super) boot: bool,
    /// Accounts for the bytes.
    pub(super) permit: OwnedSemaphorePermit,
}

/// What the thread has counted so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) scanned: AtomicU64,
    pub(super) zero: AtomicU64,
    pub(super) base: AtomicU64,
}

/// How the thread ended.
pub(super) struct ScanEnd {
    /// For each image, the pages that need no pack.
    pub(super) settled: Vec<Vec<Run>>,
    pub(super) result: Result<(), Stop>,
}

/// Why it ended early.
pub(super) enum Stop {
    Failed(CaptureError),
    /// Nobody takes frames any more.
    Unwanted,
}

pub(super) struct Scan {
    pub(super) images: Arc<Vec<ImageInput>>,
    /// Pages looked at first that go to the boot pack.
    pub(super) boot_pages: u64,
    pub(super) frames: mpsc::Sender<RawFrame>,
    pub(super) memory: Arc<Semaphore>,
    pub(super) counters: Arc<Counters>,
    pub(super) runtime: Handle,
}

impl Scan {
    /// Blocking; ends soon after the receiver of frames is gone and the semaphore is closed.
    pub(super) fn run(self) -> ScanEnd {
        let mut settled = vec![Vec::new(); self.images.len()];
        let result = self.scan(&mut settled);
        ScanEnd { settled, result }
    }

    fn scan(&self, settled: &mut [Vec<Run>]) -> Result<(), Stop> {
        let mut chunk = vec![0; CHUNK as usize * PAGE_SIZE];
        let mut base_chunk = vec![0; CHUNK as usize * PAGE_SIZE];
        let mut boot_left = self.boot_pages;
        for (at, image) in self.images.iter().enumerate() {
            let mut frame = None;
            for range in &image.look_at {
                let mut first = range.start;
                while first < range.end {
                    let mut count = CHUNK.min(range.end - first);
                    let boot = boot_left > 0;
                    if boot {
                        count = count.min(boot_left);
                        boot_left -= count;
                    }
                    let bytes = &mut chunk[..count as usize * PAGE_SIZE];
                    image.reader.read(first, bytes).map_err(|source| {
                        Stop::Failed(CaptureError::Read { image: image.kind.to_string(), page: first, source })
                    })?;
                    let base = Comparison::new(image, first, bytes, &mut base_chunk)?;
                    for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE_SIZE)) {
                        if let Some(place) = base.place(page, bytes)? {
                            let counter = match place {
                                PageRef::Zero => &self.counters.zero,
                                _ => &self.counters.base,
                            };
                            counter.fetch_add(1, Ordering::Relaxed);
                            settle(&mut settled[at], page, place);
                        } else {
                            self.add(&mut frame, at, boot, page, bytes)?;
                        }
                    }
                    self.counters.scanned.fetch_add(count, Ordering::Relaxed);
                    first += count;
                }
            }
            self.hand_on(frame.take())?;
        }
        Ok(())
    }

    /// Adds a page to the frame, handing on the one before where the page does not belong into it.
    fn add(&self, frame: &mut Option<RawFrame>, image: usize, boot: bool, page: u64, bytes: &[u8]) -> Result<(), Stop> {
        if frame.as_ref().is_some_and(|frame| frame.boot != boot) {
            self.hand_on(frame.take())?;
        }
        let capacity = PAGE_SIZE * if boot { BOOT_FRAME_PAGES } else { FRAME_PAGES } as usize;
        let open = match frame {
            Some(open) => open,
            None => frame.insert(RawFrame {
                permit: self.permit(capacity)?,
                bytes: Vec::with_capacity(capacity),
                image,
                spans: Vec::new(),
                boot,
            }),
        };
        open.bytes.extend_from_slice(bytes);
        match open.spans.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => open.spans.push(page..page + 1),
        }
        if open.bytes.len() == capacity {
            self.hand_on(frame.take())?;
        }
        Ok(())
    }

    fn hand_on(&self, frame: Option<RawFrame>) -> Result<(), Stop> {
        frame.map_or(Ok(()), |frame| self.frames.blocking_send(frame).map_err(|_| Stop::Unwanted))
    }

    /// Waits for memory. A closed semaphore ends it.
    fn permit(&self, bytes: usize) -> Result<OwnedSemaphorePermit, Stop> {
        let memory = Arc::clone(&self.memory);
        self.runtime.block_on(memory.acquire_many_owned(bytes as u32)).map_err(|_| Stop::Unwanted)
    }
}

/// Appends one page, joined to the last run where it can be.
fn settle(runs: &mut Vec<Run>, page: u64, at: PageRef) {
    if let Some(last) = runs.last_mut()
        && last.end() == page
        && last.at.advance(last.pages) == at
    {
        last.pages += 1;
    } else {
        runs.push(Run { start: page, pages: 1, at });
    }
}

/// A chunk of pages beside the blocks of the base at the same offset.
struct Comparison<'a> {
    image: &'a ImageInput,
    first: u64,
    /// Base blocks from `first` on; may be fewer than the pages.
    same_offset: &'a [u8],
}

impl<'a> Comparison<'a> {
    fn new(image: &'a ImageInput, first: u64, pages: &[u8], buffer: &'a mut [u8]) -> Result<Self, Stop> {
        let count = (pages.len() / PAGE_SIZE) as u64;
        let mut same_offset: &[u8] = &[];
        if let Some(base) = &image.base
            && base.same_offset
            && first < base.blocks
            && !is_zero(pages)
        {
            let blocks = count.min(base.blocks - first) as usize;
            let buffer = &mut buffer[..blocks * PAGE_SIZE];
            read_base(image, base, first, buffer)?;
            same_offset = buffer;
        }
        Ok(Self { image, first, same_offset })
    }

    /// Where the page's bytes are without a pack.
    fn place(&self, page: u64, bytes: &[u8]) -> Result<Option<PageRef>, Stop> {
        if is_zero(bytes) {
            return Ok(Some(PageRef::Zero));
        }
        let offset = (page - self.first) as usize * PAGE_SIZE;
        if self.same_offset.get(offset..offset + PAGE_SIZE) == Some(bytes) {
            return Ok(Some(PageRef::Base { block: page }));
        }
        if let Some(base) = &self.image.base
            && let Some(index) = &base.index
            && let Some(block) = index.candidate(bytes)
            && block < base.blocks
        {
            let mut candidate = [0; PAGE_SIZE];
            read_base(self.image, base, block, &mut candidate)?;
            if candidate == bytes {
                return Ok(Some(PageRef::Base { block }));
            }
        }
        Ok(None)
    }
}

fn read_base(image: &ImageInput, base: &BaseInput, first: u64, into: &mut [u8]) -> Result<(), Stop> {
    base.reader.read(first, into).map_err(|source| {
        Stop::Failed(CaptureError::Read { image: format!("the base of {}", image.kind), page: first, source })
    })
}
