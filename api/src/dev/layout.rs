//! Container images made of given entries, good ones and bad ones, for tests: as an OCI layout, as what `docker save` writes, and as the blobs
//! of a registry. Nothing here checks anything.

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::Path;
use tar::{EntryType, Header};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// An entry of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name, written as it is.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Modification time.
    pub mtime: u64,
    /// Extended attributes.
    pub xattrs: Vec<(String, Vec<u8>)>,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A file and its content.
    File(Vec<u8>),
    /// A symbolic link and its target.
    Symlink(Vec<u8>),
    /// A hard link and its target.
    Link(Vec<u8>),
    /// A character device.
    Device,
    /// A FIFO.
    Fifo,
}

impl Entry {
    /// One with usual permissions, of root.
    pub fn new(path: impl AsRef<[u8]>, kind: EntryKind) -> Self {
        let mode = if kind == EntryKind::Directory { 0o755 } else { 0o644 };
        Self { path: path.as_ref().to_vec(), kind, mode, uid: 0, gid: 0, mtime: 1_600_000_000, xattrs: Vec::new() }
    }

    /// A file.
    pub fn file(path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        Self::new(path, EntryKind::File(content.as_ref().to_vec()))
    }

    /// A directory.
    pub fn directory(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, EntryKind::Directory)
    }

    /// A symbolic link.
    pub fn symlink(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, EntryKind::Symlink(target.as_ref().to_vec()))
    }

    /// A hard link.
    pub fn link(path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self::new(path, EntryKind::Link(target.as_ref().to_vec()))
    }

    /// The same with other permissions.
    #[must_use]
    pub fn mode(self, mode: u32) -> Self {
        Self { mode, ..self }
    }

    /// The same of another owner.
    #[must_use]
    pub fn owner(self, uid: u64, gid: u64) -> Self {
        Self { uid, gid, ..self }
    }

    /// The same with one more extended attribute.
    #[must_use]
    pub fn xattr(mut self, name: &str, value: &[u8]) -> Self {
        self.xattrs.push((name.to_owned(), value.to_vec()));
        self
    }
}

/// A tar archive of these entries. Long names, and extended attributes, are in extended headers.
pub fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for entry in entries {
        let (kind, content, target): (_, &[u8], &[u8]) = match &entry.kind {
            EntryKind::Directory => (EntryType::Directory, b"", b""),
            EntryKind::File(content) => (EntryType::Regular, content, b""),
            EntryKind::Symlink(target) => (EntryType::Symlink, b"", target),
            EntryKind::Link(target) => (EntryType::Link, b"", target),
            EntryKind::Device => (EntryType::Char, b"", b""),
            EntryKind::Fifo => (EntryType::Fifo, b"", b""),
        };
        let mut records: Vec<(String, Vec<u8>)> =
            entry.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), value.clone())).collect();
        let mut short = |name: &str, value: &[u8]| {
            if value.len() > 100 {
                records.push((name.to_owned(), value.to_vec()));
            }
            value[..value.len().min(100)].to_vec()
        };
        let (path, target) = (short("path", &entry.path), short("linkpath", target));
        if !records.is_empty() {
            let body: Vec<u8> = records.iter().flat_map(|(name, value)| record(name, value)).collect();
            push(&mut out, EntryType::XHeader, b"x", b"", &body, entry);
        }
        push(&mut out, kind, &path, &target, content, entry);
    }
    out.extend([0; 1024]);
    out
}

/// One record of an extended header, whose length counts its own digits.
fn record(name: &str, value: &[u8]) -> Vec<u8> {
    let rest = name.len() + value.len() + 3;
    let mut len = rest + 1;
    while len != rest + len.to_string().len() {
        len = rest + len.to_string().len();
    }
    [format!("{len} {name}=").as_bytes(), value, b"\n"].concat()
}

fn push(out: &mut Vec<u8>, kind: EntryType, path: &[u8], target: &[u8], content: &[u8], entry: &Entry) {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(entry.mode);
    header.set_uid(entry.uid);
    header.set_gid(entry.gid);
    header.set_mtime(entry.mtime);
    // Past the checks of the crate, which writes no hostile names.
    let old = header.as_old_mut();
    old.name[..path.len()].copy_from_slice(path);
    old.linkname[..target.len()].copy_from_slice(target);
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(content);
    out.resize(out.len().next_multiple_of(512), 0);
}

