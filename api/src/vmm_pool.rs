//! VMM processes started ahead, so that a wake does not wait for one to start. They hold no guest and belong to nobody until [`VmmPool::take`]
//! gives one away: its run directory is renamed (a VMM knows no names), and the request that makes the machine names the
//! sandbox. Each has made ready a bare machine of the size that was asked for last: most hosts run many sandboxes of one size.
//!
//! One task fills the pool. What an earlier supervisor left is ended by `supervisor::restart`, which finds every VMM under the run root.

use crate::launcher::Launcher;
use crate::vmm_process::Vmm;
use stasis_vmm::control::types::PrepareRequest;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The wake that took a VMM comes first: its processor time is not to be spent on the next one.
const REFILL_AFTER: Duration = Duration::from_millis(150);
/// After a start that failed.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// What the names of idle VMMs begin with: no sandbox is called so.
const NAME: &str = "pool-";

/// One that waits, and what it has made ready.
#[derive(Debug)]
struct Idle {
    vmm: Vmm,
    ready: Option<PrepareRequest>,
}

/// Which of those that wait to give away for a machine of this size: one that is ready for it, else one that is ready for nothing, else any.
fn choose(idle: &[Option<PrepareRequest>], wanted: PrepareRequest) -> Option<usize> {
    let find = |ready: Option<PrepareRequest>| idle.iter().position(|found| *found == ready);
    find(Some(wanted)).or_else(|| find(None)).or_else(|| idle.len().checked_sub(1))
}

/// The pool.
#[derive(Debug)]
pub struct VmmPool {
    launcher: Arc<Launcher>,
    root: PathBuf,
    size: usize,
    within: Duration,
    idle: Mutex<Vec<Idle>>,
    /// The size that was asked for last.
    size_wanted: Mutex<Option<PrepareRequest>>,
    started: AtomicU64,
    taken: Notify,
}

impl VmmPool {
    /// One of `size` processes that `launcher` starts below `root`, each given `within` to open its control socket. Empty until [`VmmPool::run`].
    pub fn new(launcher: Arc<Launcher>, root: &Path, size: u16, within: Duration) -> Self {
        Self {
            launcher,
            root: root.to_owned(),
            size: usize::from(size),
            within,
            idle: Mutex::default(),
            size_wanted: Mutex::default(),
            started: AtomicU64::new(0),
            taken: Notify::new(),
        }
    }

    /// An idle VMM whose run directory is `run_dir` from now on, for a machine of this size; `None` when there is none.
    pub fn take(&self, run_dir: &Path, size: PrepareRequest) -> Option<Vmm> {
        *self.size_wanted.lock().unwrap_or_else(PoisonError::into_inner) = Some(size);
        loop {
            let vmm = {
                let mut idle = self.idle();
                let ready: Vec<_> = idle.iter().map(|idle| idle.ready).collect();
                let chosen = choose(&ready, size)?;
                idle.swap_remove(chosen).vmm
            };
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
                match Vmm::spawn(&self.launcher, &name, &self.root.join(&name), self.within).await {
                    Ok(vmm) => {
                        let ready = self.make_ready(&vmm).await;
                        self.idle().push(Idle { vmm, ready });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot start a VMM ahead");
                        pause = RETRY_AFTER;
                        break;
                    }
                }
            }
            // Those that were started before anything was asked for.
            while let Some(vmm) = self.take_unready() {
                let ready = self.make_ready(&vmm).await;
                self.idle().push(Idle { vmm, ready });
                if ready.is_none() {
                    break;
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
        for idle in idle {
            idle.vmm.end().await;
        }
    }

    /// One that has made nothing ready although it is known what for.
    fn take_unready(&self) -> Option<Vmm> {
        (*self.size_wanted.lock().unwrap_or_else(PoisonError::into_inner))?;
        let mut idle = self.idle();
        let found = idle.iter().position(|idle| idle.ready.is_none())?;
        Some(idle.swap_remove(found).vmm)
    }

    /// Has it make ready what was asked for last. One that cannot is as good as any.
    async fn make_ready(&self, vmm: &Vmm) -> Option<PrepareRequest> {
        let wanted = (*self.size_wanted.lock().unwrap_or_else(PoisonError::into_inner))?;
        match vmm.client.prepare(wanted).await {
            Ok(()) => Some(wanted),
            Err(error) => {
                tracing::warn!(%error, "an idle VMM cannot make a machine ready");
                None
            }
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_one_that_is_ready_is_given_away_first() {
        let size = |memory_mib| PrepareRequest { vcpus: 1, memory_mib };
        for (idle, chosen) in [
            (vec![], None),
            (vec![None, Some(size(512)), Some(size(1024))], Some(2)),
            (vec![Some(size(512)), None], Some(1)),
            (vec![Some(size(512)), Some(size(2048))], Some(1)),
        ] {
            assert_eq!(choose(&idle, size(1024)), chosen, "{idle:?}");
        }
    }

    #[tokio::test]
    async fn a_program_that_cannot_start_leaves_an_empty_pool_that_stops() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        std::fs::write(&program, "#!/bin/sh\nexit 1\n").unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let pool = VmmPool::new(Arc::new(Launcher::unjailed(&program)), dir.path(), 2, Duration::from_secs(5));
        let stop = CancellationToken::new();
        let stopping = async {
            tokio::time::sleep(Duration::from_millis(200)).await;
            stop.cancel();
        };
        tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(pool.run(stop.clone()), stopping) })
            .await
            .unwrap();
        assert!(pool.take(&dir.path().join("sbx-a"), PrepareRequest { vcpus: 1, memory_mib: 64 }).is_none());
    }
}
