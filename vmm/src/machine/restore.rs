//! From a manifest to a paused machine.
//!
//! The manifest is untrusted input. Its digest was checked before it was decoded; here its machine is checked against this host (CPU
//! vendor and features, disks) before anything is fetched, and every state is validated by the part that takes it up. An error leaves
//! nothing behind but this process.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::VcpuFd;
use stasis_snapshot::granted::PackSource;
use stasis_snapshot::ids::Digest;
use stasis_snapshot::image::{PageRef, Run};
use stasis_snapshot::manifest::{ImageKind, Manifest};
use stasis_snapshot::pager::{Options, PackCache, PageTarget, Pager, Sources, Threads};
use stasis_snapshot::seal::DataKeys;
use tokio_util::sync::CancellationToken;

use super::bare::{Bare, BareMachine};
use super::capture::{Parent, VM, new_digests, vcpu_kind, wall_ns};
use super::devices::DeviceSet;
use super::disk::Disk;
use super::kept::Kept;
use super::spec::{self, MachineSpec, SpecError};
use super::{Backends, Host, Machine, MachineError, Origin};
use crate::control::types::{NetworkLimits, Paging as PagingOptions, RestoreReport};
use crate::dirty::DirtyTracker;
use crate::kvm;
use crate::pages::PageSet;
use crate::paging::targets::{DiskTarget, MemoryTarget};
use crate::paging::{self, MEMORY, Paging, PagingError, WorkingSet};
use crate::vcpu::state::{self as vcpu_state, VcpuState};
use crate::vcpu::{VcpuError, cpuid};
use crate::vm_state::{self, VmState};

/// More would only wait for each other.
const MAX_FAULT_THREADS: usize = 5;

/// A machine cannot be restored here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoreFailed {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("the snapshot was made on a {snapshot} CPU, this host has {host}")]
    Vendor { snapshot: String, host: String },
    #[error("this host's CPU lacks features that the guest was given: {}", .0.join("; "))]
    Features(Vec<String>),
    #[error("the snapshot has {snapshot} disks, {given} were given")]
    DiskCount { snapshot: usize, given: usize },
    #[error("disk {disk}: the snapshot needs base {wanted}, given was {given}")]
    Base { disk: usize, wanted: String, given: String },
    #[error("the snapshot's images do not fit its machine: {0}")]
    Images(String),
    #[error("cannot lay out a disk")]
    Disk(#[source] std::io::Error),
}

impl From<SpecError> for RestoreFailed {
    fn from(e: SpecError) -> Self {
        Self::Machine(e.into())
    }
}

/// What a restore needs besides the manifest.
pub(crate) struct Input {
    /// Made before; used if it fits.
    pub(crate) ready: Option<Bare>,
    pub(crate) packs: Arc<dyn PackSource>,
    /// Of encrypted packs.
    pub(crate) keys: DataKeys,
    pub(crate) cache: Option<Arc<PackCache>>,
    pub(crate) backends: Backends,
    pub(crate) network_limits: NetworkLimits,
    pub(crate) generation_id: [u8; 16],
    pub(crate) host: Host,
    /// The memory file; a new one when absent.
    pub(crate) memory: Option<File>,
    /// What is in that file already.
    pub(crate) kept: Option<Kept>,
    pub(crate) paging: PagingOptions,
}

