//! From a paused machine to the input of a capture, and from its outcome to the draft of a manifest.
//!
//! A machine builds on a [`Parent`]: packs that are durable and the maps that say which page is where in them. It begins as the snapshot
//! the machine was restored from (or as nothing) and moves on with every confirmed pack, whether the supervisor commits the manifest or
//! not: packs of a failed attempt are never sent twice. That a page is *dirty* means that it may differ from this parent.

use std::sync::Arc;
use std::time::Instant;

use stasis_snapshot::capture::{BaseInput, CaptureFailed, CaptureRequest, Captured, ImageInput, Options, packs_needed};
use stasis_snapshot::granted::PackSink;
use stasis_snapshot::image::ImageMap;
use stasis_snapshot::manifest::{Arch, Base, Boot, Image, ImageKind, Manifest, Platform, StateBlob, Versioned};
use stasis_snapshot::pack::PackEntry;
use tokio_util::sync::CancellationToken;

use super::devices::DeviceSet;
use super::disk::Disk;
use super::{Machine, MachineError, spec};
use crate::memory::GuestRam;
use crate::pages::PageSet;
use crate::vcpu::{cpuid, state as vcpu_state};
use crate::vm_state;

/// What a machine's pages are compared with.
pub(crate) struct Parent {
    packs: Vec<PackEntry>,
    /// Memory, then the disks in order.
    maps: Vec<ImageMap>,
    /// For each disk, blocks that differ from its map.
    disk_dirty: Vec<PageSet>,
}

impl Parent {
    /// Of a machine that boots: zero memory, disks that equal their bases.
    pub(crate) fn none(ram: &GuestRam, devices: &DeviceSet) -> Self {
        let mut maps = vec![ImageMap::zero(ram.pages())];
        maps.extend(devices.disks.iter().map(|d| ImageMap::base(d.blocks(), d.base_blocks())));
        Self::new(Vec::new(), maps, &devices.disks)
    }

    /// Of a machine that was restored from `manifest`.
    pub(crate) fn of(manifest: &Manifest, devices: &DeviceSet) -> Self {
        let maps = manifest.images.iter().map(|i| i.map.clone()).collect();
        Self::new(manifest.packs.clone(), maps, &devices.disks)
    }

    fn new(packs: Vec<PackEntry>, maps: Vec<ImageMap>, disks: &[Disk]) -> Self {
        Self { packs, maps, disk_dirty: disks.iter().map(|d| PageSet::new(d.blocks())).collect() }
    }
}

/// How much a capture now would look at.
pub(crate) struct DirtyCounts {
    pub(crate) memory_pages: u64,
    pub(crate) disk_blocks: u64,
    pub(crate) packs_needed: u32,
}

/// A capture about to start: its input, and the state that goes with it.
pub(crate) struct Prepared {
    pub(crate) request: CaptureRequest,
    pub(crate) state: SavedState,
}

/// State of the parts of a machine, and what it took.
pub(crate) struct SavedState {
    blobs: Vec<StateBlob>,
    /// Time to save it, µs.
    pub(crate) micros: u64,
}

/// The host's wall clock, ns since the epoch.
pub(crate) fn wall_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    // Before 1970 the guest's clock stands still, which is all that can be done.
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

impl Machine {
    /// Brings the dirty sets up to date. The machine is paused.
    pub(crate) fn dirty_counts(&mut self, options: &Options) -> Result<DirtyCounts, MachineError> {
        self.dirty.collect(&self.vm, &self.ram)?;
        let memory_pages = self.dirty.pages().len();
        for (dirty, disk) in self.base.disk_dirty.iter_mut().zip(&self.devices.disks) {
            for range in disk.overlay.take_dirty() {
                dirty.insert(range);
            }
        }
        let disk_blocks = self.base.disk_dirty.iter().map(PageSet::len).sum();
        Ok(DirtyCounts { memory_pages, disk_blocks, packs_needed: packs_needed(memory_pages + disk_blocks, options) })
    }

    /// Saves all state and lists the pages to look at. The machine is paused and stays so until [`finish_capture`](Self::finish_capture).
    pub(crate) fn prepare_capture(
        &mut self,
        sink: Arc<dyn PackSink>,
        options: Options,
        cancel: CancellationToken,
    ) -> Result<Prepared, MachineError> {
        let state = self.save_state()?;
        // Memory last: saving the rest may write to it.
        self.dirty_counts(&options)?;
        let mut images = vec![ImageInput {
            kind: ImageKind::Memory,
            parent: self.base.maps[0].clone(),
            look_at: self.dirty.pages().runs(),
            reader: self.ram.clone(),
            base: None,
            digests: None,
            rewrite: Vec::new(),
        }];
        for (n, disk) in self.devices.disks.iter().enumerate() {
            images.push(ImageInput {
                kind: ImageKind::Disk(n as u32),
                parent: self.base.maps[n + 1].clone(),
                look_at: self.base.disk_dirty[n].runs(),
                reader: Arc::new(disk.clone()),
                base: disk.base.clone().map(|base| BaseInput {
                    blocks: base.blocks(),
                    reader: Arc::new(base),
                    same_offset: true,
                    index: None,
                }),
                digests: None,
                rewrite: Vec::new(),
            });
        }
        let parent_packs = self.base.packs.clone();
        let request = CaptureRequest { images, parent_packs, sink, options, cancel, progress: None, connections: None };
        Ok(Prepared { request, state })
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

    /// Moves the parent on to what is durable now and, when the capture succeeded, answers the encoded draft of its manifest.
    pub(crate) fn finish_capture(
        &mut self,
        state: SavedState,
        outcome: Result<Captured, CaptureFailed>,
    ) -> Result<Vec<u8>, FinishError> {
        match outcome {
            Ok(captured) => {
                self.dirty.settled(0..self.ram.pages());
                self.base.disk_dirty.iter_mut().for_each(|d| d.remove(0..u64::MAX));
                self.base.packs = captured.packs;
                self.base.maps = captured.maps;
                Ok(self.draft(state, captured.boot_pack)?.encode()?)
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

    fn draft(&self, state: SavedState, boot_pack: Option<u32>) -> Result<Manifest, spec::SpecError> {
        let mut maps = self.base.maps.iter().cloned();
        let mut images: Vec<Image> =
            maps.by_ref().take(1).map(|map| Image { kind: ImageKind::Memory, map, base: None }).collect();
        for ((n, disk), map) in self.devices.disks.iter().enumerate().zip(maps) {
            let base = disk.base.as_ref().map(|base| Base { digest: base.digest, blocks: base.blocks() });
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
            state: state.blobs,
            boot: Boot { pack: boot_pack, first_touch: Vec::new() },
        })
    }
}

/// A capture brought no draft.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FinishError {
    #[error(transparent)]
    Capture(#[from] stasis_snapshot::capture::CaptureError),
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
