//! Digests of an image's pages as the durable map has them: by them a capture tells a page that was rewritten with the same bytes, or only
//! read, from one that changed.
//!
//! Shared by the threads of a restore (which note pages as they place them) and of a capture. One lock for each 2 MiB of the image, held
//! for a few stores; pages are hashed outside it.

mod export;

use std::{
    io,
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::page_hash::{Page, PageHasher};
use crate::page::{PAGE_SIZE, is_zero};

/// Pages that share a lock and an allocation (2 MiB).
const GRANULE: u64 = 512;
const WORDS: usize = GRANULE as usize / 64;

/// The digests of one image. Memory: 16 bytes for each 2 MiB of the image, and where pages were noted 136 bytes a granule, 8 KiB more if
/// any of them was not zero.
///
/// A page that was never noted, or was forgotten, is never [`unchanged`](Self::unchanged). Digests never leave the process.
pub struct PageDigests {
    hasher: PageHasher,
    pages: u64,
    granules: Vec<Mutex<Option<Box<Granule>>>>,
}

/// 512 pages.
#[derive(Default)]
struct Granule {
    /// Which pages have a digest, zero pages included.
    known: [u64; WORDS],
    /// Which of them are zero; they have none in `digests`.
    zero: [u64; WORDS],
    digests: Option<Box<[u128; GRANULE as usize]>>,
}

/// What is noted of one page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Noted {
    Zero,
    Digest(u128),
}

impl std::fmt::Debug for PageDigests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageDigests").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl PageDigests {
    /// No digest yet, for an image of `pages` pages. Draws a secret key, so that no guest can make two pages with the same digest; fails
    /// if the kernel gives no random bytes.
    pub fn new(pages: u64) -> io::Result<Self> {
        Ok(Self::with_hasher(pages, PageHasher::random()?))
    }

    fn with_hasher(pages: u64, hasher: PageHasher) -> Self {
        let mut granules = Vec::new();
        granules.resize_with(pages.div_ceil(GRANULE) as usize, Mutex::default);
        Self { hasher, pages, granules }
    }

    /// Pages of the image.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Notes whole pages from `first_page` on as what the durable map has there. Pages past the image are ignored.
    pub fn note(&self, first_page: u64, bytes: &[u8]) {
        let pages = bytes.as_chunks::<PAGE_SIZE>().0;
        let digest = |page: &Page| if is_zero(page) { Noted::Zero } else { Noted::Digest(self.digest(page)) };
        self.note_each(first_page, &pages.iter().map(digest).collect::<Vec<_>>());
    }

    /// Notes a range of zero pages.
    pub fn note_zero(&self, pages: Range<u64>) {
        self.each_granule(pages, |granule, words| {
            let granule = granule.get_or_insert_default();
            for (word, mask) in words {
                granule.known[word] |= mask;
                granule.zero[word] |= mask;
            }
        });
    }

    /// Forgets a range: its pages are taken for changed until they are noted again.
    pub fn forget(&self, pages: Range<u64>) {
        self.each_granule(pages, |slot, words| {
            let Some(granule) = slot else { return };
            for (word, mask) in words {
                granule.known[word] &= !mask;
                granule.zero[word] &= !mask;
            }
            if granule.known == [0; WORDS] {
                *slot = None;
            }
        });
    }

    /// Whether `bytes`, one page, are what the durable map has at `page`.
    pub fn unchanged(&self, page: u64, bytes: &[u8]) -> bool {
        let Ok(bytes) = <&Page>::try_from(bytes) else { return false };
        self.noted(page).is_some_and(|noted| match noted {
            Noted::Zero => is_zero(bytes),
            Noted::Digest(digest) => self.digest(bytes) == digest,
        })
    }

    /// The digest of a page.
    pub(super) fn digest(&self, page: &Page) -> u128 {
        self.hasher.hash(page)
    }

    /// What is noted of `page`.
    pub(super) fn noted(&self, page: u64) -> Option<Noted> {
        let granule = self.granule(page)?;
        granule.as_ref()?.get((page % GRANULE) as usize)
    }

    /// Notes pages that are not zero, from `first_page` on, by their digests.
    pub(super) fn note_digests(&self, first_page: u64, digests: &[u128]) {
        self.note_each(first_page, &digests.iter().copied().map(Noted::Digest).collect::<Vec<_>>());
    }

    fn note_each(&self, first_page: u64, noted: &[Noted]) {
        let mut page = first_page;
        let mut rest = noted;
        while let (Some(mut granule), false) = (self.granule(page), rest.is_empty()) {
            let here = rest.len().min((GRANULE - page % GRANULE) as usize).min((self.pages - page) as usize);
            let (head, tail) = rest.split_at(here);
            let granule = granule.get_or_insert_default();
            for (at, &noted) in ((page % GRANULE) as usize..).zip(head) {
                granule.set(at, noted);
            }
            page += here as u64;
            rest = tail;
        }
    }

    fn granule(&self, page: u64) -> Option<MutexGuard<'_, Option<Box<Granule>>>> {
        if page >= self.pages {
            return None;
        }
        let slot = self.granules.get((page / GRANULE) as usize)?;
        // A panic in between leaves digests that are each whole.
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `f` for each granule that `pages` touches, with the words of its bit sets and the bits in question.
    fn each_granule(
        &self,
        pages: Range<u64>,
        mut f: impl FnMut(&mut Option<Box<Granule>>, &mut dyn Iterator<Item = (usize, u64)>),
    ) {
        let end = pages.end.min(self.pages);
        let mut page = pages.start;
        while page < end
            && let Some(mut granule) = self.granule(page)
        {
            let base = page - page % GRANULE;
            let (from, to) = (page - base, end.min(base + GRANULE) - base);
            let mut words = (0..WORDS).filter_map(|word| {
                let first = word as u64 * 64;
                let (low, high) = (from.max(first), to.min(first + 64));
                (low < high).then(|| (word, (u64::MAX >> (64 - (high - low))) << (low - first)))
            });
            f(&mut granule, &mut words);
            page = base + GRANULE;
        }
    }
}

