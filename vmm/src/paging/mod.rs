//! Memory that arrives after the guest was started again.
//!
//! The [`Pager`] of the snapshot crate knows where bytes come from; here is what the guest sees of it. An access to an absent granule
//! (2 MiB) faults to one of our threads, which has the pager fill the granule through the image mapping and then makes it present. What
//! the pager brings in unasked is made present on the first access, or all at once when everything is there.
//!
//! | file | what |
//! | --- | --- |
//! | `faults` | the threads that serve faults |
//! | `targets` | where the pager's pages go: memory and disks |
//! | `working_set` | which granules were touched first after a wake, for the next boot pack |
//!
//! # Threads
//!
//! Fault threads read the userfaultfd, block on the pager, and touch no guest mapping. The background fill is a task of the runtime; what it
//! fetched is decoded by threads of a lower priority ([`background`]), so that on a busy host the restore, the guest and its faults go first. A page
//! that cannot be had ends the machine with [`Ended::PageLost`]: the guest is never shown wrong memory and never waits for ever.

mod faults;
pub(crate) mod targets;
mod working_set;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use stasis_devices::overlay::BlockSource;
use stasis_snapshot::manifest::Touch;
use stasis_snapshot::pager::{Pager, PagerError, Urgency};
use tokio::runtime::{Handle, Runtime};
use tokio_util::sync::CancellationToken;

use crate::bus::lock;
use crate::control::types::PagingMetrics;
use crate::machine::disk::Disk;
use crate::pages::PageSet;
use crate::presence::{Presence, PresenceError};
use crate::seccomp::{self, Role};
use crate::vcpu::Ended;
use faults::FaultThreads;
pub(crate) use working_set::WorkingSet;

/// Position of memory among a manifest's images.
pub(crate) const MEMORY: usize = 0;
/// What is fetched of the recorded order before the vCPUs run, pages: 4 MiB.
const EARLY_PAGES: u64 = 1024;
/// From the last page in place until freed memory is given back: what was fetched is still on its way to the local packs, and the threads that did
/// it end once they have been idle for [`IDLE_THREAD`](crate::heap::IDLE_THREAD).
const QUIET: Duration = Duration::from_secs(1);
/// Nothing is known of the time until all is resident.
const NOT_YET: u64 = u64::MAX;

