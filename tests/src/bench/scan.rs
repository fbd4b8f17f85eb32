//! What a capture costs without its store: where there is nothing to send (zero pages, and pages that are as the parent has them), and for the
//! content that pulse has. The pipeline itself is run, in this process, over memory that stands still.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use rand::RngCore as _;
use stasis_snapshot::capture::{CaptureRequest, ImageInput, Options, PageDigests, PageReader, Stats, capture};
use stasis_snapshot::granted::PackSink;
use stasis_snapshot::image::ImageMap;
use stasis_snapshot::manifest::ImageKind;
use stasis_snapshot::store::StoreError;

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

/// Takes packs and forgets them.
struct Nowhere;

#[async_trait]
impl PackSink for Nowhere {
    async fn put(&self, n: u32, _bytes: Bytes) -> Result<String, StoreError> {
        Ok(format!("pack/{n}"))
    }
}

async fn scan(reader: Arc<Memory>, digests: Option<Arc<PageDigests>>) -> Result<(Stats, Duration), Error> {
    let image = ImageInput {
        kind: ImageKind::Memory,
        parent: ImageMap::zero(PAGES),
        look_at: std::iter::once(0..PAGES).collect(),
        reader,
        base: None,
        digests,
        rewrite: Vec::new(),
    };
    let request = CaptureRequest {
        images: vec![image],
        parent_packs: Vec::new(),
        threads: None,
        sink: Arc::new(Nowhere),
        options: Options::default(),
        cancel: tokio_util::sync::CancellationToken::new(),
        progress: None,
        connections: None,
        seal: None,
    };
    let before = own_cpu();
    let captured = capture(request).await?;
    Ok((captured.stats, own_cpu().saturating_sub(before)))
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

/// CPU time for a GiB of zero pages, for one of unchanged pages, and for one of pulse's content, as often as is said.
pub async fn measure(runs: u32, samples: &mut Samples) -> Result<(), Error> {
    let bytes = usize::try_from(PAGES)? * PAGE;
    let per_gib = f64::from(1 << 30) / bytes as f64;
    let zero = Arc::new(Memory(vec![0; bytes]));
    let mut content = vec![0; bytes];
    rand::rng().fill_bytes(&mut content);
    let digests = Arc::new(PageDigests::new(PAGES)?);
    digests.note(0, &content);
    let same = Arc::new(Memory(content));
    let used = Arc::new(Memory(real(bytes)));
    // The first of each finds caches and tables cold, as a capture does not that follows a running guest.
    for run in 0..=runs {
        let (stats, cpu) = scan(zero.clone(), None).await?;
        if stats.zero_pages != PAGES {
            return Err(format!("zero pages were not seen as such: {stats:?}").into());
        }
        let (others, again) = scan(same.clone(), Some(digests.clone())).await?;
        if others.unchanged_pages != PAGES {
            return Err(format!("unchanged pages were not seen as such: {others:?}").into());
        }
        let (_, whole) = scan(used.clone(), Some(Arc::new(PageDigests::new(PAGES)?))).await?;
        if run > 0 {
            samples.time("capture_cpu.gib", whole.mul_f64(per_gib));
            samples.time("scan.zero_gib", cpu.mul_f64(per_gib));
            samples.time("scan.unchanged_gib", again.mul_f64(per_gib));
        }
    }
    Ok(())
}
