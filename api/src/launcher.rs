//! How VMMs are started: with opened descriptors and no paths, behind the warden's walls where there is a warden, else as our own child.
//! The one place that knows which.
//!
//! What a VMM is given is made here, in its run directory, by us: its listening sockets, its console logs, its exit note. A warden (and a
//! dialler, where the store is reached over a network) outlives us, and the next supervisor finds it by its socket.

mod helpers;
mod run_dir;

use crate::config::{Config, Isolation, StoreConfig};
use crate::error::Error;
use crate::host;
use helpers::{Dialler, warden_of_ours};
use rustix::process::{Signal, pidfd_send_signal};
use stasis_vmm::inherited::names;
use stasis_warden::client::Client;
use stasis_warden::jail::Command;
use stasis_warden::jail::limits::Size;
use stasis_warden::jail::start::{Process, start};
use stasis_warden::protocol::{Program, Reply, Request, StartRequest};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use tokio_util::task::TaskTracker;

pub use run_dir::{LOG, PROCESS_NOTE, note_in};
pub use stasis_warden::jail::children::end_of;

/// Starts VMMs.
#[derive(Debug)]
pub struct Launcher {
    vmm: PathBuf,
    log: Option<String>,
    warden: Option<Client>,
    dialler: Option<Dialler>,
    caveats: Vec<String>,
    clearing: TaskTracker,
}

fn other(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(crate::error::chain(&error))
}

impl Launcher {
    /// One that starts `vmm` as our own child, for a store that takes no network.
    pub fn unjailed(vmm: &Path) -> Self {
        let log = std::env::var("STASIS_VMM_LOG").ok();
        let clearing = TaskTracker::new();
        Self { vmm: vmm.to_owned(), log, warden: None, dialler: None, caveats: Vec::new(), clearing }
    }

    /// The same with messages of the VMM at this level.
    #[must_use]
    pub fn with_log(mut self, level: &str) -> Self {
        self.log = Some(level.to_owned());
        self
    }

    /// The same for VMMs with a store at `place` (`host:port`); the dialler's socket is in `dir`.
    #[must_use]
    pub fn with_store(mut self, dir: &Path, place: &str) -> Self {
        self.dialler = Some(Dialler::new(dir, place));
        self
    }

    /// As the configuration says and this host allows. Blocking: it may start a warden and a dialler.
    pub fn new(config: &Config, vmm: &Path) -> Result<Self, Error> {
        let mut launcher = Self::unjailed(vmm);
        let refused = |error: io::Error| Error::Host(format!("sandboxes cannot be isolated (isolation): {error}"));
        match (config.isolation.mode, &config.isolation.warden) {
            (Isolation::Off, _) => {
                launcher.caveats.push("isolation is off: VMMs run as our own user, with our rights".to_owned());
            }
            (_, Some(socket)) => {
                let warden = helpers::warden_at(socket).map_err(refused)?;
                launcher.adopt(warden).map_err(refused)?;
            }
            (_, None) if rustix::process::geteuid().is_root() => {
                let warden = warden_of_ours(config, vmm);
                match warden.and_then(|warden| launcher.adopt(warden)) {
                    Err(error) if config.isolation.mode == Isolation::Available => {
                        launcher.caveats.push(format!("sandboxes are not isolated: {error}"));
                    }
                    outcome => outcome.map_err(refused)?,
                }
            }
            (Isolation::Required, None) => {
                return Err(refused(io::Error::other(
                    "only root can; name the socket of a stasis-warden (isolation.warden), or set isolation.mode to available",
                )));
            }
            (Isolation::Available, None) => launcher
                .caveats
                .push("sandboxes are not isolated: that takes root or a stasis-warden (isolation.warden)".to_owned()),
        }
        if config.isolation.mode == Isolation::Required && !launcher.caveats.is_empty() {
            return Err(refused(io::Error::other(launcher.caveats.join("; "))));
        }
        for caveat in &launcher.caveats {
            tracing::warn!("isolation: {caveat}");
        }
        if let StoreConfig::S3 { endpoint, bucket, path_style, .. } = &config.store {
            let place = helpers::place(endpoint, bucket, *path_style).map_err(Error::Host)?;
            launcher.dialler = Some(Dialler::new(&config.data_dir, &place));
            launcher.dialler().map_err(|source| Error::Local { action: "start a dialler".to_owned(), source })?;
        }
        Ok(launcher)
    }

    fn adopt(&mut self, warden: Client) -> io::Result<()> {
        let hello = warden.hello().map_err(other)?;
        self.caveats.extend(hello.missing);
        self.warden = Some(warden);
        Ok(())
    }

    /// Walls that are not there, each with the reason, for people.
    pub fn caveats(&self) -> &[String] {
        &self.caveats
    }

    /// Starts a VMM that works for `id` with a fresh run directory. Returns when its program runs.
    pub fn start_vmm(&self, id: &str, run_dir: &Path) -> io::Result<Process> {
        let mut made = run_dir::make(run_dir)?;
        if let Some(dialler) = self.dialler()? {
            made.named.push((names::DIALLER, dialler));
        }
        let mut arguments = vec!["--id".to_owned(), id.to_owned()];
        if let Some(log) = &self.log {
            arguments.extend(["--log".to_owned(), log.clone()]);
        }
        let named = made.named.into_iter().map(|(name, descriptor)| (name.to_owned(), descriptor)).collect();
        self.start(Program::Vmm, &self.vmm, arguments, made.log, made.note, named)
    }

