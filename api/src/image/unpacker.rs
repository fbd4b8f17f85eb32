//! Our side of the unpacker, the process that takes layers apart: started for one image, fed, asked, and gone when this is done with it.
//!
//! A layer is handed over when its digest is right, through a pipe, so that the process has nothing of this host but these bytes and the
//! disk. Its answers are untrusted: they end up in messages. Every wait ends with the process, with the deadline, or when nobody
//! waits for the image any more.

use super::blob::Blob;
use super::{Image, ImageError, Layer, Progress, local};
use crate::config::Templates as Limits;
use crate::launcher::{Launcher, end_of};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use stasis_unpack::protocol::{MAX_MESSAGE, Reply, Request, VERSION, names};
use stasis_warden::jail::start::{End, Process, ProcessNote};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The whole image.
const DEADLINE: Duration = Duration::from_mins(20);
/// How often it is looked whether anybody waits still.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a killed process may take to be gone, and the note of its end to be written.
const KILL: Duration = Duration::from_secs(10);
const NOTED: Duration = Duration::from_millis(200);
/// Octets of a layer that are read at once.
const PIECE: usize = 256 << 10;
/// Octets of a working directory at most: a longer one is no path.
const PATH: usize = 4095;

/// Makes `out`, a sparse file, the disk of an image. `name` is what the image is called in errors. Nothing runs any more when this returns.
pub(super) fn unpack(
    launcher: &Arc<Launcher>,
    image: &Image,
    name: &str,
    limits: &Limits,
    out: &Path,
    progress: &Progress,
) -> Result<(), ImageError> {
    let file = File::create_new(out).and_then(|file| file.set_len(limits.disk_mib << 20).map(|()| file));
    let file = file.map_err(local("make the root file system".to_owned()))?;
    let disk = file.try_clone().map_err(local("make the root file system".to_owned()))?;
    let mut unpacker = Unpacker::start(launcher, name, disk, progress, DEADLINE)?;
    unpacker.begin(limits)?;
    let count = image.layers.len();
    for (index, layer) in image.layers.iter().enumerate() {
        unpacker.layer(index + 1, count, layer)?;
    }
    progress.begin("file system", 0);
    unpacker.finish(image.process.working_dir.clone())?;
    file.sync_all().map_err(local("write the root file system".to_owned()))
}

/// See the module. Killed when it is dropped.
pub(super) struct Unpacker<'a> {
    launcher: &'a Launcher,
    /// What the image is called.
    image: &'a str,
    progress: &'a Progress,
    ends: Instant,
    deadline: Duration,
    process: Process,
    note: File,
    control: OwnedFd,
    input: OwnedFd,
    /// What it says on its standard error: as much as a pipe holds.
    log: OwnedFd,
}

