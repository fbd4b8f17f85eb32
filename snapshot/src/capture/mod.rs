//! Capture: pages of images into packs.
//!
//! | file | what |
//! | --- | --- |
//! | `scan` | cuts what is to be looked at into chunks; tells zero, unchanged and template pages apart, and the rest into blocks |
//! | `digests`, `page_hash` | what the durable map has at each page, by a keyed hash: pages that did not change are not sent |
//! | `block_index` | looks pages up among the template's blocks |
//! | `encode` | joins blocks to frames and compresses them |
//! | `rates`, `sizing` | which codec, which size of packs: pure decisions |
//! | `buffer` | the memory of packs |
//! | `pipeline` | runs it all: chunks and frames on blocking threads, packs assembled in order, PUTs in flight |
//! | `outcome` | turns what became durable into maps |
//!
//! Blocking threads scan chunks and compress frames, several at once; the calling task takes both back in the order given, assembles packs
//! and keeps PUTs in flight. Raw and stored bytes together stay under [`Options::memory`].
//!
//! A page is only ever referred to once the PUT of its pack has been confirmed. A capture that fails hands back what is durable, so
//! that the next one need not send it again. [`capture`] returns only after the last call to a [`PageReader`] has ended; stop it with its
//! token, do not drop it.

use std::{io, ops::Range, sync::Arc};

use tokio::{runtime::Handle, sync::watch};
use tokio_util::sync::CancellationToken;

mod block_index;
mod buffer;
mod digests;
mod encode;
mod outcome;
mod page_hash;
mod pipeline;
mod ranges;
mod rates;
mod scan;
mod sizing;

pub use block_index::{BlockIndex, BlockIndexBuilder};
pub use digests::PageDigests;
pub use sizing::packs_needed;

use crate::{
    granted::PackSink,
    image::{ImageMap, MapError},
    manifest::ImageKind,
    pack::{Codec, PackEntry},
    seal::DataKey,
    store::StoreError,
};

/// Reads pages. Called from several blocking threads at once; must be cheap (memory or the page cache).
pub trait PageReader: Send + Sync {
    /// Fills `into`, a whole number of pages, from `first_page` on.
    fn read(&self, first_page: u64, into: &mut [u8]) -> io::Result<()>;

    /// Exactly these pages where they lie, if they are contiguous in this process's memory and cannot change while the capture runs (the
    /// guest stands still). `None` where either does not hold: they are then [`read`](Self::read).
    fn view(&self, first_page: u64, pages: u64) -> Option<&[u8]> {
        let _ = (first_page, pages);
        None
    }
}

/// The template disk that pages are compared with.
#[derive(Clone)]
pub struct BaseInput {
    /// Reads its blocks.
    pub reader: Arc<dyn PageReader>,
    /// Its length in blocks.
    pub blocks: u64,
    /// Compare page `i` with block `i` (disks of the template).
    pub same_offset: bool,
    /// Look pages up by content (memory: the page cache holds template blocks).
    pub index: Option<Arc<BlockIndex>>,
}

/// One image to capture.
#[derive(Clone)]
pub struct ImageInput {
    /// What it is; for messages.
    pub kind: ImageKind,
    /// Where its pages were before: the parent's map, or [`ImageMap::zero`] or [`ImageMap::base`] for a first capture. Its length is the image's.
    pub parent: ImageMap,
    /// Pages that may differ from `parent`, each once, in the order in which they are to be packed.
    pub look_at: Vec<Range<u64>>,
    /// Reads the image.
    pub reader: Arc<dyn PageReader>,
    /// The template disk, where there is one.
    pub base: Option<BaseInput>,
    /// What `parent` has at each page, as far as it is known: pages that equal it are left to it. The capture notes what it made durable,
    /// and on failure no more than [`Partial::done`] covers.
    pub digests: Option<Arc<PageDigests>>,
    /// Pages among `look_at` that are sent even if they did not change (compaction). Zero pages and those of the base stay references.
    pub rewrite: Vec<Range<u64>>,
}

