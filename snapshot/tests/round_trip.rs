//! Capture and restore together: whatever is captured over generations, with failures on the way, comes back byte for byte.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use stasis_snapshot::{
    capture::{
        BaseInput, BlockIndex, CaptureError, CaptureFailed, CaptureRequest, Captured, CodecChoice, ImageInput, Options,
        PageReader, Partial, Stats, capture, packs_needed,
    },
    granted::PackSink,
    image::PageRef,
    manifest::{ImageKind, Manifest},
    pack::{BOOT_FRAME_PAGES, Codec, HEADER_LEN, PackEntry},
    page::PAGE_SIZE,
    restore::{self, PageWriter, RestoreError, restore},
    seal::DataKeys,
    store::{ErrorKind, StoreError},
};
use support::{Fault, Packs, Pages, content, first_capture, manifest, manifest_of, noise};
use tokio::{runtime::Runtime, sync::watch};
use tokio_util::sync::CancellationToken;

const KINDS: [ImageKind; 2] = [ImageKind::Memory, ImageKind::Disk(0)];

fn request(images: Vec<ImageInput>, parent_packs: Vec<PackEntry>, packs: &Arc<Packs>) -> CaptureRequest {
    CaptureRequest {
        images,
        parent_packs,
        threads: None,
        sink: packs.clone(),
        options: Options { connections: 3, ..Options::default() },
        cancel: CancellationToken::new(),
        progress: None,
        connections: None,
        seal: None,
    }
}

async fn restored(manifest: &Manifest, packs: &Arc<Packs>, base: &Arc<Pages>) -> Vec<Vec<u8>> {
    let targets: Vec<_> = manifest
        .images
        .iter()
        .map(|image| Arc::new(Pages { base: Some(base.clone()), ..Pages::zero(image.map.pages()) }))
        .collect();
    let writers: Vec<Arc<dyn PageWriter>> = targets.iter().map(|target| target.clone() as _).collect();
    restore(
        manifest,
        &writers,
        (packs.clone(), DataKeys::default()),
        restore::Options::default(),
        &CancellationToken::new(),
    )
    .await
    .unwrap();
    targets.iter().map(|target| target.snapshot()).collect()
}

