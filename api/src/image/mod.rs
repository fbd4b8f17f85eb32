//! Container images: from a reference to the root file system that a template boots from. Knows neither tenants nor templates.
//!
//! - `reference`: what a client writes, and where it leads
//! - `registry`: an image from a registry, `local`: one from a layout or archive on this host; both end as [`Image`]
//! - `credentials`: what a registry is told of the client
//! - `wire`: the JSON of images, and what of it a guest is told ([`Process`])
//! - `blob`: bytes of an image, whose digest is checked while they are read
//! - `layer`: one layer onto the tree, `tree`: what the layers make together, `furnish`: what every guest needs and no image brings
//! - `ext4`: the tree as an ext4 image, through e2fsprogs
//!
//! An image is written by strangers. The file names in it never become names on this host: the layers are merged in memory, the content of
//! files is kept under numbers, and e2fsprogs writes the rest into the image by name. So nothing needs to be mounted, no user is needed but
//! our own, and no set-user-id program, device or extended attribute is ever made here. The same image makes the same octets.

mod blob;
mod credentials;
mod ext4;
mod furnish;
mod layer;
mod local;
mod reference;
mod registry;
mod tree;
mod wire;

#[cfg(test)]
mod tests;

pub use credentials::{AmazonKey, Credentials, Password, is_region, region_of};
pub use reference::{BadReference, Reference};
pub use wire::Process;

use crate::config::Templates as Limits;
use crate::sources::UnixMs;
use blob::Blob;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use tree::Tree;

/// An image whose parts are files of this host. Only manifest and configuration were checked against their digests so far.
#[derive(Debug)]
struct Image {
    /// `sha256:…` of the manifest, or of the configuration for `docker save` archives, which have no manifest.
    digest: String,
    process: Process,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    blob: Blob,
    /// `sha256:…` of the blob; `docker save` archives say none.
    digest: Option<String>,
    /// `sha256:…` of its tar archive.
    diff_id: String,
}

/// What came of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// Digest of the image, `sha256:…`.
    pub digest: String,
    /// What it says about the processes in it.
    pub process: Process,
}

/// Why an image does not become a root file system.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The reference leads nowhere that this host reads from.
    #[error("{0}")]
    Place(String),
    /// The registry refused, or cannot be reached.
    #[error("cannot pull {reference}: cannot {action}")]
    Registry {
        /// What was pulled.
        reference: String,
        /// What was tried.
        action: String,
        /// Nobody answered: it may work later.
        unreachable: bool,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Manifest, index or configuration is missing or is none.
    #[error("the image's {part} cannot be used: {what}")]
    Document {
        /// Which.
        part: String,
        /// Why not.
        what: String,
    },
    /// The image is for another machine.
    #[error("the image has nothing for linux/amd64, only {0}")]
    Platform(String),
    /// A layer is damaged, hostile or too large.
    #[error("layer {number} of {count} ({digest}){}: {what}", entry.as_deref().map(|e| format!(", entry {e:?}")).unwrap_or_default())]
    Layer {
        /// From 1, the lowest first.
        number: usize,
        /// How many there are.
        count: usize,
        /// Its digest.
        digest: String,
        /// The entry of its archive.
        entry: Option<String>,
        /// What is wrong.
        what: String,
    },
    /// A file of this host.
    #[error("cannot {action}")]
    Local {
        /// What was tried.
        action: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// One of e2fsprogs is not there.
    #[error("{0} is not installed on this host; Debian has it in the package e2fsprogs")]
    Missing(&'static str),
    /// e2fsprogs did not make the file system.
    #[error("{program} cannot make the root file system: {what}")]
    FileSystem {
        /// Which program.
        program: &'static str,
        /// What it said.
        what: String,
    },
    /// It took too long.
    #[error("{what} took longer than {ms} ms")]
    Deadline {
        /// What.
        what: String,
        /// The deadline.
        ms: u128,
    },
}

fn local(action: String) -> impl FnOnce(io::Error) -> ImageError {
    move |source| ImageError::Local { action, source }
}

/// How far it is, for who asks meanwhile.
#[derive(Debug, Default)]
pub struct Progress {
    phase: Mutex<String>,
    done: AtomicU64,
    total: AtomicU64,
    stopped: AtomicBool,
}

/// A moment of [`Progress`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stand {
    /// What is being done.
    pub phase: String,
    /// Bytes of the phase that are through.
    pub bytes: u64,
    /// Bytes of the phase in all; 0 when nobody knows.
    pub total_bytes: u64,
}

impl Progress {
    /// Begins a phase.
    pub fn begin(&self, phase: impl fmt::Display, total: u64) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase.to_string();
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Makes the work end soon, and fail: nobody waits for it any more.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Where it stands.
    pub fn stand(&self) -> Stand {
        Stand {
            phase: self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            bytes: self.done.load(Ordering::Relaxed),
            total_bytes: self.total.load(Ordering::Relaxed),
        }
    }
}

/// Makes `out`, a raw ext4 image, from the container image at `reference`. `work` is an empty directory on the same disk, which the caller
/// removes. `now` is for what must be signed.
pub async fn build(
    reference: &Reference,
    credentials: Option<&Credentials>,
    limits: &Limits,
    work: &Path,
    out: &Path,
    progress: &std::sync::Arc<Progress>,
    now: UnixMs,
) -> Result<Built, ImageError> {
    let image = match reference {
        Reference::Registry(name) => registry::pull(name, credentials, limits, work, progress, now).await?,
        Reference::Local(place) => {
            let (place, limits) = (place.clone(), limits.clone());
            blocking(move || local::open(&place, &limits)).await?
        }
    };
    let built = Built { digest: image.digest.clone(), process: image.process.clone() };
    let contents = Contents { dir: work.join("content") };
    let tree = {
        let (contents, progress, limits) = (contents.clone(), progress.clone(), limits.clone());
        blocking(move || merge(&image, &contents, &limits, &progress)).await?
    };
    progress.begin("file system", 0);
    ext4::write(tree, &contents, limits.disk_mib, work, out).await?;
    Ok(built)
}

/// The layers of an image, one onto the other, and what a guest needs beside them.
fn merge(image: &Image, contents: &Contents, limits: &Limits, progress: &Progress) -> Result<Tree, ImageError> {
    fs::create_dir_all(&contents.dir).map_err(local(format!("make {}", contents.dir.display())))?;
    let mut tree = Tree::new(limits.image_entries);
    let mut budget = layer::Budget { bytes: limits.image_mib << 20, entries: limits.image_entries };
    let count = image.layers.len();
    for (index, layer) in image.layers.iter().enumerate() {
        let number = index + 1;
        progress.begin(format_args!("layer {number} of {count}"), layer.blob.len());
        layer::apply(&mut tree, layer, number, contents, &mut budget, progress)
            .map_err(|fault| fault.of(number, count, layer))?;
    }
    furnish::furnish(&mut tree, &image.process, contents)?;
    Ok(tree)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(ImageError::Local { action: "read the image".to_owned(), source: io::Error::other(error) }),
    }
}

/// The content of files, under numbers.
#[derive(Clone, Debug)]
struct Contents {
    dir: PathBuf,
}

impl Contents {
    fn path(&self, content: u64) -> PathBuf {
        self.dir.join(content.to_string())
    }

    /// Removes what no file has any more.
    fn forget(&self, contents: Vec<u64>) {
        for content in contents {
            // What cannot be removed goes with the directory.
            let _ = fs::remove_file(self.path(content));
        }
    }
}
