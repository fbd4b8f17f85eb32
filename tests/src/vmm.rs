//! One `stasis-vmm` process, driven without a supervisor: boot pulse, talk to it over the serial port, capture into a store, restore.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_send_signal, waitid};
use stasis_api::launcher::Launcher;
use stasis_snapshot::grant::{Access, GrantedObject};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::store::{ObjectStore, RawGrant};
use stasis_vmm::control::client::Client;
use stasis_vmm::control::types::{
    BootRequest, CaptureMode, CaptureReport, CaptureRequest, ExitNote, FdToken, MachineConfig, NetworkLimits, Paging,
    RestoreReport, RestoreRequest,
};
use stasis_vmm::control::{CONSOLE_LOG, EXIT_NOTE};
use stasis_warden::jail::start::Process;

use crate::host;

/// Any error of a test.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// How long a guest or a VMM may take for what takes milliseconds.
const PATIENCE: Duration = Duration::from_mins(2);

/// The pulse guest, built by `guest-images/pulse/build`.
pub fn pulse() -> PathBuf {
    host::built("images/pulse/pulse.elf")
}

/// Why pulse cannot run here.
pub fn no_pulse() -> Option<String> {
    host::no_kvm().or_else(|| host::missing(&pulse(), "guest-images/pulse/build makes it"))
}

/// A running VMM. Killed when dropped.
pub struct Vmm {
    /// Its control API.
    pub client: Client,
    /// Its run directory.
    pub run_dir: PathBuf,
    process: Process,
    next_token: u64,
    /// Console bytes that were looked at already.
    seen: usize,
}

/// A capture that is in a store.
pub struct Stored {
    /// The manifest, encoded.
    pub manifest: Vec<u8>,
    /// What the VMM said of it.
    pub report: CaptureReport,
}

impl Vmm {
    /// Starts a process that has no machine yet.
    pub async fn start(run_dir: &Path) -> Result<Self, Error> {
        Self::start_from(&Launcher::unjailed(&host::program("stasis-vmm")).with_log("info"), run_dir).await
    }

    /// The same with a store at `place` (`host:port`) in reach.
    pub async fn start_with_store(run_dir: &Path, place: &str) -> Result<Self, Error> {
        let launcher = Launcher::unjailed(&host::program("stasis-vmm")).with_log("info");
        let above = run_dir.parent().ok_or("a run directory is in a directory")?;
        Self::start_from(&launcher.with_store(above, place), run_dir).await
    }

    async fn start_from(launcher: &Launcher, run_dir: &Path) -> Result<Self, Error> {
        let process = launcher.start_vmm("test", run_dir)?;
        let vmm = Self { client: Client::new(run_dir), run_dir: run_dir.to_owned(), process, next_token: 1, seen: 0 };
        vmm.client.status().await?;
        Ok(vmm)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.note.pid.unsigned_abs()
    }

