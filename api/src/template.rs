//! Templates: what a sandbox boots from. Read from `<images>/templates/*/template.json`; paths in it are relative to that file.
//!
//! A template's digest is BLAKE3 over the digests of its files ([`crate::template_digest`]) and its command line.

use crate::journal::{Journal, JournalError};
use crate::template_digest::{self, Stamp, content_digest};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

/// Least memory of a sandbox unless its template says less, MiB.
const MIN_MEMORY_MIB: u32 = 512;

/// `template.json`.
#[derive(Clone, Debug, Deserialize)]
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
}

/// How a booted guest says that it takes requests.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
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
}

impl Template {
    /// `tpl-` and 16 hex digits of the digest.
    pub fn id(&self) -> String {
        format!("tpl-{}", self.digest.get(..16).unwrap_or(&self.digest))
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

/// The templates under one directory.
#[derive(Clone, Debug)]
pub struct Templates {
    dir: PathBuf,
}

impl Templates {
    /// Those under `<images>/templates`.
    pub fn new(images: &Path) -> Self {
        Self { dir: images.join("templates") }
    }

    /// Where they are looked for.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The template of that name, with digests. Blocks: reads whole files whose digest is not cached.
    pub fn find(&self, name: &str, journal: &Journal) -> Result<Template, TemplateError> {
        let mut known = self.scan()?;
        if let Some((path, file)) = known.remove(name) {
            return load(&path, file, journal);
        }
        let known = known.into_keys().collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { format!("none (nothing in {})", self.dir.display()) } else { known };
        Err(TemplateError::Unknown { name: name.to_owned(), known })
    }

    /// A root file system with that digest, `preferred` first. `None` when no template here has it.
    pub fn rootfs_by_digest(
        &self,
        digest: &str,
        preferred: &str,
        journal: &Journal,
    ) -> Result<Option<PathBuf>, TemplateError> {
        let mut known = self.scan()?;
        let first = known.remove(preferred);
        for (path, file) in first.into_iter().chain(known.into_values()) {
            // A broken neighbour must not hide the one that is looked for.
            match load(&path, file, journal) {
                Ok(template) if template.rootfs_digest.as_deref() == Some(digest) => return Ok(template.rootfs),
                Ok(_) => {}
                Err(e) => tracing::warn!(error = &e as &dyn std::error::Error, "a template cannot be used"),
            }
        }
        Ok(None)
    }

    /// The template with that digest, `preferred` first. `None` when there is none here.
    pub fn by_digest(
        &self,
        digest: &str,
        preferred: &str,
        journal: &Journal,
    ) -> Result<Option<Template>, TemplateError> {
        let mut known = self.scan()?;
        let first = known.remove(preferred);
        for (path, file) in first.into_iter().chain(known.into_values()) {
            // A broken neighbour must not hide the one that is looked for.
            match load(&path, file, journal) {
                Ok(template) if template.digest == digest => return Ok(Some(template)),
                Ok(_) => {}
                Err(e) => tracing::warn!(error = &e as &dyn std::error::Error, "a template cannot be used"),
            }
        }
        Ok(None)
    }

    /// Names of all templates whose description can be read.
    pub fn names(&self) -> Result<Vec<String>, TemplateError> {
        Ok(self.scan()?.into_keys().collect())
    }

    fn scan(&self) -> Result<BTreeMap<String, (PathBuf, TemplateFile)>, TemplateError> {
        let describe = |path: &Path| {
            let path = path.to_owned();
            move |source| TemplateError::Description { path, source }
        };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(e) => return Err(describe(&self.dir)(e)),
        };
        let mut found = BTreeMap::new();
        for entry in entries {
            let path = entry.map_err(describe(&self.dir))?.path().join("template.json");
            let text = match fs::read(&path) {
                Ok(text) => text,
                Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => continue,
                Err(e) => return Err(describe(&path)(e)),
            };
            let file: TemplateFile = serde_json::from_slice(&text)
                .map_err(|source| TemplateError::Malformed { path: path.clone(), source })?;
            found.insert(file.name.clone(), (path, file));
        }
        Ok(found)
    }
}

fn load(description: &Path, file: TemplateFile, journal: &Journal) -> Result<Template, TemplateError> {
    let base = description.parent().unwrap_or(Path::new("."));
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
        let first = templates.find("test/pulse", &journal).unwrap();
        assert_eq!(first.ready, Ready::Serial("R\n".to_owned()));
        assert_eq!(first.min_memory_mib, 64);
        assert!(!first.needs_hardware_kvm());
        assert_eq!(templates.find("test/pulse", &journal).unwrap().digest, first.digest);
        write(dir.path(), "pulse", PULSE, &[("pulse", "elf2")]);
        assert_ne!(templates.find("test/pulse", &journal).unwrap().digest, first.digest);
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_memory().unwrap();
        let templates = Templates::new(dir.path());
        assert!(templates.find("x", &journal).unwrap_err().to_string().contains("nothing in"));
        write(dir.path(), "pulse", PULSE, &[]);
        let error = templates.find("test/pulse", &journal).unwrap_err().to_string();
        assert!(error.contains("kernel") && error.contains("pulse"), "{error}");
        write(dir.path(), "pulse", "{}", &[]);
        assert!(matches!(templates.find("x", &journal), Err(TemplateError::Malformed { .. })));
    }

    #[test]
    fn a_root_file_system_is_found_by_its_digest() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::in_memory().unwrap();
        let json = r#"{"name":"a","kernel":"k","rootfs":"r","disk_mib":64,"cmdline":"","ready":"agent"}"#;
        write(dir.path(), "a", json, &[("k", "k"), ("r", "root")]);
        let templates = Templates::new(dir.path());
        let digest = templates.find("a", &journal).unwrap().rootfs_digest.unwrap();
        assert!(templates.rootfs_by_digest(&digest, "gone", &journal).unwrap().is_some());
        assert!(templates.rootfs_by_digest(&"0".repeat(64), "a", &journal).unwrap().is_none());
    }
}
