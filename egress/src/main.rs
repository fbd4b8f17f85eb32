//! `stasis-egress`: the proxy as a process.

use std::error::Error;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use clap::Parser;
use stasis_egress::addresses::{OperatorRanges, Range};
use stasis_egress::config::{Limits, Settings, name_servers};
use stasis_egress::control::server::Server;
use stasis_egress::sandboxes::Sandboxes;
use stasis_egress::{chain, confine};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;

/// The egress proxy and resolver of a host's sandboxes.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Unix socket to listen on for the supervisor. One that is there is replaced.
    #[arg(long, value_name = "PATH", required_unless_present = "control_fd")]
    control_socket: Option<PathBuf>,
    /// The same as a listening descriptor that was inherited.
    #[arg(long, value_name = "N", conflicts_with = "control_socket")]
    control_fd: Option<RawFd>,
    /// User that may speak on it beside root and this process's own.
    #[arg(long, value_name = "UID")]
    peer_uid: Vec<u32>,
    /// Name server to ask; those of --resolv-conf when there is none.
    #[arg(long, value_name = "ADDRESS:PORT")]
    upstream: Vec<SocketAddr>,
    /// Where the host's name servers are read from, once.
    #[arg(long, value_name = "PATH", default_value = "/etc/resolv.conf")]
    resolv_conf: PathBuf,
    /// Range that may be reached though it is not public.
    #[arg(long, value_name = "CIDR", value_parser = range)]
    permit: Vec<Range>,
    /// Range that is never reached.
    #[arg(long, value_name = "CIDR", value_parser = range)]
    refuse: Vec<Range>,
    /// File of certificates (PEM) that servers are trusted by beside the public ones.
    #[arg(long, value_name = "PATH")]
    extra_roots: Vec<PathBuf>,
    /// Lets a ClientHello pass by its outer name although another one may be hidden in it.
    #[arg(long)]
    pass_encrypted_hello: bool,
    /// Connections of one sandbox at once.
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    max_connections: u32,
    /// Threads.
    #[arg(long, value_name = "N", default_value = "2")]
    workers: NonZeroUsize,
}

fn range(text: &str) -> Result<Range, String> {
    Range::parse(text).ok_or_else(|| format!("{text:?} is not an IPv4 range such as 10.0.0.0/8"))
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::INFO).init();
    match run(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&*error), "the egress proxy cannot run");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let started = SystemTime::now();
    let settings = settings(&arguments)?;
    let listener = control(&arguments)?;
    let mut confined_by = confine::limit()?;
    let sandboxes = Arc::new(Sandboxes::new(settings)?);
    // Its threads are there when it is built, so that the filter takes all of them.
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(arguments.workers.get()).enable_all().build()?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::UnixListener::from_std(listener)?
    };
    confine::filter_calls()?;
    confined_by.push("seccomp".to_owned());
    tracing::info!(?confined_by, upstreams = ?sandboxes.upstreams(), "the egress proxy runs");
    runtime.block_on(Server { sandboxes, peers: arguments.peer_uid, confined_by, started }.serve(listener));
    Ok(())
}

fn settings(arguments: &Arguments) -> Result<Settings, Box<dyn Error>> {
    let mut extra_roots = Vec::new();
    for path in &arguments.extra_roots {
        for certificate in
            CertificateDer::pem_file_iter(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?
        {
            extra_roots.push(certificate.map_err(|e| format!("cannot read {}: {e}", path.display()))?.to_vec());
        }
    }
    let upstreams = if arguments.upstream.is_empty() {
        let text = std::fs::read_to_string(&arguments.resolv_conf);
        name_servers(&text.map_err(|e| format!("cannot read {}: {e}", arguments.resolv_conf.display()))?)
    } else {
        arguments.upstream.clone()
    };
    let limits = Limits { connections: arguments.max_connections, ..Limits::default() };
    Ok(Settings {
        ranges: OperatorRanges { permitted: arguments.permit.clone(), refused: arguments.refuse.clone() },
        upstreams,
        extra_roots,
        pass_encrypted_hello: arguments.pass_encrypted_hello,
        limits,
        ..Settings::default()
    })
}

fn control(arguments: &Arguments) -> Result<UnixListener, Box<dyn Error>> {
    let listener = match (&arguments.control_socket, arguments.control_fd) {
        (Some(path), _) => listen_at(path).map_err(|e| format!("cannot listen on {}: {e}", path.display()))?,
        (None, Some(number)) if number > 2 => {
            // SAFETY: whoever started this process says that it left a descriptor of this number for it; nothing else here has taken it.
            UnixListener::from(unsafe { OwnedFd::from_raw_fd(number) })
        }
        (None, _) => return Err("no control socket".into()),
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn listen_at(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => UnixListener::bind(path),
    }
}