/// How a layer is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

impl Packing {
    fn pack(self, archive: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(archive.to_vec()),
            Self::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
                encoder.write_all(archive)?;
                encoder.finish()
            }
            Self::Zstd => zstd::encode_all(archive, 1),
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// `sha256:…`
pub fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// An image.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Its manifest.
    pub manifest: Vec<u8>,
    /// Configuration and layers by digest.
    pub blobs: BTreeMap<String, Vec<u8>>,
    archives: Vec<Vec<u8>>,
    config: Vec<u8>,
}

impl Layout {
    /// An image whose configuration has this `config` object, of these archives.
    pub fn new(config: &Value, layers: &[(Packing, Vec<u8>)]) -> io::Result<Self> {
        let diff_ids: Vec<String> = layers.iter().map(|(_, archive)| digest(archive)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        Self::with_configuration(&config, layers)
    }

    /// The same with a whole configuration, which may lie.
    pub fn with_configuration(config: &Value, layers: &[(Packing, Vec<u8>)]) -> io::Result<Self> {
        let mut blobs = BTreeMap::new();
        let mut descriptor = |media_type: &str, bytes: Vec<u8>| {
            let descriptor = json!({"mediaType": media_type, "digest": digest(&bytes), "size": bytes.len()});
            blobs.insert(digest(&bytes), bytes);
            descriptor
        };
        let config = config.to_string().into_bytes();
        let config_descriptor = descriptor("application/vnd.oci.image.config.v1+json", config.clone());
        let mut described = Vec::new();
        for (packing, archive) in layers {
            described.push(descriptor(packing.media_type(), packing.pack(archive)?));
        }
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config_descriptor, "layers": described,
        });
        let archives = layers.iter().map(|(_, archive)| archive.clone()).collect();
        Ok(Self { manifest: manifest.to_string().into_bytes(), blobs, archives, config })
    }

    /// Digest of the manifest.
    pub fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// The files of its layout, under the name `name`.
    fn files(&self, name: &str) -> Vec<(String, Vec<u8>)> {
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": MANIFEST, "digest": self.digest(), "size": self.manifest.len(),
            "platform": {"os": "linux", "architecture": "amd64"},
            "annotations": {"org.opencontainers.image.ref.name": name},
        }]});
        let place = |digest: &str| format!("blobs/sha256/{}", digest.trim_start_matches("sha256:"));
        let mut files: Vec<_> = self.blobs.iter().map(|(digest, bytes)| (place(digest), bytes.clone())).collect();
        files.push((place(&self.digest()), self.manifest.clone()));
        files.push(("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        files.push(("index.json".to_owned(), index.to_string().into_bytes()));
        files
    }

    /// Writes an OCI layout.
    pub fn write(&self, dir: &Path, name: &str) -> io::Result<()> {
        fs::create_dir_all(dir.join("blobs/sha256"))?;
        self.files(name).into_iter().try_for_each(|(path, bytes)| fs::write(dir.join(path), bytes))
    }

    /// An OCI layout as a tar archive.
    pub fn oci_archive(&self, name: &str) -> Vec<u8> {
        let files: Vec<_> = self.files(name).into_iter().map(|(path, bytes)| Entry::file(path, bytes)).collect();
        archive(&files)
    }

    /// What `docker save` writes, in its older form, with one layer as a link to another's name.
    pub fn docker_archive(&self, name: &str) -> Vec<u8> {
        let config = format!("{}.json", digest(&self.config).trim_start_matches("sha256:"));
        let mut files = vec![Entry::file(&config, &self.config)];
        let mut layers = Vec::new();
        for (index, layer) in self.archives.iter().enumerate() {
            files.push(Entry::file(format!("store/{index}.tar"), layer));
            files.push(Entry::symlink(format!("{index}/layer.tar"), format!("../store/{index}.tar")));
            layers.push(format!("{index}/layer.tar"));
        }
        let manifest = json!([{"Config": config, "RepoTags": [name], "Layers": layers}]);
        files.push(Entry::file("manifest.json", manifest.to_string()));
        archive(&files)
    }
}
