//! What a capture made durable, turned into packs and maps.

use std::ops::Range;

use super::scan::Scanned;
use super::{CaptureError, CaptureFailed, Captured, ImageInput, Partial, Stats};
use crate::image::{PageRef, Run};
use crate::pack::PackEntry;

/// A pack with the pages in it. The pack's own number in a [`PageRef`] is only known at the end, when it is known which are durable.
#[derive(Debug)]
pub(super) struct Packed {
    /// Number of the pack in this capture.
    pub(super) n: u32,
    pub(super) entry: PackEntry,
    pub(super) boot: bool,
    pub(super) contents: Vec<Content>,
}

/// One frame of it.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) image: usize,
    pub(super) frame: u32,
    pub(super) pages: Vec<u64>,
}

/// Everything known at the end.
pub(super) struct Outcome {
    pub(super) scanned: Scanned,
    /// Packs whose PUT was confirmed.
    pub(super) durable: Vec<Packed>,
    pub(super) stats: Stats,
    pub(super) error: Option<CaptureError>,
}

impl Outcome {
    /// Lays what is durable over the parents' maps.
    pub(super) fn conclude(
        mut self,
        images: &[ImageInput],
        parent_packs: Vec<PackEntry>,
    ) -> Result<Captured, CaptureFailed> {
        self.durable.sort_unstable_by_key(|pack| pack.n);
        let mut runs = std::mem::take(&mut self.scanned.plain);
        let mut packs = parent_packs;
        let mut boot_pack = None;
        for packed in self.durable {
            let pack = packs.len() as u32;
            if packed.boot && boot_pack.is_none() {
                boot_pack = Some(pack);
            }
            for Content { image, frame, pages } in packed.contents {
                runs[image].extend(frame_runs(pack, frame, &pages));
            }
            packs.push(packed.entry);
        }
        let mut error = self.error.or(self.scanned.error);
        let mut maps = Vec::with_capacity(images.len());
        let mut done = Vec::with_capacity(images.len());
        for (image, runs) in images.iter().zip(&runs) {
            match image.parent.overlay(runs) {
                Ok(map) => {
                    maps.push(map);
                    done.push(covered(runs));
                }
                Err(source) => {
                    error.get_or_insert(CaptureError::Map { image: image.kind.to_string(), source });
                    maps.push(image.parent.clone());
                    done.push(Vec::new());
                }
            }
        }
        let stats = Stats {
            scanned_pages: self.scanned.scanned_pages,
            zero_pages: self.scanned.zero_pages,
            base_pages: self.scanned.base_pages,
            ..self.stats
        };
        match error {
            None => Ok(Captured { packs, maps, boot_pack, stats }),
            Some(error) => Err(CaptureFailed { error, partial: Box::new(Partial { packs, maps, done, stats }) }),
        }
    }
}

/// The pages of one frame as runs: neighbours in the frame that are neighbours in the image belong together.
fn frame_runs(pack: u32, frame: u32, pages: &[u64]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (&start, index) in pages.iter().zip(0_u32..) {
        match runs.last_mut() {
            Some(last) if last.end() == start => last.pages += 1,
            _ => runs.push(Run { start, pages: 1, at: PageRef::Pack { pack, frame, index } }),
        }
    }
    runs
}

/// The pages that runs cover: sorted, disjoint, not adjacent.
fn covered(runs: &[Run]) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = runs.iter().map(|run| run.start..run.end()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let joined = next.start <= last.end;
        if joined {
            last.end = last.end.max(next.end);
        }
        joined
    });
    ranges
}

