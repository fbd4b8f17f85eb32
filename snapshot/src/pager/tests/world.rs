//! What the pager is tested with: snapshots whose content is known, images that count, and a store behind a bad line.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Mutex,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng, seq::SliceRandom};
use tokio::runtime::Runtime;

use super::super::*;
use crate::{
    ids::Digest,
    image::{ImageMap, PageRef, Run},
    manifest::{Arch, Base, Boot, Image, ImageKind, Platform, Versioned},
    pack::{Codec, PackBuilder, encode_frame},
    page::PAGE_SIZE,
    store::{ErrorKind, Operation},
};

pub(super) const BASE_BLOCKS: u64 = 700;
/// Longer than anything here takes, and short enough for a test that hangs.
pub(super) const PATIENT: Duration = Duration::from_secs(30);

/// A snapshot, and what its images really are.
pub(super) struct World {
    pub(super) manifest: Manifest,
    pub(super) packs: HashMap<String, Bytes>,
    pub(super) images: Vec<Vec<u8>>,
    pub(super) base: Arc<Vec<u8>>,
}

pub(super) fn page_content(rng: &mut SmallRng) -> Vec<u8> {
    let noisy = rng.random_range(16..PAGE_SIZE);
    let tag: [u8; 8] = rng.random();
    let mut page: Vec<u8> = tag.iter().copied().cycle().take(PAGE_SIZE).collect();
    if rng.random_bool(0.3) {
        rng.fill(&mut page[..noisy]);
    }
    page[0] |= 1;
    page
}

/// Packs of a generation being made.
pub(super) struct Packing<'a> {
    pub(super) rng: &'a mut SmallRng,
    pub(super) packs: &'a mut Vec<crate::pack::PackEntry>,
    pub(super) stored: &'a mut HashMap<String, Bytes>,
    pub(super) builder: PackBuilder,
    pub(super) frames: u32,
}

impl Packing<'_> {
    pub(super) fn frame(&mut self, pages: &[u8]) -> (u32, u32) {
        let codec = [Codec::Raw, Codec::Lz4, Codec::Zstd][self.rng.random_range(0..3)];
        let place = (self.packs.len() as u32, self.builder.push(&encode_frame(codec, pages)));
        self.frames += 1;
        if self.rng.random_bool(0.15) {
            self.finish();
        }
        place
    }

    pub(super) fn finish(&mut self) {
        if self.frames == 0 {
            return;
        }
        self.frames = 0;
        let (bytes, mut entry) = std::mem::replace(&mut self.builder, PackBuilder::new()).finish();
        entry.digest = Digest::of(&bytes);
        entry.key = format!("pack/{}", self.packs.len());
        self.stored.insert(entry.key.clone(), bytes);
        self.packs.push(entry);
    }
}

