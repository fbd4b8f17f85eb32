//! Scanning: the pages to look at in chunks, and for each chunk what needs no pack (zero, unchanged, equal to the base) and what does, in
//! blocks. Chunks are scanned on several threads at once.

use std::{collections::VecDeque, ops::Range, sync::Arc};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{BaseInput, CaptureError, ImageInput, PageReader, digests::Noted, encode::Workshop, ranges::contains};
use crate::{
    image::{PageRef, Run},
    pack::{BOOT_FRAME_PAGES, FRAME_PAGES},
    page::{self, PAGE_SIZE, is_zero},
};

/// Pages looked at in one go: where they have to be read, what fits a core's own cache.
const STRIDE: u64 = FRAME_PAGES as u64;

/// Pages of one image that are scanned together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) image: usize,
    pub(super) spans: Vec<Range<u64>>,
    pub(super) pages: u64,
    pub(super) boot: bool,
}

/// Cuts what is to be looked at into chunks, in the order given.
pub(super) struct Chunks {
    images: Arc<Vec<ImageInput>>,
    image: usize,
    range: usize,
    /// Pages of the range that have been handed out.
    done: u64,
    boot_left: u64,
    size: u64,
}

impl Chunks {
    /// Chunks of at most `size` pages. The first `boot_pages` pages go to the boot pack.
    pub(super) fn new(images: Arc<Vec<ImageInput>>, size: u64, boot_pages: u64) -> Self {
        Self { images, image: 0, range: 0, done: 0, boot_left: boot_pages, size }
    }
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let boot = self.boot_left > 0;
        let most = if boot { self.size.min(self.boot_left) } else { self.size };
        let mut spans = Vec::new();
        let mut pages = 0;
        while pages < most {
            let Some(image) = self.images.get(self.image) else { break };
            let Some(range) = image.look_at.get(self.range) else {
                if pages > 0 {
                    break;
                }
                (self.image, self.range, self.done) = (self.image + 1, 0, 0);
                continue;
            };
            let start = range.start + self.done;
            let count = range.end.saturating_sub(start).min(most - pages);
            if count > 0 {
                spans.push(start..start + count);
                pages += count;
                self.done += count;
            }
            if start + count >= range.end {
                (self.range, self.done) = (self.range + 1, 0);
            }
        }
        if boot {
            self.boot_left -= pages;
        }
        (pages > 0).then_some(Chunk { image: self.image, spans, pages, boot })
    }
}

/// Up to a frame of pages on their way to a pack.
#[derive(Default)]
pub(super) struct Block {
    /// Which pages.
    pub(super) spans: Vec<Range<u64>>,
    pub(super) pages: u64,
    /// Their bytes; empty where the reader lets them be viewed.
    pub(super) bytes: Vec<u8>,
    /// Their digests, if the image keeps any.
    pub(super) digests: Vec<u128>,
    /// Accounts for the bytes.
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

/// How many pages were found to be what.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) scanned: u64,
    pub(super) zero: u64,
    pub(super) base: u64,
    pub(super) unchanged: u64,
}

/// Pages of one image that need no pack.
#[derive(Clone, Debug, Default)]
pub(super) struct Settled {
    /// Zero, or equal to the base.
    pub(super) runs: Vec<Run>,
    /// Digests of those that are not zero: first page, and one for each.
    pub(super) digests: Vec<(u64, Vec<u128>)>,
    /// What the parent has right.
    pub(super) unchanged: Vec<Range<u64>>,
}

impl Settled {
    /// Adds what was settled after it.
    pub(super) fn append(&mut self, mut later: Self) {
        let mut runs = later.runs.into_iter();
        if let Some(run) = runs.next() {
            settle(&mut self.runs, run);
        }
        self.runs.extend(runs);
        self.digests.append(&mut later.digests);
        later.unchanged.into_iter().for_each(|range| extend(&mut self.unchanged, range));
    }
}

/// What a chunk came to.
pub(super) struct Scanned {
    pub(super) image: usize,
    pub(super) boot: bool,
    pub(super) counts: Counts,
    pub(super) settled: Settled,
    /// In order.
    pub(super) blocks: VecDeque<Block>,
}

/// Why a job ended early.
pub(super) enum Stop {
    Failed(CaptureError),
    /// The capture is ending.
    Unwanted,
}

