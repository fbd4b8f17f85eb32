//! VMM processes: the only place that starts or ends one.
//!
//! A VMM outlives its supervisor: it has its own process group, no inherited descriptors, and an empty environment (so no credentials).
//! It is watched through a pidfd, which works for our own child and for one that was adopted after a restart. One task watches each.

use crate::record::VmmIdentity;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid};
use stasis_vmm::control::client::Client;
use stasis_vmm::control::types::ExitNote;
use stasis_vmm::control::{CONTROL_SOCKET, EXIT_NOTE};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
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
/// The VMM's own messages, in its run directory.
const LOG: &str = "vmm.log";

/// One VMM process and its run directory.
#[derive(Debug)]
pub struct Vmm {
    /// Its control API.
    pub client: Client,
    run_dir: PathBuf,
    identity: VmmIdentity,
    pidfd: Arc<OwnedFd>,
    ended: watch::Receiver<bool>,
    dismissed: AtomicBool,
    /// Our descriptor of the guest's memory file. Not there for one that was adopted.
    memory: Mutex<Option<Arc<fs::File>>>,
}

impl Vmm {
    /// Starts `program` under the name `id` with a fresh run directory, and waits until its control socket is there.
    #[expect(clippy::disallowed_methods, reason = "this is the place that starts processes")]
    pub async fn spawn(program: &Path, id: &str, run_dir: &Path, within: Duration) -> io::Result<Self> {
        if run_dir.exists() {
            fs::remove_dir_all(run_dir)?;
        }
        fs::DirBuilder::new().mode(0o700).recursive(true).create(run_dir)?;
        let log = fs::File::create(run_dir.join(LOG))?;
        let child = Command::new(program)
            .arg("--id")
            .arg(id)
            .arg("--run-dir")
            .arg(run_dir)
            .current_dir(run_dir)
            .env_clear()
            .envs(std::env::var_os("STASIS_VMM_LOG").map(|level| ("RUST_LOG", level)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|e| io::Error::new(e.kind(), format!("cannot start {}: {e}", program.display())))?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let vmm = Self::watch(pid, run_dir)?;
        match tokio::time::timeout(within, vmm.reachable()).await {
            Ok(true) => Ok(vmm),
            outcome => {
                let reason = vmm.exit_reason();
                vmm.end().await;
                let what = if outcome.is_ok() {
                    format!("it ended: {reason}")
                } else {
                    "it did not open its control socket in time".to_owned()
                };
                Err(io::Error::other(format!("{} for {id}: {what}", program.display())))
            }
        }
    }

    /// Takes over one that an earlier supervisor started. `None` when that process is gone.
    pub fn adopt(identity: &VmmIdentity, run_dir: &Path) -> Option<Self> {
        let vmm = Self::watch(identity.pid, run_dir).ok()?;
        // Compared after the pidfd was opened: from here on the id cannot be given to another process.
        (vmm.identity == *identity).then_some(vmm)
    }

    fn watch(pid: i32, run_dir: &Path) -> io::Result<Self> {
        let raw = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let pidfd = Arc::new(pidfd_open(raw, PidfdFlags::NONBLOCK)?);
        let identity = VmmIdentity { pid, started_ticks: start_ticks(pid)? };
        let (tell, ended) = watch::channel(false);
        // SAFETY: the descriptor is owned by the `Arc` inside the `AsyncFd`: it stays open, and the same, until the `AsyncFd` is dropped.
        let fd =
            unsafe { AsyncFd::register_with_interest(pidfd.clone(), Interest::READABLE) }.map_err(io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = fd.readable().await {
                tracing::error!(%error, "cannot watch a VMM process");
            }
            // Ours becomes a zombie until it is waited for; an adopted one is not ours to wait for.
            if let Err(error) =
                waitid(WaitId::PidFd(fd.get_ref().as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
            {
                tracing::debug!(%error, pid, "a VMM that ended was not a child");
            }
            tell.send_replace(true);
        });
        Ok(Self {
            client: Client::new(run_dir),
            run_dir: run_dir.to_owned(),
            identity,
            pidfd,
            ended,
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

    /// Why it ended, as far as it says.
    pub fn exit_reason(&self) -> String {
        fs::read(self.run_dir.join(EXIT_NOTE))
            .ok()
            .and_then(|note| serde_json::from_slice::<ExitNote>(&note).ok())
            .map(|note| note.reason)
            .or_else(|| last_line(&self.run_dir.join(LOG)))
            .unwrap_or_else(|| "it left no reason (killed?)".to_owned())
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
        // One that is left behind is swept away at the next start.
        let left = if fs::rename(&self.run_dir, &aside).is_ok() { aside } else { self.run_dir.clone() };
        let vmm = self.clone();
        tokio::spawn(async move { vmm.clear_away(&left).await });
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
        if let Err(error) = pidfd_send_signal(self.pidfd.as_fd(), Signal::KILL) {
            tracing::debug!(%error, pid = self.identity.pid, "cannot kill a VMM; it is gone most likely");
        }
    }

    /// True once the control socket accepts; false when the process ended first.
    async fn reachable(&self) -> bool {
        let socket = self.run_dir.join(CONTROL_SOCKET);
        let mut pause = Duration::from_millis(1);
        loop {
            if tokio::net::UnixStream::connect(&socket).await.is_ok() {
                return true;
            }
            tokio::select! {
                () = self.wait_ended() => return false,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_millis(20)),
            }
        }
    }
}

/// VMM processes of this host whose run directory lies under `root`, by looking at every process. For what a killed supervisor left behind.
/// A VMM works in its run directory, which may have another name by now than the one on its command line.
pub fn find_under(root: &Path) -> io::Result<Vec<(VmmIdentity, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // A process that ends while it is looked at is not there.
        let Ok(dir) = fs::read_link(format!("/proc/{pid}/cwd")) else { continue };
        let Ok(command) = fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        // Somebody's shell in a run directory is no VMM.
        if dir.parent() == Some(root)
            && command.split(|b| *b == 0).any(|arg| arg == b"--run-dir")
            && let Ok(started_ticks) = start_ticks(pid)
        {
            found.push((VmmIdentity { pid, started_ticks }, dir));
        }
    }
    Ok(found)
}

fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may hold anything; field 3 follows the last parenthesis, the start time is field 22.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|ticks| ticks.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

fn last_line(path: &Path) -> Option<String> {
    let text = fs::read(path).ok()?;
    let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(2000)..]).into_owned();
    tail.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_time_tells_processes_apart() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(start_ticks(me).unwrap() > start_ticks(1).unwrap());
        assert!(start_ticks(0).is_err());
    }