impl World {
    /// Memory and a disk over some generations.
    pub(super) fn new(seed: u64, memory: u64, disk: u64, generations: u32) -> Self {
        let rng = &mut SmallRng::seed_from_u64(seed);
        let mut base = Vec::new();
        (0..BASE_BLOCKS).for_each(|_| base.extend(page_content(rng)));
        let sizes = [memory, disk];
        let mut maps = vec![ImageMap::zero(memory), ImageMap::base(disk, BASE_BLOCKS)];
        let mut images: Vec<Vec<u8>> = sizes.iter().map(|&pages| vec![0; pages as usize * PAGE_SIZE]).collect();
        let covered = images[1].len().min(base.len());
        images[1][..covered].copy_from_slice(&base[..covered]);
        let (mut packs, mut stored) = (Vec::new(), HashMap::new());
        for _ in 0..generations {
            let mut packing =
                Packing { rng, packs: &mut packs, stored: &mut stored, builder: PackBuilder::new(), frames: 0 };
            for image in 0..2 {
                // Disjoint pieces of a part of the image, shuffled into frames.
                let mut pieces = Vec::new();
                let mut at = 0;
                while at < sizes[image] {
                    let end = (at + packing.rng.random_range(1..40)).min(sizes[image]);
                    if packing.rng.random_bool(0.6) {
                        pieces.push(at..end);
                    }
                    at = end;
                }
                if packing.rng.random_bool(0.5) {
                    pieces.shuffle(packing.rng);
                }
                let mut runs = Vec::new();
                let mut waiting: Vec<(Range<u64>, u32)> = Vec::new();
                let mut frame = Vec::new();
                let flush = |waiting: &mut Vec<(Range<u64>, u32)>,
                             frame: &mut Vec<u8>,
                             packing: &mut Packing<'_>,
                             runs: &mut Vec<Run>| {
                    if !waiting.is_empty() {
                        let (pack, number) = packing.frame(frame);
                        runs.extend(waiting.drain(..).map(|(range, index)| Run {
                            start: range.start,
                            pages: range.end - range.start,
                            at: PageRef::Pack { pack, frame: number, index },
                        }));
                        frame.clear();
                    }
                };
                for piece in pieces {
                    let pages = piece.end - piece.start;
                    let bytes = piece.start as usize * PAGE_SIZE..piece.end as usize * PAGE_SIZE;
                    match packing.rng.random_range(0..6) {
                        0 => {
                            images[image][bytes].fill(0);
                            runs.push(Run { start: piece.start, pages, at: PageRef::Zero });
                        }
                        1 => {
                            let block = packing.rng.random_range(0..BASE_BLOCKS - pages);
                            let from = block as usize * PAGE_SIZE;
                            images[image][bytes.clone()].copy_from_slice(&base[from..from + bytes.len()]);
                            runs.push(Run { start: piece.start, pages, at: PageRef::Base { block } });
                        }
                        _ => {
                            let mut content = Vec::new();
                            (0..pages).for_each(|_| content.extend(page_content(packing.rng)));
                            images[image][bytes].copy_from_slice(&content);
                            if frame.len() + content.len() > packing.rng.random_range(8..=64) * PAGE_SIZE {
                                flush(&mut waiting, &mut frame, &mut packing, &mut runs);
                            }
                            waiting.push((piece, (frame.len() / PAGE_SIZE) as u32));
                            frame.extend(content);
                        }
                    }
                }
                flush(&mut waiting, &mut frame, &mut packing, &mut runs);
                maps[image] = maps[image].overlay(&runs).unwrap();
            }
            packing.finish();
        }
        let kinds = [ImageKind::Memory, ImageKind::Disk(0)];
        let base_of = Some(Base { digest: Digest([1; 32]), blocks: BASE_BLOCKS });
        let manifest = Manifest {
            arch: Arch::X86_64,
            platform: Platform::default(),
            spec: Versioned::default(),
            record: Versioned::default(),
            lineage: None,
            packs,
            images: kinds.into_iter().zip(maps).map(|(kind, map)| Image { kind, map, base: base_of }).collect(),
            state: Vec::new(),
            sealed_state: None,
            boot: Boot::default(),
        };
        manifest.check().unwrap();
        Self { manifest, packs: stored, images, base: Arc::new(base) }
    }

    pub(super) fn targets(&self) -> Vec<Arc<Target>> {
        let images = self.images.iter().zip(&self.manifest.images);
        images
            .map(|(bytes, image)| {
                let disk = image.kind != ImageKind::Memory;
                let mut start = vec![0; bytes.len()];
                if disk {
                    // What an overlay reads where nothing was placed; zero pages hide the base.
                    for run in image.map.runs() {
                        for page in run.start..run.end().min(BASE_BLOCKS) {
                            if run.at != PageRef::Zero {
                                let at = page as usize * PAGE_SIZE;
                                start[at..at + PAGE_SIZE].copy_from_slice(&self.base[at..at + PAGE_SIZE]);
                            }
                        }
                    }
                }
                Arc::new(Target {
                    placed: (0..bytes.len() / PAGE_SIZE).map(|_| AtomicU8::new(0)).collect(),
                    bytes: Mutex::new(start),
                    base: self.base.clone(),
                    bad_page: None,
                })
            })
            .collect()
    }

