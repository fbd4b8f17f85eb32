//! VMM processes, from their start by the [`Launcher`] to their end.
//!
//! A VMM outlives its supervisor: it has a session of its own, inherits what it needs by number, and has an empty environment (so no
//! credentials). It is watched through a pidfd, which works for our own child, for another's, and for one that was adopted after a
//! restart. One task watches each.

use crate::launcher::{LOG, Launcher, PROCESS_NOTE, end_of, note_in};
use crate::record::VmmIdentity;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use stasis_vmm::control::EXIT_NOTE;
use stasis_vmm::control::client::Client;
use stasis_vmm::control::types::ExitNote;
use stasis_warden::jail::start::{End, ProcessNote, find};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

/// How long a VMM that was asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// How long the kernel may take to end a killed process.
const KILL: Duration = Duration::from_secs(20);
/// What the names of run directories begin with whose VMMs were let go: no sandbox is called so.
const ENDED: &str = "ended-";
/// How long the note of an end, which another process writes, may come after the end.
const NOTED: Duration = Duration::from_millis(100);

/// One VMM process and its run directory.
#[derive(Debug)]
pub struct Vmm {
    /// Its control API.
    pub client: Client,
    run_dir: PathBuf,
    identity: VmmIdentity,
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<bool>,
    end: Arc<OnceLock<End>>,
    launcher: Arc<Launcher>,
    dismissed: AtomicBool,
    /// Our descriptor of the guest's memory file. Not there for one that was adopted.
    memory: Mutex<Option<Arc<fs::File>>>,
}

impl Vmm {
    /// Starts one under the name `id` with a fresh run directory, and waits until it answers.
    pub async fn spawn(launcher: &Arc<Launcher>, id: &str, run_dir: &Path, within: Duration) -> io::Result<Self> {
        let (starting, name, dir) = (launcher.clone(), id.to_owned(), run_dir.to_owned());
        let started =
            tokio::task::spawn_blocking(move || starting.start_vmm(&name, &dir)).await.map_err(io::Error::other)?;
        let process = started.map_err(|e| io::Error::new(e.kind(), format!("cannot start a VMM for {id}: {e}")))?;
        let vmm = Self::watch(process.note, process.pidfd, run_dir, launcher)?;
        match tokio::time::timeout(within, vmm.reachable()).await {
            Ok(true) => Ok(vmm),
            outcome => {
                let reason = vmm.exit_reason();
                vmm.end().await;
                let what = if outcome.is_ok() {
                    format!("it ended: {reason}")
                } else {
                    "it did not answer in time".to_owned()
                };
                Err(io::Error::other(format!("the VMM for {id}: {what}")))
            }
        }
    }

    /// Takes over one that an earlier supervisor started. `None` when that process is gone.
    pub fn adopt(identity: &VmmIdentity, run_dir: &Path, launcher: &Arc<Launcher>) -> Option<Self> {
        let note = ProcessNote { pid: identity.pid, started_ticks: identity.started_ticks, file: None, end: None };
        Self::watch(note, find(&note)?, run_dir, launcher).ok()
    }

