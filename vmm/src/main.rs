//! `stasis-vmm`: the process of one sandbox. It takes over the descriptors it was started with, waits for one machine, and ends with it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use stasis_snapshot::granted::StoreClient;
use stasis_vmm::control::fds::Inbox;
use stasis_vmm::control::refusal::chain;
use stasis_vmm::control::server::{Finished, Settings, serve};
use stasis_vmm::control::types::ExitNote;
use stasis_vmm::dialled::Dialled;
use stasis_vmm::inherited::{Inherited, Named};
use stasis_vmm::limits::Limits;
use stasis_vmm::seccomp::{self, Role};
use stasis_vmm::vcpu::Ended;
use tokio::signal::unix::{SignalKind, signal};

/// Runs one virtual machine, told what to do over its control socket.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Id of the sandbox, for logs and answers.
    #[arg(long)]
    id: String,
    /// What is logged, as for RUST_LOG: the environment is empty.
    #[arg(long, default_value = "error")]
    log: String,
    /// An inherited descriptor, as NAME=NUMBER.
    #[arg(long)]
    fd: Vec<Named>,
    /// Do without the walls that the process puts up around itself.
    #[arg(long)]
    unconfined: bool,
    /// An MSR (number) that a restore may leave out when this host refuses it.
    #[arg(long, value_parser = msr)]
    allow_msr: Vec<u32>,
    #[command(flatten)]
    limits: Limits,
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
    let mut arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&arguments.log))
        .with_writer(std::io::stderr)
        .init();
    tracing::debug!(version = env!("CARGO_PKG_VERSION"), unconfined = arguments.unconfined, "starts");
    if let Err(error) = make_room_for_descriptors() {
        tracing::debug!(%error, "the descriptor table stays small");
    }
    let named = std::mem::take(&mut arguments.fd);
    // SAFETY: whoever starts a VMM gives it these, nothing else here has touched them, and this is the only call.
    let inherited = match unsafe { Inherited::take(named) } {
        Ok(inherited) => inherited,
        Err(error) => {
            tracing::error!(%error, "cannot use the inherited descriptors");
            return ExitCode::FAILURE;
        }
    };
    let exit_note = match inherited.exit_note.try_clone() {
        Ok(file) => file,
        Err(error) => {
            tracing::error!(%error, "cannot keep the exit note");
            return ExitCode::FAILURE;
        }
    };
    if !arguments.unconfined
        && let Err(error) = stasis_vmm::confine::process(&exit_note)
    {
        let reason = format!("cannot confine itself: {}", chain(&error));
        tracing::error!(reason);
        leave_note(&exit_note, &ExitNote { status: 1, reason });
        return ExitCode::FAILURE;
    }
    let note = match start(arguments, inherited) {
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
    leave_note(&exit_note, &note);
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

/// Leaves the note with one write, so that nobody reads half of it.
fn leave_note(file: &File, note: &ExitNote) {
    let written = serde_json::to_vec(note).map_err(Into::into).and_then(|json| file.write_all_at(&json, 0));
    if let Err(error) = written {
        tracing::warn!(%error, reason = note.reason, "cannot leave the exit note");
    }
}

fn start(arguments: Arguments, inherited: Inherited) -> Result<Finished, Box<dyn std::error::Error>> {
    let Inherited { control, files, host, dialler, .. } = inherited;
    let inbox = Inbox::default();
    inbox.listen(files)?;
    // Made ahead: it takes a millisecond, which the first request would wait for.
    let store = StoreClient::new(Arc::new(Dialled(dialler)))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("vmm-worker")
        .on_thread_start(|| seccomp::enter(Role::Worker))
        .thread_keep_alive(stasis_vmm::heap::IDLE_THREAD)
        .enable_all()
        .build()?;
    let finished = runtime.block_on(async {
        control.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(control)?;
        let mut terminate = signal(SignalKind::terminate())?;
        seccomp::enter(Role::Worker);
        let settings = Settings {
            id: arguments.id,
            host: Arc::new(host),
            allowed_msrs: arguments.allow_msr,
            store,
            limits: arguments.limits,
        };
        Ok::<_, std::io::Error>(tokio::select! {
            finished = serve(listener, inbox, settings) => finished,
            _ = terminate.recv() => Finished::Shutdown,
        })
    });
    // A capture or a guest that does not stop must not hold the process: everything in it is given up with it.
    runtime.shutdown_background();
    Ok(finished?)
}
