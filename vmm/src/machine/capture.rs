//! From a machine to the input of a capture, and from its outcome to the draft of a manifest.
//!
//! A machine builds on a [`Parent`]: packs that are durable and the maps that say which page is where in them. It begins as the snapshot
//! the machine was restored from (or as nothing) and moves on with every confirmed pack, whether the supervisor commits the manifest or
//! not: packs of a failed attempt are never sent twice. That a page is *dirty* means that it may differ from this parent; its digest in
//! the parent, where it is known, tells.
//!
//! A capture reads memory in one of three ways: in place while the guest stands still, in place while it runs (a round: what is written
//! meanwhile is dirty again), or from a [`staged`](super::staging) copy while it runs again. Absent memory is never read: it stays the
//! reference that the parent's map has for it.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use stasis_snapshot::capture::{
    BaseInput, CaptureFailed, CaptureRequest, Captured, ImageInput, Options, PageDigests, PageReader, packs_needed,
};
use stasis_snapshot::compact;
use stasis_snapshot::granted::PackSink;
use stasis_snapshot::image::ImageMap;
use stasis_snapshot::manifest::{Arch, Base, Boot, Image, ImageKind, Manifest, Platform, StateBlob, Versioned};
use stasis_snapshot::pack::PackEntry;
use stasis_snapshot::seal::DataKey;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::devices::DeviceSet;
use super::disk::Disk;
use super::staging::Staging;
use super::{Machine, MachineError, spec};
use crate::dirty::Then;
use crate::memory::{GuestRam, RunningRam, StoppedRam};
use crate::pages::PageSet;
use crate::paging::{self, MEMORY};
use crate::vcpu::{cpuid, state as vcpu_state};
use crate::vm_state;

/// Pages of the boot pack at most (16 MiB).
const BOOT_PAGES: u64 = stasis_snapshot::pack::MAX_BOOT_PACK / stasis_snapshot::page::PAGE_SIZE as u64;
/// With fewer pages to look at, memory is not compared with the blocks of the template (1 MiB).
const INDEX_PAGES: u64 = 256;

/// What a machine's pages are compared with.
pub(crate) struct Parent {
    packs: Vec<PackEntry>,
    /// Memory, then the disks in order.
    maps: Vec<ImageMap>,
    /// The same: what the maps have at each page, as far as it was seen.
    digests: Vec<Arc<PageDigests>>,
    /// For each disk, blocks that may differ from its map.
    disk_dirty: Vec<PageSet>,
}

impl Parent {
    /// Of a machine that boots: zero memory, disks that equal their bases.
    pub(crate) fn none(ram: &GuestRam, devices: &DeviceSet) -> Result<Self, MachineError> {
        let mut maps = vec![ImageMap::zero(ram.pages())];
        maps.extend(devices.disks.iter().map(|d| ImageMap::base(d.blocks(), d.base_blocks())));
        let digests = new_digests(&maps)?;
        Ok(Self::new(Vec::new(), maps, digests, &devices.disks))
    }

    /// Of a machine that boots over the disks of `manifest`.
    pub(crate) fn stored(
        manifest: &Manifest,
        digests: Vec<Arc<PageDigests>>,
        ram: &GuestRam,
        devices: &DeviceSet,
    ) -> Self {
        let disks = manifest.images.iter().skip(1).map(|image| image.map.clone());
        let maps = std::iter::once(ImageMap::zero(ram.pages())).chain(disks).collect();
        Self::new(manifest.packs.clone(), maps, digests, &devices.disks)
    }

    /// Of a machine that was restored from `manifest`.
    pub(crate) fn of(manifest: &Manifest, digests: Vec<Arc<PageDigests>>, devices: &DeviceSet) -> Self {
        let maps = manifest.images.iter().map(|i| i.map.clone()).collect();
        Self::new(manifest.packs.clone(), maps, digests, &devices.disks)
    }

    fn new(packs: Vec<PackEntry>, maps: Vec<ImageMap>, digests: Vec<Arc<PageDigests>>, disks: &[Disk]) -> Self {
        Self { packs, maps, digests, disk_dirty: disks.iter().map(|d| PageSet::new(d.blocks())).collect() }
    }
}

/// Empty digests for each image.
pub(crate) fn new_digests(maps: &[ImageMap]) -> Result<Vec<Arc<PageDigests>>, MachineError> {
    maps.iter().map(|map| PageDigests::new(map.pages()).map(Arc::new).map_err(MachineError::Digests)).collect()
}

/// How much a capture now would look at.
pub(crate) struct DirtyCounts {
    pub(crate) memory_pages: u64,
    pub(crate) disk_blocks: u64,
    pub(crate) packs_needed: u32,
}