/// Scans a chunk. Blocking; ends soon after `stop`. `permit` accounts for all its pages.
pub(super) fn scan(
    images: &[ImageInput],
    chunk: Chunk,
    mut permit: OwnedSemaphorePermit,
    workshop: &Workshop,
    stop: &CancellationToken,
) -> Result<Scanned, Stop> {
    let image = &images[chunk.image];
    let mut scanner = Scanner {
        image,
        workshop,
        limit: u64::from(if chunk.boot { BOOT_FRAME_PAGES } else { FRAME_PAGES }),
        counts: Counts { scanned: chunk.pages, ..Counts::default() },
        settled: Settled::default(),
        blocks: VecDeque::new(),
        open: Block::default(),
        candidates: Vec::new(),
        base_bytes: Vec::new(),
    };
    let mut bytes = workshop.block();
    for span in chunk.spans {
        let view = viewed(&*image.reader, &span);
        let mut first = span.start;
        while first < span.end {
            if stop.is_cancelled() {
                return Err(Stop::Unwanted);
            }
            let count = STRIDE.min(span.end - first);
            let len = count as usize * PAGE_SIZE;
            if let Some(view) = view {
                let at = (first - span.start) as usize * PAGE_SIZE;
                scanner.stride(first, &view[at..at + len], true)?;
            } else {
                bytes.resize(len, 0);
                image.reader.read(first, &mut bytes).map_err(|source| unreadable(image, first, source))?;
                scanner.stride(first, &bytes, false)?;
            }
            first += count;
        }
    }
    scanner.close();
    workshop.give_back_block(bytes);
    for block in &mut scanner.blocks {
        block.permit = permit.split(page::bytes(block.pages) as usize);
    }
    let Scanner { counts, settled, blocks, .. } = scanner;
    Ok(Scanned { image: chunk.image, boot: chunk.boot, counts, settled, blocks })
}

/// Exactly these pages, where the reader shows them.
pub(super) fn viewed<'a>(reader: &'a dyn PageReader, span: &Range<u64>) -> Option<&'a [u8]> {
    let pages = span.end - span.start;
    reader.view(span.start, pages).filter(|view| view.len() as u64 == page::bytes(pages))
}

pub(super) fn unreadable(image: &ImageInput, page: u64, source: std::io::Error) -> Stop {
    Stop::Failed(CaptureError::Read { image: image.kind.to_string(), page, source })
}

struct Scanner<'a> {
    image: &'a ImageInput,
    workshop: &'a Workshop,
    /// Pages of a block at most.
    limit: u64,
    counts: Counts,
    settled: Settled,
    blocks: VecDeque<Block>,
    open: Block,
    /// Pages of the stride that are neither zero nor unchanged: the page, and its digest if any are kept.
    candidates: Vec<(u64, Option<u128>)>,
    base_bytes: Vec<u8>,
}

impl Scanner<'_> {
    /// Classifies pages from `first` on; `viewed` if they can be looked at again later.
    fn stride(&mut self, first: u64, bytes: &[u8], viewed: bool) -> Result<(), Stop> {
        let pages = bytes.as_chunks::<PAGE_SIZE>().0;
        let image = self.image;
        self.candidates.clear();
        for (page, bytes) in (first..).zip(pages) {
            if is_zero(bytes) {
                self.counts.zero += 1;
                settle(&mut self.settled.runs, Run { start: page, pages: 1, at: PageRef::Zero });
                continue;
            }
            let digest = image.digests.as_ref().map(|digests| digests.digest(bytes));
            if let (Some(digests), Some(digest)) = (&image.digests, digest)
                && digests.noted(page) == Some(Noted::Digest(digest))
                && !contains(&image.rewrite, page)
            {
                self.counts.unchanged += 1;
                extend(&mut self.settled.unchanged, page..page + 1);
            } else {
                self.candidates.push((page, digest));
            }
        }
        let (Some(&(low, _)), Some(&(high, _))) = (self.candidates.first(), self.candidates.last()) else {
            return Ok(());
        };
        let mut base_bytes = std::mem::take(&mut self.base_bytes);
        let same_offset = same_offset(image, low..high + 1, &mut base_bytes)?;
        for (page, digest) in std::mem::take(&mut self.candidates) {
            let bytes = &pages[(page - first) as usize];
            if let Some(block) = base_block(image, page, bytes, low, same_offset)? {
                self.counts.base += 1;
                settle(&mut self.settled.runs, Run { start: page, pages: 1, at: PageRef::Base { block } });
                if let Some(digest) = digest {
                    match self.settled.digests.last_mut() {
                        Some((first, digests)) if *first + digests.len() as u64 == page => digests.push(digest),
                        _ => self.settled.digests.push((page, vec![digest])),
                    }
                }
            } else {
                self.send(page, bytes, digest, viewed);
            }
        }
        self.base_bytes = base_bytes;
        Ok(())
    }

    /// Adds a page to the open block.
    fn send(&mut self, page: u64, bytes: &[u8], digest: Option<u128>, viewed: bool) {
        // Bytes that can be viewed again and bytes that cannot do not share a block.
        if self.open.pages > 0 && self.open.bytes.is_empty() != viewed {
            self.close();
        }
        let open = &mut self.open;
        open.pages += 1;
        extend(&mut open.spans, page..page + 1);
        open.digests.extend(digest);
        if !viewed {
            if open.bytes.is_empty() {
                open.bytes = self.workshop.block();
            }
            open.bytes.extend_from_slice(bytes);
        }
        if open.pages == self.limit {
            self.close();
        }
    }

    fn close(&mut self) {
        let mut block = std::mem::take(&mut self.open);
        if block.pages > 0 {
            // A few pages must not hold the memory of a frame.
            if !block.bytes.is_empty() && block.pages < STRIDE {
                let few = block.bytes.as_slice().into();
                self.workshop.give_back_block(std::mem::replace(&mut block.bytes, few));
            }
            self.blocks.push_back(block);
        }
    }
}

