//! The bound on a capture's memory, by what the allocator hands out. Alone in its file: the allocator counts the whole process.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use stasis_snapshot::{
    capture::{CaptureRequest, Options, PageReader, capture},
    granted::PackSink,
    manifest::ImageKind,
    store::StoreError,
};
use support::{Frozen, Pages, first_capture, noise};
use tokio_util::sync::CancellationToken;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        MOST.fetch_max(now, Ordering::SeqCst);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // In one step: between two, other threads would count the block twice.
        if let Some(more) = size.checked_sub(layout.size()) {
            MOST.fetch_max(NOW.fetch_add(more, Ordering::SeqCst) + more, Ordering::SeqCst);
        } else {
            NOW.fetch_sub(layout.size() - size, Ordering::SeqCst);
        }
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A store that takes its time.
struct Sluggish;

#[async_trait]
impl PackSink for Sluggish {
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        tokio::time::sleep(Duration::from_millis(30)).await;
        drop(bytes);
        Ok(n.to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_keeps_to_its_memory() {
    let pages = 24_576;
    let memory = Arc::new(Pages::from_bytes(noise(2, pages)));
    let frozen = Arc::new(Frozen(noise(3, pages)));
    for connections in [4, 32] {
        for limit in [32 << 20, 48 << 20] {
            for viewed in [false, true] {
                let mut input = first_capture(ImageKind::Memory, &memory, None);
                if viewed {
                    let reader: Arc<dyn PageReader> = frozen.clone();
                    input.reader = reader;
                }
                let options = Options { connections, memory: limit as u64, ..Options::default() };
                let request = CaptureRequest {
                    images: vec![input],
                    parent_packs: Vec::new(),
                    threads: None,
                    sink: Arc::new(Sluggish),
                    options,
                    cancel: CancellationToken::new(),
                    progress: None,
                    connections: None,
                    seal: None,
                };
                let before = NOW.load(Ordering::SeqCst);
                MOST.store(before, Ordering::SeqCst);
                let captured = capture(request).await.unwrap();
                assert_eq!(captured.stats.sent_pages, pages);
                let most = MOST.load(Ordering::SeqCst) - before;
                // What is known of each page and frame comes on top.
                assert!(
                    most < limit + (1 << 20),
                    "{most} bytes of {limit}, {connections} connections, viewed: {viewed}"
                );
                assert!(most > limit / 4, "the bound is not what was tested: {most}");
            }
        }
    }
}