/// Ranges without the pages of others.
fn without(ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    ranges
        .iter()
        .flat_map(Clone::clone)
        .filter(|page| !others.iter().any(|other| other.contains(page)))
        .map(|page| page..page + 1)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn three_generations_come_back(seed in any::<u64>(), codec in 0u8..3, boot_pages in prop::sample::select(vec![0u64, 40])) {
        Runtime::new().unwrap().block_on(async {
            let mut rng = SmallRng::seed_from_u64(seed);
            let base = Arc::new(Pages::from_bytes(noise(seed ^ 1, 120)));
            let index = Arc::new(BlockIndex::build(&*base, 120).unwrap());
            let input = |same_offset| BaseInput {
                reader: base.clone(),
                blocks: 120,
                same_offset,
                index: Some(index.clone()),
            };
            let images = [Arc::new(Pages::zero(900)), Arc::new(Pages::zero(300))];
            for block in 0..120 {
                images[1].set(block, &base.page(block));
            }
            let packs = Arc::new(Packs::default());
            let mut parent: Option<Captured> = None;
            for generation in 0..3 {
                // The guest runs.
                let mut dirty: [Vec<Range<u64>>; 2] = Default::default();
                for (image, dirty) in images.iter().zip(&mut dirty) {
                    for _ in 0..rng.random_range(0..12) {
                        let start = rng.random_range(0..image.len());
                        let end = (start + rng.random_range(1..90)).min(image.len());
                        for page in start..end {
                            match rng.random_range(0..6) {
                                4 => image.set(page, &base.page(rng.random_range(0..120))),
                                5 => {}
                                kind => image.set(page, &content(&mut rng, kind)),
                            }
                        }
                        dirty.push(start..end);
                    }
                }
                // The guest is paused.
                let mut inputs = vec![
                    first_capture(KINDS[0], &images[0], Some(input(false))),
                    first_capture(KINDS[1], &images[1], Some(input(true))),
                ];
                if let Some(parent) = &parent {
                    for ((input, map), dirty) in inputs.iter_mut().zip(&parent.maps).zip(dirty) {
                        input.parent = map.clone();
                        input.look_at = dirty;
                    }
                }
                let looked_at = inputs.iter().flat_map(|input| &input.look_at).map(|range| range.end - range.start).sum();
                packs.begin(&format!("{generation}/"));
                let before = parent.map_or(Vec::new(), |parent| parent.packs);
                let mut request = request(inputs, before.clone(), &packs);
                request.options.codec = CodecChoice::Fixed([Codec::Lz4, Codec::Zstd, Codec::Raw][usize::from(codec)]);
                request.options.boot_pages = boot_pages;
                let options = request.options;
                let captured = capture(request).await.unwrap();

                assert_eq!(captured.packs[..before.len()], before);
                let new = &captured.packs[before.len()..];
                assert_eq!(new.len(), captured.stats.packs as usize);
                assert!(captured.stats.packs <= packs_needed(looked_at, &options));
                assert_eq!(captured.stats.scanned_pages, looked_at);
                let stats = captured.stats;
                assert_eq!(stats.scanned_pages, stats.zero_pages + stats.base_pages + stats.sent_pages);
                assert_eq!(stats.sent_bytes, new.iter().map(|pack| u64::from(pack.size)).sum::<u64>());
                for (position, pack) in captured.packs.iter().enumerate() {
                    if captured.boot_pack == Some(position as u32) {
                        assert!(pack.frames.iter().all(|frame| frame.pages <= BOOT_FRAME_PAGES));
                    }
                }

                let manifest = manifest_of(&captured, &KINDS, 120);
                let back = restored(&manifest, &packs, &base).await;
                assert!(back[0] == images[0].snapshot(), "memory of generation {generation}");
                assert!(back[1] == images[1].snapshot(), "disk of generation {generation}");
                parent = Some(captured);
            }
        });
    }
}

/// An image of several packs, captured with a fault at PUT `n`; then again from what is left; then restored.
async fn fail_and_go_on(n: u32, fault: impl Fn(CancellationToken) -> Fault) -> CaptureFailed {
    let memory = Arc::new(Pages::from_bytes(noise(7, 1200)));
    for page in 100..400 {
        memory.set(page, &[0; PAGE_SIZE]);
    }
    let packs = Arc::new(Packs::default());
    packs.begin("first/");
    let mut first = request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs);
    *packs.fault.lock().unwrap() = Some((n, fault(first.cancel.clone())));
    first.options.connections = 8;
    let failed = capture(first).await.unwrap_err();

    let Partial { packs: left, maps, done, .. } = &*failed.partial;
    for entry in left {
        assert!(packs.stored.lock().unwrap().contains_key(&entry.key), "{} was never confirmed", entry.key);
    }
    // What is said to be done is there.
    let back = restored(&manifest(left, maps, &KINDS[..1], 0), &packs, &memory).await;
    for page in done[0].iter().flat_map(Clone::clone) {
        let at = page as usize * PAGE_SIZE;
        assert!(back[0][at..at + PAGE_SIZE] == memory.page(page)[..], "page {page}");
    }

    // The guest runs on, writes to some pages that were done and some that were not, and is captured again.
    let mut dirty = Vec::new();
    for page in [3, 150, 700, 1199] {
        memory.set(page, &[page as u8 | 1; PAGE_SIZE]);
        dirty.push(page..page + 1);
    }
    let all = 0..1200;
    let mut look_at = without(&[all], &done[0]);
    look_at.extend(dirty);
    let mut again = first_capture(KINDS[0], &memory, None);
    again.parent = maps[0].clone();
    again.look_at = look_at;
    packs.begin("second/");
    let captured = capture(request(vec![again], left.clone(), &packs)).await.unwrap();
    let back = restored(&manifest_of(&captured, &KINDS[..1], 0), &packs, &memory).await;
    assert!(back[0] == memory.snapshot());
    failed
}

