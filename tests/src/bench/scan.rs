//! What work on pages costs without a store: a capture where there is nothing to send (zero pages, and pages that are as the parent has them),
//! and of the content that pulse has; its pages checked, decoded and placed; a plain copy. The product's own code is run, in this process, over
//! memory that stands still.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::RngCore as _;
use stasis_snapshot::capture::{CaptureRequest, Captured, ImageInput, Options, PageDigests, PageReader, capture};
use stasis_snapshot::granted::PackSink;
use stasis_snapshot::image::ImageMap;
use stasis_snapshot::manifest::ImageKind;
use stasis_snapshot::pack::FrameDecoder;
use stasis_snapshot::seal::{DataKey, DataKeyId, PackCipher};
use stasis_snapshot::store::StoreError;

use super::case::Case;
use super::process::own_cpu;
use super::samples::Samples;
use crate::vmm::Error;

const PAGE: usize = 4096;
/// Pages that are scanned: 256 MiB.
const PAGES: u64 = 65536;

struct Memory(Vec<u8>);

impl Memory {
    fn part(&self, first_page: u64, bytes: usize) -> Option<&[u8]> {
        let from = usize::try_from(first_page).ok()?.checked_mul(PAGE)?;
        self.0.get(from..from.checked_add(bytes)?)
    }
}

impl PageReader for Memory {
    fn read(&self, first_page: u64, into: &mut [u8]) -> io::Result<()> {
        let part = self.part(first_page, into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(part);
        Ok(())
    }

    fn view(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        self.part(first_page, usize::try_from(pages).ok()? * PAGE)
    }
}

/// Keeps packs, by number.
#[derive(Default)]
struct Packs(Mutex<Vec<(u32, Bytes)>>);

#[async_trait]
impl PackSink for Packs {
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((n, bytes));
        Ok(format!("pack/{n}"))
    }

    fn key(&self, n: u32) -> Option<String> {
        Some(format!("pack/{n}"))
    }
}

/// A capture, its packs and the processor time that it took.
async fn scan(
    reader: Arc<Memory>,
    digests: Option<Arc<PageDigests>>,
    seal: Option<DataKey>,
) -> Result<(Captured, Arc<Packs>, Duration), Error> {
    let image = ImageInput {
        kind: ImageKind::Memory,
        parent: ImageMap::zero(PAGES),
        look_at: std::iter::once(0..PAGES).collect(),
        reader,
        base: None,
        digests,
        rewrite: Vec::new(),
    };
    let sink = Arc::new(Packs::default());
    let request = CaptureRequest {
        images: vec![image],
        parent_packs: Vec::new(),
        threads: None,
        sink: sink.clone(),
        options: Options::default(),
        cancel: tokio_util::sync::CancellationToken::new(),
        progress: None,
        connections: None,
        seal,
    };
    let before = own_cpu();
    let captured = capture(request).await?;
    Ok((captured, sink, own_cpu().saturating_sub(before)))
}

/// Processor time to check and decode the frames of a capture into memory, and to note the digests of the pages.
fn fill(
    captured: &Captured,
    packs: &Packs,
    key: Option<&DataKey>,
    into: &mut [u8],
    digests: &PageDigests,
) -> Result<Duration, Error> {
    let packs = packs.0.lock().unwrap_or_else(PoisonError::into_inner);
    let before = own_cpu();
    let (mut at, mut page, mut decoder) = (0, 0, FrameDecoder::default());
    for (n, bytes) in &*packs {
        let entry = captured.packs.get(usize::try_from(*n)?).ok_or("a pack that the capture does not name")?;
        let cipher = key.map(|key| PackCipher::new(key, &entry.key));
        for (number, frame) in (0..).zip(&entry.frames) {
            let from = usize::try_from(frame.offset)?;
            let stored = bytes.get(from..from + usize::try_from(frame.stored_len)?).ok_or("a frame past its pack")?;
            let pages = decoder.decode(frame, number, stored, cipher.as_ref())?;
            into.get_mut(at..at + pages.len()).ok_or("more pages than there were")?.copy_from_slice(pages);
            digests.note(page, pages);
            (at, page) = (at + pages.len(), page + u64::from(frame.pages));
        }
    }
    Ok(own_cpu().saturating_sub(before))
}

/// Content as pulse's `real` mix: of 16 pages 2 random, 6 half random, 4 zero, 2 duplicates of 64, 2 full of pointers.
fn real(bytes: usize) -> Vec<u8> {
    let mut random = rand::rng();
    let mut duplicates = vec![0; 64 * PAGE];
    random.fill_bytes(&mut duplicates);
    let mut content = vec![0; bytes];
    for (number, page) in content.chunks_exact_mut(PAGE).enumerate() {
        match number % 16 {
            0 | 1 => random.fill_bytes(page),
            2..8 => random.fill_bytes(&mut page[..PAGE / 2]),
            8..12 => {}
            12 | 13 => page.copy_from_slice(&duplicates[number * 29 % 64 * PAGE..][..PAGE]),
            _ => {
                for word in page.as_chunks_mut::<8>().0 {
                    *word = (0x7fff_0000_0000 | random.next_u64() & 0xf_fff8).to_le_bytes();
                }
            }
        }
    }
    content
}

/// CPU time for a GiB of zero pages, for one of unchanged pages, and for one of pulse's content, back again and copied, as often as the case runs.
pub async fn measure(case: &Case, samples: &mut Samples) -> Result<(), Error> {
    let bytes = usize::try_from(PAGES)? * PAGE;
    let per_gib = f64::from(1 << 30) / bytes as f64;
    let zero = Arc::new(Memory(vec![0; bytes]));
    let mut content = vec![0; bytes];
    rand::rng().fill_bytes(&mut content);
    let digests = Arc::new(PageDigests::new(PAGES)?);
    digests.note(0, &content);
    let same = Arc::new(Memory(content));
    let used = Arc::new(Memory(real(bytes)));
    let key = case.encrypt.then(|| DataKey::new(DataKeyId(rand::random()), &rand::random()));
    let sealed = if case.encrypt { ".sealed" } else { "" };
    // The first of each finds caches and tables cold, as a capture does not that follows a running guest.
    for run in 0..=case.runs {
        let (captured, _, cpu) = scan(zero.clone(), None, None).await?;
        if captured.stats.zero_pages != PAGES {
            return Err(format!("zero pages were not seen as such: {:?}", captured.stats).into());
        }
        let (others, _, again) = scan(same.clone(), Some(digests.clone()), None).await?;
        if others.stats.unchanged_pages != PAGES {
            return Err(format!("unchanged pages were not seen as such: {:?}", others.stats).into());
        }
        let fresh = || Ok::<_, Error>(Arc::new(PageDigests::new(PAGES)?));
        let (captured, packs, whole) = scan(used.clone(), Some(fresh()?), key.clone()).await?;
        // Fresh: what a guest is woken into is new to the kernel.
        let mut filled = vec![0; bytes];
        let back = fill(&captured, &packs, key.as_ref(), &mut filled, &*fresh()?)?;
        let before = own_cpu();
        filled.copy_from_slice(&used.0);
        let copied = own_cpu().saturating_sub(before);
        if run > 0 {
            samples.time(format!("capture_cpu.gib{sealed}"), whole.mul_f64(per_gib));
            samples.time(format!("fill_cpu.gib{sealed}"), back.mul_f64(per_gib));
            samples.time("copy.gib", copied.mul_f64(per_gib));
            samples.time("scan.zero_gib", cpu.mul_f64(per_gib));
            samples.time("scan.unchanged_gib", again.mul_f64(per_gib));
        }
    }
    Ok(())
}
