//! A guest without a guest: whoever connects to the vsock socket of a sandbox reaches the forwarder of a real agent on this machine, so
//! `127.0.0.1` of the "guest" is this machine's. Pulse guests have no vsock, so the socket in their run directory is ours to make, and all
//! connections break when the VMM goes. VMMs that wait in the pool get one, too: whoever comes right after a wake must find it, and not the
//! device, which would wait for a guest that never answers.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use stasis_vmm::control::{CONTROL_SOCKET, VSOCK_SOCKET};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use crate::host;
use crate::vmm::{Error, until};

const LOOK: Duration = Duration::from_millis(3);

/// The guest of one sandbox. Everything of it ends when it is dropped.
pub struct Guest {
    agent: Child,
    _dir: tempfile::TempDir,
    _task: AbortOnDropHandle<()>,
    seen: Arc<Seen>,
}

/// What happened to it.
#[derive(Default)]
struct Seen {
    lives: AtomicUsize,
    connections: AtomicUsize,
    /// The next connection is closed in the middle of its greeting.
    hiccup: AtomicBool,
}

impl Guest {
    /// The guest of the sandbox whose VMM has this run directory, now and after every wake.
    #[expect(clippy::disallowed_methods, reason = "the agent, run natively")]
    pub async fn start(run_dir: PathBuf) -> Result<Self, Error> {
        let dir = host::scratch()?;
        let socket = dir.path().join("a");
        let agent = std::process::Command::new(host::program("stasis-agent"))
            .arg("--unix")
            .arg(&socket)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let forwarder = dir.path().join("a_2");
        until("the agent's forwarder", || Ok(forwarder.exists().then_some(()))).await?;
        let seen = Arc::new(Seen::default());
        let task = AbortOnDropHandle::new(tokio::spawn(live(run_dir, forwarder, seen.clone())));
        until("the guest's vsock", || Ok((seen.lives.load(Ordering::SeqCst) > 0).then_some(()))).await?;
        Ok(Self { agent, _dir: dir, _task: task, seen })
    }

    /// How often its VMM began.
    pub fn lives(&self) -> usize {
        self.seen.lives.load(Ordering::SeqCst)
    }

    /// How many connections were made.
    pub fn connections(&self) -> usize {
        self.seen.connections.load(Ordering::SeqCst)
    }

    /// Breaks the next connection before it is made.
    pub fn break_next(&self) {
        self.seen.hiccup.store(true, Ordering::SeqCst);
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

/// Keeps the sockets of the sandbox's VMM and of those in the pool ours.
async fn live(run_dir: PathBuf, forwarder: PathBuf, seen: Arc<Seen>) {
    let mut ours: HashMap<u64, AbortOnDropHandle<()>> = HashMap::new();
    let mut current = None;
    loop {
        let pool = run_dir.parent().and_then(|all| std::fs::read_dir(all).ok()).into_iter().flatten().flatten();
        let pool = pool.filter(|entry| entry.file_name().to_string_lossy().starts_with("pool-"));
        for dir in std::iter::once(run_dir.clone()).chain(pool.map(|entry| entry.path())) {
            let vsock = dir.join(VSOCK_SOCKET);
            if inode(&vsock).is_some_and(|now| ours.contains_key(&now)) || !lives(&dir) {
                continue;
            }
            let _ = std::fs::remove_file(&vsock);
            // It may have been given away this moment, or end: the next look finds it.
            if let Ok(listener) = UnixListener::bind(&vsock)
                && let Some(now) = inode(&vsock)
            {
                let accepting = tokio::spawn(accept(listener, forwarder.clone(), seen.clone()));
                ours.insert(now, AbortOnDropHandle::new(accepting));
            }
        }
        let now = inode(&run_dir.join(VSOCK_SOCKET)).filter(|now| ours.contains_key(now));
        if now != current {
            // With it go the connections to the VMM before.
            current.and_then(|before| ours.remove(&before));
            seen.lives.fetch_add(usize::from(now.is_some()), Ordering::SeqCst);
            current = now;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The file's number, which no other has while our listener is there.
fn inode(path: &Path) -> Option<u64> {
    path.metadata().ok().map(|found| found.ino())
}

/// Whether a VMM serves this run directory, rather than having left it behind.
fn lives(dir: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(dir.join(CONTROL_SOCKET)).is_ok()
}

async fn accept(listener: UnixListener, forwarder: PathBuf, seen: Arc<Seen>) {
    let mut connections = JoinSet::new();
    while let Ok((host, _)) = listener.accept().await {
        connections.spawn(connection(host, forwarder.clone(), seen.clone()));
    }
}

async fn connection(mut host: UnixStream, forwarder: impl AsRef<Path>, seen: Arc<Seen>) {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let Ok(byte) = host.read_u8().await else { return };
        line.push(byte);
    }
    if line != b"CONNECT 2\n" || seen.hiccup.swap(false, Ordering::SeqCst) {
        return;
    }
    let Ok(mut agent) = UnixStream::connect(forwarder).await else { return };
    if host.write_all(b"OK 1073741824\n").await.is_ok() {
        seen.connections.fetch_add(1, Ordering::SeqCst);
        let _ = copy_bidirectional(&mut host, &mut agent).await;
    }
}
