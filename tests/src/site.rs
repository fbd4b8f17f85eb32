//! A site of a test's own, for Debian guests with networks: this process is the host, and a network namespace behind a veth is everything else.
//! Nothing of it is connected to the machine's network.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::time::Instant;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use serde_json::{Value, json};

use crate::host;
use crate::service::{Options, Service};
use crate::vmm::Error;

/// What every name leads to.
pub const SHARED: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// The site's name server.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 1);
/// The host's own address.
pub const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 2);

/// Why such a site cannot be made here, or no Debian guest runs.
pub fn lacking() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    let images = host::built("images/templates/debian-bookworm/template.json");
    host::no_linux_guest().or_else(|| host::missing(&images, "guest-images/linux/build makes it"))
}

#[expect(clippy::disallowed_methods, reason = "the test's own network is made with what people use")]
fn ip(arguments: &str) -> Result<(), Error> {
    let output = std::process::Command::new("ip").args(arguments.split(' ')).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// Leaves the calling thread's network for a new one.
fn fresh() -> Result<OwnedFd, Error> {
    // SAFETY: descriptors stay shared between threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
    Ok(File::open("/proc/thread-self/ns/net")?.into())
}

/// Makes the site while the process has one thread: all of it, and the supervisor that it starts, is on the host then. `serve` opens the
/// servers' sockets, which stay in the namespace that they were made in, on [`SHARED`] and `addresses`. A name server has every name at
/// [`SHARED`].
pub fn lay_out(addresses: &[Ipv4Addr], serve: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    let home = fresh()?;
    ip("link set lo up")?;
    // Its sockets keep it.
    fresh()?;
    ip("link set lo up")?;
    let back = format!("/proc/{}/fd/{}", std::process::id(), home.as_raw_fd());
    ip(&format!("link add lan type veth peer name wan netns {back}"))?;
    ip(&format!("addr add {NAME_SERVER}/24 dev lan"))?;
    ip("link set lan up")?;
    for address in addresses.iter().chain([&SHARED]) {
        ip(&format!("addr add {address}/32 dev lo"))?;
    }
    answer_names(UdpSocket::bind((NAME_SERVER, 53))?);
    serve()?;
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))?;
    ip(&format!("addr add {HOST}/24 dev wan"))?;
    ip("link set wan up")?;
    ip(&format!("route add default via {NAME_SERVER}"))
}

/// HTTP that says 200 to everything.
pub fn serve_http(listener: TcpListener) {
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut head = [0; 4096];
                let _ = stream.read(&mut head);
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nok\n");
            });
        }
    });
}

/// Sends datagrams back.
pub fn echo(socket: UdpSocket) {
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

fn answer_names(socket: UdpSocket) {
    std::thread::spawn(move || {
        let mut question = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut question) {
            let Some(mut answer) = question.get(..length).map(<[u8]>::to_vec) else { continue };
            let Some(end) = answer.iter().skip(12).position(|octet| *octet == 0).map(|end| end + 12 + 5) else {
                continue;
            };
            let is_ipv4 = answer.get(end - 4..end - 2) == Some(&[0, 1]);
            answer.truncate(end);
            // A response without errors, recursion available; one question, one answer or none.
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_ipv4), 0, 0, 0, 0]);
            if is_ipv4 {
                answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
                answer.extend_from_slice(&SHARED.octets());
            }
            let _ = socket.send_to(&answer, from);
        }
    });
}

/// A service on the site's host, whose sandboxes are Debian guests with networks.
pub struct Site {
    /// The service.
    pub service: Service,
    began: Instant,
    _config: tempfile::TempDir,
}

