//! What the tests of capture and restore share: images in memory, and packs in memory whose PUTs can be made to fail.

#![allow(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{
    collections::HashMap,
    io,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use stasis_snapshot::{
    capture::{BaseInput, Captured, ImageInput, PageReader},
    granted::{PackSink, PackSource},
    ids::Digest,
    image::ImageMap,
    manifest::{Arch, Base, Boot, Image, ImageKind, Manifest, Platform, Versioned},
    pack::PackEntry,
    page::PAGE_SIZE,
    restore::PageWriter,
    store::{ErrorKind, Operation, StoreError},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const GATE_DEADLINE: Duration = Duration::from_secs(30);

/// An image in memory.
#[derive(Default)]
pub(crate) struct Pages {
    pub(crate) bytes: Mutex<Vec<u8>>,
    /// Fails the read that touches this page.
    pub(crate) bad_page: Option<u64>,
    pub(crate) reads: AtomicU64,
    /// What `write_base` copies from; without it base pages are left alone.
    pub(crate) base: Option<Arc<Pages>>,
}

impl Pages {
    pub(crate) fn zero(pages: u64) -> Self {
        Self { bytes: Mutex::new(vec![0; pages as usize * PAGE_SIZE]), ..Self::default() }
    }

    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes), ..Self::default() }
    }

    pub(crate) fn len(&self) -> u64 {
        (self.bytes.lock().unwrap().len() / PAGE_SIZE) as u64
    }

    pub(crate) fn snapshot(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    pub(crate) fn set(&self, page: u64, content: &[u8]) {
        let at = page as usize * PAGE_SIZE;
        self.bytes.lock().unwrap()[at..at + PAGE_SIZE].copy_from_slice(content);
    }

    pub(crate) fn page(&self, page: u64) -> Vec<u8> {
        let at = page as usize * PAGE_SIZE;
        self.bytes.lock().unwrap()[at..at + PAGE_SIZE].to_vec()
    }
}

impl PageReader for Pages {
    fn read(&self, first_page: u64, into: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let pages = first_page..first_page + (into.len() / PAGE_SIZE) as u64;
        if self.bad_page.is_some_and(|bad| pages.contains(&bad)) {
            return Err(io::Error::other("bad page"));
        }
        let at = first_page as usize * PAGE_SIZE;
        into.copy_from_slice(&self.bytes.lock().unwrap()[at..at + into.len()]);
        Ok(())
    }
}

/// An image that stands still.
pub(crate) struct Frozen(pub(crate) Vec<u8>);

impl PageReader for Frozen {
    fn read(&self, first_page: u64, into: &mut [u8]) -> io::Result<()> {
        let pages = (into.len() / PAGE_SIZE) as u64;
        into.copy_from_slice(self.view(first_page, pages).ok_or_else(|| io::Error::other("past the end"))?);
        Ok(())
    }

    fn view(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        self.0.get(first_page as usize * PAGE_SIZE..(first_page + pages) as usize * PAGE_SIZE)
    }
}

impl PageWriter for Pages {
    fn write(&self, first_page: u64, bytes: &[u8]) -> io::Result<()> {
        if self.bad_page == Some(first_page) {
            return Err(io::Error::other("bad page"));
        }
        let at = first_page as usize * PAGE_SIZE;
        self.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn write_base(&self, first_page: u64, first_block: u64, pages: u64) -> io::Result<()> {
        if let Some(base) = &self.base {
            for i in 0..pages {
                self.set(first_page + i, &base.page(first_block + i));
            }
        }
        Ok(())
    }
}

/// What happens at a PUT.
#[derive(Clone)]
pub(crate) enum Fault {
    Fail(ErrorKind),
    /// Cancels the capture and never answers.
    Cancel(CancellationToken),
    /// Stores the pack, then cancels the capture.
    StoreThenCancel(CancellationToken),
}

/// Packs in memory.
#[derive(Default)]
pub(crate) struct Packs {
    pub(crate) stored: Mutex<HashMap<String, Bytes>>,
    /// What the next captures' keys begin with.
    pub(crate) prefix: Mutex<String>,
    pub(crate) fault: Mutex<Option<(u32, Fault)>>,
    pub(crate) in_flight: AtomicUsize,
    pub(crate) most_in_flight: watch::Sender<usize>,
    pub(crate) bytes_in_flight: AtomicUsize,
    pub(crate) most_bytes_in_flight: AtomicUsize,
    /// No PUT is answered before so many have been in flight together.
    pub(crate) gate: AtomicUsize,
}

impl Packs {
    pub(crate) fn begin(&self, prefix: &str) {
        prefix.clone_into(&mut self.prefix.lock().unwrap());
        *self.fault.lock().unwrap() = None;
    }

    pub(crate) fn damage(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut stored = self.stored.lock().unwrap();
        let mut bytes = stored[key].to_vec();
        change(&mut bytes);
        stored.insert(key.to_owned(), bytes.into());
    }