/// How a capture is to be done.
pub(crate) struct Order {
    pub(crate) sink: Arc<dyn PackSink>,
    pub(crate) options: Options,
    pub(crate) connections: watch::Receiver<u16>,
    pub(crate) cancel: CancellationToken,
    /// Packs are encrypted under it.
    pub(crate) seal: Option<DataKey>,
}

/// What the draft of a manifest holds.
pub(crate) enum Content {
    /// Nothing: there is none.
    None,
    /// Disks.
    Disks,
    /// Memory, disks and this state.
    Machine(SavedState),
}

impl Content {
    /// Time to save the state, µs.
    pub(crate) fn micros(&self) -> u64 {
        match self {
            Self::None | Self::Disks => 0,
            Self::Machine(state) => state.micros,
        }
    }
}

/// State of the parts of a machine, and what it took.
pub(crate) struct SavedState {
    blobs: Vec<StateBlob>,
    /// Time to save it, µs.
    micros: u64,
}

/// The host's wall clock, ns since the epoch.
pub(crate) fn wall_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    // Before 1970 the guest's clock stands still, which is all that can be done.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

impl Machine {
    /// Brings the dirty sets up to date. The guest may run: what it writes from now on is for the next time.
    pub(crate) fn collect_dirty(&mut self, options: &Options, then: Then) -> Result<DirtyCounts, MachineError> {
        self.dirty.collect(&self.vm, &self.ram, &self.presence, then)?;
        self.collect_dirty_disks();
        let disk_blocks = self.base.disk_dirty.iter().map(PageSet::len).sum();
        Ok(counts(self.dirty.pages().len(), disk_blocks, options))
    }

    fn collect_dirty_disks(&mut self) {
        for (dirty, disk) in self.base.disk_dirty.iter_mut().zip(&self.devices.disks) {
            for range in disk.overlay.take_dirty() {
                dirty.insert(range);
            }
        }
    }

    /// What a capture now would look at; changes nothing.
    pub(crate) fn estimate_dirty(&self, options: &Options) -> Result<DirtyCounts, MachineError> {
        let memory_pages = self.dirty.estimate(&self.vm, &self.ram, &self.presence)?.len();
        let carried: u64 = self.base.disk_dirty.iter().map(PageSet::len).sum();
        let written: u64 = self.devices.disks.iter().map(|disk| disk.overlay.dirty_count()).sum();
        Ok(counts(memory_pages, carried + written, options))
    }

    /// A capture of a machine that stands still until it has ended.
    pub(crate) fn prepare_stopped(&mut self, order: Order) -> Result<(CaptureRequest, SavedState), MachineError> {
        if let Some(paging) = &self.paging {
            paging.stop_filling();
        }
        let state = self.save_state()?;
        // Memory last: saving the rest may write to it.
        self.collect_dirty(&order.options, Then::Leave)?;
        let memory: Arc<dyn PageReader> = Arc::new(StoppedRam(self.ram.clone()));
        let rewrite = self.to_compact();
        Ok((self.request(order, memory, &rewrite), state))
    }

    /// A capture of the disks alone, of a machine that stands still until it has ended. Memory stays as dirty as it is.
    pub(crate) fn prepare_disks(&mut self, order: Order) -> Result<CaptureRequest, MachineError> {
        if let Some(paging) = &self.paging {
            paging.stop_filling();
        }
        self.collect_dirty(&order.options, Then::Leave)?;
        let memory: Arc<dyn PageReader> = Arc::new(StoppedRam(self.ram.clone()));
        let rewrite = self.to_compact();
        let mut request = self.request(order, memory, &rewrite);
        request.options.boot_pages = 0;
        if let Some(memory) = request.images.get_mut(MEMORY) {
            (memory.look_at, memory.rewrite) = (Vec::new(), Vec::new());
        }
        Ok(request)
    }

    /// A round: pages are sent while the guest runs on, which comes before it.
    pub(crate) fn prepare_round(&mut self, order: Order) -> Result<CaptureRequest, MachineError> {
        let threads = Some(paging::background()?);
        self.collect_dirty(&order.options, Then::Track)?;
        let memory: Arc<dyn PageReader> = Arc::new(RunningRam(self.ram.clone()));
        Ok(CaptureRequest { threads, ..self.request(order, memory, &[]) })
    }

    /// For each image, pages to write anew so that old packs fall out of use. What is absent cannot be: it is not here.
    fn to_compact(&self) -> Vec<PageSet> {
        let planned = compact::plan(&self.base.packs, &self.base.maps, compact::Limits::default());
        let mut sets = Vec::new();
        for (image, ranges) in planned.into_iter().enumerate() {
            let mut set = PageSet::new(self.base.maps[image].pages());
            ranges.into_iter().for_each(|range| set.insert(range));
            match image.checked_sub(1) {
                None => set.intersect(&self.presence.present()),
                Some(disk) => self.devices.disks[disk].overlay.absent().into_iter().for_each(|range| set.remove(range)),
            }
            sets.push(set);
        }
        sets
    }