#[tokio::test]
async fn a_put_that_fails_leaves_what_is_durable() {
    let mut kept = 0;
    for n in 0..3 {
        let failed = fail_and_go_on(n, |_| Fault::Fail(ErrorKind::Forbidden)).await;
        let CaptureError::Store { n: at, source } = &failed.error else { panic!("{:?}", failed.error) };
        assert_eq!((*at, source.kind), (n, ErrorKind::Forbidden));
        kept += failed.partial.packs.len();
    }
    assert!(kept > 0, "nothing was ever kept");
}

#[tokio::test]
async fn a_cancelled_capture_leaves_what_is_durable() {
    for n in 0..3 {
        let failed = fail_and_go_on(n, Fault::Cancel).await;
        assert!(matches!(failed.error, CaptureError::Cancelled), "{:?}", failed.error);
        assert!(!failed.partial.packs.iter().any(|entry| entry.key == format!("first/{n}")));
    }
    for n in 0..3 {
        let failed = fail_and_go_on(n, Fault::StoreThenCancel).await;
        assert!(matches!(failed.error, CaptureError::Cancelled), "{:?}", failed.error);
    }
}

#[tokio::test]
async fn a_page_that_cannot_be_read_is_named() {
    let memory = Arc::new(Pages { bad_page: Some(900), ..Pages::from_bytes(noise(3, 1200)) });
    let packs = Arc::new(Packs::default());
    let failed = capture(request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs)).await.unwrap_err();
    assert!(
        matches!(&failed.error, CaptureError::Read { image, page: 896, .. } if image == "memory"),
        "{}",
        failed.error
    );
}

#[tokio::test]
async fn pages_beyond_the_image_are_refused() {
    let memory = Arc::new(Pages::zero(10));
    let mut input = first_capture(KINDS[0], &memory, None);
    input.look_at.push(9..11);
    let packs = Arc::new(Packs::default());
    let failed = capture(request(vec![input], Vec::new(), &packs)).await.unwrap_err();
    assert!(matches!(failed.error, CaptureError::Map { .. }), "{}", failed.error);
    assert_eq!(memory.reads.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn no_reader_is_called_after_the_end() {
    let memory = Arc::new(Pages::from_bytes(noise(5, 8000)));
    let packs = Arc::new(Packs::default());
    let mut stuck = request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs);
    // Little more than a pack: however slow the cancellation, the thread cannot have got far.
    stuck.options.memory = 0;
    *packs.fault.lock().unwrap() = Some((0, Fault::Cancel(stuck.cancel.clone())));
    capture(stuck).await.unwrap_err();
    let reads = memory.reads.load(Ordering::SeqCst);
    assert!(reads < 8000 / 64, "the capture went on to the end");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(memory.reads.load(Ordering::SeqCst), reads);
}

#[tokio::test]
async fn memory_and_connections_are_bounded() {
    let memory = Arc::new(Pages::from_bytes(noise(6, 8192)));
    let packs = Arc::new(Packs::default());
    packs.gate.store(2, Ordering::SeqCst);
    let mut bounded = request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs);
    bounded.options = Options { connections: 16, memory: 6 << 20, ..Options::default() };
    capture(bounded).await.unwrap();
    // 32 MiB in packs of 2 MiB: without the bound, 16 would be in flight.
    assert!(packs.most_bytes_in_flight.load(Ordering::SeqCst) <= (6 << 20) + 3 * HEADER_LEN as usize);

    let packs = Arc::new(Packs::default());
    packs.gate.store(3, Ordering::SeqCst);
    let mut bounded = request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs);
    bounded.options.connections = 3;
    capture(bounded).await.unwrap();
    assert_eq!(*packs.most_in_flight.borrow(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_change_while_a_capture_runs() {
    let memory = Arc::new(Pages::from_bytes(noise(6, 8192)));
    let packs = Arc::new(Packs::default());
    // No PUT is answered before three are in flight, and one is allowed.
    packs.gate.store(3, Ordering::SeqCst);
    let (connections, allowed) = watch::channel(1);
    let mut throttled = request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs);
    throttled.connections = Some(allowed);
    let mut most = packs.most_in_flight.subscribe();
    let running = tokio::spawn(capture(throttled));
    most.wait_for(|most| *most == 1).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(*most.borrow_and_update(), 1);
    connections.send(3).unwrap();
    most.wait_for(|most| *most == 3).await.unwrap();
    connections.send(0).unwrap();
    drop(connections);
    running.await.unwrap().unwrap();
    assert_eq!(*packs.most_in_flight.borrow(), 3);
}

/// Pages that are slow to read: a chunk takes a second.
struct Slow(AtomicU64);

impl PageReader for Slow {
    fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        #[expect(clippy::disallowed_methods, reason = "the time it takes is the point")]
        std::thread::sleep(Duration::from_millis(20 * (into.len() / PAGE_SIZE) as u64 / 10));
        into.fill(first_page as u8 | 1);
        Ok(())
    }
}

