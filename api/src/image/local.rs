//! Images on this host: OCI layouts, as directories and as tar archives, and what `docker save` writes.
//!
//! A client names them, so they are opened below the operator's directory and nowhere else: the kernel resolves each path beneath it, and
//! refuses symbolic links that lead out.

use super::blob::{Blob, digest_of, sha256_hex};
use super::reference::{Form, Place};
use super::wire::{self, Descriptor, Index, MAX_DOCUMENT, Manifest, Saved, document};
use super::{Image, ImageError, Layer};
use crate::config::Templates as Limits;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Annotation of a layout's image that names it.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Members of an archive at most, and symbolic links from one to another.
const MEMBERS: usize = 100_000;
const HOPS: usize = 8;
/// Indexes within indexes.
const NESTING: usize = 4;

/// Opens the image, and checks its manifest and configuration.
pub(super) fn open(place: &Place, limits: &Limits) -> Result<Image, ImageError> {
    let Some(dir) = &limits.local_dir else {
        return Err(ImageError::Place(
            "this server takes no images from its own disk: its operator can name a directory for them (templates.local_dir)"
                .to_owned(),
        ));
    };
    // What is wrong is said of the path that the client gave: what lies around it is not for clients.
    let path = place.path.strip_prefix(dir).unwrap_or(&place.path);
    if path.is_absolute() {
        return Err(ImageError::Place(format!(
            "{} is not below the directory for images of this server",
            place.path.display()
        )));
    }
    let root = openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|e| super::local("open templates.local_dir".to_owned())(e.into()))?;
    let below = Below { root, path: path.to_owned() };
    let cannot = |e: io::Error| ImageError::Place(format!("cannot open {}: {e}", place.path.display()));
    let archive = || below.open("").and_then(Archive::read).map_err(cannot);
    match place.form {
        Form::OciLayout => layout(&|name| below.open(name).and_then(Blob::whole), place.name.as_deref()),
        Form::OciArchive => {
            let archive = archive()?;
            layout(&|name| archive.member(name), place.name.as_deref())
        }
        Form::DockerArchive => saved(&archive()?, place.name.as_deref()),
    }
}

/// A path below the operator's directory.
struct Below {
    root: OwnedFd,
    path: PathBuf,
}

impl Below {
    /// The file `name` below it; the path itself when that is empty.
    fn open(&self, name: &str) -> io::Result<File> {
        let path = if name.is_empty() { self.path.clone() } else { self.path.join(name) };
        // Not blocking, or a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(openat2(&self.root, &path, flags, Mode::empty(), resolve)?);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
    }
}

/// The members of a tar archive and where they are in it.
struct Archive {
    file: Arc<File>,
    members: HashMap<PathBuf, Member>,
}

enum Member {
    File { offset: u64, len: u64 },
    Link(PathBuf),
}

impl Archive {
    fn read(file: File) -> io::Result<Self> {
        let mut members = HashMap::new();
        let mut archive = tar::Archive::new(file);
        for entry in archive.entries_with_seek()? {
            let entry = entry?;
            if members.len() == MEMBERS {
                return Err(io::Error::other(format!("it has more than {MEMBERS} members")));
            }
            let path: PathBuf =
                entry.path()?.components().filter(|part| *part != std::path::Component::CurDir).collect();
            let member = match (entry.header().entry_type(), entry.link_name()?) {
                (kind, _) if kind.is_file() => Member::File { offset: entry.raw_file_position(), len: entry.size() },
                (kind, Some(target)) if kind.is_symlink() => Member::Link(beside(&path, &target)),
                (kind, Some(target)) if kind.is_hard_link() => Member::Link(target.into_owned()),
                _ => continue,
            };
            members.insert(path, member);
        }
        Ok(Self { file: Arc::new(archive.into_inner()), members })
    }

