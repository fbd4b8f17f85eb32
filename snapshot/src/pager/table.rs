//! What of a manifest is needed to bring its pages in, small: which unit holds which pages, and where a unit's bytes are.
//!
//! A *unit* is what is fetched and placed at once: a frame that at least one page refers to, or a window of an image's pages that
//! equal base blocks. Frames are numbered first, in the order of packs and of their places in them, so that neighbours in a pack
//! are neighbours in number. 16 bytes a run and 60 a frame: a few thousandths of a byte per guest page for runs of the usual length.

use std::{ops::Range, sync::OnceLock};

use crate::{
    image::PageRef,
    manifest::{ImageKind, Manifest},
    pack::FrameEntry,
    seal::{DataKey, DataKeys, PackCipher},
};

use super::PagerError;

/// Pages of a base window: those of 2 MiB.
pub(super) const WINDOW_PAGES: u64 = 512;

/// Consecutive pages of one image that are at consecutive places of one unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// First page.
    pub(super) start: u32,
    /// In whose bytes.
    pub(super) unit: u32,
    /// Position in the frame, or the first block of the base.
    pub(super) at: u32,
    pub(super) pages: u16,
    pub(super) image: u16,
}

impl Placement {
    pub(super) fn range(&self) -> Range<u64> {
        let start = u64::from(self.start);
        start..start + u64::from(self.pages)
    }
}

/// A frame that is needed.
#[derive(Debug)]
pub(super) struct Frame {
    /// Position in the pack's frame list.
    pub(super) number: u32,
    pub(super) entry: FrameEntry,
}

impl Frame {
    /// The frame's bytes in its pack.
    pub(super) fn range(&self) -> Range<u64> {
        let start = u64::from(self.entry.offset);
        start..start + u64::from(self.entry.stored_len)
    }
}

#[derive(Debug)]
struct Pack {
    key: String,
    /// Its first frame's unit; the next pack's is its end.
    first: u32,
    /// What its frames are encrypted with.
    sealed: Option<(DataKey, OnceLock<PackCipher>)>,
}

#[derive(Debug)]
struct Image {
    kind: ImageKind,
    pages: u64,
    /// In `placements`.
    placements: Range<usize>,
}

/// The whole table. Never changes.
#[derive(Debug)]
pub(super) struct Table {
    images: Vec<Image>,
    /// By image and first page.
    placements: Vec<Placement>,
    /// Positions in `placements`, by unit.
    by_unit: Vec<u32>,
    /// Where each unit's part of `by_unit` begins; one more entry at the end.
    first_of_unit: Vec<u32>,
    packs: Vec<Pack>,
    frames: Vec<Frame>,
}

const UNUSED: u32 = u32::MAX;

fn too_large<T>(_: T) -> PagerError {
    PagerError::Manifest("it has more pages, runs or frames than a pager can number")
}

impl Table {
    pub(super) fn new(manifest: &Manifest, keys: &DataKeys) -> Result<Self, PagerError> {
        // Position of each pack's first frame in `unit_of`.
        let mut first_frame = Vec::with_capacity(manifest.packs.len());
        let mut count = 0;
        for pack in &manifest.packs {
            first_frame.push(count);
            count += pack.frames.len();
        }
        let mut unit_of = vec![UNUSED; count];
        let dangling = || PagerError::Manifest("a page refers to a pack, frame or page that does not exist");
        let find = |pack: u32, frame: u32| {
            let entry = manifest.packs.get(pack as usize)?.frames.get(frame as usize)?;
            Some((first_frame.get(pack as usize)? + frame as usize, entry))
        };
        for run in manifest.images.iter().flat_map(|image| image.map.runs()) {
            if let PageRef::Pack { pack, frame, index } = run.at {
                let (at, entry) = find(pack, frame).ok_or_else(dangling)?;
                if u64::from(index).saturating_add(run.pages) > u64::from(entry.pages) {
                    return Err(dangling());
                }
                unit_of[at] = 0;
            }
        }
        let mut packs = Vec::with_capacity(manifest.packs.len());
        let mut frames = Vec::new();
        for (pack, at) in manifest.packs.iter().zip(&first_frame) {
            let sealed = match pack.sealed {
                None => None,
                Some(id) => {
                    let missing = || PagerError::NoKey { key: pack.key.clone(), id };
                    Some((keys.get(id).ok_or_else(missing)?.clone(), OnceLock::new()))
                }
            };
            let first = u32::try_from(frames.len()).map_err(too_large)?;
            packs.push(Pack { key: pack.key.clone(), first, sealed });
            for (number, entry) in (0..).zip(&pack.frames) {
                let unit = &mut unit_of[at + number as usize];
                if *unit != UNUSED {
                    *unit = u32::try_from(frames.len()).map_err(too_large)?;
                    frames.push(Frame { number, entry: entry.clone() });
                }
            }
        }
        let mut table = Self {
            images: Vec::with_capacity(manifest.images.len()),
            placements: Vec::new(),
            by_unit: Vec::new(),
            first_of_unit: Vec::new(),
            packs,
            frames,
        };
        let mut units = u32::try_from(table.frames.len()).map_err(too_large)?;
        for (image, input) in manifest.images.iter().enumerate() {
            let number = u16::try_from(image).map_err(too_large)?;
            let first = table.placements.len();
            let mut window = None;
            for run in input.map.runs() {
                match run.at {
                    PageRef::Zero => {}
                    PageRef::Pack { pack, frame, index } => {
                        let (at, _) = find(pack, frame).ok_or_else(dangling)?;
                        table.placements.push(Placement {
                            start: u32::try_from(run.start).map_err(too_large)?,
                            unit: unit_of[at],
                            at: index,
                            // At most a frame's.
                            pages: u16::try_from(run.pages).map_err(too_large)?,
                            image: number,
                        });
                    }
                    // A disk reads its base there by itself.
                    PageRef::Base { block } if matches!(input.kind, ImageKind::Disk(_)) && block == run.start => {}
                    PageRef::Base { block } => {
                        let mut page = run.start;
                        while page < run.end() {
                            let end = run.end().min((page / WINDOW_PAGES + 1) * WINDOW_PAGES);
                            if window != Some(page / WINDOW_PAGES) {
                                window = Some(page / WINDOW_PAGES);
                                units = units.checked_add(1).ok_or_else(|| too_large(()))?;
                            }
                            let at = block.saturating_add(page - run.start);
                            table.placements.push(Placement {
                                start: u32::try_from(page).map_err(too_large)?,
                                unit: units - 1,
                                at: u32::try_from(at).map_err(too_large)?,
                                pages: (end - page) as u16,
                                image: number,
                            });
                            page = end;
                        }
                    }
                }
            }
            let placements = first..table.placements.len();
            table.images.push(Image { kind: input.kind, pages: input.map.pages(), placements });
        }
        table.placements.shrink_to_fit();
        table.index_units(units)?;
        Ok(table)
    }

