//! Templates: what a sandbox boots from. Those of the operator, which every tenant may use, are read from `<images>/templates/*/template.json`;
//! those that tenants made from container images from [`uploads`]. Paths in a `template.json` are relative to it.
//!
//! A template's digest is BLAKE3 over the digests of its files ([`crate::template_digest`]) and its command line.

pub(crate) mod uploads;

use crate::image::Process;
use crate::journal::{Journal, JournalError};
use crate::sources::UnixMs;
use crate::template_digest::{self, Stamp, content_digest};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

/// Least memory of a sandbox unless its template says less, MiB.
const MIN_MEMORY_MIB: u32 = 512;

/// `template.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct TemplateFile {
    name: String,
    kernel: PathBuf,
    #[serde(default)]
    initramfs: Option<PathBuf>,
    #[serde(default)]
    rootfs: Option<PathBuf>,
    #[serde(default)]
    disk_mib: u64,
    cmdline: String,
    ready: Ready,
    #[serde(default)]
    min_memory_mib: Option<u32>,
    #[serde(default)]
    exit_counter: bool,
    #[serde(default)]
    port: Option<NonZeroU16>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    upload: Option<Upload>,
}

/// A template that a tenant made from a container image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// Its id, which it keeps under every name.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// Where the image was.
    pub uri: String,
    /// Digest of the image, `sha256:…`.
    pub image_digest: String,
    /// What the image says about the processes in it.
    pub process: Process,
    /// When it was made.
    pub created_at: UnixMs,
}

/// How a booted guest says that it takes requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    /// Its agent answers over vsock.
    Agent,
    /// It writes this text to its console. Such a guest has no agent: it runs no commands, and nothing is told to it on a wake.
    Serial(String),
}

/// A template whose files exist.
#[derive(Clone, Debug)]
pub struct Template {
    /// As requests name it.
    pub name: String,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// Root file system: the read-only base of the guest's disk.
    pub rootfs: Option<PathBuf>,
    /// Size of the guest's disk, MiB; 0 is no disk.
    pub disk_mib: u64,
    /// Kernel command line.
    pub cmdline: String,
    /// When it is ready.
    pub ready: Ready,
    /// Least memory, MiB.
    pub min_memory_mib: u32,
    /// Attach the exit counter.
    pub exit_counter: bool,
    /// TCP port that its app serves on.
    pub port: Option<NonZeroU16>,
    /// BLAKE3 of the whole, hex.
    pub digest: String,
    /// BLAKE3 of `rootfs`, hex: what a restore must find again.
    pub rootfs_digest: Option<String>,
    /// The image that it was made from; `None` for a template of the operator.
    pub upload: Option<Upload>,
}

impl Template {
    /// `tpl-` and 16 hex digits of the digest, or what the upload was called.
    pub fn id(&self) -> String {
        match &self.upload {
            Some(upload) => upload.id.clone(),
            None => format!("tpl-{}", self.digest.get(..16).unwrap_or(&self.digest)),
        }
    }