impl<'a> Unpacker<'a> {
    /// Starts one for `disk`.
    pub(super) fn start(
        launcher: &'a Launcher,
        image: &'a str,
        disk: File,
        progress: &'a Progress,
        deadline: Duration,
    ) -> Result<Self, ImageError> {
        let start = || -> io::Result<Self> {
            let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
            let (control, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
            let (taken, input) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::fs::fcntl_setfl(&input, OFlags::NONBLOCK)?;
            let (log, said) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::fs::fcntl_setfl(&log, OFlags::NONBLOCK)?;
            let note = File::from(rustix::fs::memfd_create("process", rustix::fs::MemfdFlags::CLOEXEC)?);
            let named = [(names::CONTROL, theirs), (names::INPUT, taken), (names::DISK, disk.into())];
            let named = named.map(|(name, descriptor)| (name.to_owned(), descriptor)).into();
            let process = launcher.start_unpacker(said, note.try_clone()?, named)?;
            let ends = Instant::now() + deadline;
            Ok(Self { launcher, image, progress, ends, deadline, process, note, control, input, log })
        };
        start().map_err(local("start the unpacker".to_owned()))
    }

    /// Tells it the bounds.
    pub(super) fn begin(&mut self, limits: &Limits) -> Result<(), ImageError> {
        let (bytes, entries) = (limits.image_mib << 20, limits.image_entries);
        self.ask(&Request::Begin { version: VERSION, bytes, entries })?;
        self.answer()?.map_err(|refused| ImageError::FileSystem(refused.what))
    }

    /// Has it unpack a layer.
    pub(super) fn layer(&mut self, number: usize, count: usize, layer: &Layer) -> Result<(), ImageError> {
        let fault = |entry, what| ImageError::Layer {
            number,
            count,
            digest: layer.digest.clone().unwrap_or_else(|| layer.diff_id.clone()),
            entry,
            what,
        };
        if let Some(digest) = &layer.digest {
            self.progress.begin(format_args!("digest of layer {number} of {count}"), layer.blob.len());
            let found = layer.blob.digest(|n| self.seen(n)).map_err(|error| fault(None, error.to_string()))?;
            if found != *digest {
                return Err(fault(None, format!("it has the digest {found}, not {digest}")));
            }
        }
        self.progress.begin(format_args!("layer {number} of {count}"), layer.blob.len());
        self.ask(&Request::Layer { number, bytes: layer.blob.len(), diff_id: layer.diff_id.clone() })?;
        self.feed(&layer.blob)?.map_err(|error| fault(None, error.to_string()))?;
        self.answer()?.map_err(|refused| fault(refused.entry, refused.what))
    }

    /// Has it write the file system.
    pub(super) fn finish(mut self, working_dir: Option<String>) -> Result<(), ImageError> {
        self.ask(&Request::Finish { working_dir: working_dir.filter(|dir| dir.len() <= PATH) })?;
        self.answer()?.map_err(|refused| ImageError::FileSystem(refused.what))
    }

    /// Which process it is.
    #[cfg(test)]
    pub(super) fn pid(&self) -> i32 {
        self.process.note.pid
    }

    /// Counts octets; an error when nobody waits for the image any more.
    fn seen(&self, octets: usize) -> io::Result<()> {
        self.progress.add(octets as u64);
        if self.progress.is_stopped() { Err(io::Error::other("it was given up")) } else { Ok(()) }
    }

    /// Gives it the octets of a layer. It may have ended by itself or refused the layer before it has them all: its answer tells.
    /// The inner error is one of reading the layer.
    fn feed(&self, blob: &Blob) -> Result<io::Result<()>, ImageError> {
        let (mut reader, mut piece) = (blob.reader(), vec![0; PIECE]);
        loop {
            let mut left = match reader.read(&mut piece) {
                Ok(0) => return Ok(Ok(())),
                Ok(len) => &piece[..len],
                Err(error) => return Ok(Err(error)),
            };
            while !left.is_empty() {
                self.wait(self.input.as_fd(), PollFlags::OUT)?;
                match rustix::io::write(&self.input, left) {
                    Ok(written) => {
                        left = &left[written..];
                        self.progress.add(written as u64);
                    }
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                    // It reads no more.
                    Err(_) => return Ok(Ok(())),
                }
            }
        }
    }

    fn ask(&mut self, request: &Request) -> Result<(), ImageError> {
        let bytes = serde_json::to_vec(request).map_err(|error| local("ask the unpacker".to_owned())(error.into()))?;
        match rustix::net::send(&self.control, &bytes, SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(_) => Err(self.ended()),
        }
    }

    fn answer(&mut self) -> Result<Result<(), Refused>, ImageError> {
        self.wait(self.control.as_fd(), PollFlags::IN)?;
        let mut bytes = vec![0; MAX_MESSAGE];
        let len = rustix::io::read(&self.control, &mut bytes).unwrap_or_default();
        if len == 0 {
            return Err(self.ended());
        }
        match serde_json::from_slice(&bytes[..len]) {
            Ok(Reply::Done) => Ok(Ok(())),
            Ok(Reply::Refused { entry, what }) => Ok(Err(Refused { entry, what })),
            Err(error) => Err(self.failed(format!("it answered what cannot be understood: {error}"))),
        }
    }

    /// Waits until a descriptor is ready, which the end of the process makes it.
    fn wait(&self, descriptor: BorrowedFd<'_>, what: PollFlags) -> Result<(), ImageError> {
        loop {
            if self.progress.is_stopped() {
                return Err(self.failed("nobody waits for the image any more".to_owned()));
            }
            if Instant::now() > self.ends {
                let what = format!("the unpacking of image {}", self.image);
                return Err(ImageError::Deadline { what, ms: self.deadline.as_millis() });
            }
            if ready(descriptor, what) {
                return Ok(());
            }
        }
    }

    /// Why it ended, which it has, or does now.
    fn ended(&mut self) -> ImageError {
        let end = self.end();
        let mut said = vec![0; 4096];
        let len = rustix::io::read(&self.log, &mut said).unwrap_or_default();
        let said = String::from_utf8_lossy(&said[..len]);
        let line = said.lines().map(str::trim).find(|line| !line.is_empty());
        let how = match end {
            Some(End::Signal(31)) => "seccomp ended it for a system call that it may not make".to_owned(),
            Some(End::Signal(9)) => "it was killed, by somebody or for the memory or time that it took".to_owned(),
            Some(End::Signal(signal)) => format!("it was ended by signal {signal}"),
            Some(End::Code(code)) => format!("it ended with status {code}"),
            None => "it ended".to_owned(),
        };
        self.failed(line.map_or(how.clone(), |line| format!("{how}: {line}")))
    }

    fn failed(&self, what: String) -> ImageError {
        ImageError::Unpacker { image: self.image.to_owned(), what }
    }

    /// Waits for its end, for which it is given a moment, and then none. How it ended, when that can be known.
    fn end(&mut self) -> Option<End> {
        let until = |time: Duration| {
            let by = Instant::now() + time;
            while Instant::now() < by {
                if ready(self.process.pidfd.as_fd(), PollFlags::IN) {
                    return true;
                }
            }
            false
        };
        if !until(NOTED) {
            if let Err(error) = self.launcher.kill(self.process.pidfd.as_fd()) {
                tracing::debug!(%error, "cannot kill an unpacker; it is gone most likely");
            }
            if !until(KILL) {
                tracing::error!(pid = self.process.note.pid, "a killed unpacker does not end");
                return None;
            }
        }
        if !self.launcher.has_warden() {
            let status =
                waitid(WaitId::PidFd(self.process.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
            return status.ok().flatten().and_then(|status| end_of(&status));
        }
        let by = Instant::now() + NOTED;
        while Instant::now() < by {
            let mut text = [0; 512];
            let len = self.note.read_at(&mut text, 0).unwrap_or_default();
            if let Some(end) = serde_json::from_slice::<ProcessNote>(&text[..len]).ok().and_then(|note| note.end) {
                return Some(end);
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        None
    }
}

impl Drop for Unpacker<'_> {
    fn drop(&mut self) {
        // What waits for requests ends when none can come.
        let _ = rustix::net::shutdown(&self.control, rustix::net::Shutdown::Both);
        self.end();
    }
}

/// What it says of an image.
struct Refused {
    entry: Option<String>,
    what: String,
}

/// Looks, and waits for a moment.
fn ready(descriptor: BorrowedFd<'_>, what: PollFlags) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(descriptor, what)];
    poll(&mut polled, Some(&LOOK)).is_ok_and(|ready| ready > 0)
}