    /// A capture of a running machine: it is stopped, saved and copied, and runs again when this returns. Answers how long it stood, µs.
    pub(crate) fn prepare_staged(
        &mut self,
        order: Order,
        mut staging: Staging,
    ) -> Result<(CaptureRequest, SavedState, u64), MachineError> {
        let threads = Some(paging::background()?);
        let began = Instant::now();
        self.pause()?;
        let copied = self.save_state().and_then(|state| {
            self.dirty.collect_lightly(&self.vm, &self.ram, &self.presence)?;
            self.collect_dirty_disks();
            staging.copy(&self.ram, self.dirty.pages()).map_err(MachineError::Staging)?;
            let mut disks = Vec::new();
            for (n, disk) in self.devices.disks.iter().enumerate() {
                disks.push(Staging::copy_disk(disk, &self.base.disk_dirty[n]).map_err(MachineError::Staging)?);
            }
            Ok((state, disks))
        });
        // It runs again whatever came of it.
        self.resume()?;
        let stop_us = began.elapsed().as_micros() as u64;
        let (state, disks) = copied?;
        let mut request = CaptureRequest { threads, ..self.request(order, Arc::new(staging), &[]) };
        for (image, copy) in request.images.iter_mut().skip(1).zip(disks) {
            image.reader = copy;
        }
        Ok((request, state, stop_us))
    }

    /// `rewrite`: pages of each image to be written anew besides; none where an image has no entry.
    fn request(&self, order: Order, memory: Arc<dyn PageReader>, rewrite: &[PageSet]) -> CaptureRequest {
        let runs = |image: usize| rewrite.get(image).map(PageSet::runs).unwrap_or_default();
        let with = |dirty: &PageSet, image: usize| {
            let mut pages = dirty.clone();
            if let Some(more) = rewrite.get(image) {
                pages.union(more);
            }
            pages
        };
        let (look_at, boot_pages) = self.first_touched_first(with(self.dirty.pages(), MEMORY));
        // For a few pages the index is not worth its reading.
        let worth = look_at.iter().map(|run| run.end - run.start).sum::<u64>() >= INDEX_PAGES;
        let template = self.devices.disks.first().and_then(|disk| disk.base.clone()).map(|base| BaseInput {
            blocks: base.blocks(),
            index: worth.then(|| base.index()).flatten(),
            reader: Arc::new(base),
            same_offset: false,
        });
        let mut images = vec![ImageInput {
            kind: ImageKind::Memory,
            parent: self.base.maps[0].clone(),
            look_at,
            reader: memory,
            base: template,
            digests: Some(self.base.digests[0].clone()),
            rewrite: runs(MEMORY),
        }];
        for (n, disk) in self.devices.disks.iter().enumerate() {
            images.push(ImageInput {
                kind: ImageKind::Disk(n as u32),
                parent: self.base.maps[n + 1].clone(),
                look_at: with(&self.base.disk_dirty[n], n + 1).runs(),
                reader: Arc::new(disk.clone()),
                base: disk.base.clone().map(|base| BaseInput {
                    blocks: base.blocks(),
                    reader: Arc::new(base),
                    same_offset: true,
                    index: None,
                }),
                digests: Some(self.base.digests[n + 1].clone()),
                rewrite: runs(n + 1),
            });
        }
        let options = Options { boot_pages, ..order.options };
        CaptureRequest {
            images,
            parent_packs: self.base.packs.clone(),
            threads: None,
            sink: order.sink,
            options,
            cancel: order.cancel,
            progress: None,
            connections: Some(order.connections),
            seal: order.seal,
        }
    }

    /// The pages of `rest`: those of the working set in its order, then the others; and how many of them belong into the boot pack.
    fn first_touched_first(&self, mut rest: PageSet) -> (Vec<Range<u64>>, u64) {
        let mut order = Vec::new();
        let mut boot = 0;
        for touch in self.working_set.order() {
            for run in rest.runs_within(touch.start..touch.start + touch.pages) {
                if boot < BOOT_PAGES {
                    boot += run.end - run.start;
                }
                rest.remove(run.clone());
                order.push(run);
            }
        }
        order.extend(rest.runs());
        (order, boot.min(BOOT_PAGES))
    }

