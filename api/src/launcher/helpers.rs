//! The processes beside the supervisor that VMMs depend on: the warden, where none is configured, and the dialler. Both outlive us and are
//! found again by their sockets; both end by themselves when nobody needs them any more.

use crate::config::Config;
use crate::host;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{WaitId, WaitIdOptions, waitid};
use stasis_warden::client::Client;
use stasis_warden::jail::Command;
use stasis_warden::jail::start::{Process, start};
use stasis_warden::protocol::Request;
use stasis_warden::server::bind_at;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a warden may take to listen.
const WARDEN: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);
/// Seconds without a supervisor and without a VMM after which a warden that we started ends.
const WARDEN_IDLE_S: &str = "10";

/// A warden that we have started, now or earlier: the one at our data directory's socket, if its programs are those that we would start.
pub(super) fn warden_of_ours(config: &Config, vmm: &Path) -> io::Result<Client> {
    let socket = config.data_dir.join("warden.sock");
    let program = host::beside("stasis-warden")?;
    let (dialler, unpacker) = (host::beside("stasis-dialler")?, host::beside("stasis-unpack")?);
    let client = Client::new(&socket);
    if let Ok(hello) = client.hello() {
        let now = [vmm, &dialler, &unpacker].map(|path| stasis_warden::warden::fingerprint(path).unwrap_or_default());
        if hello.programs == now {
            return Ok(client);
        }
        tracing::info!("the programs have changed: the warden is started anew");
        let _ = client.call(&Request::Retire, &[]);
    }
    let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
    let trees = config.data_dir.join("trees");
    let mut arguments = Vec::new();
    for (flag, path) in [
        (c"--socket", socket.as_path()),
        (c"--vmm", vmm),
        (c"--dialler", dialler.as_path()),
        (c"--unpacker", unpacker.as_path()),
        (c"--trees", trees.as_path()),
    ] {
        arguments.extend([flag.to_owned(), text(path)?]);
    }
    arguments.extend([c"--until-idle".to_owned(), CString::new(WARDEN_IDLE_S)?]);
    let log = File::options().append(true).create(true).open(config.data_dir.join("warden.log"))?;
    let note = File::create(config.data_dir.join("warden.json"))?;
    let command = Command {
        program: text(&program)?,
        arguments,
        environment: Vec::new(),
        log: log.into(),
        descriptors: Vec::new(),
        note,
    };
    let process = start(&command, None).map_err(super::other)?;
    let began = Instant::now();
    loop {
        match client.hello() {
            Ok(_) => return wait_for_end(process).map(|()| client),
            Err(error) if began.elapsed() > WARDEN => return Err(super::other(error)),
            Err(_) => {}
        }
        // It ends at once when it cannot do its work; else this is the pause before the next look.
        let mut ended = [rustix::event::PollFd::new(&process.pidfd, rustix::event::PollFlags::IN)];
        let pause = rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
        if rustix::event::poll(&mut ended, Some(&pause)).is_ok_and(|ready| ready > 0) {
            let log = std::fs::read_to_string(config.data_dir.join("warden.log")).unwrap_or_default();
            let last = log.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it left no reason").to_owned();
            return Err(io::Error::other(format!("the warden ended: {last}")));
        }
    }
}

/// The configured warden at `socket`, which may be starting, too.
pub(super) fn warden_at(socket: &Path) -> io::Result<Client> {
    let (client, began) = (Client::new(socket), Instant::now());
    loop {
        match client.hello() {
            Ok(_) => return Ok(client),
            Err(error) if began.elapsed() > WARDEN => return Err(super::other(error)),
            Err(_) => std::thread::park_timeout(LOOK),
        }
    }
}

/// Waits for the end of a helper that is our child, on a thread of its own: the kernel keeps it until then.
pub(super) fn wait_for_end(helper: Process) -> io::Result<()> {
    let wait = move || {
        // Its descriptor does not block.
        let mut readable = [rustix::event::PollFd::new(&helper.pidfd, rustix::event::PollFlags::IN)];
        while rustix::event::poll(&mut readable, None) == Err(rustix::io::Errno::INTR) {}
        let ended = waitid(WaitId::PidFd(helper.pidfd.as_fd()), WaitIdOptions::EXITED);
        tracing::debug!(pid = helper.note.pid, ?ended, "a helper ended, or is not our child");
    };
    std::thread::Builder::new().name("helper".to_owned()).spawn(wait).map(drop)
}

/// `HOST:PORT` to which requests to a bucket go.
pub(super) fn place(endpoint: &str, bucket: &str, path_style: bool) -> Result<String, String> {
    let uri: http::Uri = endpoint.parse().map_err(|error| format!("store.endpoint {endpoint:?} is no URL: {error}"))?;
    let (Some(scheme), Some(host)) = (uri.scheme_str(), uri.host()) else {
        return Err(format!("store.endpoint {endpoint:?} has no scheme and host"));
    };
    let port = uri.port_u16().unwrap_or(if scheme == "http" { 80 } else { 443 });
    Ok(if path_style { format!("{host}:{port}") } else { format!("{bucket}.{host}:{port}") })
}

/// The dialler for one place.
#[derive(Debug)]
pub(super) struct Dialler {
    place: String,
    socket: PathBuf,
    /// A connection that keeps it from ending while we run, and says whether it is there.
    held: Mutex<Option<OwnedFd>>,
}

impl Dialler {
    /// That for `place`, with its socket in the data directory.
    pub(super) fn new(data_dir: &Path, place: &str) -> Self {
        let name = &blake3::hash(place.as_bytes()).to_hex()[..12];
        Self { place: place.to_owned(), socket: data_dir.join(format!("dialler-{name}.sock")), held: Mutex::default() }
    }

    /// A new connection; `start` starts one with a listening socket, a log and a note when nobody listens.
    pub(super) fn connect(
        &self,
        start: impl FnOnce(&str, OwnedFd, OwnedFd, File) -> io::Result<()>,
    ) -> io::Result<OwnedFd> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(connection) = self.try_connect() {
            if held.is_none() {
                *held = self.try_connect().ok();
            }
            return Ok(connection);
        }
        let listener = bind_at(&self.socket)?;
        let log = File::options().append(true).create(true).open(self.socket.with_extension("log"))?;
        let note = File::create(self.socket.with_extension("json"))?;
        start(&self.place, listener, log.into(), note)?;
        *held = Some(self.try_connect()?);
        self.try_connect()
    }

    fn try_connect(&self) -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(&self.socket)?)?;
        Ok(socket)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_to_a_bucket_go_to_one_place() {
        for (endpoint, path_style, expected) in [
            ("http://127.0.0.1:9000", true, "127.0.0.1:9000"),
            ("https://s3.eu-central-1.amazonaws.com", false, "b.s3.eu-central-1.amazonaws.com:443"),
            ("http://localhost", true, "localhost:80"),
            ("https://[::1]:9000", true, "[::1]:9000"),
        ] {
            assert_eq!(place(endpoint, "b", path_style).as_deref(), Ok(expected));
        }
        assert!(place("nonsense", "b", true).is_err());
    }
}