impl Granule {
    fn get(&self, at: usize) -> Option<Noted> {
        let (word, bit) = (at / 64, 1 << (at % 64));
        if self.known[word] & bit == 0 {
            None
        } else if self.zero[word] & bit != 0 {
            Some(Noted::Zero)
        } else {
            self.digests.as_ref().map(|digests| Noted::Digest(digests[at]))
        }
    }

    fn set(&mut self, at: usize, noted: Noted) {
        let (word, bit) = (at / 64, 1 << (at % 64));
        self.known[word] |= bit;
        match noted {
            Noted::Zero => self.zero[word] |= bit,
            Noted::Digest(digest) => {
                self.zero[word] &= !bit;
                self.digests.get_or_insert_with(|| Box::new([0; GRANULE as usize]))[at] = digest;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn page(word: u64) -> Vec<u8> {
        word.to_le_bytes().repeat(PAGE_SIZE / 8)
    }

    fn allocated(digests: &PageDigests) -> (usize, usize) {
        let granules: Vec<_> = digests.granules.iter().map(|granule| granule.lock().unwrap()).collect();
        let some = granules.iter().filter(|granule| granule.is_some()).count();
        let full = granules.iter().filter(|granule| granule.as_ref().is_some_and(|g| g.digests.is_some())).count();
        (some, full)
    }

    #[test]
    fn only_what_was_noted_is_unchanged() {
        let digests = PageDigests::new(2000).unwrap();
        assert!(!digests.unchanged(5, &page(0)));
        assert!(!digests.unchanged(5, &page(1)));
        let bytes = [page(1), page(0), page(3), page(4)].concat();
        digests.note(510, &bytes);
        for (at, word) in (510..).zip([1, 0, 3, 4]) {
            assert!(digests.unchanged(at, &page(word)), "page {at}");
            assert!(!digests.unchanged(at, &page(word + 9)), "page {at}");
        }
        digests.note(512, &page(0));
        assert!(digests.unchanged(512, &page(0)) && !digests.unchanged(512, &page(3)));
        digests.note(511, &page(7));
        assert!(digests.unchanged(511, &page(7)) && !digests.unchanged(511, &page(0)));
        digests.forget(511..513);
        assert!(digests.unchanged(510, &page(1)) && digests.unchanged(513, &page(4)));
        assert!(!digests.unchanged(511, &page(7)) && !digests.unchanged(512, &page(0)));
    }

    #[test]
    fn ranges_of_any_shape_are_noted_and_forgotten() {
        for (start, end) in
            [(0, 1), (63, 65), (0, 64), (100, 1300), (511, 513), (512, 1024), (1990, 2500), (3000, 4000)]
        {
            let digests = PageDigests::new(2000).unwrap();
            digests.note_zero(start..end);
            for at in 0..2100 {
                assert_eq!(
                    digests.unchanged(at, &page(0)),
                    (start..end.min(2000)).contains(&at),
                    "{start}..{end}, {at}"
                );
            }
            digests.note_zero(0..2000);
            digests.forget(start..end);
            for at in 0..2000 {
                assert_eq!(digests.unchanged(at, &page(0)), !(start..end).contains(&at), "{start}..{end}, {at}");
            }
        }
    }

    #[test]
    fn memory_follows_what_is_noted() {
        let digests = PageDigests::new(1 << 20).unwrap();
        assert_eq!(allocated(&digests), (0, 0));
        digests.note_zero(0..5 * GRANULE);
        assert_eq!(allocated(&digests), (5, 0));
        digests.note(2 * GRANULE + 3, &page(1));
        assert_eq!(allocated(&digests), (5, 1));
        digests.note(1 << 20, &page(1));
        digests.note((1 << 20) - 1, &[page(1), page(2)].concat());
        assert_eq!(allocated(&digests), (6, 2));
        digests.forget(0..1 << 20);
        assert_eq!(allocated(&digests), (0, 0));
    }

    #[test]
    fn threads_note_at_once() {
        let digests = Arc::new(PageDigests::new(4096).unwrap());
        let threads: Vec<_> = (0..4u64)
            .map(|thread| {
                let digests = Arc::clone(&digests);
                std::thread::spawn(move || (thread..4096).step_by(4).for_each(|at| digests.note(at, &page(at))))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!((0..4096).all(|at| digests.unchanged(at, &page(at))));
    }
}