    /// Devices, then vCPUs, then the VM: a device's last interrupt must be in the controllers when those are saved.
    fn save_state(&self) -> Result<SavedState, MachineError> {
        let started = Instant::now();
        let mut blobs = self.devices.save()?;
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            blobs.push(spec::blob(&vcpu_kind(index), vcpu_state::VERSION, &vcpu.save()?)?);
        }
        blobs.push(spec::blob(VM, vm_state::VERSION, &vm_state::save(&self.vm, wall_ns())?)?);
        Ok(SavedState { blobs, micros: started.elapsed().as_micros() as u64 })
    }

    /// Moves the parent on to what is durable now and, when a capture with state succeeded, answers the encoded draft of its manifest.
    /// What was written since the capture looked is in the trackers, not in the carry-over that is settled here. The state in the draft is
    /// encrypted under `seal`.
    pub(crate) fn finish_capture(
        &mut self,
        content: Content,
        outcome: Result<Captured, CaptureFailed>,
        seal: Option<&DataKey>,
    ) -> Result<Vec<u8>, FinishError> {
        match outcome {
            Ok(captured) => {
                if !matches!(content, Content::Disks) {
                    self.dirty.settled(0..self.ram.pages());
                }
                self.base.disk_dirty.iter_mut().for_each(|d| d.remove(0..u64::MAX));
                self.base.packs = captured.packs;
                self.base.maps = captured.maps;
                match content {
                    Content::None => Ok(Vec::new()),
                    Content::Disks => {
                        let mut draft = self.draft(Vec::new(), Boot::default())?;
                        draft.images[MEMORY].map = ImageMap::zero(self.ram.pages());
                        Ok(draft.encode()?)
                    }
                    Content::Machine(state) => {
                        let boot = Boot { pack: captured.boot_pack, first_touch: self.working_set.order() };
                        let mut draft = self.draft(state.blobs, boot)?;
                        if let Some(key) = seal {
                            let mut salt = [0; 32];
                            rustix::rand::getrandom(&mut salt, rustix::rand::GetRandomFlags::empty())
                                .map_err(FinishError::Random)?;
                            draft.seal_state(key, salt)?;
                        }
                        Ok(draft.encode()?)
                    }
                }
            }
            Err(failed) => {
                let partial = *failed.partial;
                let mut done = partial.done.into_iter();
                for pages in done.next().unwrap_or_default() {
                    self.dirty.settled(pages);
                }
                for (dirty, ranges) in self.base.disk_dirty.iter_mut().zip(done) {
                    for blocks in ranges {
                        dirty.remove(blocks);
                    }
                }
                self.base.packs = partial.packs;
                self.base.maps = partial.maps;
                Err(FinishError::Capture(failed.error))
            }
        }
    }

    fn draft(&self, state: Vec<StateBlob>, boot: Boot) -> Result<Manifest, spec::SpecError> {
        let mut maps = self.base.maps.iter().cloned();
        let base_of = |disk: &Disk| disk.base.as_ref().map(|base| Base { digest: base.digest, blocks: base.blocks() });
        // Memory holds blocks of the first disk's template: its page cache.
        let base = self.devices.disks.first().and_then(base_of);
        let mut images: Vec<Image> =
            maps.by_ref().take(1).map(|map| Image { kind: ImageKind::Memory, map, base }).collect();
        for ((n, disk), map) in self.devices.disks.iter().enumerate().zip(maps) {
            let base = base_of(disk);
            images.push(Image { kind: ImageKind::Disk(n as u32), map, base });
        }
        let host_kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Ok(Manifest {
            arch: Arch::X86_64,
            platform: Platform {
                vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
                cpu_vendor: cpuid::vendor(&self.offered),
                cpu_features: cpuid::feature_list(&self.offered),
                host_kernel,
            },
            spec: self.spec.encode()?,
            record: Versioned::default(),
            lineage: None,
            packs: self.base.packs.clone(),
            images,
            state,
            sealed_state: None,
            boot,
        })
    }

    /// Digests of memory as the parent has it.
    pub(super) fn memory_digests(&self) -> &Arc<PageDigests> {
        &self.base.digests[0]
    }
}

fn counts(memory_pages: u64, disk_blocks: u64, options: &Options) -> DirtyCounts {
    let most = memory_pages + disk_blocks + compact::Limits::default().pages;
    DirtyCounts { memory_pages, disk_blocks, packs_needed: packs_needed(most, options) }
}

/// A capture brought no draft.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FinishError {
    #[error(transparent)]
    Capture(#[from] stasis_snapshot::capture::CaptureError),
    #[error("the kernel has no random numbers")]
    Random(#[source] rustix::io::Errno),
    #[error("cannot write the draft of the manifest")]
    Spec(#[from] spec::SpecError),
    #[error("cannot write the draft of the manifest")]
    Manifest(#[from] stasis_snapshot::manifest::ManifestError),
}

/// Name of the VM's state in a snapshot.
pub(crate) const VM: &str = "vm";

/// Name of a vCPU's state in a snapshot.
pub(crate) fn vcpu_kind(index: usize) -> String {
    format!("vcpu/{index}")
}