    /// How it ended; none while it has not.
    fn try_wait(&self) -> std::io::Result<Option<WaitIdStatus>> {
        Ok(waitid(WaitId::PidFd(self.process.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?)
    }

    /// Boots pulse.
    pub async fn boot_pulse(&mut self, vcpus: u8, memory_mib: u32, cmdline: &str) -> Result<(), Error> {
        let kernel = File::open(pulse())?;
        self.boot(kernel, vcpus, memory_mib, cmdline).await
    }

    /// Boots a kernel without disks.
    pub async fn boot(&mut self, kernel: File, vcpus: u8, memory_mib: u32, cmdline: &str) -> Result<(), Error> {
        self.boot_with(kernel, None, vcpus, memory_mib, cmdline).await
    }

    /// The same with a memory file of the caller's.
    pub async fn boot_with(
        &mut self,
        kernel: File,
        memory: Option<File>,
        vcpus: u8,
        memory_mib: u32,
        cmdline: &str,
    ) -> Result<(), Error> {
        let tokens = self.send(std::iter::once(kernel).chain(memory).collect()).await?;
        let (kernel, memory) = (tokens[0], tokens.get(1).copied());
        let machine = MachineConfig { vcpus, memory_mib, vsock_cid: None, exit_counter: true, network: None };
        let request = BootRequest {
            machine,
            kernel,
            initramfs: None,
            cmdline: cmdline.to_owned(),
            disks: vec![],
            memory,
            tap: None,
            disks_from: None,
            id: None,
        };
        self.client.boot(&request).await?;
        Ok(())
    }

    /// Sends files and answers their tokens.
    pub async fn send(&mut self, files: Vec<File>) -> Result<Vec<FdToken>, Error> {
        let named: Vec<_> = files.into_iter().zip(self.next_token..).map(|(f, t)| (FdToken(t), f)).collect();
        let tokens: Vec<_> = named.iter().map(|(token, _)| *token).collect();
        self.next_token += tokens.len() as u64;
        if !named.is_empty() {
            self.client.send_files(named).await?;
        }
        Ok(tokens)
    }

    /// The notes on the memory file of a paused machine.
    pub async fn keep(&mut self) -> Result<Vec<u8>, Error> {
        let mut notes = tempfile::tempfile()?;
        let token = FdToken(self.next_token);
        self.next_token += 1;
        self.client.keep(token, notes.try_clone()?).await?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut notes, &mut bytes)?;
        Ok(bytes)
    }

    /// Pauses and captures into `store` under `prefix`. The machine stays paused.
    pub async fn capture(&mut self, store: &dyn ObjectStore, prefix: &str) -> Result<Stored, Error> {
        let paused = self.client.pause().await?;
        self.capture_in(store, prefix, CaptureMode::Stopped, paused.packs_needed).await
    }

    /// Captures a running machine into `store` under `prefix`: a round, or staged.
    pub async fn capture_running(
        &mut self,
        store: &dyn ObjectStore,
        prefix: &str,
        mode: CaptureMode,
    ) -> Result<Stored, Error> {
        // The guest goes on writing after the estimate.
        let packs = self.client.dirty().await?.packs_needed * 2 + 8;
        self.capture_in(store, prefix, mode, packs).await
    }

    /// Captures into at most `packs` packs.
    pub async fn capture_in(
        &mut self,
        store: &dyn ObjectStore,
        prefix: &str,
        mode: CaptureMode,
        packs: u32,
    ) -> Result<Stored, Error> {
        let keys: Vec<String> = (0..packs).map(|n| format!("{prefix}/pack/{n}")).collect();
        let mut grants = Vec::new();
        for key in &keys {
            grants.push(store.grant_put(key, PATIENCE).await?);
        }
        let packs = self.grant(keys, grants).await?;
        let request =
            CaptureRequest { packs, connections: 4, deadline_ms: 600_000, mode, memory_bytes: None, seal: None };
        let (draft, report) = self.client.capture(&request).await?;
        Ok(Stored { manifest: draft.to_vec(), report })
    }

    /// Restores a capture and leaves the machine paused. Pages arrive when they are needed.
    pub async fn restore(&mut self, store: &dyn ObjectStore, manifest: &[u8]) -> Result<RestoreReport, Error> {
        self.restore_with(store, manifest, None, None, Paging::default()).await
    }

    /// The same with a memory file of the caller's: empty, or holding what its notes say.
    pub async fn restore_with(
        &mut self,
        store: &dyn ObjectStore,
        manifest: &[u8],
        memory: Option<File>,
        notes: Option<&[u8]>,
        paging: Paging,
    ) -> Result<RestoreReport, Error> {
        let mut files = Vec::from_iter(memory);
        if let Some(notes) = notes {
            files.push(filled(notes)?);
        }
        let tokens = self.send(files).await?;
        let mut request = self.restore_request(store, manifest).await?;
        request.memory = tokens.first().copied();
        request.kept = tokens.get(1).copied();
        request.paging = paging;
        Ok(self.client.restore(&request).await?)
    }

    /// What a restore asks for, with the manifest and its packs sent: a machine without disks or a tap, in memory of its VMM's own.
    pub async fn restore_request(&mut self, store: &dyn ObjectStore, manifest: &[u8]) -> Result<RestoreRequest, Error> {
        let keys: Vec<String> = Manifest::decode(manifest)?.packs.into_iter().map(|p| p.key).collect();
        let mut grants = Vec::new();
        for key in &keys {
            grants.push(store.grant_get(key, PATIENCE).await?);
        }
        let packs = self.grant(keys, grants).await?;
        let tokens = self.send(vec![filled(manifest)?]).await?;
        Ok(RestoreRequest {
            manifest: tokens[0],
            manifest_digest: Digest::of(manifest).to_string(),
            packs,
            disks: vec![],
            generation_id: format!("{:032x}", rand::random::<u128>()),
            memory: None,
            kept: None,
            keys: Vec::new(),
            tap: None,
            network_limits: NetworkLimits::default(),
            paging: Paging::default(),
            id: None,
        })
    }

    async fn grant(&mut self, keys: Vec<String>, grants: Vec<RawGrant>) -> Result<Vec<GrantedObject>, Error> {
        let mut files = Vec::new();
        let mut objects = Vec::new();
        for (key, grant) in keys.into_iter().zip(grants) {
            let access = match grant {
                RawGrant::Url(url) => Access::Url(url),
                RawGrant::File(file) => {
                    files.push(file);
                    Access::Fd(self.next_token + files.len() as u64 - 1)
                }
            };
            objects.push(GrantedObject { key, access, cache: None });
        }
        self.send(files).await?;
        Ok(objects)
    }

    /// Console output that was not looked at yet, up to and with the first `end`.
    pub async fn console_until(&mut self, end: &str) -> Result<String, Error> {
        let path = self.run_dir.join(CONSOLE_LOG);
        let seen = self.seen;
        let found = until(&format!("{end:?} on the console"), || {
            let log = std::fs::read(&path)?;
            let text = String::from_utf8_lossy(log.get(seen..).unwrap_or_default()).into_owned();
            Ok(text.find(end).map(|at| text[..at + end.len()].to_owned()))
        })
        .await?;
        self.seen += found.len();
        Ok(found)
    }

    /// Sends a byte to pulse and waits for the line that answers it.
    pub async fn ask_pulse(&mut self, byte: u8, answer: &str) -> Result<String, Error> {
        self.client.console(bytes::Bytes::copy_from_slice(&[byte])).await?;
        self.console_until(answer).await?;
        let line = self.console_until("\n").await?;
        Ok(line.trim().to_owned())
    }

    /// Pulse's digest of its memory and the number of its last pass. It stands still, so both stay.
    pub async fn digest(&mut self) -> Result<(String, String), Error> {
        let digest = self.ask_pulse(b'd', "D ").await?;
        self.console_until("g ").await?;
        let pass = self.console_until("\n").await?;
        Ok((digest, pass.trim().to_owned()))
    }

    /// Waits until the process ends by itself, and reads the note it leaves.
    pub async fn ended(&self) -> Result<ExitNote, Error> {
        until("the VMM's end", || self.try_wait()).await?;
        Ok(serde_json::from_slice(&std::fs::read(self.run_dir.join(EXIT_NOTE))?)?)
    }

    /// Ends the process and waits until it is gone.
    pub async fn shutdown(self) -> Result<(), Error> {
        self.client.shutdown().await?;
        let status = until("the VMM's end", || self.try_wait()).await?;
        if status.exit_status() != Some(0) {
            let note = std::fs::read_to_string(self.run_dir.join(EXIT_NOTE)).unwrap_or_default();
            return Err(format!("the VMM ended with {status:?}: {note}").into());
        }
        Ok(())
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have been waited for.
        let _ = pidfd_send_signal(&self.process.pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(self.process.pidfd.as_fd()), WaitIdOptions::EXITED);
    }
}

/// Waits until `check` has an answer, or gives up with what was waited for.
pub async fn until<T>(what: &str, mut check: impl FnMut() -> std::io::Result<Option<T>>) -> Result<T, Error> {
    let started = Instant::now();
    loop {
        if let Some(answer) = check()? {
            return Ok(answer);
        }
        if started.elapsed() > PATIENCE {
            return Err(format!("waited {} s for {what}", PATIENCE.as_secs()).into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// An empty memory file, as a supervisor makes it.
pub fn memory_file() -> Result<File, Error> {
    Ok(rustix::fs::memfd_create("guest-memory", rustix::fs::MemfdFlags::CLOEXEC)?.into())
}

fn filled(bytes: &[u8]) -> Result<File, Error> {
    let mut file = tempfile::tempfile()?;
    std::io::Write::write_all(&mut file, bytes)?;
    std::io::Seek::rewind(&mut file)?;
    Ok(file)
}

/// A store in a directory.
pub fn directory_store(root: &Path) -> Result<Arc<dyn ObjectStore>, Error> {
    std::fs::create_dir_all(root)?;
    Ok(Arc::new(stasis_snapshot::store::directory::DirectoryStore::open(root)?))
}