/// Makes the machine, paused. Its pages arrive later, unless that is asked for or the host cannot.
pub(crate) async fn restore(manifest: Manifest, input: Input) -> Result<(Machine, RestoreReport), RestoreFailed> {
    let spec = MachineSpec::decode(&manifest.spec)?.limited(input.network_limits)?;
    check_images(&manifest, &spec, &input.backends.disks)?;
    let (bare, fds) = spec.bare(input.ready, &input.host.files)?.with_memory(input.memory, &input.host.files)?;
    check_cpu(&manifest, &fds)?;
    let mut report = RestoreReport::default();

    let started = Instant::now();
    for (disk, image) in input.backends.disks.iter().zip(manifest.images.iter().skip(1)) {
        hide_base(disk, &image.map).map_err(RestoreFailed::Disk)?;
    }
    let maps: Vec<_> = manifest.images.iter().map(|image| image.map.clone()).collect();
    let mut digests = new_digests(&maps)?;
    let kept = input.kept.unwrap_or_else(|| Kept::nothing(bare.ram.pages()));
    if let Some(known) = kept.digests {
        digests[MEMORY] = known;
    } else {
        for zero in maps[MEMORY].runs().iter().filter(|run| run.at == PageRef::Zero) {
            digests[MEMORY].note_zero(zero.start..zero.end());
        }
    }
    // What is in the memory file is not to be fetched: to the pager it is zero, which needs nothing.
    let mut to_fetch = manifest.clone();
    let in_place: Vec<Run> = kept
        .present
        .runs()
        .into_iter()
        .map(|pages| Run { start: pages.start, pages: pages.end - pages.start, at: PageRef::Zero })
        .collect();
    to_fetch.images[MEMORY].map = maps[MEMORY].overlay(&in_place).map_err(|e| RestoreFailed::Images(e.to_string()))?;
    let mut targets: Vec<Arc<dyn PageTarget>> = vec![Arc::new(MemoryTarget {
        ram: bare.ram.clone(),
        base: input.backends.disks.first().and_then(|d| d.base.clone()),
        digests: digests[MEMORY].clone(),
    })];
    for (disk, digests) in input.backends.disks.iter().zip(&digests[1..]) {
        targets.push(Arc::new(DiskTarget { disk: disk.clone(), digests: digests.clone() }));
    }
    let options = pager_options(input.paging);
    let sources = Sources { store: input.packs, cache: input.cache, keys: input.keys };
    let threads = Threads {
        runtime: tokio::runtime::Handle::current(),
        background: paging::background().map_err(MachineError::from)?,
    };
    let pager = Pager::new(&to_fetch, targets, sources, options, threads)
        .map_err(PagingError::from)
        .map_err(MachineError::from)?;
    let lazy = !input.paging.eager && bare.presence.can_be_absent();
    let mut absent = PageSet::new(bare.ram.pages());
    if lazy {
        for run in to_fetch.images[MEMORY].map.runs().iter().filter(|run| run.at != PageRef::Zero) {
            bare.presence.granules_of(run.start..run.end()).for_each(|granule| absent.insert(granule));
        }
    } else {
        pager
            .fill(&[], true, &CancellationToken::new())
            .await
            .map_err(PagingError::from)
            .map_err(MachineError::from)?;
    }
    let working_set = Arc::new(WorkingSet::new(&manifest.boot.first_touch, bare.ram.pages()));
    let order = if lazy { manifest.boot.first_touch.clone() } else { Vec::new() };
    let threads = usize::from(spec.vcpus) + 1;
    let paging = Paging::start(
        bare.presence.clone(),
        pager,
        &absent,
        order,
        input.paging.sweep_mib_per_second > 0,
        threads.min(MAX_FAULT_THREADS),
        working_set.clone(),
        input.host.ended.clone(),
    )
    .map_err(MachineError::from)?;
    for (n, disk) in input.backends.disks.iter().enumerate() {
        paging.attach_disk(n, disk);
    }
    let paging = Arc::new(paging);
    if lazy {
        // What the guest touches first is on its way before its vCPUs are; the rest follows when they run.
        paging.fill_early();
    }
    let metrics = paging.metrics();
    report.fetched_bytes = metrics.store_bytes + metrics.cache_bytes;
    report.absent_pages = metrics.absent_pages;
    report.kept = kept.present.len() > 0;
    report.pages_us = started.elapsed().as_micros() as u64;

    let started = Instant::now();
    let origin = |devices: &DeviceSet, dirty| Origin {
        dirty,
        base: Parent::of(&manifest, digests, devices),
        working_set,
        paging: Some(paging),
    };
    let machine = tokio::task::block_in_place(|| {
        place(&manifest, spec, bare, fds, input.backends, input.generation_id, input.host, origin)
    })?;
    report.state_us = started.elapsed().as_micros() as u64;
    Ok((machine, report))
}

pub(super) fn pager_options(paging: PagingOptions) -> Options {
    let connections = paging.connections.max(2);
    Options {
        connections,
        demand_connections: (connections / 4).max(1),
        sweep_bytes_per_second: Some(u64::from(paging.sweep_mib_per_second) << 20).filter(|rate| *rate > 0),
        ..Options::default()
    }
}