    pub(super) fn source(&self) -> Arc<Source> {
        Arc::new(Source { packs: self.packs.clone(), ..Source::default() })
    }

    pub(super) fn pager(
        &self,
        runtime: &Runtime,
        source: &Arc<Source>,
        cache: Option<PackCache>,
        options: Options,
    ) -> (Pager, Vec<Arc<Target>>) {
        let targets = self.targets();
        let pager = Pager::new(
            &self.manifest,
            targets.iter().map(|target| target.clone() as Arc<dyn PageTarget>).collect(),
            Sources { store: source.clone(), cache: cache.map(Arc::new), keys: DataKeys::default() },
            options,
            runtime.handle().clone(),
        );
        (pager.unwrap(), targets)
    }

    /// Every page that was placed is right and was placed once; what the pager says of pages is so.
    pub(super) fn check(&self, pager: &Pager, targets: &[Arc<Target>]) {
        let mut count = 0;
        let placed_pages = pager.stats().placed_pages;
        for (image, target) in targets.iter().enumerate() {
            let absent: HashSet<u64> = pager.absent(image).into_iter().flatten().collect();
            let bytes = target.bytes.lock().unwrap();
            for page in 0..(bytes.len() / PAGE_SIZE) as u64 {
                let placed = target.placed[page as usize].load(Ordering::SeqCst);
                count += u64::from(placed);
                assert!(placed <= 1, "page {page} of image {image} was placed {placed} times");
                assert!(pager.is_placed(image, page..page + 1) || absent.contains(&page));
                if !absent.contains(&page) {
                    let at = page as usize * PAGE_SIZE;
                    assert!(
                        bytes[at..at + PAGE_SIZE] == self.images[image][at..at + PAGE_SIZE],
                        "page {page} of image {image}: {:?}",
                        self.manifest.images[image].map.lookup(page)
                    );
                }
            }
        }
        assert!(placed_pages <= count);
    }

    pub(super) fn check_all(&self, pager: &Pager, targets: &[Arc<Target>]) {
        self.check(pager, targets);
        for (image, target) in targets.iter().enumerate() {
            assert_eq!(pager.absent(image), []);
            assert!(*target.bytes.lock().unwrap() == self.images[image]);
        }
    }

    pub(super) fn any_pages(&self, rng: &mut SmallRng) -> (usize, Range<u64>) {
        let image = rng.random_range(0..2);
        let pages = self.manifest.images[image].map.pages();
        let start = rng.random_range(0..pages);
        (image, start..(start + rng.random_range(1..100)).min(pages))
    }

    /// A page of memory in a pack, and the pack.
    pub(super) fn some_pack_page(&self) -> (u64, String) {
        let found = self.manifest.images[0].map.runs().iter().find_map(|run| match run.at {
            PageRef::Pack { pack, .. } => Some((run.start, self.manifest.packs[pack as usize].key.clone())),
            _ => None,
        });
        found.unwrap()
    }
}

/// An image in memory that counts.
pub(super) struct Target {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) placed: Vec<AtomicU8>,
    pub(super) base: Arc<Vec<u8>>,
    pub(super) bad_page: Option<u64>,
}