    /// Sorts the placements by unit, by counting.
    fn index_units(&mut self, units: u32) -> Result<(), PagerError> {
        u32::try_from(self.placements.len()).map_err(too_large)?;
        let mut first = vec![0u32; units as usize + 1];
        for placement in &self.placements {
            first[placement.unit as usize + 1] += 1;
        }
        for unit in 0..units as usize {
            first[unit + 1] += first[unit];
        }
        let mut next = first.clone();
        self.by_unit = vec![0; self.placements.len()];
        for (position, placement) in (0..).zip(&self.placements) {
            let at = &mut next[placement.unit as usize];
            self.by_unit[*at as usize] = position;
            *at += 1;
        }
        self.first_of_unit = first;
        Ok(())
    }

    /// Number of units.
    pub(super) fn units(&self) -> u32 {
        self.first_of_unit.len() as u32 - 1
    }

    pub(super) fn image_kind(&self, image: usize) -> Option<ImageKind> {
        self.images.get(image).map(|image| image.kind)
    }

    /// The frame that the unit is; `None` for a base window.
    pub(super) fn frame(&self, unit: u32) -> Option<&Frame> {
        self.frames.get(unit as usize)
    }

    /// The pack of a frame's unit.
    pub(super) fn pack_of(&self, unit: u32) -> u32 {
        self.packs.partition_point(|pack| pack.first <= unit) as u32 - 1
    }

    pub(super) fn key(&self, pack: u32) -> &str {
        self.packs.get(pack as usize).map_or("", |pack| &pack.key)
    }

    /// What opens the pack's frames, where they are encrypted.
    pub(super) fn cipher(&self, pack: u32) -> Option<&PackCipher> {
        let pack = self.packs.get(pack as usize)?;
        let (key, cipher) = pack.sealed.as_ref()?;
        Some(cipher.get_or_init(|| PackCipher::new(key, &pack.key)))
    }

    /// The units of a pack's frames.
    pub(super) fn units_of_pack(&self, pack: u32) -> Range<u32> {
        let at = |pack: usize| self.packs.get(pack).map_or(self.frames.len() as u32, |pack| pack.first);
        at(pack as usize)..at(pack as usize + 1)
    }

    /// Where the unit's pages go.
    pub(super) fn placements_of(&self, unit: u32) -> impl Iterator<Item = &Placement> {
        let at = |unit: u32| self.first_of_unit[unit as usize] as usize;
        self.by_unit[at(unit)..at(unit + 1)].iter().map(|&position| &self.placements[position as usize])
    }

    /// What of `pages` of an image has to be placed, in order. `None` for pages that the image does not have.
    pub(super) fn placements(&self, image: usize, pages: &Range<u64>) -> Option<&[Placement]> {
        let found = self.images.get(image)?;
        if pages.end > found.pages || pages.start > pages.end {
            return None;
        }
        let all = &self.placements[found.placements.clone()];
        let first = all.partition_point(|placement| placement.range().end <= pages.start);
        let end = all.partition_point(|placement| u64::from(placement.start) < pages.end);
        Some(&all[first..end.max(first)])
    }

    /// Everything of an image that has to be placed, in order.
    pub(super) fn all_placements(&self, image: usize) -> &[Placement] {
        self.images.get(image).map_or(&[], |image| &self.placements[image.placements.clone()])
    }

    /// Bytes that bringing in the unit moves: stored ones of a frame, those of the pages of a window.
    pub(super) fn cost(&self, unit: u32) -> u64 {
        match self.frame(unit) {
            Some(frame) => u64::from(frame.entry.stored_len),
            None => self.placements_of(unit).map(|placement| crate::page::bytes(placement.pages.into())).sum(),
        }
    }
}