    /// Starts an unpacker of container images with what it inherits, under the names of its protocol. Returns when its program runs.
    pub fn start_unpacker(&self, log: OwnedFd, note: File, named: Vec<(String, OwnedFd)>) -> io::Result<Process> {
        let program = host::beside("stasis-unpack")?;
        self.start(Program::Unpacker, &program, Vec::new(), log, note, named)
    }

    /// A connection to the dialler, which is started when there is none; none where the store needs none.
    fn dialler(&self) -> io::Result<Option<OwnedFd>> {
        let Some(dialler) = &self.dialler else { return Ok(None) };
        let connection = dialler.connect(|place, listener, log, note| {
            let program = host::beside("stasis-dialler")?;
            let arguments = vec!["--place".to_owned(), place.to_owned()];
            let named = vec![("listener".to_owned(), listener)];
            helpers::wait_for_end(self.start(Program::Dialler, &program, arguments, log, note, named)?)
        })?;
        Ok(Some(connection))
    }

    fn start(
        &self,
        kind: Program,
        program: &Path,
        arguments: Vec<String>,
        log: OwnedFd,
        note: File,
        mut named: Vec<(String, OwnedFd)>,
    ) -> io::Result<Process> {
        if let Some(warden) = &self.warden {
            let names = named.iter().map(|(name, _)| name.clone()).collect();
            let request = Request::Start(StartRequest { program: kind, arguments, names, size: None });
            let given: Vec<BorrowedFd<'_>> =
                [log.as_fd(), note.as_fd()].into_iter().chain(named.iter().map(|(_, fd)| fd.as_fd())).collect();
            return match warden.call(&request, &given).map_err(other)? {
                (Reply::Started(note), mut received) if received.len() == 1 => {
                    let pidfd = received.pop().ok_or(io::ErrorKind::InvalidData)?;
                    rustix::fs::fcntl_setfl(&pidfd, rustix::fs::OFlags::NONBLOCK)?;
                    Ok(Process { note, pidfd })
                }
                (reply, _) => Err(io::Error::other(format!("the warden answered {reply:?}"))),
            };
        }
        if kind == Program::Vmm {
            named.extend(stasis_warden::warden::devices()?);
        }
        let c_string = |text: &[u8]| CString::new(text).map_err(io::Error::other);
        let command = Command {
            program: c_string(program.as_os_str().as_bytes())?,
            arguments: arguments.iter().map(|text| c_string(text.as_bytes())).collect::<Result<_, _>>()?,
            environment: Vec::new(),
            log,
            descriptors: named,
            note,
        };
        let process = start(&command, None).map_err(other)?;
        rustix::fs::fcntl_setfl(&process.pidfd, rustix::fs::OFlags::NONBLOCK)?;
        Ok(process)
    }

    /// Starts a helper of ours with these arguments, without walls, and waits for its end on a thread.
    pub fn start_helper(program: &Path, arguments: &[String], log: File, note: File) -> io::Result<()> {
        let text = |text: &[u8]| CString::new(text).map_err(io::Error::other);
        let command = Command {
            program: text(program.as_os_str().as_bytes())?,
            arguments: arguments.iter().map(|argument| text(argument.as_bytes())).collect::<Result<_, _>>()?,
            environment: Vec::new(),
            log: log.into(),
            descriptors: Vec::new(),
            note,
        };
        helpers::wait_for_end(start(&command, None).map_err(other)?)
    }

    /// Kills a process that a launcher has started. Where that is another user's, the warden does it.
    pub fn kill(&self, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        match (pidfd_send_signal(pidfd, Signal::KILL), &self.warden) {
            (Err(rustix::io::Errno::PERM), Some(warden)) => {
                warden.call(&Request::Kill, &[pidfd]).map(drop).map_err(other)
            }
            (done, _) => Ok(done?),
        }
    }

    /// Holds a VMM to what a sandbox of this size may use. One that cannot be resized keeps the limits of the largest.
    pub fn resize(&self, pidfd: BorrowedFd<'_>, size: Size) {
        let Some(warden) = &self.warden else { return };
        if let Err(error) = warden.call(&Request::Resize { size }, &[pidfd]) {
            tracing::warn!(error = crate::error::chain(&error), "a VMM keeps the limits of the largest");
        }
    }

    /// Does what is left to do after a VMM that was let go.
    pub fn clear_later(&self, rest: impl Future<Output = ()> + Send + 'static) {
        self.clearing.spawn(rest);
    }

    /// Waits until all that is done; nothing is to be let go any more.
    pub async fn cleared(&self) {
        self.clearing.close();
        self.clearing.wait().await;
    }

    /// The warden, where there is one.
    pub fn warden(&self) -> Option<&Client> {
        self.warden.as_ref()
    }

    /// Whether another process than we reaps what was started.
    pub fn has_warden(&self) -> bool {
        self.warden.is_some()
    }
}
