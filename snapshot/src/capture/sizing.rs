//! How large packs become, and how many there may be.
//!
//! What will be sent is known only at the end, and how many packs may be written is fixed before (they are granted). So the number
//! granted is what full packs need if everything is sent, and some more: by those, the first packs leave early, one for each connection, and
//! all are made for what will really be sent as that becomes clear.

use super::Options;
use crate::{
    pack::{MIN_PACK, pack_size},
    page,
};

/// The boot pack and the last one may be of any size.
const UNEVEN: u64 = 2;

/// How many packs a capture that looks at `pages` pages may need at most.
pub fn packs_needed(pages: u64, options: &Options) -> u32 {
    u32::try_from(Sizing::new(pages, options).packs).unwrap_or(u32::MAX)
}

/// What is decided beforehand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizing {
    /// Stored bytes of a pack when everything looked at is sent.
    pub(super) full: u64,
    /// Bytes of all pages to look at.
    total: u64,
    /// Packs at most.
    packs: u64,
    connections: u16,
}

/// Where the capture is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    /// Stored bytes of the frames in the open pack.
    pub(super) open: u64,
    /// Packs closed so far.
    pub(super) closed: u64,
    /// Bytes of pages looked at so far, and of those of them that are to be sent.
    pub(super) scanned: u64,
    pub(super) sendable: u64,
    /// Bytes of pages in packs so far, the open one included, and what they became.
    pub(super) placed: u64,
    pub(super) stored: u64,
    /// Whether a PUT could begin at once.
    pub(super) idle: bool,
}

impl Sizing {
    pub(super) fn new(pages: u64, options: &Options) -> Self {
        let bytes = page::bytes(pages.min(u64::MAX / page::bytes(1)));
        let full = pack_size(bytes, options.connections);
        let early = u64::from(options.connections).min(bytes / MIN_PACK);
        Self { full, total: bytes, packs: bytes / full + early + UNEVEN, connections: options.connections }
    }

    /// Whether to send the open pack now.
    pub(super) fn close(&self, now: Standing) -> bool {
        if now.open >= self.full {
            return true;
        }
        // What is left after this one must do even if all the rest is sent as it is.
        let settled = now.scanned - now.sendable;
        let unplaced = self.total.saturating_sub(settled).saturating_sub(now.placed);
        let enough = self.packs > now.closed + unplaced / self.full + UNEVEN;
        let first = now.closed < u64::from(self.connections);
        enough && now.open >= MIN_PACK && (now.idle && first || now.open >= self.target(now))
    }

    /// What the size would be if all that will be sent were known: as much of the rest as of what was scanned, stored in as many bytes.
    fn target(&self, now: Standing) -> u64 {
        let part = |whole: u64, of: u64, in_all: u64| u128::from(whole) * u128::from(of) / u128::from(in_all.max(1));
        let sendable = u64::try_from(part(self.total, now.sendable, now.scanned)).unwrap_or(u64::MAX);
        let rest = part(sendable.saturating_sub(now.placed), now.stored, now.placed);
        let rest = u64::try_from(rest).unwrap_or(u64::MAX);
        pack_size(now.stored.saturating_add(rest), self.connections)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAME: u64 = 256 << 10;

    fn options(connections: u16) -> Options {
        Options { connections, ..Options::default() }
    }

    /// Closes packs over frames of (bytes of pages, stored bytes); returns their sizes.
    fn packs(sizing: &Sizing, frames: &[(u64, u64)], idle: impl Fn(usize) -> bool) -> Vec<u64> {
        let mut sizes = Vec::new();
        let (mut open, mut placed, mut stored) = (0, 0, 0);
        for &(pages, bytes) in frames {
            open += bytes;
            placed += pages;
            stored += bytes;
            let now = Standing {
                open,
                closed: sizes.len() as u64,
                scanned: placed,
                sendable: placed,
                placed,
                stored,
                idle: idle(sizes.len()),
            };
            if sizing.close(now) {
                sizes.push(std::mem::take(&mut open));
            }
        }
        sizes.extend((open > 0).then_some(open));
        sizes
    }

    #[test]
    fn the_first_packs_leave_early() {
        let sizing = Sizing::new(1 << 18, &options(8));
        let sizes = packs(&sizing, &vec![(FRAME, FRAME); 4096], |n| n < 8);
        assert_eq!(sizes[0], 1 << 20);
        assert!(sizes[12..sizes.len() - 1].iter().all(|&size| size == 8 << 20), "{sizes:?}");
        assert!(sizes.len() <= 128 + 8 + 2);
    }

    #[test]
    fn packs_fit_what_is_really_sent() {
        // 64 MiB become 16 MiB: 2 MiB for each of 8 connections, not 8.
        let sizing = Sizing::new(1 << 14, &options(8));
        let sizes = packs(&sizing, &[(FRAME, FRAME / 4); 256], |_| false);
        assert_eq!(sizes, [2 << 20; 8]);
    }

    #[test]
    fn small_captures_ask_for_few_packs() {
        assert_eq!(packs_needed(0, &options(8)), 2);
        assert_eq!(packs_needed(1, &options(32)), 2);
        assert_eq!(packs_needed(512, &options(32)), 6);
        assert_eq!(packs_needed(1 << 18, &options(8)), 138);
        assert_eq!(packs_needed(u64::MAX, &options(8)), u32::MAX);
    }

    proptest! {
        #[test]
        fn never_more_packs_than_granted(
            connections in 0u16..40,
            frames in prop::collection::vec((1u64..=64, 0u64..=100), 0..700),
            idle in any::<u64>(),
        ) {
            let frames: Vec<_> = frames.into_iter().map(|(pages, share)| (pages << 12, (pages << 12) * share / 100)).collect();
            let pages: u64 = frames.iter().map(|frame| frame.0 >> 12).sum();
            let sizing = Sizing::new(pages, &options(connections));
            // One more for the boot pack, which may end anywhere.
            let made = packs(&sizing, &frames, |n| idle >> (n % 64) & 1 == 1).len() as u32 + 1;
            prop_assert!(made <= packs_needed(pages, &options(connections)), "{made}");
        }
    }
}
