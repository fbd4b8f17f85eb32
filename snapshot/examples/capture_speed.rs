//! How fast a capture is, and where its time goes: scanning alone, then whole captures of 256 MiB of mixed content into nothing and into a
//! directory. `cargo run --release -p stasis-snapshot --example capture_speed [DIRECTORY]`

#![expect(clippy::cast_precision_loss, reason = "estimates")]

use std::{
    collections::HashMap,
    error::Error,
    fs::File,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use stasis_snapshot::{
    capture::{CaptureRequest, Captured, CodecChoice, ImageInput, Options, PageDigests, PageReader, capture},
    grant::{Access, GrantedObject},
    granted::{Direct, GrantedPacks, PackSink, Patience, StoreClient},
    image::ImageMap,
    manifest::ImageKind,
    pack::Codec,
    page::PAGE_SIZE,
    store::StoreError,
};
use tokio_util::sync::CancellationToken;

const MIB: u64 = 256;

/// Memory that stands still, to be viewed or to be read.
struct Memory {
    bytes: Vec<u8>,
    viewed: bool,
}

impl PageReader for Memory {
    fn read(&self, first_page: u64, into: &mut [u8]) -> io::Result<()> {
        let at = first_page as usize * PAGE_SIZE;
        into.copy_from_slice(&self.bytes[at..at + into.len()]);
        Ok(())
    }

    fn view(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        let range = first_page as usize * PAGE_SIZE..(first_page + pages) as usize * PAGE_SIZE;
        self.bytes.get(range).filter(|_| self.viewed)
    }
}

/// Where packs go to be forgotten.
struct Nowhere;

#[async_trait]
impl PackSink for Nowhere {
    async fn put(&self, n: u32, _: Bytes) -> Result<String, StoreError> {
        Ok(n.to_string())
    }
}

/// Content as the pulse guest's `real` mix: of 16 pages 2 random, 6 half random, 4 zero, 2 duplicates of 64, 2 full of pointers.
fn real(pages: u64) -> Vec<u8> {
    let mut state = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut fill = |bytes: &mut [u8], shape: fn(u64) -> u64| {
        bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = shape(random()).to_le_bytes());
    };
    let mut duplicates = vec![0; 64 * PAGE_SIZE];
    fill(&mut duplicates, |word| word);
    let mut bytes = vec![0; pages as usize * PAGE_SIZE];
    for (number, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        match number % 16 {
            0 | 1 => fill(page, |word| word),
            2..8 => fill(&mut page[..PAGE_SIZE / 2], |word| word),
            8..12 => {}
            12 | 13 => page.copy_from_slice(&duplicates[number * 29 % 64 * PAGE_SIZE..][..PAGE_SIZE]),
            _ => fill(page, |word| 0x7fff_0000_0000 | word & 0xf_fff8),
        }
    }
    bytes
}

struct Run<'a> {
    name: String,
    memory: &'a Arc<Memory>,
    sink: Arc<dyn PackSink>,
    codec: CodecChoice,
    parent: Option<&'a Captured>,
    digests: Option<&'a Arc<PageDigests>>,
}

/// CPU time of this process.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

impl Run<'_> {
    async fn go(self) -> Result<Captured, Box<dyn Error>> {
        let pages = (self.memory.bytes.len() / PAGE_SIZE) as u64;
        let input = ImageInput {
            kind: ImageKind::Memory,
            parent: self.parent.map_or(ImageMap::zero(pages), |parent| parent.maps[0].clone()),
            look_at: std::iter::once(0..pages).collect(),
            reader: self.memory.clone(),
            base: None,
            digests: self.digests.cloned(),
            rewrite: Vec::new(),
        };
        let request = CaptureRequest {
            images: vec![input],
            parent_packs: self.parent.map_or(Vec::new(), |parent| parent.packs.clone()),
            threads: None,
            sink: self.sink,
            options: Options { codec: self.codec, ..Options::default() },
            cancel: CancellationToken::new(),
            progress: None,
            connections: None,
            seal: None,
        };
        let (started, before) = (Instant::now(), cpu());
        let captured = capture(request).await?;
        let (took, used) = (started.elapsed(), cpu().saturating_sub(before));
        let gib = self.memory.bytes.len() as f64 / f64::from(1 << 30);
        let stats = captured.stats;
        println!(
            "{:34} {:7.1} ms {:7.1} ms CPU {:6.2} GiB/s {:6.2} GiB/s of CPU {:6} sent {:7.1} MiB {:3} packs",
            self.name,
            took.as_secs_f64() * 1e3,
            used.as_secs_f64() * 1e3,
            gib / took.as_secs_f64(),
            gib / used.as_secs_f64(),
            stats.sent_pages,
            stats.sent_bytes as f64 / f64::from(1 << 20),
            stats.packs,
        );
        Ok(captured)
    }
}

fn directory(path: &Path) -> Result<Arc<dyn PackSink>, Box<dyn Error>> {
    let mut files = HashMap::new();
    let mut objects = Vec::new();
    for token in 0..64 {
        let key = format!("capture-speed-{token}");
        files.insert(token, File::create(path.join(&key))?);
        objects.push(GrantedObject { key, access: Access::Fd(token), cache: None });
    }
    Ok(Arc::new(GrantedPacks::new(StoreClient::new(Arc::new(Direct))?, objects, &mut files, Patience::default())?))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1);
    let pages = MIB << 8;
    let mut zero = vec![1; pages as usize * PAGE_SIZE];
    zero.fill(0);
    let nowhere: Arc<dyn PackSink> = Arc::new(Nowhere);
    for round in 0..3 {
        println!("round {round}");
        for viewed in [true, false] {
            let how = if viewed { "viewed" } else { "read" };
            let name = |what: &str| format!("{what}, {how}");
            let memory = |bytes| Arc::new(Memory { bytes, viewed });
            let digests = Arc::new(PageDigests::new(pages)?);
            let empty = memory(std::mem::take(&mut zero));
            let filled = memory(real(pages));
            let run = |name, memory, codec, parent, digests| {
                Run { name, memory, sink: nowhere.clone(), codec, parent, digests }.go()
            };
            let lz4 = CodecChoice::Fixed(Codec::Lz4);
            run(name("zero"), &empty, lz4, None, None).await?;
            run(name("real, raw"), &filled, CodecChoice::Fixed(Codec::Raw), None, None).await?;
            run(name("real, zstd"), &filled, CodecChoice::Fixed(Codec::Zstd), None, None).await?;
            run(name("real, adaptive"), &filled, CodecChoice::Adaptive, None, None).await?;
            run(name("real, lz4"), &filled, lz4, None, None).await?;
            let first = run(name("real, lz4, noting digests"), &filled, lz4, None, Some(&digests)).await?;
            run(name("unchanged"), &filled, lz4, Some(&first), Some(&digests)).await?;
            if let Some(path) = &path {
                let sink = directory(Path::new(path))?;
                let name = name("real, adaptive, directory");
                Run { name, memory: &filled, sink, codec: CodecChoice::Adaptive, parent: None, digests: None }
                    .go()
                    .await?;
            }
            zero = Arc::try_unwrap(empty).map(|memory| memory.bytes).unwrap_or_default();
        }
    }
    Ok(())
}