/// How frames are compressed. Frames that gain too little are stored raw in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CodecChoice {
    /// Always this one.
    Fixed(Codec),
    /// What the measured rates of store and codecs call for.
    #[default]
    Adaptive,
}

/// How to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// PUTs in flight at most.
    pub connections: u16,
    /// Compression.
    pub codec: CodecChoice,
    /// Bytes of pages and packs in memory at most; raised to what one pack and the workers need.
    pub memory: u64,
    /// Pages looked at first that go to a boot pack of small frames (at most 16 MiB); 0 for none.
    pub boot_pages: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { connections: 8, codec: CodecChoice::Adaptive, memory: 64 << 20, boot_pages: 0 }
    }
}

/// Everything [`capture`] needs.
pub struct CaptureRequest {
    /// Memory, then disks.
    pub images: Vec<ImageInput>,
    /// The packs that the parents' maps refer to.
    pub parent_packs: Vec<PackEntry>,
    /// Whose blocking threads scan and compress; the current runtime's otherwise. With threads of a lower priority a guest that runs meanwhile
    /// comes first.
    pub threads: Option<Handle>,
    /// Where packs go.
    pub sink: Arc<dyn PackSink>,
    /// How.
    pub options: Options,
    /// Stops the capture.
    pub cancel: CancellationToken,
    /// Told of progress.
    pub progress: Option<watch::Sender<Stats>>,
    /// How many PUTs may be in flight from now on, where that changes while the capture runs; [`Options::connections`] otherwise.
    pub connections: Option<watch::Receiver<u16>>,
    /// Encrypts the packs under this key; the sink must know their keys beforehand.
    pub seal: Option<DataKey>,
}

/// What a capture did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages looked at.
    pub scanned_pages: u64,
    /// Of them zero.
    pub zero_pages: u64,
    /// Of them equal to a template block.
    pub base_pages: u64,
    /// Of them neither, and equal to what the parent's map has there.
    pub unchanged_pages: u64,
    /// Pages in packs that are durable.
    pub sent_pages: u64,
    /// Bytes of packs that are durable.
    pub sent_bytes: u64,
    /// Packs that are durable.
    pub packs: u32,
    /// Processor time of the threads that scanned and compressed, µs.
    pub cpu_us: u64,
}

/// Where the pages are now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The parent's packs, then the new ones; every new one is durable.
    pub packs: Vec<PackEntry>,
    /// For each image, its parent's map with what was captured laid over it.
    pub maps: Vec<ImageMap>,
    /// Position of the boot pack in `packs`.
    pub boot_pack: Option<u32>,
    /// What it took.
    pub stats: Stats,
}

/// What a failed capture leaves. To go on from it: its packs and maps become the parent's, and of the pages that were to be looked
/// at those in `done` need not be, unless the guest wrote to them since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partial {
    /// The parent's packs, then those that are durable.
    pub packs: Vec<PackEntry>,
    /// For each image, its parent's map with what is durable laid over it.
    pub maps: Vec<ImageMap>,
    /// For each image, the pages that its map now has right: sorted, disjoint.
    pub done: Vec<Vec<Range<u64>>>,
    /// What it took.
    pub stats: Stats,
}

/// Why a capture failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum CaptureError {
    #[error("capture was cancelled")]
    Cancelled,
    #[error("cannot read page {page} of {image}")]
    Read { image: String, page: u64, source: io::Error },
    #[error("pack {n} cannot be encrypted: its key in the store is not known beforehand")]
    Nameless { n: u32 },
    #[error("cannot store pack {n} of this capture")]
    Store { n: u32, source: StoreError },
    #[error("{image} cannot be captured")]
    Map { image: String, source: MapError },
    #[error("a capture thread failed")]
    Thread(#[source] tokio::task::JoinError),
}

/// A failed capture.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct CaptureFailed {
    /// Why.
    #[source]
    pub error: CaptureError,
    /// What is durable all the same.
    pub partial: Box<Partial>,
}

/// Captures the images. See the module for the order of things and for what holds on failure.
pub async fn capture(request: CaptureRequest) -> Result<Captured, CaptureFailed> {
    pipeline::run(request).await
}