impl PageTarget for Target {
    fn place(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        let pages = first_page..first_page + (bytes.len() / PAGE_SIZE) as u64;
        if self.bad_page.is_some_and(|bad| pages.contains(&bad)) {
            return Err(io::Error::other("bad page"));
        }
        let at = first_page as usize * PAGE_SIZE;
        self.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        for page in pages {
            self.placed[page as usize].fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn place_base(&self, first_page: u64, first_block: u64, pages: u64) -> io::Result<()> {
        let from = first_block as usize * PAGE_SIZE;
        self.place(first_page, &self.base[from..from + pages as usize * PAGE_SIZE])
    }
}

/// Packs in memory, behind a bad line.
#[derive(Default)]
pub(super) struct Source {
    pub(super) packs: HashMap<String, Bytes>,
    /// Of each answer, in microseconds at most.
    pub(super) latency: u64,
    /// Answers of unavailability, and answers with a bit turned, that are still to be given.
    pub(super) failures: AtomicUsize,
    pub(super) damaged: AtomicUsize,
    /// Fails for good.
    pub(super) lost: Mutex<HashSet<String>>,
    pub(super) rotten: Mutex<HashSet<String>>,
    /// Requests so far.
    pub(super) log: Mutex<Vec<(String, Range<u64>)>>,
    /// Answers nothing.
    pub(super) silent: bool,
    pub(super) open: AtomicUsize,
    pub(super) most_open: AtomicUsize,
}

impl Source {
    pub(super) fn requests(&self) -> usize {
        self.log.lock().unwrap().len()
    }

    pub(super) fn one_of(count: &AtomicUsize) -> bool {
        rand::rng().random_bool(0.3)
            && count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }
}

struct Open<'a>(&'a AtomicUsize);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl PackSource for Source {
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.log.lock().unwrap().push((key.to_owned(), range.clone()));
        self.most_open.fetch_max(self.open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        let _open = Open(&self.open);
        if self.silent {
            std::future::pending::<()>().await;
        }
        if self.latency > 0 {
            let latency = rand::rng().random_range(self.latency / 2..self.latency);
            time::sleep(Duration::from_micros(latency)).await;
        }
        if self.lost.lock().unwrap().contains(key) {
            return Err(StoreError::new(ErrorKind::NotFound, Operation::Get, key));
        }
        if Self::one_of(&self.failures) {
            return Err(StoreError::new(ErrorKind::Unavailable, Operation::Get, key));
        }
        let mut bytes = self.packs[key][range.start as usize..range.end as usize].to_vec();
        if self.rotten.lock().unwrap().contains(key) || Self::one_of(&self.damaged) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
        }
        Ok(bytes.into())
    }
}

pub(super) fn hasty() -> Options {
    Options { backoff: Duration::from_millis(1), deadline: PATIENT, ..Options::default() }
}

/// Files for every pack: whole, in part, garbage, or empty.
pub(super) fn cache(world: &World, rng: &mut SmallRng) -> PackCache {
    let mut files = HashMap::new();
    for (key, bytes) in &world.packs {
        let file = tempfile::tempfile().unwrap();
        let len = bytes.len();
        match rng.random_range(0..5) {
            0 => {}
            1 => file.write_all_at(bytes, 0).unwrap(),
            2 => file.write_all_at(&bytes[len / 2..], len as u64 / 2).unwrap(),
            3 => {
                file.write_all_at(&bytes[..len / 3], 0).unwrap();
                file.set_len(len as u64).unwrap();
            }
            _ => {
                let mut garbage = bytes.to_vec();
                for _ in 0..8 {
                    garbage[rng.random_range(0..len)] ^= 1;
                }
                file.write_all_at(&garbage, 0).unwrap();
            }
        }
        if rng.random_bool(0.9) {
            files.insert(key.clone(), file);
        }
    }
    PackCache::new(files)
}

pub(super) fn empty_cache(world: &World) -> (PackCache, HashMap<String, File>) {
    let files: HashMap<String, File> =
        world.packs.keys().map(|key| (key.clone(), tempfile::tempfile().unwrap())).collect();
    let handed = files.iter().map(|(key, file)| (key.clone(), file.try_clone().unwrap())).collect();
    (PackCache::new(handed), files)
}

pub(super) fn any_order(world: &World, rng: &mut SmallRng) -> Vec<Touch> {
    let touch = |(image, pages): (usize, Range<u64>)| Touch {
        image: image as u32,
        start: pages.start,
        pages: pages.end - pages.start,
    };
    (0..rng.random_range(0..20)).map(|_| touch(world.any_pages(rng))).collect()
}