/// Cancels after a while; what is called afterwards shows.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancellation_is_prompt_whatever_is_going_on() {
    let slow = Arc::new(Slow(AtomicU64::new(0)));
    let memory = Arc::new(Pages::from_bytes(noise(6, 8192)));
    for (after, reading) in [(0, true), (300, true), (0, false), (5, false), (40, false), (200, false)] {
        let packs = Arc::new(Packs::default());
        // PUTs are never answered.
        packs.gate.store(1000, Ordering::SeqCst);
        let mut input = first_capture(KINDS[0], &memory, None);
        if reading {
            input.reader = slow.clone();
        }
        let request = request(vec![input], Vec::new(), &packs);
        let cancel = request.cancel.clone();
        let cancelled = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(after)).await;
            cancel.cancel();
            Instant::now()
        });
        let failed = capture(request).await.unwrap_err();
        let took = cancelled.await.unwrap().elapsed();
        assert!(matches!(failed.error, CaptureError::Cancelled), "{}", failed.error);
        // Milliseconds, and 128 for a read that cannot be interrupted; but a busy machine may not run us at once. All reads take 8 s, and
        // the PUTs for ever.
        println!("{took:?} after {after} ms, reading slowly: {reading}");
        assert!(took < Duration::from_secs(5), "{took:?} after {after} ms");
        let reads = slow.0.load(Ordering::SeqCst) + memory.reads.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_eq!(slow.0.load(Ordering::SeqCst) + memory.reads.load(Ordering::SeqCst), reads);
    }
}

/// Takes 300 ms for each pack.
struct SlowSink(Arc<Packs>);

#[async_trait]
impl PackSink for SlowSink {
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.0.put(n, bytes).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_store_makes_the_codec_zstd() {
    // Words of a small vocabulary: lz4 leaves more of them than zstd does.
    let mut rng = SmallRng::seed_from_u64(1);
    let words: Vec<[u8; 6]> = (0..500).map(|_| rng.random()).collect();
    let bytes = std::iter::repeat_with(|| words[rng.random_range(0..500)]).flatten().take(8192 * PAGE_SIZE).collect();
    let memory = Arc::new(Pages::from_bytes(bytes));
    let packs = Arc::new(Packs::default());
    let mut slow = request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs);
    slow.options.connections = 2;
    slow.options.memory = 0;
    slow.sink = Arc::new(SlowSink(packs.clone()));
    let captured = capture(slow).await.unwrap();
    let codecs: Vec<_> = captured.packs.iter().flat_map(|pack| &pack.frames).map(|frame| frame.codec).collect();
    assert_eq!(codecs[0], Codec::Lz4);
    assert!(codecs.contains(&Codec::Zstd), "{codecs:?}");
    let back = restored(&manifest_of(&captured, &KINDS[..1], 0), &packs, &memory).await;
    assert!(back[0] == memory.snapshot());
}

