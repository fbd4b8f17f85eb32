//! A lazy disk: what is read and written while blocks are still on their way.

use super::*;
use crate::overlay::{BLOCK, OverlayError};
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Content of block `n` in the snapshot: never zero, never the base's, never the guest's.
fn saved(block: u64) -> [u8; BLOCK] {
    [0x80 | block as u8; BLOCK]
}

/// A snapshot whose blocks divisible by 7 are zero.
#[derive(Default)]
struct Snapshot {
    disk: OnceLock<Weak<Overlay>>,
    fetched: Mutex<Vec<Range<u64>>>,
    broken: AtomicBool,
    idle: AtomicBool,
    delay: AtomicU64,
}

impl Snapshot {
    fn put(disk: &Overlay, block: u64) {
        if block.is_multiple_of(7) {
            disk.restore_zero(block..block + 1).unwrap();
        } else {
            disk.restore_block(block, &saved(block)).unwrap();
        }
    }
}

impl BlockSource for Snapshot {
    fn fetch(&self, blocks: Range<u64>) -> io::Result<()> {
        self.fetched.lock().unwrap().push(blocks.clone());
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("the store is gone"));
        }
        if self.idle.load(Ordering::SeqCst) {
            return Ok(());
        }
        // Time for the guests to come between.
        thread::park_timeout(Duration::from_micros(self.delay.load(Ordering::SeqCst)));
        let disk = self.disk.get().unwrap().upgrade().unwrap();
        // Would not return if the caller held the lock.
        drop(disk.absent());
        for block in blocks {
            Self::put(&disk, block);
        }
        Ok(())
    }
}

/// A disk of `blocks` blocks over a base of threes, all of it absent.
fn lazy(blocks: u64) -> (Arc<Overlay>, Arc<Snapshot>) {
    let base = tempfile::tempfile().unwrap();
    base.write_all_at(&vec![3; (blocks * BLOCK_BYTES) as usize], 0).unwrap();
    let disk = Arc::new(Overlay::new(Some(base), tempfile::tempfile().unwrap(), blocks * BLOCK_BYTES).unwrap());
    let source = Arc::new(Snapshot::default());
    source.disk.set(Arc::downgrade(&disk)).unwrap();
    disk.set_lazy(source.clone(), std::slice::from_ref(&(0..blocks)));
    (disk, source)
}

fn block(disk: &Overlay, block: u64) -> Vec<u8> {
    let mut content = vec![0; BLOCK];
    disk.read_blocks(block, &mut content).unwrap();
    content
}

#[test]
fn reads_fetch_what_is_absent_once() {
    let (disk, source) = lazy(20);
    let mut content = vec![0; 2 * BLOCK];
    disk.read_at(5 * BLOCK_BYTES + 512, &mut content).unwrap();
    assert_eq!(*source.fetched.lock().unwrap(), vec![5..8]);
    assert!(content[..BLOCK - 512] == saved(5)[512..]);
    assert!(content[2 * BLOCK - 512..].iter().all(|&byte| byte == 0), "block 7 is zero");
    disk.read_at(6 * BLOCK_BYTES, &mut content[..BLOCK]).unwrap();
    assert_eq!(source.fetched.lock().unwrap().len(), 1);
    assert_eq!(disk.absent(), [0..5, 8..20]);
    assert!(disk.dirty().is_empty());
    // Around what is here: one call.
    disk.read_at(3 * BLOCK_BYTES, &mut vec![0; 6 * BLOCK]).unwrap();
    assert_eq!(source.fetched.lock().unwrap()[1], 3..9);
}

#[test]
fn only_partial_writes_fetch() {
    let (disk, source) = lazy(20);
    disk.write_at(BLOCK_BYTES, &[1; 3 * BLOCK]).unwrap();
    disk.zero_at(8 * BLOCK_BYTES, 2 * BLOCK_BYTES).unwrap();
    assert!(source.fetched.lock().unwrap().is_empty());
    assert_eq!(disk.absent(), [0..1, 4..8, 10..20]);
    disk.write_at(12 * BLOCK_BYTES - 100, &[2; 200 + BLOCK]).unwrap();
    disk.zero_at(16 * BLOCK_BYTES - 100, 200 + BLOCK_BYTES).unwrap();
    assert_eq!(*source.fetched.lock().unwrap(), [11..12, 13..14, 15..16, 17..18]);
    assert_eq!(disk.absent(), [0..1, 4..8, 10..11, 14..15, 18..20]);
    assert_eq!(disk.dirty(), [1..4, 8..10, 11..14, 15..18]);
    let edge = block(&disk, 11);
    assert!(edge[..BLOCK - 100] == saved(11)[100..] && edge[BLOCK - 100..] == [2; 100]);
    assert!(block(&disk, 8) == [0; BLOCK]);
    assert!(block(&disk, 2) == [1; BLOCK]);
}