/// Appends a run, joined to the last one where the two are one.
fn settle(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.end() == run.start
        && last.at.advance(last.pages) == run.at
    {
        last.pages += run.pages;
    } else {
        runs.push(run);
    }
}

/// Appends a range, joined to the last one where the two are one.
fn extend(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// The base's blocks at `pages`, where pages are compared with those; may end early.
fn same_offset<'a>(image: &'a ImageInput, pages: Range<u64>, buffer: &'a mut Vec<u8>) -> Result<&'a [u8], Stop> {
    let Some(base) = image.base.as_ref().filter(|base| base.same_offset && pages.start < base.blocks) else {
        return Ok(&[]);
    };
    let blocks = pages.start..pages.end.min(base.blocks);
    if let Some(view) = viewed(&*base.reader, &blocks) {
        return Ok(view);
    }
    buffer.resize(page::bytes(blocks.end - blocks.start) as usize, 0);
    read_base(image, base, blocks.start, buffer)?;
    Ok(buffer)
}

/// The block of the base that equals the page. `same_offset` begins at block `low`.
fn base_block(
    image: &ImageInput,
    page: u64,
    bytes: &[u8; PAGE_SIZE],
    low: u64,
    same_offset: &[u8],
) -> Result<Option<u64>, Stop> {
    let offset = (page - low) as usize * PAGE_SIZE;
    if same_offset.get(offset..offset + PAGE_SIZE) == Some(bytes) {
        return Ok(Some(page));
    }
    if let Some(base) = &image.base
        && let Some(index) = &base.index
        && let Some(block) = index.candidate(bytes)
        && block < base.blocks
    {
        let mut candidate = [0; PAGE_SIZE];
        read_base(image, base, block, &mut candidate)?;
        if candidate == *bytes {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

fn read_base(image: &ImageInput, base: &BaseInput, first: u64, into: &mut [u8]) -> Result<(), Stop> {
    base.reader.read(first, into).map_err(|source| {
        Stop::Failed(CaptureError::Read { image: format!("the base of {}", image.kind), page: first, source })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{image::ImageMap, manifest::ImageKind};

    struct Nothing;

    impl PageReader for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn image(look_at: Vec<Range<u64>>) -> ImageInput {
        ImageInput {
            kind: ImageKind::Memory,
            parent: ImageMap::zero(10_000),
            look_at,
            reader: Arc::new(Nothing),
            base: None,
            digests: None,
            rewrite: Vec::new(),
        }
    }

    #[test]
    fn chunks_hold_every_page_once_and_in_order() {
        #[expect(clippy::reversed_empty_ranges, reason = "what a caller may give")]
        let looks = [vec![5..6, 100..900, 8..8, 0..3], vec![], vec![9..7, 40..45], vec![7..8, 3..3]];
        let images = Arc::new(looks.iter().cloned().map(image).collect::<Vec<_>>());
        for (size, boot_pages) in [(64, 0), (64, 70), (1, 3), (1000, 10_000), (512, 802)] {
            let chunks: Vec<_> = Chunks::new(Arc::clone(&images), size, boot_pages).collect();
            let pages = |chunk: &Chunk| {
                let image = chunk.image;
                chunk.spans.iter().flat_map(Clone::clone).map(move |page| (image, page)).collect::<Vec<_>>()
            };
            let expected = looks
                .iter()
                .enumerate()
                .flat_map(|(image, look)| look.iter().flat_map(Clone::clone).map(move |page| (image, page)));
            assert!(chunks.iter().flat_map(pages).eq(expected));
            assert!(chunks.iter().all(|chunk| chunk.pages <= size && chunk.pages == pages(chunk).len() as u64));
            let boot: u64 = chunks.iter().filter(|chunk| chunk.boot).map(|chunk| chunk.pages).sum();
            assert_eq!(boot, boot_pages.min(810));
            assert!(chunks.is_sorted_by_key(|chunk| !chunk.boot));
        }
    }
}
