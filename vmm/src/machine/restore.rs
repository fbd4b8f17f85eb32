//! From a manifest to a paused machine.
//!
//! The manifest is untrusted input. Its digest was checked before it was decoded; here its machine is checked against this host (CPU
//! vendor and features, disks) before anything is fetched, and every state is validated by the part that takes it up. An error leaves
//! nothing behind but this process.

use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::VcpuFd;
use stasis_snapshot::capture::PageReader;
use stasis_snapshot::granted::PackSource;
use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::{ImageKind, Manifest};
use stasis_snapshot::restore::{self as pages, Options, PageWriter, RestoreError};
use tokio_util::sync::CancellationToken;

use super::capture::{Parent, VM, vcpu_kind, wall_ns};
use super::devices::DeviceSet;
use super::disk::{BaseFile, Disk};
use super::spec::{self, MachineSpec, SpecError};
use super::{BareMachine, Host, Machine, MachineError};
use crate::control::types::RestoreReport;
use crate::dirty::DirtyTracker;
use crate::kvm;
use crate::memory::GuestRam;
use crate::vcpu::state::{self as vcpu_state, VcpuState};
use crate::vcpu::{VcpuError, cpuid};
use crate::vm_state::{self, VmState};

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
    #[error(transparent)]
    Pages(#[from] RestoreError),
}

impl From<SpecError> for RestoreFailed {
    fn from(e: SpecError) -> Self {
        Self::Machine(e.into())
    }
}

/// Hands base blocks to `write`, one at a time.
fn copy_base(
    base: Option<&BaseFile>,
    first_page: u64,
    first_block: u64,
    pages: u64,
    write: impl Fn(u64, &[u8]) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let base = base.ok_or_else(|| std::io::Error::other("pages refer to a base that is not there"))?;
    let mut block = [0; stasis_snapshot::page::PAGE_SIZE];
    for i in 0..pages {
        base.read(first_block + i, &mut block)?;
        write(first_page + i, &block)?;
    }
    Ok(())
}

/// Memory pages may equal blocks of the first disk's base: memory has no other way to them than to copy.
struct MemoryWriter {
    ram: Arc<GuestRam>,
    base: Option<BaseFile>,
}

impl PageWriter for MemoryWriter {
    fn write(&self, first_page: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.ram.write(first_page, bytes)
    }

    fn write_base(&self, first_page: u64, first_block: u64, pages: u64) -> std::io::Result<()> {
        copy_base(self.base.as_ref(), first_page, first_block, pages, |page, bytes| self.ram.write(page, bytes))
    }
}

/// Blocks that equal the base at their own place are left to it.
struct DiskWriter(Disk);

impl PageWriter for DiskWriter {
    fn write(&self, first_page: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.0.overlay.restore_block(first_page, bytes).map_err(std::io::Error::other)
    }

    fn write_base(&self, first_page: u64, first_block: u64, pages: u64) -> std::io::Result<()> {
        if first_page == first_block {
            return Ok(());
        }
        copy_base(self.0.base.as_ref(), first_page, first_block, pages, |page, bytes| self.write(page, bytes))
    }
}

/// What a restore needs besides the manifest.
pub(crate) struct Input {
    pub(crate) packs: Arc<dyn PackSource>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) generation_id: [u8; 16],
    pub(crate) host: Host,
}

/// Makes the machine, paused.
pub(crate) async fn restore(manifest: Manifest, input: Input) -> Result<(Machine, RestoreReport), RestoreFailed> {
    let spec = MachineSpec::decode(&manifest.spec)?;
    let bare = BareMachine::new(&spec)?;
    check_images(&manifest, &spec, &input.disks)?;
    let fds = bare.vcpu_fds(&spec)?;
    check_cpu(&manifest, &fds)?;
    let mut report = RestoreReport::default();

    let started = Instant::now();
    // A zero page of a disk hides the base's block: it must be made zero before the rest is laid over it.
    for (disk, image) in input.disks.iter().zip(manifest.images.iter().skip(1)) {
        hide_base(disk, &image.map).map_err(|source| RestoreError::Write {
            image: "disk".to_owned(),
            first_page: 0,
            source,
        })?;
    }
    let memory = MemoryWriter { ram: bare.ram.clone(), base: input.disks.first().and_then(|d| d.base.clone()) };
    let mut writers: Vec<Arc<dyn PageWriter>> = vec![Arc::new(memory)];
    writers.extend(input.disks.iter().map(|d| Arc::new(DiskWriter(d.clone())) as Arc<dyn PageWriter>));
    let cancel = CancellationToken::new();
    let stats = pages::restore(&manifest, &writers, input.packs, Options::default(), &cancel).await?;
    report.fetched_bytes = stats.fetched_bytes;
    report.pages_us = started.elapsed().as_micros() as u64;

    let started = Instant::now();
    let machine = tokio::task::block_in_place(|| {
        place(&manifest, spec, bare, fds, input.disks, input.generation_id, input.host)
    })?;
    report.state_us = started.elapsed().as_micros() as u64;
    Ok((machine, report))
}

/// Puts the saved state into KVM and the devices. Memory is in place.
fn place(
    manifest: &Manifest,
    spec: MachineSpec,
    bare: BareMachine,
    fds: Vec<VcpuFd>,
    disks: Vec<Disk>,
    generation_id: [u8; 16],
    host: Host,
) -> Result<Machine, MachineError> {
    // Before the devices, whose new generation id is a write that the snapshot does not have.
    let dirty = DirtyTracker::for_restored(&bare.vm, &bare.ram)?;
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
    let devices = DeviceSet::restore(&spec, &manifest.state, disks, &bare.ram, &bare.vm, &host.run_dir, generation_id)?;
    let base = Parent::of(manifest, &devices);
    let mut machine = Machine::assemble(bare, spec, fds, devices, dirty, base, host)?;
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
fn check_images(manifest: &Manifest, spec: &MachineSpec, disks: &[Disk]) -> Result<(), RestoreFailed> {
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
        if wanted != given {
            let name = |d: Option<Digest>| d.map_or_else(|| "none".to_owned(), |d| d.to_string());
            return Err(RestoreFailed::Base { disk: n, wanted: name(wanted), given: name(given) });
        }
    }
    Ok(())
}

/// Makes every page of `map` that is zero hide what the base has there.
fn hide_base(disk: &Disk, map: &stasis_snapshot::image::ImageMap) -> std::io::Result<()> {
    for run in map.runs() {
        let hidden = run.start..run.end().min(disk.base_blocks());
        if run.at == stasis_snapshot::image::PageRef::Zero && !hidden.is_empty() {
            disk.overlay.restore_zero(hidden).map_err(std::io::Error::other)?;
        }
    }
    Ok(())
}