    fn watch(note: ProcessNote, pidfd: OwnedFd, run_dir: &Path, launcher: &Arc<Launcher>) -> io::Result<Self> {
        let pidfd = Arc::new(pidfd);
        let identity = VmmIdentity { pid: note.pid, started_ticks: note.started_ticks };
        let end = Arc::new(OnceLock::new());
        let (tell, ended) = watch::channel(false);
        // SAFETY: the descriptor is owned by the `Arc` inside the `AsyncFd`: it stays open, and the same, until the `AsyncFd` is dropped.
        let fd =
            unsafe { AsyncFd::register_with_interest(pidfd.clone(), Interest::READABLE) }.map_err(io::Error::other)?;
        // Under whatever name its directory has by then.
        let written = fs::File::open(run_dir.join(PROCESS_NOTE)).ok().filter(|_| launcher.has_warden());
        let noted = end.clone();
        tokio::spawn(async move {
            if let Err(error) = fd.readable().await {
                tracing::error!(%error, "cannot watch a VMM process");
            }
            // The warden waits for those that it has started, and writes down how they ended.
            if let Some(written) = written
                && let Ok(end) = tokio::time::timeout(NOTED, end_noted_in(&written)).await
            {
                let _ = noted.set(end);
            }
            // Ours becomes a zombie until it is waited for; another's is not ours to wait for.
            match waitid(WaitId::PidFd(fd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
                Ok(status) => drop(status.and_then(|status| end_of(&status)).map(|end| noted.set(end))),
                Err(error) => tracing::debug!(%error, pid = note.pid, "a VMM that ended was not a child"),
            }
            tell.send_replace(true);
        });
        Ok(Self {
            client: Client::new(run_dir),
            run_dir: run_dir.to_owned(),
            identity,
            pidfd,
            ended,
            end,
            launcher: launcher.clone(),
            dismissed: AtomicBool::new(false),
            memory: Mutex::default(),
        })
    }

    /// The same process with its run directory moved to `run_dir`, over what may be there; or the process as it was.
    #[expect(clippy::result_large_err, reason = "the process itself: it goes on in either case")]
    pub fn renamed(mut self, run_dir: &Path) -> Result<Self, (Self, io::Error)> {
        let moved = match fs::remove_dir_all(run_dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::rename(&self.run_dir, run_dir),
        };
        match moved {
            Ok(()) => {
                self.client = Client::new(run_dir);
                run_dir.clone_into(&mut self.run_dir);
                Ok(self)
            }
            Err(error) => Err((self, error)),
        }
    }

    /// Remembers the guest's memory file, which outlives the process with whoever holds it.
    pub fn hold_memory(&self, memory: Arc<fs::File>) {
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory);
    }

