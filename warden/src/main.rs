//! `stasis-warden`: the privileged helper as a process.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser;
use stasis_warden::jail::Users;
use stasis_warden::protocol::{Refusal, RefusalCode};
use stasis_warden::server::{bind_at, run};
use stasis_warden::warden::{Settings, Warden};

/// Does what needs root for a supervisor that runs without it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen.
    #[arg(long)]
    socket: PathBuf,
    /// A user, by name or number, that may ask besides root; the socket belongs to it.
    #[arg(long)]
    user: Option<String>,
    /// The VMM's program.
    #[arg(long)]
    vmm: PathBuf,
    /// The dialler's program.
    #[arg(long)]
    dialler: PathBuf,
    /// The unpacker's program.
    #[arg(long)]
    unpacker: PathBuf,
    /// A directory of its own.
    #[arg(long)]
    trees: PathBuf,
    /// Holds what a restart must find of networks; gone after a reboot.
    #[arg(long, default_value = "/run/stasis-warden/networks")]
    networks: PathBuf,
    /// The number before that of the first user of a jailed process; 4194304 from it on are used.
    #[arg(long, default_value_t = Users::default().first)]
    first_user: u32,
    /// Divide the control group that this process is in, which a service manager has delegated to it.
    #[arg(long)]
    delegated: bool,
    /// End when nobody has been connected and nothing of it has run for so many seconds.
    #[arg(long)]
    until_idle: Option<u64>,
    /// What is logged, as for RUST_LOG.
    #[arg(long, default_value = "info")]
    log: String,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(&arguments.log))
        .with_writer(std::io::stderr)
        .init();
    match start(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = Refusal::of(RefusalCode::Failed, &*error).message, "ends");
            ExitCode::FAILURE
        }
    }
}

fn start(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    // Trees are for users that own nothing in them; nothing else of the warden is for anybody else.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let user = arguments.user.as_deref().map(number_of).transpose()?;
    let warden = Arc::new(Warden::new(&Settings {
        vmm: arguments.vmm.clone(),
        dialler: arguments.dialler.clone(),
        unpacker: arguments.unpacker.clone(),
        trees: arguments.trees.clone(),
        users: Users { first: arguments.first_user },
        delegated: arguments.delegated,
        networks: arguments.networks.clone(),
    })?);
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let socket = bind_at(&arguments.socket)?;
    if let Some(user) = user {
        std::os::unix::fs::chown(&arguments.socket, Some(user), None)?;
    }
    let users: Vec<u32> = [Some(0), Some(rustix::process::geteuid().as_raw()), user].into_iter().flatten().collect();
    let connections = Arc::new(AtomicUsize::new(0));
    if let Some(seconds) = arguments.until_idle {
        end_when_idle(seconds, warden.clone(), connections.clone())?;
    }
    Ok(run(&socket, &users, &warden, &connections)?)
}

/// The number of a user, from `/etc/passwd`.
fn number_of(user: &str) -> std::io::Result<u32> {
    if let Ok(number) = user.parse() {
        return Ok(number);
    }
    let users = std::fs::read_to_string("/etc/passwd")?;
    let found =
        users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|fields| fields.first() == Some(&user));
    found
        .and_then(|fields| fields.get(2)?.parse().ok())
        .ok_or_else(|| std::io::Error::other(format!("there is no user {user}")))
}

fn end_when_idle(seconds: u64, warden: Arc<Warden>, connections: Arc<AtomicUsize>) -> std::io::Result<()> {
    let look = move || {
        let mut idle = 0;
        while idle < seconds.max(1) {
            std::thread::park_timeout(Duration::from_secs(1));
            let used = connections.load(Ordering::Acquire) > 0 || warden.children().count() > 0;
            idle = if used { 0 } else { idle + 1 };
        }
        tracing::info!("nobody needs it");
        std::process::exit(0)
    };
    std::thread::Builder::new().name("idle".to_owned()).spawn(look).map(drop)
}
