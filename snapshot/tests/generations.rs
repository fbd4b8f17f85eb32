//! Captures over generations with digests of what is durable: failures, cancellations and a guest that writes meanwhile. What is durable is
//! always the live image but for the pages that are still dirty, and no page is sent that did not change.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use stasis_snapshot::{
    capture::{
        BaseInput, BlockIndex, CaptureRequest, ImageInput, Options, PageDigests, PageReader, capture, packs_needed,
    },
    image::{ImageMap, PageRef},
    manifest::ImageKind,
    pack::PackEntry,
    page::{PAGE_SIZE, is_zero},
    restore::{self, PageWriter, restore},
    seal::{DataKey, DataKeyId, DataKeys},
    store::ErrorKind,
};
use support::{Fault, Frozen, Packs, Pages, content, first_capture, manifest, noise};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

const KINDS: [ImageKind; 2] = [ImageKind::Memory, ImageKind::Disk(0)];
const BLOCKS: u64 = 120;

fn data_key(n: u64) -> DataKey {
    DataKey::new(DataKeyId([n as u8; 16]), &[n as u8 ^ 0x77; 32])
}

/// A guest's image, and what is known of it.
struct Image {
    live: Arc<Pages>,
    map: ImageMap,
    dirty: BTreeSet<u64>,
    digests: Arc<PageDigests>,
    /// Pages whose digests were noted.
    noted: BTreeSet<u64>,
}

impl Image {
    fn new(live: Pages, map: ImageMap) -> Self {
        let digests = Arc::new(PageDigests::new(live.len()).unwrap());
        Self { live: Arc::new(live), map, dirty: BTreeSet::new(), digests, noted: BTreeSet::new() }
    }

    fn look_at(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for &page in &self.dirty {
            match ranges.last_mut() {
                Some(last) if last.end == page => last.end += 1,
                _ => ranges.push(page..page + 1),
            }
        }
        ranges
    }
}

async fn durable(packs: &Arc<Packs>, entries: &[PackEntry], images: &[Image], base: &Arc<Pages>) -> Vec<Vec<u8>> {
    let maps: Vec<_> = images.iter().map(|image| image.map.clone()).collect();
    let targets: Vec<_> = images
        .iter()
        .map(|image| Arc::new(Pages { base: Some(base.clone()), ..Pages::zero(image.live.len()) }))
        .collect();
    let writers: Vec<Arc<dyn PageWriter>> = targets.iter().map(|target| target.clone() as _).collect();
    let manifest = manifest(entries, &maps, &KINDS, BLOCKS);
    restore(
        &manifest,
        &writers,
        (packs.clone(), DataKeys::new((0..8).map(data_key))),
        restore::Options::default(),
        &CancellationToken::new(),
    )
    .await
    .unwrap();
    targets.iter().map(|target| target.snapshot()).collect()
}

fn page_of(bytes: &[u8], page: u64) -> &[u8] {
    &bytes[page as usize * PAGE_SIZE..][..PAGE_SIZE]
}

/// Writes as a guest does: new content, zeros, template blocks, the same bytes again.
fn write(rng: &mut SmallRng, live: &Pages, base: &Pages, dirty: &mut BTreeSet<u64>) {
    let start = rng.random_range(0..live.len());
    for page in start..(start + rng.random_range(1..90)).min(live.len()) {
        match rng.random_range(0..8) {
            4 => live.set(page, &base.page(rng.random_range(0..BLOCKS))),
            5..8 => live.set(page, &live.page(page)),
            kind => live.set(page, &content(rng, kind)),
        }
        dirty.insert(page);
    }
}