    fn member(&self, name: &str) -> io::Result<Blob> {
        let mut path = Path::new(name);
        for _ in 0..HOPS {
            match self.members.get(path) {
                Some(Member::File { offset, len }) => return Ok(Blob::part(self.file.clone(), *offset, *len)),
                Some(Member::Link(target)) => path = target,
                None => break,
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }
}

/// Where the target of a symbolic link leads, by its text.
fn beside(link: &Path, target: &Path) -> PathBuf {
    let mut path = link.parent().unwrap_or(Path::new("")).to_owned();
    for part in target.components() {
        match part {
            std::path::Component::ParentDir => drop(path.pop()),
            std::path::Component::Normal(name) => path.push(name),
            _ => {}
        }
    }
    path
}

/// Opens a member of a layout by its name.
type Open<'a> = &'a dyn Fn(&str) -> io::Result<Blob>;

fn layout(open: Open<'_>, name: Option<&str>) -> Result<Image, ImageError> {
    let index: Index = wire::read("index.json", &fetch("index.json", open("index.json"))?)?;
    let named =
        |d: &&Descriptor| name.is_none_or(|name| d.annotations.get(REF_NAME).is_some_and(|found| found == name));
    let candidates: Vec<Descriptor> = index.manifests.iter().filter(named).cloned().collect();
    if candidates.is_empty() {
        let there: Vec<_> = index.manifests.iter().filter_map(|d| d.annotations.get(REF_NAME)).cloned().collect();
        return Err(document(
            "index.json",
            format_args!("it has no image {}; it has {there:?}", name.unwrap_or("at all")),
        ));
    }
    let mut chosen = choose(candidates)?;
    for _ in 0..NESTING {
        let bytes = object(open, "manifest", &chosen.digest)?;
        let is_index = chosen.media_type.contains("image.index") || chosen.media_type.contains("manifest.list");
        if !is_index && let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
            return image(open, chosen.digest, &manifest);
        }
        let nested: Index = wire::read("manifest", &bytes)?;
        chosen = choose(nested.manifests)?;
    }
    Err(document("index.json", "its indexes lead from one to the next"))
}

/// The one image for this machine among those of an index.
fn choose(candidates: Vec<Descriptor>) -> Result<Descriptor, ImageError> {
    let platforms = candidates.iter().filter_map(|d| d.platform.as_ref()).map(wire::Platform::text);
    let others = platforms.collect::<Vec<_>>().join(", ");
    let mut fitting: Vec<_> =
        candidates.into_iter().filter(|d| d.platform.as_ref().is_none_or(wire::Platform::fits)).collect();
    match fitting.len() {
        0 => Err(ImageError::Platform(others)),
        1 => Ok(fitting.remove(0)),
        n => Err(document("index", format_args!("it has {n} images: name one behind the path, as in oci:PATH:NAME"))),
    }
}

fn image(open: Open<'_>, digest: String, manifest: &Manifest) -> Result<Image, ImageError> {
    let config = object(open, "configuration", &manifest.config.digest)?;
    let (process, diff_ids) = wire::configuration(&config, manifest.layers.len())?;
    let mut layers = Vec::new();
    for (layer, diff_id) in manifest.layers.iter().zip(diff_ids) {
        let blob = open(&blob_name("layer", &layer.digest)?)
            .map_err(|e| document("layer", format_args!("{}: {e}", layer.digest)))?;
        layers.push(Layer { blob, digest: Some(layer.digest.clone()), diff_id });
    }
    Ok(Image { digest, process, layers })
}

fn blob_name(part: &str, digest: &str) -> Result<String, ImageError> {
    match sha256_hex(digest) {
        Some(hex) => Ok(format!("blobs/sha256/{hex}")),
        None => Err(document(part, format_args!("{digest:?} is no SHA-256 digest"))),
    }
}

fn fetch(part: &str, blob: io::Result<Blob>) -> Result<Vec<u8>, ImageError> {
    blob.and_then(|blob| blob.read(MAX_DOCUMENT)).map_err(|e| document(part, e))
}

/// A document of a layout, whose digest is checked.
fn object(open: Open<'_>, part: &str, digest: &str) -> Result<Vec<u8>, ImageError> {
    let bytes = fetch(part, open(&blob_name(part, digest)?))?;
    let found = digest_of(&bytes);
    if found == digest {
        Ok(bytes)
    } else {
        Err(document(part, format_args!("it has the digest {found}, not {digest}")))
    }
}

fn saved(archive: &Archive, name: Option<&str>) -> Result<Image, ImageError> {
    const MANIFEST: &str = "manifest.json";
    let bytes = fetch(MANIFEST, archive.member(MANIFEST))?;
    let images: Vec<Saved> = wire::read(MANIFEST, &bytes)?;
    let wanted = |image: &&Saved| {
        let mut tags = image.repo_tags.iter().flatten();
        name.is_none_or(|name| tags.any(|tag| *tag == name || *tag == format!("{name}:latest")))
    };
    let mut found = images.iter().filter(wanted);
    let (image, more) = (found.next(), found.next());
    let image = match (image, more) {
        (Some(image), None) => image,
        (Some(_), Some(_)) => {
            return Err(document(
                MANIFEST,
                "it has several images: name one behind the path, as in docker-archive:PATH:NAME",
            ));
        }
        (None, _) => {
            let there: Vec<_> = images.iter().filter_map(|image| image.repo_tags.as_ref()).flatten().collect();
            return Err(document(
                MANIFEST,
                format_args!("it has no image {}; it has {there:?}", name.unwrap_or("at all")),
            ));
        }
    };
    let config = fetch("configuration", archive.member(&image.config))?;
    let digest = digest_of(&config);
    // Its name is its digest, in the old form and in the new.
    let hex = image.config.trim_end_matches(".json").rsplit('/').next().unwrap_or_default();
    if hex.len() == 64 && digest != format!("sha256:{hex}") {
        return Err(document("configuration", format_args!("it has the digest {digest}, not sha256:{hex}")));
    }
    let (process, diff_ids) = wire::configuration(&config, image.layers.len())?;
    let mut layers = Vec::new();
    for (name, diff_id) in image.layers.iter().zip(diff_ids) {
        let blob = archive.member(name).map_err(|e| document("layer", format_args!("{name:?}: {e}")))?;
        layers.push(Layer { blob, digest: None, diff_id });
    }
    Ok(Image { digest, process, layers })
}