#[tokio::test]
async fn zero_and_template_pages_are_not_sent() {
    let base = Arc::new(Pages::from_bytes(noise(8, 64)));
    let memory = Arc::new(Pages::zero(1 << 16));
    for (page, block) in [(5, 9), (6, 10), (40_000, 63)] {
        memory.set(page, &base.page(block));
    }
    let index = Some(Arc::new(BlockIndex::build(&*base, 64).unwrap()));
    let input = BaseInput { reader: base.clone(), blocks: 64, same_offset: false, index };
    let packs = Arc::new(Packs::default());
    let (progress, seen) = watch::channel(Stats::default());
    let mut request = request(vec![first_capture(KINDS[0], &memory, Some(input))], Vec::new(), &packs);
    request.progress = Some(progress);
    let captured = capture(request).await.unwrap();
    assert_eq!(captured.stats.packs, 0);
    assert_eq!(captured.stats.base_pages, 3);
    assert_eq!(captured.stats.zero_pages, (1 << 16) - 3);
    assert_eq!(*seen.borrow(), captured.stats);
    assert_eq!(captured.maps[0].lookup(6), Some(PageRef::Base { block: 10 }));
    assert!(captured.maps[0].runs().len() <= 5, "{:?}", captured.maps[0]);
}

#[tokio::test]
async fn a_hint_of_the_block_index_is_not_believed() {
    let base = Arc::new(Pages::from_bytes(noise(8, 4)));
    let index = Some(Arc::new(BlockIndex::build(&*base, 4).unwrap()));
    let memory = Arc::new(Pages::zero(4));
    memory.set(1, &base.page(2));
    // The block is not what it was when the index was made.
    base.set(2, &[7; PAGE_SIZE]);
    let input = BaseInput { reader: base, blocks: 4, same_offset: false, index };
    let packs = Arc::new(Packs::default());
    let captured =
        capture(request(vec![first_capture(KINDS[0], &memory, Some(input))], Vec::new(), &packs)).await.unwrap();
    assert!(matches!(captured.maps[0].lookup(1), Some(PageRef::Pack { .. })));
}

#[tokio::test]
async fn the_boot_pack_holds_the_first_pages_in_order() {
    let memory = Arc::new(Pages::from_bytes(noise(9, 600)));
    let mut input = first_capture(KINDS[0], &memory, None);
    input.look_at = vec![500..540, 0..500, 540..600];
    let packs = Arc::new(Packs::default());
    let mut request = request(vec![input], Vec::new(), &packs);
    request.options.boot_pages = 40;
    let captured = capture(request).await.unwrap();
    let boot = captured.boot_pack.unwrap();
    let entry = &captured.packs[boot as usize];
    assert_eq!(entry.frames.iter().map(|frame| frame.pages).collect::<Vec<_>>(), [16, 16, 8]);
    assert_eq!(captured.maps[0].lookup(500), Some(PageRef::Pack { pack: boot, frame: 0, index: 0 }));
    assert_eq!(captured.maps[0].lookup(539), Some(PageRef::Pack { pack: boot, frame: 2, index: 7 }));
    assert!(!matches!(captured.maps[0].lookup(499), Some(PageRef::Pack { pack, .. }) if pack == boot));
}

/// A snapshot of one image in several packs.
async fn example() -> (Manifest, Arc<Packs>, Arc<Pages>) {
    let memory = Arc::new(Pages::from_bytes(noise(4, 700)));
    let packs = Arc::new(Packs::default());
    let captured = capture(request(vec![first_capture(KINDS[0], &memory, None)], Vec::new(), &packs)).await.unwrap();
    assert!(captured.packs.len() >= 2);
    (manifest_of(&captured, &KINDS[..1], 0), packs, memory)
}

