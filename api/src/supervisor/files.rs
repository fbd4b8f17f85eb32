//! The opened files that a VMM is handed: guest memory, disks, what is held in memory, and the local files of packs.

use super::Core;
use crate::error::Error;
use crate::record::Spec;
use crate::store::Grants;
use rustix::fs::{MemfdFlags, memfd_create};
use stasis_snapshot::grant::Access;
use stasis_snapshot::pager::cache_dir::CacheDir;
use stasis_vmm::control::types::{DiskConfig, FdToken};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

/// Files to send to a VMM and the disks that name them.
#[derive(Debug, Default)]
pub(super) struct Disks {
    pub(super) files: Vec<(FdToken, File)>,
    pub(super) disks: Vec<DiskConfig>,
}

/// An empty memory file. Its size is the VMM's to set.
pub(super) fn guest_memory() -> Result<Arc<File>, Error> {
    memfd_create("guest-memory", MemfdFlags::CLOEXEC)
        .map(|fd| Arc::new(File::from(fd)))
        .map_err(|e| Error::Local { action: "make a file for a guest's memory".to_owned(), source: e.into() })
}

/// A file in memory that holds `bytes`, to be read from its beginning.
pub(super) fn in_memory(name: &str, bytes: &[u8]) -> Result<File, Error> {
    let make = || -> io::Result<File> {
        let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
        file.write_all(bytes)?;
        file.rewind()?;
        Ok(file)
    };
    make().map_err(|source| Error::Local { action: format!("hold a {name} in memory"), source })
}

/// Another descriptor of the same file, to be sent.
pub(super) fn duplicate(file: &File) -> Result<File, Error> {
    file.try_clone().map_err(|source| Error::Local { action: "duplicate a descriptor".to_owned(), source })
}

impl Core {
    /// An empty, unlinked, sparse file for the writes of a disk: gone with the last process that holds it.
    fn overlay(&self) -> Result<File, Error> {
        let dir = self.config.data_dir.join("scratch");
        let local = |source| Error::Local { action: format!("make an overlay file in {}", dir.display()), source };
        std::fs::create_dir_all(&dir).map_err(local)?;
        let tmpfile = i32::try_from(rustix::fs::OFlags::TMPFILE.bits()).unwrap_or(0);
        match OpenOptions::new().read(true).write(true).custom_flags(tmpfile).open(&dir) {
            Ok(file) => Ok(file),
            // File systems without O_TMPFILE answer one of these.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)) =>
            {
                let path = dir.join(self.sources.word(20));
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).map_err(local)?;
                std::fs::remove_file(&path).map_err(local)?;
                Ok(file)
            }
            Err(e) => Err(local(e)),
        }
    }

    /// The disks of a sandbox over this root file system.
    pub(super) fn disks(&self, spec: &Spec, rootfs: Option<&Path>) -> Result<Disks, Error> {
        let mut out = Disks::default();
        if spec.disk_mib == 0 {
            return Ok(out);
        }
        let overlay = self.store.token();
        out.files.push((overlay, self.overlay()?));
        let (mut base, mut base_index) = (None, None);
        if let Some(rootfs) = rootfs {
            let token = self.store.token();
            let file = File::open(rootfs).map_err(|source| Error::Local {
                action: format!("open the root file system {}", rootfs.display()),
                source,
            })?;
            out.files.push((token, file));
            base = Some(token);
            if let Some(index) =
                spec.rootfs_digest.as_deref().and_then(|digest| self.block_indexes.open(rootfs, digest))
            {
                let token = self.store.token();
                out.files.push((token, index));
                base_index = Some(token);
            }
        }
        let base_digest = spec.rootfs_digest.clone().filter(|_| base.is_some());
        out.disks.push(DiskConfig {
            base,
            base_digest,
            base_index,
            overlay: Some(overlay),
            size_mib: spec.disk_mib,
            read_only: false,
        });
        Ok(out)
    }

    /// Adds the local file of each pack that does not come from a local file anyway; without `make`, only of those that have one. Without a
    /// file a pack is fetched from the store.
    pub(super) fn add_cache_files(&self, grants: &mut Grants, make: bool) {
        let Some(cache) = &self.pack_cache else { return };
        for object in &mut grants.objects {
            if matches!(object.access, Access::Fd(_)) {
                continue;
            }
            let opened = if make { cache.open(&object.key).map(Some) } else { cache.open_existing(&object.key) };
            match opened {
                Ok(None) => {}
                Ok(Some(file)) => {
                    let token = self.store.token();
                    grants.files.push((token, file));
                    object.cache = Some(token.0);
                }
                Err(error) => {
                    tracing::warn!(%error, key = object.key, "a pack has no local file");
                    return;
                }
            }
        }
    }

    /// Keeps the cache within its budget beside everything else, if many files were opened since it was last looked at.
    pub(super) fn trim_cache_if_due(self: &Arc<Self>) {
        let core = self.clone();
        drop(tokio::task::spawn_blocking(move || {
            if let Some(Err(error)) = core.pack_cache.as_ref().map(CacheDir::trim_if_due) {
                tracing::warn!(%error, "the pack cache cannot be trimmed");
            }
        }));
    }

    /// Forgets the local files of packs that were not written, and keeps the cache within its budget. Blocks.
    pub(super) fn trim_cache(&self, unwritten: &[String]) {
        let Some(cache) = &self.pack_cache else { return };
        for key in unwritten {
            if let Err(error) = cache.remove(key) {
                tracing::warn!(%error, key, "a local file of a pack stays");
            }
        }
        if let Err(error) = cache.trim() {
            tracing::warn!(%error, "the pack cache cannot be trimmed");
        }
    }
}