    /// The guest is a stock kernel with our agent, which software KVM cannot run (design §8).
    pub fn needs_hardware_kvm(&self) -> bool {
        self.ready == Ready::Agent
    }
}

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// No `template.json` has that name.
    #[error("there is no template {name:?}; known: {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A file of it is missing or cannot be read.
    #[error("template {name:?}: cannot read its {part} {path}; build the images (make images) or correct template.json", path = path.display())]
    File {
        /// The template.
        name: String,
        /// Which file.
        part: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A `template.json` cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Description {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A `template.json` says something else than a template.
    #[error("{path} does not describe a template", path = path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The cache of digests failed.
    #[error("cannot keep the digests of template files")]
    Journal(#[source] JournalError),
}

/// The templates of this host.
#[derive(Clone, Debug)]
pub struct Templates {
    dir: PathBuf,
    uploads: Option<PathBuf>,
}

/// A `template.json` and where it is.
struct Described {
    path: PathBuf,
    file: TemplateFile,
}

impl Described {
    /// The tenant may use it: it is its own, or the operator's.
    fn is_for(&self, tenant: &str) -> bool {
        self.file.upload.as_ref().is_none_or(|upload| upload.tenant == tenant)
    }
}

impl Templates {
    /// Those of the operator, under `<images>/templates`.
    pub fn new(images: &Path) -> Self {
        Self { dir: images.join("templates"), uploads: None }
    }

    /// And those that tenants made, under `uploads`.
    #[must_use]
    pub fn with_uploads(self, uploads: &Path) -> Self {
        Self { uploads: Some(uploads.to_owned()), ..self }
    }

    /// Where those of the operator are looked for.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The template that `tenant` means by that name, with digests. Blocks: reads whole files whose digest is not cached.
    pub fn find(&self, tenant: &str, name: &str, journal: &Journal) -> Result<Template, TemplateError> {
        let mut known = self.scan()?;
        known.retain(|one| one.is_for(tenant));
        // Its own first, should the operator have come by the same name later.
        known.sort_by_key(|one| one.file.upload.is_none());
        if let Some(found) = known.iter().position(|one| one.file.name == name) {
            return load(known.swap_remove(found), journal);
        }
        let mut names: Vec<_> = known.into_iter().map(|one| one.file.name).collect();
        names.sort();
        let known =
            if names.is_empty() { format!("none (nothing in {})", self.dir.display()) } else { names.join(", ") };
        Err(TemplateError::Unknown { name: name.to_owned(), known })
    }

    /// All that `tenant` may use and that can be used. Blocks, as [`Templates::find`] does.
    pub fn visible(&self, tenant: &str, journal: &Journal) -> Result<Vec<Template>, TemplateError> {
        let known = self.scan()?.into_iter().filter(|one| one.is_for(tenant));
        Ok(known.filter_map(|one| usable(load(one, journal))).collect())
    }

    /// How many templates of container images there are, of all tenants.
    pub fn uploaded(&self) -> Result<usize, TemplateError> {
        Ok(self.scan()?.iter().filter(|one| one.file.upload.is_some()).count())
    }

    /// A root file system with that digest, templates called `preferred` first. `None` when no template here has it.
    pub fn rootfs_by_digest(
        &self,
        digest: &str,
        preferred: &str,
        journal: &Journal,
    ) -> Result<Option<PathBuf>, TemplateError> {
        let found = self.first(preferred, journal, |template| template.rootfs_digest.as_deref() == Some(digest))?;
        Ok(found.and_then(|template| template.rootfs))
    }

    /// The template with that digest, those called `preferred` first. `None` when there is none here.
    pub fn by_digest(
        &self,
        digest: &str,
        preferred: &str,
        journal: &Journal,
    ) -> Result<Option<Template>, TemplateError> {
        self.first(preferred, journal, |template| template.digest == digest)
    }

    /// The first that is meant, whoever it belongs to: what is asked for by digest is known to who asks.
    fn first(
        &self,
        preferred: &str,
        journal: &Journal,
        meant: impl Fn(&Template) -> bool,
    ) -> Result<Option<Template>, TemplateError> {
        let mut known = self.scan()?;
        known.sort_by_key(|one| one.file.name != preferred);
        // A broken neighbour must not hide the one that is looked for.
        Ok(known.into_iter().filter_map(|one| usable(load(one, journal))).find(meant))
    }

    /// Names of the operator's templates whose description can be read.
    pub fn names(&self) -> Result<Vec<String>, TemplateError> {
        let mut names: Vec<_> = scan_dir(&self.dir)?.into_iter().map(|one| one.file.name).collect();
        names.sort();
        Ok(names)
    }

    fn scan(&self) -> Result<Vec<Described>, TemplateError> {
        let mut found = scan_dir(&self.dir)?;
        let Some(uploads) = &self.uploads else { return Ok(found) };
        for tenant in uploads::tenants(uploads).map_err(describe(uploads))? {
            found.extend(scan_dir(&tenant)?.into_iter().filter(|one| {
                one.file.upload.is_some() && one.path.parent().is_some_and(|dir| !uploads::is_withdrawn(dir))
            }));
        }
        Ok(found)
    }
}

fn scan_dir(dir: &Path) -> Result<Vec<Described>, TemplateError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(describe(dir)(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(describe(dir))?.path().join("template.json");
        match read(&path) {
            Err(TemplateError::Description { source, .. })
                if matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            other => found.push(Described { file: other?, path }),
        }
    }
    Ok(found)
}

fn describe(path: &Path) -> impl Fn(io::Error) -> TemplateError {
    move |source| TemplateError::Description { path: path.to_owned(), source }
}

fn read(path: &Path) -> Result<TemplateFile, TemplateError> {
    let text = fs::read(path).map_err(describe(path))?;
    serde_json::from_slice(&text).map_err(|source| TemplateError::Malformed { path: path.to_owned(), source })
}

fn usable(loaded: Result<Template, TemplateError>) -> Option<Template> {
    loaded.inspect_err(|e| tracing::warn!(error = e as &dyn std::error::Error, "a template cannot be used")).ok()
}

/// Reads a file whole and notes its digest beside it, for the first [`load`].
pub(crate) fn note_digest(path: &Path) -> io::Result<()> {
    let stamp = Stamp::of(path)?;
    template_digest::leave_beside(path, stamp, &content_digest(&fs::File::open(path)?, stamp.len)?);
    Ok(())
}

fn load(Described { path, file }: Described, journal: &Journal) -> Result<Template, TemplateError> {
    let base = path.parent().unwrap_or(Path::new("."));
    let digest_of = |part: &'static str, path: &Path| {
        let path = base.join(path);
        let wrong = |source| TemplateError::File { name: file.name.clone(), part, path: path.clone(), source };
        let stamp = Stamp::of(&path).map_err(wrong)?;
        let beside = template_digest::beside(&path, stamp);
        let cached = match beside {
            Some(digest) => Some(digest),
            None => journal.cached_digest(&path, (stamp.len, stamp.mtime_ns)).map_err(TemplateError::Journal)?,
        };
        if let Some(digest) = cached {
            return Ok((path, digest));
        }
        let digest = fs::File::open(&path).and_then(|f| content_digest(&f, stamp.len)).map_err(wrong)?;
        journal.cache_digest(&path, (stamp.len, stamp.mtime_ns), &digest).map_err(TemplateError::Journal)?;
        template_digest::leave_beside(&path, stamp, &digest);
        Ok((path, digest))
    };
    let (kernel, kernel_digest) = digest_of("kernel", &file.kernel)?;
    let initramfs = file.initramfs.as_deref().map(|p| digest_of("initramfs", p)).transpose()?;
    let rootfs = file.rootfs.as_deref().map(|p| digest_of("root file system", p)).transpose()?;
    let mut whole = blake3::Hasher::new();
    for part in [Some(&kernel_digest), initramfs.as_ref().map(|i| &i.1), rootfs.as_ref().map(|r| &r.1)] {
        // Each part is a line, so that a missing initramfs cannot look like a missing root file system.
        whole.update(part.map_or("-", String::as_str).as_bytes()).update(b"\n");
    }
    whole.update(file.cmdline.as_bytes());
    let (rootfs, rootfs_digest) = rootfs.unzip();
    Ok(Template {
        digest: whole.finalize().to_hex().to_string(),
        name: file.name,
        kernel,
        initramfs: initramfs.map(|i| i.0),
        rootfs,
        disk_mib: file.disk_mib,
        cmdline: file.cmdline,
        ready: file.ready,
        min_memory_mib: file.min_memory_mib.unwrap_or(MIN_MEMORY_MIB),
        exit_counter: file.exit_counter,
        port: file.port,
        rootfs_digest,
        upload: file.upload,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, folder: &str, json: &str, files: &[(&str, &str)]) {
        let dir = dir.join("templates").join(folder);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("template.json"), json).unwrap();
        for (name, content) in files {
            fs::write(dir.join(name), content).unwrap();
        }
    }

    const PULSE: &str =
        r#"{"name":"test/pulse","kernel":"pulse","cmdline":"fill=1","ready":{"serial":"R\n"},"min_memory_mib":64}"#;

    #[test]
    fn digests_follow_content_and_are_cached() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_memory().unwrap();
        write(dir.path(), "pulse", PULSE, &[("pulse", "elf")]);
        let templates = Templates::new(dir.path());
        let first = templates.find("t", "test/pulse", &journal).unwrap();
        assert_eq!(first.ready, Ready::Serial("R\n".to_owned()));
        assert_eq!(first.min_memory_mib, 64);
        assert!(!first.needs_hardware_kvm());
        assert_eq!(templates.find("t", "test/pulse", &journal).unwrap().digest, first.digest);
        write(dir.path(), "pulse", PULSE, &[("pulse", "elf2")]);
        assert_ne!(templates.find("t", "test/pulse", &journal).unwrap().digest, first.digest);
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_memory().unwrap();
        let templates = Templates::new(dir.path());
        assert!(templates.find("t", "x", &journal).unwrap_err().to_string().contains("nothing in"));
        write(dir.path(), "pulse", PULSE, &[]);
        let error = templates.find("t", "test/pulse", &journal).unwrap_err().to_string();
        assert!(error.contains("kernel") && error.contains("pulse"), "{error}");
        write(dir.path(), "pulse", "{}", &[]);
        assert!(matches!(templates.find("t", "x", &journal), Err(TemplateError::Malformed { .. })));
    }

    #[test]
    fn a_root_file_system_is_found_by_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_memory().unwrap();
        let json = r#"{"name":"a","kernel":"k","rootfs":"r","disk_mib":64,"cmdline":"","ready":"agent"}"#;
        write(dir.path(), "a", json, &[("k", "k"), ("r", "root")]);
        let templates = Templates::new(dir.path());
        let digest = templates.find("t", "a", &journal).unwrap().rootfs_digest.unwrap();
        assert!(templates.rootfs_by_digest(&digest, "gone", &journal).unwrap().is_some());
        assert!(templates.rootfs_by_digest(&"0".repeat(64), "a", &journal).unwrap().is_none());
    }
}
