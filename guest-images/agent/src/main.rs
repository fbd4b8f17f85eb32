//! The guest agent: PID 1 of a sandbox, and the one who runs commands in it. `lib.rs` holds the protocol it speaks.
//!
//! - `init`: what PID 1 does before it serves: modules, the root disk, mounts, loopback
//! - `reaper`: the one place that waits for child processes
//! - `exec`: one command, its output and its end
//! - `git`: one run of git
//! - `image`: what a container image says about the processes in it, and its program
//! - `files`: the guest's files
//! - `terminals`: shells on pseudo-terminals
//! - `trust`: the authority of the egress proxy in the trust store, and the variables that name it
//! - `accounts`: users and groups by name
//! - `network`: the interface, and the connections of before a restore
//! - `wake`: clock and random pool after a restore
//! - `server`: HTTP over vsock
//! - `small_writes`: writes to vsock that the kernel always has memory for
//! - `forward`: connections to TCP ports of the guest
//!
//! One thread runs everything: tokio's current-thread runtime. No task blocks for longer than a `fork` takes; operations on files run on
//! a few threads beside it, which may.

mod accounts;
mod exec;
mod files;
mod forward;
mod git;
mod image;
mod init;
mod network;
mod reaper;
mod server;
mod small_writes;
mod terminals;
mod trust;
mod wake;

use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use reaper::{Adoption, Reaper};
use stasis_agent::protocol::{AGENT_PORT, FORWARD_PORT};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

/// Threads for operations on files, and how long an idle one stays.
const FILE_THREADS: usize = 16;
const FILE_THREAD_IDLE: Duration = Duration::from_secs(5);

const USAGE: &str = "usage: stasis-agent            serve on vsock, and first set the guest up when PID 1
       stasis-agent --unix PATH  serve on unix sockets: the agent on PATH, the forwarder on PATH_2";

fn main() -> ExitCode {
    let is_init = std::process::id() == 1;
    let ended = run(is_init, &std::env::args_os().skip(1).collect::<Vec<_>>());
    if let Err(error) = &ended {
        report(error.as_ref());
    }
    if is_init {
        init::shut_down();
    }
    if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints an error and its causes.
fn report(error: &dyn Error) {
    eprintln!("stasis-agent: {}", chain(error));
}

/// An error and its causes on one line.
fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        line = format!("{line}: {inner}");
        cause = inner.source();
    }
    line
}

fn run(is_init: bool, arguments: &[OsString]) -> Result<(), Box<dyn Error>> {
    // The kernel hands PID 1 the words of its command line that it does not know.
    let socket = match arguments {
        _ if is_init => None,
        [] => None,
        [flag, path] if flag == "--unix" => Some(PathBuf::from(path)),
        _ => return Err(USAGE.into()),
    };
    if is_init {
        init::set_up()?;
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(FILE_THREADS)
        .thread_keep_alive(FILE_THREAD_IDLE)
        .build()?
        .block_on(serve(is_init, socket))
}

/// Serves until a signal asks to stop.
async fn serve(is_init: bool, socket: Option<PathBuf>) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let reaper = Arc::new(Reaper::start(if is_init { Adoption::Everyone } else { Adoption::OwnChildren })?);
    let router = server::router(reaper);
    let served = async {
        if let Some(path) = socket {
            let mut beside = path.clone().into_os_string();
            beside.push(format!("_{FORWARD_PORT}"));
            let (agent, forwarder) = (listen_unix(&path)?, listen_unix(Path::new(&beside))?);
            ready();
            tokio::join!(server::serve(agent, router), forward::serve(forwarder));
        } else {
            let (agent, forwarder) = (listen_vsock(AGENT_PORT)?, listen_vsock(FORWARD_PORT)?);
            ready();
            tokio::join!(server::serve(agent, router), forward::serve(forwarder));
        }
        Ok::<(), Box<dyn Error>>(())
    };
    tokio::select! {
        ended = served => ended,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

fn listen_unix(path: &Path) -> Result<UnixListener, Box<dyn Error>> {
    UnixListener::bind(path).map_err(|source| format!("cannot listen on {}: {source}", path.display()).into())
}

fn listen_vsock(port: u32) -> Result<VsockListener, Box<dyn Error>> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .map_err(|source| format!("cannot listen on vsock port {port}: {source}").into())
}

/// Who watches the console waits for this line.
fn ready() {
    eprintln!("stasis-agent: ready");
}
