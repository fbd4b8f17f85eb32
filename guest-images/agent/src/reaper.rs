//! The one place that waits for child processes.
//!
//! PID 1 inherits every orphan and must reap it with `waitpid(-1)`, which also takes the exit status of processes that somebody
//! waits for. So all of them are started through [`Reaper::spawn`], and their status is handed on from here. The lock is held from
//! before the fork until the process is registered, and while statuses are collected: a process that ends at once is not missed.
//!
//! [`Reaper::start`] leaves a task behind that collects on every SIGCHLD. Signals merge, so each time it collects until nothing is left.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Whose processes are reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Adoption {
    /// Those that [`Reaper::spawn`] started.
    OwnChildren,
    /// All children of this process: for PID 1, also every orphan.
    Everyone,
}

type Waiting = HashMap<Pid, oneshot::Sender<WaitStatus>>;

/// See the module.
pub(crate) struct Reaper {
    waiting: Arc<Mutex<Waiting>>,
}

/// A started process. Dropping it neither ends the process nor stops its status from being collected.
pub(crate) struct Process {
    /// Its id, until `exited` has given the status.
    pub(crate) pid: Pid,
    /// The standard streams.
    pub(crate) child: Child,
    /// How it ended.
    pub(crate) exited: oneshot::Receiver<WaitStatus>,
}

impl Reaper {
    /// Starts to collect, in a task of the current runtime.
    pub(crate) fn start(adoption: Adoption) -> io::Result<Self> {
        let waiting = Arc::new(Mutex::new(Waiting::new()));
        let mut children = signal(SignalKind::child())?;
        let collected = Arc::clone(&waiting);
        tokio::spawn(async move {
            loop {
                collect(adoption, &mut lock(&collected));
                if children.recv().await.is_none() {
                    break;
                }
            }
        });
        Ok(Self { waiting })
    }

    /// Starts a process.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Process> {
        let mut waiting = lock(&self.waiting);
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (sender, exited) = oneshot::channel();
        waiting.insert(pid, sender);
        Ok(Process { pid, child, exited })
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn collect(adoption: Adoption, waiting: &mut Waiting) {
    match adoption {
        Adoption::Everyone => {
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                hand_over(waiting, pid, status);
            }
        }
        Adoption::OwnChildren => {
            let pids: Vec<Pid> = waiting.keys().copied().collect();
            for pid in pids {
                if let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::NOHANG) {
                    hand_over(waiting, pid, status);
                }
            }
        }
    }
}

fn hand_over(waiting: &mut Waiting, pid: Pid, status: WaitStatus) {
    if let Some(sender) = waiting.remove(&pid) {
        // Nobody listens any more: the status was wanted only for reaping.
        let _ = sender.send(status);
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "processes are what is tested")]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::time::{Duration, Instant};

    use rustix::process::{WaitId, WaitIdOptions, getpid, set_child_subreaper, waitid};
    use tokio::time::timeout;

    use super::*;

    const ALONE: &str = "STASIS_TEST_ALONE";
    /// Longer than anything here takes on a busy machine.
    const HANG: Duration = Duration::from_mins(1);

    /// Reaping everyone would take the children of the tests beside it, so this one runs again in a process of its own.
    #[tokio::test]
    async fn everyone_is_reaped_whatever_group_it_is_in() {
        if std::env::var_os(ALONE).is_none() {
            let name = "reaper::tests::everyone_is_reaped_whatever_group_it_is_in";
            let status =
                Command::new(std::env::current_exe().unwrap()).args([name, "--exact"]).env(ALONE, "1").status();
            assert!(status.unwrap().success());
            return;
        }
        set_child_subreaper(Some(getpid())).unwrap();
        let reaper = Reaper::start(Adoption::Everyone).unwrap();
        // Leaves an orphan, which a subreaper inherits as PID 1 does.
        let orphan = "setsid sh -c 'sleep 0.1; exit 3' & exit 5";
        let process = reaper.spawn(Command::new("/bin/sh").args(["-c", orphan]).process_group(0)).unwrap();
        let status = timeout(Duration::from_secs(10), process.exited).await.expect("the command was not reaped");
        assert_eq!(status.unwrap().exit_status(), Some(5));
        let begun = Instant::now();
        while wait_would_find_a_child() {
            assert!(begun.elapsed() < HANG, "the orphan was not reaped");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether a child is left, running or dead; takes no status.
    fn wait_would_find_a_child() -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::All, options).is_ok()
    }

    #[tokio::test]
    async fn statuses_reach_their_own_waiter() {
        let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
        let processes: Vec<_> = (0..40)
            .map(|code| (code, reaper.spawn(Command::new("/bin/sh").args(["-c", &format!("exit {code}")])).unwrap()))
            .collect();
        for (code, process) in processes {
            assert_eq!(process.exited.await.unwrap().exit_status(), Some(code));
        }
        assert!(lock(&reaper.waiting).is_empty());
    }

    #[tokio::test]
    async fn a_command_that_cannot_start_leaves_no_waiter() {
        let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
        assert!(reaper.spawn(&mut Command::new("/no/such/program")).is_err());
        assert!(lock(&reaper.waiting).is_empty());
    }

    #[tokio::test]
    async fn a_signal_is_told_from_an_exit() {
        let reaper = Reaper::start(Adoption::OwnChildren).unwrap();
        let process = reaper.spawn(Command::new("/bin/sh").args(["-c", "kill -9 $$"])).unwrap();
        assert_eq!(process.exited.await.unwrap().terminating_signal(), Some(9));
    }
}