    /// Whether we hold the guest's memory file.
    pub fn has_memory(&self) -> bool {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// The guest's memory file, given away.
    pub fn take_memory(&self) -> Option<Arc<fs::File>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Which process it is.
    pub fn identity(&self) -> &VmmIdentity {
        &self.identity
    }

    /// Where its sockets are.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// The process is gone. Asks the kernel: the task that watches it may not have run yet.
    pub fn has_ended(&self) -> bool {
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut pidfd = [rustix::event::PollFd::new(&*self.pidfd, rustix::event::PollFlags::IN)];
        *self.ended.borrow() || rustix::event::poll(&mut pidfd, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Waits until the process is gone.
    pub async fn wait_ended(&self) {
        let mut ended = self.ended.clone();
        // The sender is dropped only after it said so.
        let _ = ended.wait_for(|gone| *gone).await;
    }

    /// Its end was asked for by [`Vmm::end`].
    pub fn was_dismissed(&self) -> bool {
        self.dismissed.load(Ordering::Acquire)
    }

    /// Why it ended, as far as it says, or the kernel does.
    pub fn exit_reason(&self) -> String {
        let note = fs::read(self.run_dir.join(EXIT_NOTE)).ok();
        if let Some(note) = note.and_then(|note| serde_json::from_slice::<ExitNote>(&note).ok()) {
            return note.reason;
        }
        match self.end.get() {
            // SIGSYS.
            Some(End::Signal(31)) => "ended by seccomp: a system call that it may not use".to_owned(),
            Some(End::Signal(9)) => "it was killed, by somebody or for want of memory".to_owned(),
            Some(End::Signal(signal)) => format!("it was ended by signal {signal}"),
            Some(End::Code(_)) | None => {
                last_line(&self.run_dir.join(LOG)).unwrap_or_else(|| "it left no reason (killed?)".to_owned())
            }
        }
    }

    /// Holds it to what a sandbox of this size may use. Blocking, for well under a millisecond.
    pub fn resize(&self, size: stasis_warden::jail::limits::Size) {
        self.launcher.resize(self.pidfd.as_fd(), size);
    }

    /// Ends the process, politely at first, waits until it is gone and removes its run directory. Nothing of it is left afterwards.
    pub async fn end(&self) {
        self.dismissed.store(true, Ordering::Release);
        if !self.has_ended() {
            let asked = tokio::time::timeout(GRACE, async {
                if self.client.shutdown().await.is_ok() {
                    self.wait_ended().await;
                }
            });
            if asked.await.is_err() || !self.has_ended() {
                self.kill();
            }
        }
        self.clear_away(&self.run_dir).await;
    }

    /// Kills the process without waiting: for one whose guest stands still and that has nothing left to say. Its guest never runs again, since
    /// a killed process runs no more of its own instructions and enters no guest. Its run directory gets another name, so that the sandbox's
    /// next VMM may have it; a task waits until the kernel has taken the process apart, which takes it some 20 ms, and removes that.
    pub fn let_go(self: &Arc<Self>) {
        self.dismissed.store(true, Ordering::Release);
        self.kill();
        let aside = self.run_dir.with_file_name(format!("{ENDED}{}", self.identity.pid));
        // A supervisor that ends waits for it; what one that is killed leaves behind is swept away at the next start.
        let left = if fs::rename(&self.run_dir, &aside).is_ok() { aside } else { self.run_dir.clone() };
        let vmm = self.clone();
        self.launcher.clear_later(async move { vmm.clear_away(&left).await });
    }

    async fn clear_away(&self, run_dir: &Path) {
        if tokio::time::timeout(KILL, self.wait_ended()).await.is_err() {
            tracing::error!(
                pid = self.identity.pid,
                "a killed VMM does not end; its run directory stays until the next start"
            );
            return;
        }
        if let Err(error) = fs::remove_dir_all(run_dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, dir = %run_dir.display(), "cannot remove a run directory");
        }
    }

    /// SIGKILL, without waiting.
    pub fn kill(&self) {
        if let Err(error) = self.launcher.kill(self.pidfd.as_fd()) {
            tracing::debug!(%error, pid = self.identity.pid, "cannot kill a VMM; it is gone most likely");
        }
    }

    /// True once it answers; false when the process ended first. Its control socket is there before it is.
    async fn reachable(&self) -> bool {
        tokio::select! {
            status = self.client.status() => status.is_ok(),
            () = self.wait_ended() => false,
        }
    }
}

/// VMM processes that work for run directories under `root`, by their notes. For what a killed supervisor left behind.
pub fn find_under(root: &Path) -> io::Result<Vec<(VmmIdentity, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root)? {
        let dir = entry?.path();
        if let Some(note) = note_in(&dir)
            && find(&note).is_some()
        {
            found.push((VmmIdentity { pid: note.pid, started_ticks: note.started_ticks }, dir));
        }
    }
    Ok(found)
}

/// Waits until a note says how its process ended.
async fn end_noted_in(note: &fs::File) -> End {
    loop {
        let mut text = [0; 512];
        let len = note.read_at(&mut text, 0).unwrap_or_default();
        if let Some(end) = serde_json::from_slice::<ProcessNote>(&text[..len]).ok().and_then(|note| note.end) {
            return end;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn last_line(path: &Path) -> Option<String> {
    let text = fs::read(path).ok()?;
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    tail.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_program_that_ends_at_once_is_reported_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        fs::write(&program, "#!/bin/sh\necho no such luck >&2\nexit 1\n").unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let run = dir.path().join("run");
        let launcher = Arc::new(Launcher::unjailed(&program));
        let error = Vmm::spawn(&launcher, "sbx-a", &run, GRACE).await.unwrap_err();
        assert!(error.to_string().contains("no such luck") || error.to_string().contains("/dev/kvm"), "{error}");
    }

    #[tokio::test]
    async fn a_vmm_is_found_under_the_name_that_its_run_directory_has_now() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let (run, renamed) = (root.join("pool-0"), root.join("sbx-a"));
        // A stand-in for a VMM, which ends when it is killed.
        let program = root.join("vmm");
        fs::write(&program, "#!/bin/sh\nexec sleep 600\n").unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let launcher = Arc::new(Launcher::unjailed(&program));
        let process = match launcher.start_vmm("sbx-a", &run) {
            Ok(process) => process,
            Err(error) => return eprintln!("left out: {error}"),
        };
        let vmm = Vmm::watch(process.note, process.pidfd, &run, &launcher).unwrap().renamed(&renamed).unwrap();
        assert_eq!(find_under(&root).unwrap(), [(vmm.identity().clone(), renamed.clone())]);
        let past = VmmIdentity { started_ticks: vmm.identity().started_ticks - 1, ..vmm.identity().clone() };
        assert!(Vmm::adopt(&past, &renamed, &launcher).is_none(), "another process with its id");
        vmm.kill();
        vmm.wait_ended().await;
        assert!(vmm.exit_reason().contains("killed"), "{}", vmm.exit_reason());
        vmm.end().await;
        assert!(find_under(&root).unwrap().is_empty() && !renamed.exists());
    }
}
