//! Container images: from a reference to the root file system that a template boots from. Knows neither tenants nor templates.
//!
//! - `reference`: what a client writes, and where it leads
//! - `registry`: an image from a registry, `local`: one from a layout or archive on this host; both end as [`Image`]
//! - `credentials`: what a registry is told of the client
//! - `wire`: the JSON of images, and what of it a guest is told ([`Process`])
//! - `blob`: bytes of an image, and their digests
//! - `unpacker`: the process that makes a file system of the layers (crate `stasis-unpack`)
//!
//! An image is written by strangers. What is read of it here is JSON and, of archives on this host, where their members are. The
//! layers are taken apart elsewhere, by a process that can do nothing else.

mod blob;
mod credentials;
mod local;
mod reference;
mod registry;
mod unpacker;
mod wire;

#[cfg(test)]
mod tests;

pub use credentials::{AmazonKey, Credentials, Password, is_region, region_of};
pub use reference::{BadReference, Reference};
pub use wire::Process;

use crate::config::Templates as Limits;
use crate::launcher::Launcher;
use crate::sources::UnixMs;
use blob::Blob;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
    /// The image cannot be a file system, or its disk is too small.
    #[error("cannot make the root file system: {0}")]
    FileSystem(String),
    /// The unpacker ended before it was done.
    #[error("image {image} was not unpacked: {what}")]
    Unpacker {
        /// Which image.
        image: String,
        /// What happened.
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
/// removes, with `out` when this fails. `now` is for what must be signed.
#[expect(clippy::too_many_arguments, reason = "an image, its bounds, and where it goes")]
pub async fn build(
    launcher: &Arc<Launcher>,
    reference: &Reference,
    credentials: Option<&Credentials>,
    limits: &Limits,
    work: &Path,
    out: &Path,
    progress: &Arc<Progress>,
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
    let (launcher, limits, progress) = (launcher.clone(), limits.clone(), progress.clone());
    let (name, out) = (reference.to_string(), out.to_owned());
    blocking(move || unpacker::unpack(&launcher, &image, &name, &limits, &out, &progress)).await?;
    Ok(built)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(ImageError::Local { action: "read the image".to_owned(), source: io::Error::other(error) }),
    }
}
