//! A guest without a guest: whoever connects to the vsock socket of a sandbox reaches the forwarder of a real agent on this machine, so
//! `127.0.0.1` of the "guest" is this machine's. Pulse guests have no vsock, so the socket in their run directory is ours to make; it is made
//! anew after every wake, and all connections break when the VMM goes.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use stasis_vmm::control::{CONTROL_SOCKET, VSOCK_SOCKET};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};

use crate::host;
use crate::vmm::{Error, until};

const LOOK: Duration = Duration::from_millis(3);

/// The guest of one sandbox. Everything of it ends when it is dropped.
pub struct Guest {
    agent: Child,
    _dir: tempfile::TempDir,
    task: JoinHandle<()>,
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
        let task = tokio::spawn(live(run_dir.clone(), forwarder, seen.clone()));
        until("the guest's vsock", || Ok((seen.lives.load(Ordering::SeqCst) > 0).then_some(()))).await?;
        Ok(Self { agent, _dir: dir, task, seen })
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
        self.task.abort();
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

async fn live(run_dir: PathBuf, forwarder: PathBuf, seen: Arc<Seen>) {
    let vsock = run_dir.join(VSOCK_SOCKET);
    loop {
        if !run_dir.join(CONTROL_SOCKET).exists() {
            tokio::time::sleep(LOOK).await;
            continue;
        }
        let _ = std::fs::remove_file(&vsock);
        let Ok(listener) = UnixListener::bind(&vsock) else { continue };
        seen.lives.fetch_add(1, Ordering::SeqCst);
        let mut connections = JoinSet::new();
        let Ok(ours) = vsock.metadata() else { continue };
        // The next VMM's directory comes with a socket of its own.
        while vsock.metadata().is_ok_and(|now| now.ino() == ours.ino()) {
            tokio::select! {
                accepted = listener.accept() => if let Ok((host, _)) = accepted {
                    connections.spawn(connection(host, forwarder.clone(), seen.clone()));
                },
                () = tokio::time::sleep(LOOK) => {}
            }
        }
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