/// Paging cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum PagingError {
    #[error(transparent)]
    Pager(#[from] PagerError),
    #[error(transparent)]
    Presence(#[from] PresenceError),
    #[error("cannot start a thread that serves faults")]
    Thread(#[source] std::io::Error),
    #[error("cannot make the threads of the background")]
    Background(#[source] std::io::Error),
}

/// Added to the niceness of the background's threads: a third of a core's time against one that is wanted, so that a fault which has to wait
/// for them is not starved.
const BACKGROUND_NICE: i32 = 5;

/// Blocking threads for what nobody waits for.
pub(crate) fn background() -> Result<Handle, PagingError> {
    // Its tasks would not be run by anybody; only its blocking threads are used. Never dropped: it ends with the process.
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime.handle().clone());
    }
    let made = tokio::runtime::Builder::new_current_thread()
        .thread_name("background")
        .thread_keep_alive(crate::heap::IDLE_THREAD)
        .on_thread_start(|| {
            seccomp::enter(Role::Worker);
            if let Err(error) = rustix::process::nice(BACKGROUND_NICE) {
                tracing::debug!(%error, "the background keeps its priority");
            }
        })
        .build()
        .map_err(PagingError::Background)?;
    Ok(RUNTIME.get_or_init(|| made).handle().clone())
}

/// The pages of one restored machine on their way.
pub(crate) struct Paging {
    shared: Arc<Shared>,
    faults: Mutex<Option<FaultThreads>>,
    /// What was recorded before, in first-touch order: fetched first.
    order: Arc<Vec<Touch>>,
    sweep: bool,
    /// Stops the background fill that runs.
    fill: Mutex<CancellationToken>,
    runtime: Handle,
}

/// What fault threads and the fill share.
pub(super) struct Shared {
    presence: Arc<Presence>,
    pager: Pager,
    /// Granules that are being brought in for somebody who waits.
    coming: Mutex<PageSet>,
    working_set: Arc<WorkingSet>,
    ended: Arc<dyn Fn(Ended) + Send + Sync>,
    began: Instant,
    resident_us: AtomicU64,
    faults: AtomicU64,
    fault_us: AtomicU64,
    fault_max_us: AtomicU64,
}

impl Paging {
    /// Serves the faults on `absent` memory (whole granules) from now on. The vCPUs do not run yet.
    #[expect(clippy::too_many_arguments, reason = "each is another part of the machine")]
    pub(crate) fn start(
        presence: Arc<Presence>,
        pager: Pager,
        absent: &PageSet,
        order: Vec<Touch>,
        sweep: bool,
        threads: usize,
        working_set: Arc<WorkingSet>,
        ended: Arc<dyn Fn(Ended) + Send + Sync>,
    ) -> Result<Self, PagingError> {
        presence.make_absent(absent)?;
        let shared = Arc::new(Shared {
            presence,
            pager,
            coming: Mutex::new(PageSet::new(absent.bound())),
            working_set,
            ended,
            began: Instant::now(),
            resident_us: AtomicU64::new(NOT_YET),
            faults: AtomicU64::new(0),
            fault_us: AtomicU64::new(0),
            fault_max_us: AtomicU64::new(0),
        });
        let faults = if absent.len() > 0 {
            Some(FaultThreads::start(&shared, threads).map_err(PagingError::Thread)?)
        } else {
            None
        };
        let fill = Mutex::new(CancellationToken::new());
        let runtime = Handle::current();
        Ok(Self { shared, faults: Mutex::new(faults), order: Arc::new(order), sweep, fill, runtime })
    }

    /// Block device `n` gets its blocks from here, each when it is asked for.
    pub(crate) fn attach_disk(&self, n: usize, disk: &Disk) {
        let image = n + 1;
        let absent = self.shared.pager.absent(image);
        if !absent.is_empty() {
            let blocks = Blocks { pager: self.shared.pager.clone(), image, runtime: self.runtime.clone() };
            disk.overlay.set_lazy(Arc::new(blocks), &absent);
        }
    }

    /// Fetches what is touched first: for while the machine is put together. Everything at once would take the processors from that.
    pub(crate) fn fill_early(self: &Arc<Self>) {
        let mut pages = 0;
        let early = self.order.iter().take_while(|touch| {
            let wanted = pages < EARLY_PAGES;
            pages += touch.pages;
            wanted
        });
        let early = Arc::new(early.copied().collect::<Vec<_>>());
        if !early.is_empty() {
            self.fill_with(early, false);
        }
    }

    /// Fetches in the background what nobody asked for yet. Does nothing when all is there or a fill runs.
    pub(crate) fn fill(self: &Arc<Self>) {
        self.fill_with(self.order.clone(), self.sweep);
    }

    fn fill_with(self: &Arc<Self>, order: Arc<Vec<Touch>>, sweep: bool) {
        if self.is_resident() {
            return;
        }
        let cancel = {
            let mut fill = lock(&self.fill);
            fill.cancel();
            *fill = CancellationToken::new();
            fill.clone()
        };
        let paging = Arc::downgrade(self);
        let shared = self.shared.clone();
        self.runtime.spawn(async move {
            match shared.pager.fill(&order, sweep, &cancel).await {
                Ok(()) if sweep => {
                    shared.all_present();
                    if let Some(paging) = paging.upgrade() {
                        // Their threads end by themselves; joined on a thread that may wait.
                        let threads = lock(&paging.faults).take();
                        drop(paging);
                        drop(tokio::task::spawn_blocking(move || drop(threads)).await);
                        tokio::time::sleep(QUIET).await;
                        crate::heap::quiet_down().await;
                    }
                }
                Ok(()) | Err(PagerError::Cancelled | PagerError::Stopped) => {}
                Err(error) => tracing::warn!(%error, "the background fill ended early; pages still come on demand"),
            }
        });
    }

    /// Stops the background fill: a capture needs the connections, or the guest stands still. Faults go on being served.
    pub(crate) fn stop_filling(&self) {
        lock(&self.fill).cancel();
    }

    /// Everything is in place.
    pub(crate) fn is_resident(&self) -> bool {
        self.shared.resident_us.load(Ordering::Acquire) != NOT_YET
    }

    pub(crate) fn metrics(&self) -> PagingMetrics {
        let shared = &self.shared;
        let stats = shared.pager.stats();
        let resident = shared.resident_us.load(Ordering::Acquire);
        let absent = shared.pager.absent(MEMORY);
        PagingMetrics {
            faults: shared.faults.load(Ordering::Relaxed),
            fault_us: shared.fault_us.load(Ordering::Relaxed),
            fault_max_us: shared.fault_max_us.load(Ordering::Relaxed),
            cache_bytes: stats.from_cache().bytes,
            store_bytes: stats.from_store().bytes,
            store_requests: stats.from_store().requests,
            absent_pages: absent.iter().map(|range| range.end - range.start).sum(),
            resident_us: (resident != NOT_YET).then_some(resident),
        }
    }
}

/// Blocks of one disk, on demand.
struct Blocks {
    pager: Pager,
    image: usize,
    runtime: Handle,
}

impl BlockSource for Blocks {
    fn fetch(&self, blocks: Range<u64>) -> std::io::Result<()> {
        // On the runtime's threads: a device's thread may not do what fetching takes, such as start threads. The pager bounds the wait.
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let (pager, image) = (self.pager.clone(), self.image);
        self.runtime.spawn(async move { drop(tell.send(pager.fetch(image, blocks, Urgency::Demand).await)) });
        told.recv().map_err(std::io::Error::other)?.map_err(std::io::Error::other)
    }
}

impl Drop for Paging {
    fn drop(&mut self) {
        self.stop_filling();
        self.shared.pager.stop();
    }
}

impl Shared {
    /// A granule was touched that is not present: bring it in. Called on a fault thread.
    fn serve(&self, address: u64) {
        let Some(pages) = self.presence.granule_at(address) else {
            return tracing::error!(address, "a fault outside guest memory");
        };
        {
            let mut coming = lock(&self.coming);
            if self.presence.is_present(pages.clone()) {
                // It came between the fault and now.
                return self.check(self.presence.wake(pages));
            }
            if coming.contains_all(pages.start..pages.start + 1) {
                return;
            }
            coming.insert(pages.start..pages.start + 1);
        }
        let began = Instant::now();
        self.working_set.touched(pages.start);
        let outcome = self.pager.fetch_blocking(MEMORY, pages.clone(), Urgency::Demand);
        if let Err(error) = outcome {
            (self.ended)(Ended::PageLost(crate::control::refusal::chain(&error)));
            return;
        }
        self.check(self.presence.make_present(pages.clone()));
        lock(&self.coming).remove(pages.start..pages.start + 1);
        let took = began.elapsed().as_micros() as u64;
        self.faults.fetch_add(1, Ordering::Relaxed);
        self.fault_us.fetch_add(took, Ordering::Relaxed);
        self.fault_max_us.fetch_max(took, Ordering::Relaxed);
    }

    /// The pager has placed everything: nothing is absent any more.
    fn all_present(&self) {
        for pages in self.presence.absent().runs() {
            // Faults that are being served make their granule present themselves.
            for granule in self.presence.granules_of(pages) {
                let coming = lock(&self.coming);
                if !coming.contains_all(granule.start..granule.start + 1) && !self.presence.is_present(granule.clone())
                {
                    self.check(self.presence.make_present(granule));
                }
            }
        }
        self.resident_us.store(self.began.elapsed().as_micros() as u64, Ordering::Release);
        tracing::info!(micros = self.began.elapsed().as_micros() as u64, "all memory is in place");
    }

    /// Without its page tables the guest would wait for ever.
    fn check(&self, result: Result<(), PresenceError>) {
        if let Err(error) = result {
            (self.ended)(Ended::PageLost(crate::control::refusal::chain(&error)));
        }
    }
}