    #[tokio::test]
    async fn a_program_that_ends_at_once_is_reported_with_its_last_words() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        fs::write(&program, "#!/bin/sh\necho no such luck >&2\nexit 1\n").unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let run = dir.path().join("run");
        let error = Vmm::spawn(&program, "sbx-a", &run, GRACE).await.unwrap_err();
        assert!(error.to_string().contains("no such luck"), "{error}");
        assert!(!run.exists());
    }

    #[tokio::test]
    #[expect(
        clippy::disallowed_methods,
        clippy::zombie_processes,
        reason = "a stand-in for a VMM: the watch waits for it"
    )]
    async fn a_vmm_is_found_under_the_name_that_its_run_directory_has_now() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        let (run, renamed) = (root.join("pool-0"), root.join("sbx-a"));
        fs::create_dir(&run).unwrap();
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read x", "--run-dir", "."])
            .current_dir(&run)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let vmm = Vmm::watch(i32::try_from(child.id()).unwrap(), &run).unwrap().renamed(&renamed).unwrap();
        // The kernel lets us go on before it has set up the child's command line.
        for _ in 0..200 {
            if find_under(&root).unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        assert_eq!(find_under(&root).unwrap(), [(vmm.identity().clone(), renamed.clone())]);
        drop(child.stdin.take());
        vmm.end().await;
        assert!(find_under(&root).unwrap().is_empty() && !renamed.exists());
    }

    #[tokio::test]
    async fn an_identity_of_the_past_is_not_adopted() {
        let me = i32::try_from(std::process::id()).unwrap();
        let now = VmmIdentity { pid: me, started_ticks: start_ticks(me).unwrap() };
        let past = VmmIdentity { started_ticks: now.started_ticks - 1, ..now.clone() };
        let dir = tempfile::tempdir().unwrap();
        assert!(Vmm::adopt(&now, dir.path()).is_some());
        assert!(Vmm::adopt(&past, dir.path()).is_none());
    }
}