impl Site {
    /// Starts it, with more lines of its configuration's `[network]`.
    pub async fn start(network: &str) -> Result<Self, Error> {
        let config = tempfile::tempdir()?;
        let file = config.path().join("stasis.toml");
        let text = format!("[network]\nenabled = \"on\"\ndns = [\"{NAME_SERVER}:53\"]\n{network}\n");
        std::fs::write(&file, text)?;
        let mut options = Options { images: Some(host::built("images")), ..Options::default() };
        let file = file.display().to_string();
        let more = [
            ("STASIS_CONFIG", file.as_str()),
            ("STASIS_DEADLINES_BOOT_MS", "300000"),
            ("STASIS_DEADLINES_WAKE_MS", "60000"),
            ("STASIS_DEADLINES_CAPTURE_MS", "240000"),
        ];
        options.environment.extend(more.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Ok(Self { service: Service::start(options).await?, began: Instant::now(), _config: config })
    }

    /// The rig is slow, and a test that says nothing for minutes looks like one that hangs.
    pub fn say(&self, what: &str) {
        eprintln!("{:7.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    /// A small sandbox with this policy; answers its id.
    pub async fn create(&self, policy: Value) -> Result<String, Error> {
        let body = json!({
            "template_name": "system/debian:bookworm", "memory": 512, "vcpu": 1, "network_policy": policy,
        });
        let made = self.service.call("POST", "/v1/sandbox", Some(body)).await?;
        if made.status != 201 {
            self.tell_logs();
        }
        Ok(made.expect(201)?.text("id"))
    }

    /// What went wrong is in these, and the scratch directory of the rig ends with it.
    fn tell_logs(&self) {
        let data = self.service.dir.path().join("d");
        eprintln!("{}", self.service.log());
        for directory in [data.join("run"), data.clone()] {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                for log in [entry.path(), entry.path().join("vmm.log"), entry.path().join("exit.json")] {
                    let told = log.extension().is_some_and(|kind| kind == "log") || log.ends_with("exit.json");
                    if let (true, Ok(text)) = (told, std::fs::read_to_string(&log)) {
                        let from = text.len().saturating_sub(4000);
                        eprintln!("{}: {}", log.display(), text.get(from..).unwrap_or(&text));
                    }
                }
            }
        }
    }

    /// Runs a command in a guest: its answer, whatever its exit status.
    pub async fn run(&self, id: &str, command: &str) -> Result<Value, Error> {
        let body = json!({"command": command, "timeout": 240});
        let path = format!("/v1/sandbox/{id}/process/execute");
        Ok(self.service.call("POST", &path, Some(body)).await?.expect(200)?.json)
    }

    /// What its network did.
    pub async fn network(&self, id: &str) -> Result<Value, Error> {
        Ok(self.service.call("GET", &format!("/v1/sandbox/{id}/network"), None).await?.expect(200)?.json)
    }

    /// What was refused, as `address name reason`, `-` for what is not known.
    pub async fn refusals(&self, id: &str) -> Result<Vec<String>, Error> {
        let network = self.network(id).await?;
        let refusals = network["refusals"].as_array().cloned().unwrap_or_default();
        let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
        let line = |refusal: &Value| ["address", "name", "reason"].map(|field| word(&refusal[field])).join(" ");
        Ok(refusals.iter().map(line).collect())
    }
}

/// Whether a file below `dir` holds these bytes; which.
pub fn files_holding(dir: &Path, bytes: &[u8]) -> Vec<std::path::PathBuf> {
    let (mut found, mut left) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => left.push(entry.path()),
                Ok(kind) if kind.is_file() && holds(&std::fs::read(entry.path()).unwrap_or_default(), bytes) => {
                    found.push(entry.path());
                }
                _ => {}
            }
        }
    }
    found
}

/// Whether `bytes` are somewhere in `all`. The C library's search: a guest's memory is large, and this code is not optimised.
pub fn holds(all: &[u8], bytes: &[u8]) -> bool {
    // SAFETY: reads the two slices, by their lengths.
    let found = unsafe { libc::memmem(all.as_ptr().cast(), all.len(), bytes.as_ptr().cast(), bytes.len()) };
    !found.is_null()
}
