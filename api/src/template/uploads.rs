//! The templates that tenants made, on this host's disk:
//!
//! ```text
//! <data_dir>/templates/<tenant>/<id>/template.json, rootfs.ext4, vmlinux, initramfs
//! <data_dir>/templates/<tenant>/<id>.withdrawn/      about to be deleted
//! <data_dir>/templates/.boot/                        kernels and initramfs, which the templates share by hard links
//! <data_dir>/templates/.making/<id>/                 scratch of a build
//! ```
//!
//! A template is there when its directory has its name, whole: it is made elsewhere and renamed. What a killed supervisor left is swept at the
//! next start: scratch goes, what was withdrawn comes back, since nobody said yet that no sandbox needs it.
//!
//! Kernel and initramfs are the template's own, as its root file system is: a new kernel of the operator's does not change what a stopped
//! sandbox starts with.

use super::{Ready, Template, TemplateFile, Upload, read};
use crate::template_digest::{Stamp, content_digest};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

const MAKING: &str = ".making";
const BOOT: &str = ".boot";
const WITHDRAWN: &str = ".withdrawn";
/// Name of the root file system in a template's directory and in its scratch.
const ROOTFS: &str = "rootfs.ext4";

/// The directories of tenants below `root`.
pub(super) fn tenants(root: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(root) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with('.') && entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The directory of a template that is about to be deleted.
pub(super) fn is_withdrawn(dir: &Path) -> bool {
    dir.extension().is_some_and(|extension| extension == &WITHDRAWN[1..])
}

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Uploads {
    root: PathBuf,
}

/// Scratch of a build; removed when dropped.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// For what is only needed while the template is made.
    pub(crate) fn work(&self) -> PathBuf {
        self.0.join("work")
    }

    /// Where the root file system is to be made.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.0.join("whole").join(ROOTFS)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, dir = %self.0.display(), "scratch of a template is left to the next start");
        }
    }
}

impl Uploads {
    pub(crate) fn new(data_dir: &Path) -> Self {
        Self { root: data_dir.join("templates") }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Takes up after a supervisor that was killed. Nothing of its work goes on.
    pub(crate) fn sweep(&self) -> io::Result<()> {
        match fs::remove_dir_all(self.root.join(MAKING)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        for tenant in tenants(&self.root)? {
            for entry in fs::read_dir(&tenant)? {
                let name = entry?.file_name();
                if let Some(id) = name.to_string_lossy().strip_suffix(WITHDRAWN) {
                    fs::rename(tenant.join(&name), tenant.join(id))?;
                }
            }
        }
        let boot = match fs::read_dir(self.root.join(BOOT)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for entry in boot {
            let path = entry?.path();
            // No template shares it any more.
            if fs::metadata(&path)?.nlink() == 1 {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    pub(crate) fn scratch(&self, id: &str) -> io::Result<Scratch> {
        let scratch = Scratch(self.root.join(MAKING).join(id));
        fs::create_dir_all(scratch.work())?;
        fs::create_dir_all(scratch.0.join("whole"))?;
        Ok(scratch)
    }

    /// Makes a template of the root file system in `scratch`, on the kernel of `boot`. It is there when this returns.
    pub(crate) fn publish(
        &self,
        scratch: &Scratch,
        name: &str,
        upload: Upload,
        boot: &Template,
        disk_mib: u64,
    ) -> io::Result<()> {
        let whole = scratch.0.join("whole");
        self.share(&boot.kernel, &whole.join("vmlinux"))?;
        if let Some(initramfs) = &boot.initramfs {
            self.share(initramfs, &whole.join("initramfs"))?;
        }
        let tenant = self.root.join(&upload.tenant);
        let place = tenant.join(&upload.id);
        let file = TemplateFile {
            name: name.to_owned(),
            kernel: "vmlinux".into(),
            initramfs: boot.initramfs.as_ref().map(|_| "initramfs".into()),
            rootfs: Some(ROOTFS.into()),
            disk_mib,
            cmdline: boot.cmdline.clone(),
            ready: Ready::Agent,
            min_memory_mib: Some(boot.min_memory_mib),
            exit_counter: false,
            port: upload.process.port,
            upload: Some(upload),
        };
        write_description(&whole, &file)?;
        fs::create_dir_all(&tenant)?;
        sync(&whole)?;
        fs::rename(&whole, &place)?;
        sync(&tenant)
    }

    /// A second name for a copy that is nobody else's: the original may be written to.
    fn share(&self, original: &Path, place: &Path) -> io::Result<()> {
        let stamp = Stamp::of(original)?;
        let digest = content_digest(&File::open(original)?, stamp.len)?;
        let shared = self.root.join(BOOT).join(&digest);
        if !shared.exists() {
            fs::create_dir_all(self.root.join(BOOT))?;
            let copy = place.with_extension("copy");
            fs::copy(original, &copy)?;
            File::open(&copy)?.sync_all()?;
            fs::rename(&copy, &shared)?;
        }
        fs::hard_link(shared, place)
    }

    /// Gives a template another name.
    pub(crate) fn rename(&self, upload: &Upload, name: &str) -> io::Result<()> {
        let dir = self.root.join(&upload.tenant).join(&upload.id);
        let mut file = read(&dir.join("template.json")).map_err(io::Error::other)?;
        name.clone_into(&mut file.name);
        write_description(&dir, &file)
    }

    /// Takes a template away so that nothing new is made from it.
    pub(crate) fn withdraw(&self, upload: &Upload) -> io::Result<Withdrawn> {
        let place = self.root.join(&upload.tenant).join(&upload.id);
        let aside = place.with_extension(&WITHDRAWN[1..]);
        fs::rename(&place, &aside)?;
        Ok(Withdrawn { place, aside, scratch: self.root.join(MAKING) })
    }
}

/// A template that is withdrawn.
#[derive(Debug)]
pub(crate) struct Withdrawn {
    place: PathBuf,
    aside: PathBuf,
    scratch: PathBuf,
}

impl Withdrawn {
    /// It is there again.
    pub(crate) fn put_back(self) -> io::Result<()> {
        fs::rename(self.aside, self.place)
    }

    /// It is gone for good.
    pub(crate) fn remove(self) -> io::Result<()> {
        fs::create_dir_all(&self.scratch)?;
        let doomed = self.scratch.join(self.aside.file_name().unwrap_or_default());
        fs::rename(&self.aside, &doomed)?;
        fs::remove_dir_all(doomed)
    }
}

fn write_description(dir: &Path, file: &TemplateFile) -> io::Result<()> {
    let new = dir.join("template.json.new");
    fs::write(&new, serde_json::to_vec_pretty(file)?)?;
    File::open(&new)?.sync_all()?;
    fs::rename(new, dir.join("template.json"))
}

fn sync(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
