//! VMM processes started ahead, so that a wake does not wait for one to start. They hold no machine and belong to nobody until [`VmmPool::take`]
//! gives one away: its run directory is renamed (a VMM works in it by relative names), and the request that makes the machine names the
//! sandbox.
//!
//! One task fills the pool. What an earlier supervisor left is ended by `supervisor::restart`, which finds every VMM under the run root.

use crate::vmm_process::Vmm;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The wake that took a VMM comes first: its processor time is not to be spent on the next one.
const REFILL_AFTER: Duration = Duration::from_millis(150);
/// After a start that failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// What the names of idle VMMs begin with: no sandbox is called so.
const NAME: &str = "pool-";

/// The pool.
#[derive(Debug)]
pub struct VmmPool {
    program: PathBuf,
    root: PathBuf,
    size: usize,
    within: Duration,
    idle: Mutex<Vec<Vmm>>,
    started: AtomicU64,
    taken: Notify,
}

impl VmmPool {
    /// One of `size` processes of `program` below `root`, each given `within` to open its control socket. Empty until [`VmmPool::run`].
    pub fn new(program: &Path, root: &Path, size: u16, within: Duration) -> Self {
        Self {
            program: program.to_owned(),
            root: root.to_owned(),
            size: usize::from(size),
            within,
            idle: Mutex::default(),
            started: AtomicU64::new(0),
            taken: Notify::new(),
        }
    }

    /// An idle VMM whose run directory is `run_dir` from now on; `None` when there is none.
    pub fn take(&self, run_dir: &Path) -> Option<Vmm> {
        loop {
            let vmm = self.idle().pop()?;
            self.taken.notify_one();
            if vmm.has_ended() {
                tracing::warn!(reason = vmm.exit_reason(), "an idle VMM ended by itself");
                tokio::spawn(async move { vmm.end().await });
                continue;
            }
            match vmm.renamed(run_dir) {
                Ok(vmm) => return Some(vmm),
                Err((vmm, error)) => {
                    tracing::warn!(%error, to = %run_dir.display(), "an idle VMM cannot be given a sandbox's run directory");
                    tokio::spawn(async move { vmm.end().await });
                }
            }
        }
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.idle().len()
    }

    /// Keeps the pool full until `stop`, then ends what is in it.
    pub async fn run(&self, stop: CancellationToken) {
        while self.size > 0 && !stop.is_cancelled() {
            let mut pause = Duration::MAX;
            while self.waiting() < self.size && !stop.is_cancelled() {
                let name = format!("{NAME}{}", self.started.fetch_add(1, Ordering::Relaxed));
                match Vmm::spawn(&self.program, &name, &self.root.join(&name), self.within).await {
                    Ok(vmm) => self.idle().push(vmm),
                    Err(error) => {
                        tracing::warn!(%error, "cannot start a VMM ahead");
                        pause = RETRY_AFTER;
                        break;
                    }
                }
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = self.taken.notified() => tokio::select! {
                    () = stop.cancelled() => {}
                    () = tokio::time::sleep(REFILL_AFTER) => {}
                },
                () = tokio::time::sleep(pause) => {}
            }
        }
        let idle = std::mem::take(&mut *self.idle());
        for vmm in idle {
            vmm.end().await;
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Vmm>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_program_that_cannot_start_leaves_an_empty_pool_that_stops() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        std::fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let pool = VmmPool::new(&program, dir.path(), 2, Duration::from_secs(5));
        let stop = CancellationToken::new();
        let stopping = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            stop.cancel();
        };
        tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(pool.run(stop.clone()), stopping) })
            .await
            .unwrap();
        assert!(pool.take(&dir.path().join("sbx-a")).is_none());
    }
}
