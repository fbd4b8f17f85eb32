//! `stasis-vmm`: the process of one sandbox. It makes its sockets, waits for one machine, and ends with it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use stasis_vmm::control::fds::Inbox;
use stasis_vmm::control::server::{Finished, Settings, chain, serve};
use stasis_vmm::control::types::ExitNote;
use stasis_vmm::control::{CONTROL_SOCKET, EXIT_NOTE, FDS_SOCKET};
use stasis_vmm::vcpu::Ended;
use tokio::signal::unix::{SignalKind, signal};

/// Runs one virtual machine, told what to do over `control.sock` in its run directory.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Id of the sandbox, for logs and answers.
    #[arg(long)]
    id: String,
    /// Directory for sockets and logs; made if it is not there.
    #[arg(long)]
    run_dir: PathBuf,
    /// An MSR (number) that a restore may leave out when this host refuses it.
    #[arg(long, value_parser = msr)]
    allow_msr: Vec<u32>,
}

fn msr(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|e| e.to_string())
}

fn main() -> ExitCode {
    stasis_vmm::heap::keep_freed();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let mut arguments = Arguments::parse();
    if let Err(error) = make_room_for_descriptors() {
        tracing::debug!(%error, "the descriptor table stays small");
    }
    // From here on it is ".": a run directory may get another name when a VMM that was started ahead is given a sandbox.
    if let Err(error) = enter(&arguments.run_dir) {
        tracing::error!(run_dir = %arguments.run_dir.display(), %error, "cannot use the run directory");
        return ExitCode::FAILURE;
    }
    arguments.run_dir = PathBuf::from(".");
    let run_dir = arguments.run_dir.clone();
    let note = match start(arguments) {
        Ok(Finished::Shutdown) => ExitNote { status: 0, reason: "shutdown was asked for".to_owned() },
        Ok(Finished::Machine(Ended::ByGuest(reason))) => {
            ExitNote { status: 2, reason: format!("the guest ended: {reason}") }
        }
        Ok(Finished::Machine(Ended::Failed(reason))) => ExitNote { status: 3, reason },
        Ok(Finished::Machine(Ended::PageLost(reason))) => {
            ExitNote { status: 4, reason: format!("a page of the snapshot cannot be had: {reason}") }
        }
        Err(error) => ExitNote { status: 1, reason: format!("cannot start: {}", chain(&*error)) },
    };
    tracing::info!(status = note.status, reason = note.reason, "ends");
    leave_note(&run_dir, &note);
    ExitCode::from(u8::try_from(note.status).unwrap_or(u8::MAX))
}

/// Makes the descriptor table large while there is one thread: a process with several waits for an RCU grace period (10 to 20 ms, seen in
/// wakes) each time it outgrows its table.
fn make_room_for_descriptors() -> std::io::Result<()> {
    const ROOM: u64 = 4096;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let soft = ROOM.min(limit.maximum.unwrap_or(ROOM)).max(limit.current.unwrap_or(ROOM));
    let raised = rustix::process::Rlimit { current: Some(soft), maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised)?;
    let last = i32::try_from(soft.min(ROOM) - 1).map_err(std::io::Error::other)?;
    drop(rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), last)?);
    Ok(())
}

fn enter(run_dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(run_dir)?;
    std::env::set_current_dir(run_dir)
}

/// Leaves the note in one step, so that nobody reads half of it.
fn leave_note(run_dir: &Path, note: &ExitNote) {
    let temporary = run_dir.join("exit.json.new");
    let written = serde_json::to_vec(note)
        .map_err(Into::into)
        .and_then(|json| std::fs::write(&temporary, json))
        .and_then(|()| std::fs::rename(&temporary, run_dir.join(EXIT_NOTE)));
    if let Err(error) = written {
        tracing::warn!(%error, reason = note.reason, "cannot leave the exit note");
    }
}

fn start(arguments: Arguments) -> Result<Finished, Box<dyn std::error::Error>> {
    let files = Inbox::default();
    files.listen(std::os::unix::net::UnixListener::bind(arguments.run_dir.join(FDS_SOCKET))?)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("vmm-worker").enable_all().build()?;
    let finished = runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(arguments.run_dir.join(CONTROL_SOCKET))?;
        let mut terminate = signal(SignalKind::terminate())?;
        let settings = Settings { id: arguments.id, run_dir: arguments.run_dir, allowed_msrs: arguments.allow_msr };
        Ok::<_, std::io::Error>(tokio::select! {
            finished = serve(listener, files, settings) => finished,
            _ = terminate.recv() => Finished::Shutdown,
        })
    });
    // A capture or a guest that does not stop must not hold the process: everything in it is given up with it.
    runtime.shutdown_background();
    Ok(finished?)
}