    fn store(&self, key: &str, bytes: Bytes) {
        let before = self.stored.lock().unwrap().insert(key.to_owned(), bytes);
        assert!(before.is_none(), "{key} was stored twice");
    }
}

#[async_trait]
impl PackSink for Packs {
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        let key = format!("{}{n}", self.prefix.lock().unwrap());
        let fault = self.fault.lock().unwrap().clone();
        match fault {
            Some((at, Fault::Fail(kind))) if at == n => {
                // A refusal takes its time, too: packs that were sent before are durable by then.
                tokio::time::sleep(Duration::from_millis(20)).await;
                return Err(StoreError::new(kind, Operation::Put, key));
            }
            Some((at, Fault::Cancel(token))) if at == n => {
                token.cancel();
                std::future::pending::<()>().await;
            }
            Some((at, Fault::StoreThenCancel(token))) if at == n => {
                self.store(&key, bytes);
                token.cancel();
                return Ok(key);
            }
            _ => {}
        }
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        let held = self.bytes_in_flight.fetch_add(bytes.len(), Ordering::SeqCst) + bytes.len();
        self.most_bytes_in_flight.fetch_max(held, Ordering::SeqCst);
        self.most_in_flight.send_modify(|most| *most = now.max(*most));
        let gate = self.gate.load(Ordering::SeqCst);
        let mut most = self.most_in_flight.subscribe();
        let open = tokio::time::timeout(GATE_DEADLINE, most.wait_for(|most| *most >= gate)).await.is_ok();
        assert!(open, "never {gate} PUTs in flight");
        if n.is_multiple_of(2) {
            // Out of order.
            tokio::task::yield_now().await;
        }
        self.bytes_in_flight.fetch_sub(bytes.len(), Ordering::SeqCst);
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        self.store(&key, bytes);
        Ok(key)
    }

    fn key(&self, n: u32) -> Option<String> {
        Some(format!("{}{n}", self.prefix.lock().unwrap()))
    }
}

#[async_trait]
impl PackSource for Packs {
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let stored = self.stored.lock().unwrap();
        let bytes = stored.get(key).ok_or_else(|| StoreError::new(ErrorKind::NotFound, Operation::Get, key))?;
        if range.end > bytes.len() as u64 {
            return Err(StoreError::new(ErrorKind::Corrupt, Operation::Get, key));
        }
        Ok(bytes.slice(range.start as usize..range.end as usize))
    }
}

/// Page contents of every kind.
pub(crate) fn content(rng: &mut SmallRng, kind: u8) -> Vec<u8> {
    match kind {
        0 => vec![0; PAGE_SIZE],
        1 => vec![rng.random_range(1..=255); PAGE_SIZE],
        2 => (0..PAGE_SIZE).map(|i| (i / 16) as u8 ^ 0x5a).collect(),
        _ => (0..PAGE_SIZE).map(|_| rng.random()).collect(),
    }
}

pub(crate) fn noise(seed: u64, pages: u64) -> Vec<u8> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut bytes = vec![0; pages as usize * PAGE_SIZE];
    rng.fill(&mut bytes[..]);
    bytes
}

/// The whole image, from nothing.
pub(crate) fn first_capture(kind: ImageKind, pages: &Arc<Pages>, base: Option<BaseInput>) -> ImageInput {
    let blocks = base.as_ref().filter(|base| base.same_offset).map_or(0, |base| base.blocks);
    ImageInput {
        kind,
        parent: ImageMap::base(pages.len(), blocks),
        look_at: std::iter::once(0..pages.len()).collect(),
        reader: pages.clone(),
        base,
        digests: None,
        rewrite: Vec::new(),
    }
}

/// A manifest of these packs and maps, through its encoding.
pub(crate) fn manifest(packs: &[PackEntry], maps: &[ImageMap], kinds: &[ImageKind], base_blocks: u64) -> Manifest {
    let images = maps
        .iter()
        .zip(kinds)
        .map(|(map, &kind)| Image {
            kind,
            map: map.clone(),
            base: (base_blocks > 0).then_some(Base { digest: Digest([1; 32]), blocks: base_blocks }),
        })
        .collect();
    let manifest = Manifest {
        arch: Arch::X86_64,
        platform: Platform::default(),
        spec: Versioned::default(),
        record: Versioned::default(),
        lineage: None,
        packs: packs.to_vec(),
        images,
        state: Vec::new(),
        sealed_state: None,
        boot: Boot::default(),
    };
    Manifest::decode(&manifest.encode().unwrap()).unwrap()
}

pub(crate) fn manifest_of(captured: &Captured, kinds: &[ImageKind], base_blocks: u64) -> Manifest {
    manifest(&captured.packs, &captured.maps, kinds, base_blocks)
}
