//! What a capture came to: maps, packs and digests, of all of it or of what is durable.

use std::collections::BTreeMap;

use super::{CaptureError, CaptureFailed, Captured, ImageInput, Partial, Stats, ranges::joined, scan::Settled};
use crate::{
    image::{ImageMap, PageRef, Run},
    pack::PackEntry,
};

/// Pages of one image within a pack.
pub(super) struct Placed {
    pub(super) image: usize,
    pub(super) start: u64,
    pub(super) pages: u64,
    pub(super) frame: u32,
    pub(super) index: u32,
    /// One a page, if the image keeps any.
    pub(super) digests: Vec<u128>,
}

/// A pack whose PUT was confirmed.
pub(super) struct Durable {
    pub(super) entry: PackEntry,
    pub(super) placed: Vec<Placed>,
    pub(super) boot: bool,
}

/// All that is known at the end.
pub(super) struct Outcome {
    pub(super) parent_packs: Vec<PackEntry>,
    /// One an image.
    pub(super) settled: Vec<Settled>,
    pub(super) durable: BTreeMap<u32, Durable>,
    pub(super) stats: Stats,
}

impl Outcome {
    pub(super) fn captured(self, images: &[ImageInput]) -> Result<Captured, CaptureFailed> {
        let runs = self.runs();
        match overlaid(images, &runs) {
            Ok(maps) => {
                self.note(images);
                let boot = self.durable.values().position(|durable| durable.boot);
                Ok(Captured {
                    boot_pack: boot.map(|at| (self.parent_packs.len() + at) as u32),
                    stats: self.stats,
                    packs: self.packs(),
                    maps,
                })
            }
            Err(error) => Err(self.nothing(images, error)),
        }
    }

    pub(super) fn failed(self, images: &[ImageInput], error: CaptureError) -> CaptureFailed {
        let runs = self.runs();
        let Ok(maps) = overlaid(images, &runs) else { return self.nothing(images, error) };
        self.note(images);
        let done = runs.iter().zip(&self.settled).map(|(runs, settled)| {
            let ranges = runs.iter().map(|run| run.start..run.end());
            joined(ranges.chain(settled.unchanged.iter().cloned()).collect())
        });
        let partial = Partial { done: done.collect(), maps, stats: self.stats, packs: self.packs() };
        CaptureFailed { error, partial: Box::new(partial) }
    }

    /// A failure of which nothing can be used again.
    fn nothing(self, images: &[ImageInput], error: CaptureError) -> CaptureFailed {
        let partial = Partial {
            packs: self.parent_packs,
            maps: images.iter().map(|image| image.parent.clone()).collect(),
            done: vec![Vec::new(); images.len()],
            stats: self.stats,
        };
        CaptureFailed { error, partial: Box::new(partial) }
    }

    /// For each image, the runs of what needs no pack and of what is in durable packs.
    fn runs(&self) -> Vec<Vec<Run>> {
        let mut runs: Vec<_> = self.settled.iter().map(|settled| settled.runs.clone()).collect();
        let first = self.parent_packs.len() as u32;
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

    fn packs(self) -> Vec<PackEntry> {
        let mut packs = self.parent_packs;
        packs.extend(self.durable.into_values().map(|durable| durable.entry));
        packs
    }

    /// Notes what the new maps refer to.
    fn note(&self, images: &[ImageInput]) {
        for (image, settled) in images.iter().zip(&self.settled) {
            let Some(digests) = &image.digests else { continue };
            for run in settled.runs.iter().filter(|run| run.at == PageRef::Zero) {
                digests.note_zero(run.start..run.end());
            }
            for (first, noted) in &settled.digests {
                digests.note_digests(*first, noted);
            }
        }
        for placed in self.durable.values().flat_map(|durable| &durable.placed) {
            if let Some(digests) = &images[placed.image].digests {
                digests.note_digests(placed.start, &placed.digests);
            }
        }
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