#[test]
fn a_late_restore_overwrites_nothing() {
    let (disk, _) = lazy(8);
    disk.write_at(2 * BLOCK_BYTES, &[1; BLOCK]).unwrap();
    disk.zero_at(4 * BLOCK_BYTES, BLOCK_BYTES).unwrap();
    let mut all = Vec::new();
    (0..8).for_each(|block| all.extend_from_slice(&saved(block)));
    disk.restore_block(0, &all).unwrap();
    disk.restore_zero(0..8).unwrap();
    assert!(disk.absent().is_empty());
    assert_eq!(disk.dirty(), [2..3, 4..5]);
    for at in 0..8 {
        let expected = match at {
            2 => [1; BLOCK],
            4 => [0; BLOCK],
            _ => saved(at),
        };
        assert!(block(&disk, at) == expected, "block {at}");
    }
}

#[test]
fn a_failed_fetch_is_an_io_error_and_is_remembered() {
    let (disk, source) = lazy(4);
    assert!(disk.fetch_error().is_none());
    source.broken.store(true, Ordering::SeqCst);
    for result in
        [disk.read_at(0, &mut [0; 512]), disk.write_at(BLOCK_BYTES, &[1; 512]), disk.zero_at(BLOCK_BYTES, 512)]
    {
        assert!(matches!(result, Err(OverlayError::Io { .. })), "{result:?}");
    }
    assert_eq!(disk.fetch_error().unwrap().to_string(), "the store is gone");
    assert!(disk.dirty().is_empty(), "a write that could not begin has changed nothing");
    // The disk is still good for what needs nothing.
    disk.write_at(0, &[1; BLOCK]).unwrap();
    assert!(block(&disk, 0) == [1; BLOCK]);
    source.broken.store(false, Ordering::SeqCst);
    source.idle.store(true, Ordering::SeqCst);
    assert!(disk.read_at(BLOCK_BYTES, &mut [0; 512]).is_err(), "never the base's bytes");
}

#[test]
fn ranges_beyond_the_disk_do_no_harm_and_a_second_source_is_none() {
    let (disk, first) = lazy(4);
    let second = Arc::new(Snapshot::default());
    disk.set_lazy(second.clone(), &[0..u64::MAX, 2..2]);
    assert_eq!(disk.absent(), vec![0..4]);
    assert!(block(&disk, 1) == saved(1));
    assert_eq!(first.fetched.lock().unwrap().len(), 1);
    assert!(second.fetched.lock().unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Two guests write, each to its own bytes, while everything is being placed: at the end the disk is what it would be, had
    /// everything been here from the start.
    #[test]
    fn the_guest_s_bytes_are_never_lost(
        steps in prop::collection::vec((0u64..32 * BLOCK_BYTES - 9000, 1u64..9000, 0u8..3), 1..40),
        delay in 0u64..60,
        placer_first in any::<bool>(),
    ) {
        const BLOCKS: u64 = 32;
        let (disk, source) = lazy(2 * BLOCKS);
        source.delay.store(delay, Ordering::SeqCst);
        let half = BLOCKS * BLOCK_BYTES;
        let guest = |offset: u64, seed: u8| {
            let (disk, steps) = (disk.clone(), steps.clone());
            thread::spawn(move || {
                let mut model: Vec<u8> = Vec::new();
                for block in offset / BLOCK_BYTES..offset / BLOCK_BYTES + BLOCKS {
                    model.extend_from_slice(&if block.is_multiple_of(7) { [0; BLOCK] } else { saved(block) });
                }
                for (at, len, kind) in steps {
                    let range = at as usize..(at + len) as usize;
                    match kind {
                        0 => {
                            disk.write_at(offset + at, &vec![seed; len as usize]).unwrap();
                            model[range].fill(seed);
                        }
                        1 => {
                            disk.zero_at(offset + at, len).unwrap();
                            model[range].fill(0);
                        }
                        _ => {
                            let mut got = vec![0; len as usize];
                            disk.read_at(offset + at, &mut got).unwrap();
                            assert!(got == model[range], "read {len} bytes at {at}");
                        }
                    }
                }
                model
            })
        };
        let place = || {
            let disk = disk.clone();
            thread::spawn(move || {
                for block in (0..BLOCKS).flat_map(|block| [block, 2 * BLOCKS - 1 - block]) {
                    Snapshot::put(&disk, block);
                }
            })
        };
        let early = placer_first.then(place);
        let guests = [guest(0, 1), guest(half, 2)];
        let late = (!placer_first).then(place);
        let mut model = Vec::new();
        for guest in guests {
            model.extend(guest.join().unwrap());
        }
        early.into_iter().chain(late).for_each(|placer| placer.join().unwrap());
        prop_assert!(disk.absent().is_empty());
        let mut got = vec![0; model.len()];
        disk.read_at(0, &mut got).unwrap();
        prop_assert!(got == model);
    }
}

#[test]
fn a_disk_that_is_not_lazy_restores_over_what_is_there() {
    let file: File = tempfile::tempfile().unwrap();
    let disk = Overlay::new(None, file, 2 * BLOCK_BYTES).unwrap();
    disk.restore_zero(0..2).unwrap();
    disk.restore_block(1, &saved(1)).unwrap();
    assert!(block(&disk, 1) == saved(1));
    assert!(disk.absent().is_empty());
}
