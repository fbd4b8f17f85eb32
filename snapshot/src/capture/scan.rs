//! The reading side of a capture: one blocking thread goes through the pages in order.
//!
//! It takes memory permits before it hands a frame on, so it stops by itself when compression or upload fall behind. It ends early when the
//! capture is cancelled, the channel is closed, or the permits are.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::{BaseInput, CaptureError, ImageInput};
use crate::image::{PageRef, Run};
use crate::pack::{BOOT_FRAME_PAGES, FRAME_PAGES};
use crate::page::{PAGE_SIZE, is_zero};

/// Pages that have to be stored: one frame of them.
pub(super) struct RawFrame {
    /// Position of the image in the request.
    pub(super) image: usize,
    /// Which pages, in the order of the bytes.
    pub(super) pages: Vec<u64>,
    pub(super) bytes: Vec<u8>,
    /// Part of the boot pack.
    pub(super) boot: bool,
    /// One permit a page.
    pub(super) permit: OwnedSemaphorePermit,
}

/// What the scan found besides frames.
#[derive(Debug, Default)]
pub(super) struct Scanned {
    /// For each image, the pages that need no bytes.
    pub(super) plain: Vec<Vec<Run>>,
    pub(super) scanned_pages: u64,
    pub(super) zero_pages: u64,
    pub(super) base_pages: u64,
    /// Why it ended early.
    pub(super) error: Option<CaptureError>,
}

pub(super) struct Scanner {
    pub(super) images: Arc<[ImageInput]>,
    pub(super) boot_pages: u64,
    pub(super) permits: Arc<Semaphore>,
    pub(super) frames: mpsc::Sender<RawFrame>,
    pub(super) cancel: CancellationToken,
    pub(super) runtime: Handle,
}

/// The other side is gone; it knows why.
struct Closed;

enum Stop {
    Closed,
    Failed(CaptureError),
}

impl From<Closed> for Stop {
    fn from(_: Closed) -> Self {
        Self::Closed
    }
}

impl Scanner {
    /// Scans everything. Blocking.
    pub(super) fn run(self) -> Scanned {
        let mut found = Scanned { plain: vec![Vec::new(); self.images.len()], ..Scanned::default() };
        let images = Arc::clone(&self.images);
        for (number, image) in images.iter().enumerate() {
            match self.scan_image(number, image, &mut found) {
                Ok(()) => {}
                Err(Stop::Closed) => break,
                Err(Stop::Failed(error)) => {
                    found.error = Some(error);
                    break;
                }
            }
        }
        found
    }

    fn scan_image(&self, number: usize, image: &ImageInput, found: &mut Scanned) -> Result<(), Stop> {
        let mut buffer = vec![0; FRAME_PAGES as usize * PAGE_SIZE];
        let mut compared = Vec::new();
        let mut frame = Pending::default();
        for range in &image.look_at {
            let mut first = range.start;
            while first < range.end {
                if self.cancel.is_cancelled() {
                    return Err(Stop::Failed(CaptureError::Cancelled));
                }
                let count = u64::from(FRAME_PAGES).min(range.end - first);
                let bytes = &mut buffer[..count as usize * PAGE_SIZE];
                image.reader.read(first, bytes).map_err(|source| read_error(image, first, source))?;
                let same = read_same_offset(image, first, count, &mut compared)?;
                for (i, page) in bytes.chunks_exact(PAGE_SIZE).enumerate() {
                    let at = first + i as u64;
                    let boot = found.scanned_pages < self.boot_pages;
                    found.scanned_pages += 1;
                    let equals = same.and_then(|blocks| blocks.get(i * PAGE_SIZE..(i + 1) * PAGE_SIZE));
                    match classify(image, at, page, equals)? {
                        Some(place) => {
                            match place {
                                PageRef::Zero => found.zero_pages += 1,
                                _ => found.base_pages += 1,
                            }
                            found.plain[number].push(Run { start: at, pages: 1, at: place });
                        }
                        None => {
                            if frame.boot != boot {
                                self.send(number, &mut frame)?;
                            }
                            frame.boot = boot;
                            frame.pages.push(at);
                            frame.bytes.extend_from_slice(page);
                            if frame.pages.len() == frame.limit() {
                                self.send(number, &mut frame)?;
                            }
                        }
                    }
                }
                first += count;
            }
        }
        Ok(self.send(number, &mut frame)?)
    }

    fn send(&self, image: usize, frame: &mut Pending) -> Result<(), Closed> {
        if frame.pages.is_empty() {
            return Ok(());
        }
        let Pending { pages, bytes, boot } = std::mem::take(frame);
        let wanted = pages.len() as u32;
        let permit = self.runtime.block_on(Arc::clone(&self.permits).acquire_many_owned(wanted)).map_err(|_| Closed)?;
        self.frames.blocking_send(RawFrame { image, pages, bytes, boot, permit }).map_err(|_| Closed)
    }
}

/// A frame being filled.
#[derive(Default)]
struct Pending {
    pages: Vec<u64>,
    bytes: Vec<u8>,
    boot: bool,
}

impl Pending {
    fn limit(&self) -> usize {
        if self.boot { BOOT_FRAME_PAGES as usize } else { FRAME_PAGES as usize }
    }
}

fn read_error(image: &ImageInput, page: u64, source: std::io::Error) -> Stop {
    Stop::Failed(CaptureError::Read { image: image.kind.to_string(), page, source })
}

/// The base's blocks at the pages' own places, as far as there are any; `None` where they are not to be compared.
fn read_same_offset<'a>(
    image: &ImageInput,
    first: u64,
    count: u64,
    into: &'a mut Vec<u8>,
) -> Result<Option<&'a [u8]>, Stop> {
    let Some(BaseInput { reader, blocks, same_offset: true, .. }) = &image.base else { return Ok(None) };
    let there = blocks.saturating_sub(first).min(count);
    into.resize(there as usize * PAGE_SIZE, 0);
    reader.read(first, into).map_err(|source| read_error(image, first, source))?;
    Ok(Some(into))
}

/// Where the page is without storing it; `None` when it must be stored.
fn classify(image: &ImageInput, at: u64, page: &[u8], same_offset: Option<&[u8]>) -> Result<Option<PageRef>, Stop> {
    if is_zero(page) {
        return Ok(Some(PageRef::Zero));
    }
    if same_offset == Some(page) {
        return Ok(Some(PageRef::Base { block: at }));
    }
    let Some(BaseInput { reader, index: Some(index), .. }) = &image.base else { return Ok(None) };
    let Some(block) = index.find(page) else { return Ok(None) };
    let mut bytes = [0; PAGE_SIZE];
    reader.read(block, &mut bytes).map_err(|source| read_error(image, at, source))?;
    Ok((bytes == page).then_some(PageRef::Base { block }))
}