async fn restore_error(manifest: &Manifest, packs: &Arc<Packs>, target: Pages) -> RestoreError {
    let writers: Vec<Arc<dyn PageWriter>> = vec![Arc::new(target)];
    restore(
        manifest,
        &writers,
        (packs.clone(), DataKeys::default()),
        restore::Options::default(),
        &CancellationToken::new(),
    )
    .await
    .unwrap_err()
}

#[tokio::test]
async fn damage_is_named_and_nothing_is_taken_for_zero() {
    let (manifest, packs, _) = example().await;
    let key = manifest.packs[1].key.clone();
    let at = manifest.packs[1].frames[2].offset as usize + 5;
    packs.damage(&key, |bytes| bytes[at] ^= 1);
    let error = restore_error(&manifest, &packs, Pages::zero(700)).await;
    assert!(matches!(&error, RestoreError::Pack { key: named, frame: 2, .. } if *named == key), "{error:?}");
    packs.damage(&key, |bytes| bytes[at] ^= 1);

    packs.damage(&key, |bytes| {
        bytes.pop();
    });
    let error = restore_error(&manifest, &packs, Pages::zero(700)).await;
    assert!(
        matches!(&error, RestoreError::Fetch { key: named, source } if *named == key && source.kind == ErrorKind::Corrupt),
        "{error:?}"
    );

    packs.stored.lock().unwrap().remove(&key);
    let error = restore_error(&manifest, &packs, Pages::zero(700)).await;
    assert!(
        matches!(&error, RestoreError::Fetch { key: named, source } if *named == key && source.kind == ErrorKind::NotFound),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_restore_that_cannot_go_on_says_why() {
    let (manifest, packs, _) = example().await;
    let full = Pages { bad_page: Some(64), ..Pages::zero(700) };
    let error = restore_error(&manifest, &packs, full).await;
    assert!(matches!(&error, RestoreError::Write { image, first_page: 64, .. } if image == "memory"), "{error:?}");

    let error = restore(
        &manifest,
        &[],
        (packs.clone(), DataKeys::default()),
        restore::Options::default(),
        &CancellationToken::new(),
    )
    .await;
    assert!(matches!(error, Err(RestoreError::Writers { writers: 0, images: 1 })));

    let mut inconsistent = manifest.clone();
    inconsistent.packs.pop();
    let error = restore_error(&inconsistent, &packs, Pages::zero(700)).await;
    assert!(matches!(error, RestoreError::Manifest(_)), "{error:?}");

    let cancelled = CancellationToken::new();
    cancelled.cancel();
    let writers: Vec<Arc<dyn PageWriter>> = vec![Arc::new(Pages::zero(700))];
    let error =
        restore(&manifest, &writers, (packs, DataKeys::default()), restore::Options::default(), &cancelled).await;
    assert!(matches!(error, Err(RestoreError::Cancelled)));
}

#[tokio::test]
async fn neighbouring_frames_are_fetched_together() {
    let (manifest, packs, memory) = example().await;
    let fetch = |request_bytes| {
        let (manifest, packs) = (&manifest, packs.clone());
        async move {
            let target = Arc::new(Pages::zero(700));
            let writers: Vec<Arc<dyn PageWriter>> = vec![target.clone()];
            let options = restore::Options { connections: 2, request_bytes };
            let stats = restore(manifest, &writers, (packs, DataKeys::default()), options, &CancellationToken::new())
                .await
                .unwrap();
            (stats, target.snapshot())
        }
    };
    let (together, bytes) = fetch(4 << 20).await;
    assert!(bytes == memory.snapshot());
    assert_eq!(together.requests, manifest.packs.len() as u64);
    let (apart, bytes) = fetch(1).await;
    assert!(bytes == memory.snapshot());
    assert_eq!(apart.requests, manifest.packs.iter().map(|pack| pack.frames.len() as u64).sum::<u64>());
    assert_eq!(apart.pack_pages, 700);
}
