//! A boot over the disks of a manifest: what a start after a stop is. Memory begins as nothing, and the kernel is loaded anew.
//!
//! The disks are filled before the first vCPU runs. Their pages are the snapshot's until the guest writes them, so that the next capture sends
//! only those.

use std::sync::Arc;

use stasis_snapshot::granted::PackSource;
use stasis_snapshot::image::ImageMap;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::pager::{PackCache, PageTarget, Pager, Sources};
use stasis_snapshot::seal::DataKeys;
use tokio_util::sync::CancellationToken;

use super::capture::{Parent, new_digests};
use super::disk::Disk;
use super::restore::{RestoreFailed, check_images, hide_base, pager_options};
use super::spec::MachineSpec;
use super::{Backends, Bare, BootFiles, Host, Machine, MachineError};
use crate::control::types::{MachineConfig, Paging};
use crate::paging::targets::{DiskTarget, MemoryTarget};
use crate::paging::{MEMORY, PagingError};

/// Where the disks come from.
pub(crate) struct Stored {
    pub(crate) manifest: Manifest,
    pub(crate) packs: Arc<dyn PackSource>,
    /// Of encrypted packs.
    pub(crate) keys: DataKeys,
    pub(crate) cache: Option<Arc<PackCache>>,
    pub(crate) connections: u16,
}

/// Fills the disks and boots, in `ready` if that fits; the vCPUs run when this returns.
pub(crate) async fn reboot(
    config: &MachineConfig,
    ready: Option<Bare>,
    mut files: BootFiles,
    backends: Backends,
    host: Host,
    stored: Stored,
) -> Result<Machine, RestoreFailed> {
    let disks = backends.disks.clone();
    let spec = MachineSpec::new(config, disks.iter().map(Disk::spec).collect())?;
    let mut manifest = stored.manifest;
    check_images(&manifest, &spec, &disks)?;
    let (bare, vcpus) = spec.bare(ready, &host.files)?.with_memory(files.memory.take(), &host.files)?;
    manifest.images[MEMORY].map = ImageMap::zero(bare.ram.pages());
    for (disk, image) in disks.iter().zip(manifest.images.iter().skip(1)) {
        hide_base(disk, &image.map).map_err(RestoreFailed::Disk)?;
    }
    let maps: Vec<_> = manifest.images.iter().map(|image| image.map.clone()).collect();
    let digests = new_digests(&maps)?;
    let mut targets: Vec<Arc<dyn PageTarget>> =
        vec![Arc::new(MemoryTarget { ram: bare.ram.clone(), base: None, digests: digests[MEMORY].clone() })];
    for (disk, digests) in disks.iter().zip(&digests[1..]) {
        targets.push(Arc::new(DiskTarget { disk: disk.clone(), digests: digests.clone() }));
    }
    let options = pager_options(Paging { eager: true, connections: stored.connections, sweep_mib_per_second: 0 });
    let sources = Sources { store: stored.packs, cache: stored.cache, keys: stored.keys };
    let pager = Pager::new(&manifest, targets, sources, options, tokio::runtime::Handle::current())
        .map_err(PagingError::from)
        .map_err(MachineError::from)?;
    pager.fill(&[], true, &CancellationToken::new()).await.map_err(PagingError::from).map_err(MachineError::from)?;
    drop(pager);
    let machine = tokio::task::block_in_place(|| {
        Machine::boot_on(spec, (bare, vcpus), files, backends, host, |ram, devices| {
            Ok(Parent::stored(&manifest, digests, ram, devices))
        })
    })?;
    Ok(machine)
}