/// Puts the saved state into KVM and the devices. Memory is in place, or faults.
#[expect(clippy::too_many_arguments, reason = "each is a part of the machine, used once")]
fn place(
    manifest: &Manifest,
    spec: MachineSpec,
    bare: BareMachine,
    fds: Vec<VcpuFd>,
    backends: Backends,
    generation_id: [u8; 16],
    host: Host,
    origin: impl FnOnce(&DeviceSet, DirtyTracker) -> Origin,
) -> Result<Machine, MachineError> {
    // Before the devices, whose new generation id is a write that the snapshot does not have.
    let dirty = DirtyTracker::for_restored(&bare.vm, &bare.ram, &bare.presence)?;
    let vm_saved: VmState = spec::unblob(&manifest.state, VM, vm_state::VERSION)?;
    let context = vcpu_state::Context {
        xsave_size: kvm::xsave_size(&bare.vm),
        msr_indices: &[],
        allowed_msrs: &host.allowed_msrs,
        tsc_shift: vm_saved.host_tsc.wrapping_sub(vm_state::host_tsc()),
    };
    for (index, fd) in fds.iter().enumerate() {
        let saved: VcpuState = spec::unblob(&manifest.state, &vcpu_kind(index), vcpu_state::VERSION)?;
        vcpu_state::restore(fd, &context, &saved).map_err(|source| VcpuError::Kvm { index: index as u8, source })?;
    }
    vm_state::restore(&bare.vm, &vm_saved, wall_ns())?;
    // After the VM: a device that raises its line now must find the controllers restored.
    let devices = DeviceSet::restore(&spec, &manifest.state, backends, &bare.ram, &bare.vm, &host, generation_id)?;
    let origin = origin(&devices, dirty);
    let mut machine = Machine::assemble(bare, spec, fds, devices, origin, host)?;
    machine.hold()?;
    Ok(machine)
}

/// Refuses a guest that relies on CPU features which a guest made on this host would not have.
fn check_cpu(manifest: &Manifest, fresh: &[VcpuFd]) -> Result<(), RestoreFailed> {
    let offered = fresh.first().map(cpuid::of_vcpu).transpose().map_err(MachineError::from)?.unwrap_or_default();
    let host = cpuid::vendor(&offered);
    if manifest.platform.cpu_vendor != host {
        return Err(RestoreFailed::Vendor { snapshot: manifest.platform.cpu_vendor.clone(), host });
    }
    let first: VcpuState = spec::unblob(&manifest.state, &vcpu_kind(0), vcpu_state::VERSION)?;
    let missing = cpuid::missing_features(&first.cpuid, &offered);
    if missing.is_empty() { Ok(()) } else { Err(RestoreFailed::Features(missing)) }
}

/// The images are memory and one for each disk, of the machine's sizes, over the bases that were given.
pub(super) fn check_images(manifest: &Manifest, spec: &MachineSpec, disks: &[Disk]) -> Result<(), RestoreFailed> {
    if spec.disks.len() != disks.len() {
        return Err(RestoreFailed::DiskCount { snapshot: spec.disks.len(), given: disks.len() });
    }
    let mut kinds = vec![(ImageKind::Memory, spec.memory_bytes() / stasis_snapshot::page::PAGE_SIZE as u64)];
    kinds.extend(spec.disks.iter().zip(0..).map(|(disk, n)| (ImageKind::Disk(n), disk.blocks)));
    let found: Vec<_> = manifest.images.iter().map(|i| (i.kind, i.map.pages())).collect();
    if kinds != found {
        return Err(RestoreFailed::Images(format!("expected {kinds:?}, found {found:?}")));
    }
    for (n, (disk, image)) in disks.iter().zip(manifest.images.iter().skip(1)).enumerate() {
        if disk.blocks() != spec.disks[n].blocks {
            return Err(RestoreFailed::Images(format!("disk {n} was given with another size")));
        }
        let (wanted, given) = (image.base.map(|b| b.digest), disk.base.as_ref().map(|b| b.digest));
        same_base(n, wanted, given)?;
    }
    // Of memory only where it refers to blocks of a template, which are the first disk's.
    let wanted = manifest.images.first().and_then(|image| image.base).map(|base| base.digest);
    let given = disks.first().and_then(|disk| disk.base.as_ref()).map(|base| base.digest);
    same_base(0, wanted, if wanted.is_some() { given } else { None })
}

fn same_base(disk: usize, wanted: Option<Digest>, given: Option<Digest>) -> Result<(), RestoreFailed> {
    let name = |d: Option<Digest>| d.map_or_else(|| "none".to_owned(), |d| d.to_string());
    if wanted == given {
        return Ok(());
    }
    Err(RestoreFailed::Base { disk, wanted: name(wanted), given: name(given) })
}

/// Makes every page of `map` that is zero hide what the base has there.
pub(super) fn hide_base(disk: &Disk, map: &stasis_snapshot::image::ImageMap) -> std::io::Result<()> {
    for run in map.runs() {
        let hidden = run.start..run.end().min(disk.base_blocks());
        if run.at == PageRef::Zero && !hidden.is_empty() {
            disk.overlay.restore_zero(hidden).map_err(std::io::Error::other)?;
        }
    }
    Ok(())
}