async fn generations(seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let base = Arc::new(Pages::from_bytes(noise(seed ^ 1, BLOCKS)));
    let index = Arc::new(BlockIndex::build(&*base, BLOCKS).unwrap());
    let disk = Pages::zero(300);
    (0..BLOCKS).for_each(|block| disk.set(block, &base.page(block)));
    let mut images = [Image::new(Pages::zero(900), ImageMap::zero(900)), Image::new(disk, ImageMap::base(300, BLOCKS))];
    let packs = Arc::new(Packs::default());
    let mut entries: Vec<PackEntry> = Vec::new();
    let mut committed = 0;
    let mut round = 0;
    let sealed: bool = rng.random();
    while committed < 4 {
        round += 1;
        for image in &mut images {
            for _ in 0..rng.random_range(0..10) {
                write(&mut rng, &image.live, &base, &mut image.dirty);
            }
        }
        let before = durable(&packs, &entries, &images, &base).await;
        // A new process knows only what it restored.
        if rng.random_range(0..5) == 0 {
            for (image, bytes) in images.iter_mut().zip(&before) {
                image.digests = Arc::new(PageDigests::new(image.live.len()).unwrap());
                image.digests.note(0, bytes);
                image.noted = (0..image.live.len()).collect();
            }
        }
        let noted: Vec<_> = images.iter().map(|image| image.noted.clone()).collect();
        let running = rng.random_range(0..3) == 0;
        let seen: Vec<_> = images.iter().map(|image| image.live.snapshot()).collect();
        let inputs: Vec<_> = images
            .iter()
            .zip(KINDS)
            .map(|(image, kind)| {
                let reader: Arc<dyn PageReader> =
                    if running || rng.random() { image.live.clone() } else { Arc::new(Frozen(image.live.snapshot())) };
                ImageInput {
                    kind,
                    parent: image.map.clone(),
                    look_at: image.look_at(),
                    reader,
                    base: Some(BaseInput {
                        reader: base.clone(),
                        blocks: BLOCKS,
                        same_offset: kind != ImageKind::Memory,
                        index: Some(index.clone()),
                    }),
                    digests: Some(image.digests.clone()),
                    rewrite: Vec::new(),
                }
            })
            .collect();
        let looked_at: u64 = images.iter().map(|image| image.dirty.len() as u64).sum();
        packs.begin(&format!("{round}/"));
        let cancel = CancellationToken::new();
        let fault = match rng.random_range(0..6) {
            0 => Some(Fault::Fail(ErrorKind::Forbidden)),
            1 => Some(Fault::Cancel(cancel.clone())),
            2 => Some(Fault::StoreThenCancel(cancel.clone())),
            _ => None,
        };
        *packs.fault.lock().unwrap() = fault.map(|fault| (rng.random_range(0..3), fault));
        let options = Options {
            connections: rng.random_range(1..6),
            boot_pages: if rng.random() { 40 } else { 0 },
            memory: if rng.random() { 0 } else { 64 << 20 },
            ..Options::default()
        };
        let request = CaptureRequest {
            images: inputs,
            parent_packs: entries.clone(),
            threads: None,
            sink: packs.clone(),
            options,
            cancel,
            progress: None,
            connections: None,
            // Of a new key now and then, as after a move to another host.
            seal: sealed.then(|| data_key(round / 3 % 8)),
        };

        // Whatever the guest writes from here on is dirty again.
        let stop = Arc::new(AtomicBool::new(!running));
        let guest = {
            let lives: Vec<_> = images.iter().map(|image| image.live.clone()).collect();
            let (stop, base, mut rng) = (stop.clone(), base.clone(), SmallRng::seed_from_u64(rng.random()));
            std::thread::spawn(move || {
                let mut dirty = [BTreeSet::new(), BTreeSet::new()];
                while !stop.load(Ordering::SeqCst) {
                    for (live, dirty) in lives.iter().zip(&mut dirty) {
                        write(&mut rng, live, &base, dirty);
                    }
                }
                dirty
            })
        };
        let result = capture(request).await;
        stop.store(true, Ordering::SeqCst);
        let written = guest.join().unwrap();

        let looked: Vec<_> = images.iter().map(|image| image.dirty.clone()).collect();
        let (stats, whole) = match result {
            Ok(captured) => {
                assert!(captured.stats.packs <= packs_needed(looked_at, &options));
                entries = captured.packs;
                for (image, map) in images.iter_mut().zip(captured.maps) {
                    image.map = map;
                    image.noted.append(&mut image.dirty);
                }
                committed += 1;
                (captured.stats, true)
            }
            Err(failed) => {
                let partial = *failed.partial;
                entries = partial.packs;
                for ((image, map), done) in images.iter_mut().zip(partial.maps).zip(partial.done) {
                    image.map = map;
                    for page in done.into_iter().flatten() {
                        assert!(image.dirty.remove(&page), "page {page} was not to be looked at");
                        image.noted.insert(page);
                    }
                }
                (partial.stats, false)
            }
        };
        for (image, written) in images.iter_mut().zip(written) {
            image.dirty.extend(written);
        }

        let after = durable(&packs, &entries, &images, &base).await;
        for (number, image) in images.iter().enumerate() {
            for page in 0..image.live.len() {
                let there = page_of(&after[number], page);
                if !image.dirty.contains(&page) {
                    assert!(there == &image.live.page(page)[..], "image {number}, page {page}, round {round}");
                }
                if image.noted.contains(&page) {
                    assert!(image.digests.unchanged(page, there), "image {number}, page {page}: another digest");
                }
            }
        }
        if whole && !running {
            assert_eq!(stats.scanned_pages, looked_at);
            let counted = stats.zero_pages + stats.base_pages + stats.unchanged_pages + stats.sent_pages;
            assert_eq!(counted, looked_at);
            // Exactly those whose digests were known and that did not change were left to the parent.
            let left = |number: usize, page: u64| {
                let (was, is) = (page_of(&before[number], page), page_of(&seen[number], page));
                was == is && !is_zero(is) && noted[number].contains(&page)
            };
            let unchanged = looked
                .iter()
                .enumerate()
                .map(|(number, looked)| looked.iter().filter(|&&page| left(number, page)).count());
            assert_eq!(stats.unchanged_pages, unchanged.sum::<usize>() as u64, "round {round}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_is_durable_is_the_live_image(seed in any::<u64>()) {
        Runtime::new().unwrap().block_on(generations(seed));
    }
}

fn request(input: ImageInput, parent_packs: Vec<PackEntry>, packs: &Arc<Packs>) -> CaptureRequest {
    CaptureRequest {
        images: vec![input],
        parent_packs,
        threads: None,
        sink: packs.clone(),
        options: Options::default(),
        cancel: CancellationToken::new(),
        progress: None,
        connections: None,
        seal: None,
    }
}

#[tokio::test]
async fn equal_pages_are_not_sent_and_changed_ones_are() {
    let live = Arc::new(Pages::from_bytes(noise(11, 700)));
    (600..650).for_each(|page| live.set(page, &[0; PAGE_SIZE]));
    let digests = Arc::new(PageDigests::new(700).unwrap());
    let packs = Arc::new(Packs::default());
    let input = |map: Option<&ImageMap>, look_at: Vec<Range<u64>>| {
        let mut input = first_capture(ImageKind::Memory, &live, None);
        input.parent = map.cloned().unwrap_or(input.parent);
        input.look_at = look_at;
        input.digests = Some(digests.clone());
        input
    };
    packs.begin("0/");
    #[expect(clippy::single_range_in_vec_init, reason = "one range")]
    let first = capture(request(input(None, vec![0..700]), Vec::new(), &packs)).await.unwrap();
    assert_eq!((first.stats.unchanged_pages, first.stats.sent_pages), (0, 650));

    // All are looked at again; one bit of one page is another, one page became zero, one zero page did not.
    let mut page = live.page(321);
    page[4095] ^= 0x10;
    live.set(321, &page);
    live.set(10, &[0; PAGE_SIZE]);
    live.set(601, &[5; PAGE_SIZE]);
    packs.begin("1/");
    #[expect(clippy::single_range_in_vec_init, reason = "one range")]
    let second =
        capture(request(input(Some(&first.maps[0]), vec![0..700]), first.packs.clone(), &packs)).await.unwrap();
    let stats = second.stats;
    assert_eq!((stats.unchanged_pages, stats.sent_pages, stats.zero_pages), (648, 2, 50));
    assert!(stats.sent_bytes < 3 * PAGE_SIZE as u64, "{stats:?}");
    assert_eq!(second.maps[0].lookup(320), first.maps[0].lookup(320));
    assert_eq!(second.maps[0].lookup(10), Some(PageRef::Zero));

    // Back to what the first had, which is no longer what is durable.
    page[4095] ^= 0x10;
    live.set(321, &page);
    packs.begin("2/");
    let mut third = input(Some(&second.maps[0]), vec![300..400, 640..700]);
    third.rewrite = vec![380..390, 385..395, 645..652];
    let third = capture(request(third, second.packs.clone(), &packs)).await.unwrap();
    // The changed page, fifteen by order, and of seven more the two that are not zero.
    assert_eq!((third.stats.sent_pages, third.stats.zero_pages), (1 + 15 + 2, 10));
    assert_eq!(third.stats.unchanged_pages, 160 - 18 - 10);
    let newest = third.packs.len() as u32 - 1;
    for page in (380..395).chain(650..652) {
        assert!(
            matches!(third.maps[0].lookup(page), Some(PageRef::Pack { pack, .. }) if pack == newest),
            "page {page}"
        );
    }
}
