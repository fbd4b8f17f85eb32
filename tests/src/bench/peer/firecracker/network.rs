//! Firecracker's network beside ours: a namespace with a tap in it, made as its documentation makes it, the device that is put on the tap, and
//! what passes through it to and from a server in the namespace. That is a shorter way than that of our guests, which leave their
//! namespace by a veth and the host's rules: it favours the peer.

use std::fs::File;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use serde_json::{Value, json};
use stasis_agent::protocol::ExecRequest;
use stasis_api::agent_client::Agent;
use stasis_vmm::control::VSOCK_SOCKET;
use stasis_warden::network::{GATEWAY, GUEST, GUEST_HARDWARE, MTU};

use super::Firecracker;
use super::api::Api;
use crate::bench::case::Case;
use crate::bench::debian;
use crate::bench::network::{MANY, PASSES, PORT, TIMED, pass, programs, rate};
use crate::bench::samples::Samples;
use crate::host;
use crate::site::SHARED;
use crate::vmm::Error;

/// The tap's name in its namespace.
const TAP: &str = "tap0";
/// How long a guest may take to boot, and a command of it.
const BOOT: Duration = Duration::from_mins(2);
/// The vsock address of the guest.
const CID: u32 = 3;

/// The same rows as ours, but for networks that were made ahead, which it has none of.
pub async fn measure(program: &Path, case: &Case, samples: &mut Samples, notes: &mut Vec<String>) -> Result<(), Error> {
    timed(program, "", samples).await?;
    let others =
        (0..MANY).map(|_| in_a_namespace(None, lay_out).map(|((), here)| here)).collect::<Result<Vec<_>, _>>()?;
    timed(program, &format!(".among_{MANY}"), samples).await?;
    drop(others);
    match debian::lacking() {
        Some(why) => notes.push(format!("what passes through a guest's network device of Firecracker: {why}")),
        None => through_a_guest(program, case, samples).await?,
    }
    Ok(())
}

/// Does something in a network namespace, a new one if none is given, and answers the namespace with what came of it.
fn in_a_namespace<T: Send>(
    there: Option<File>,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<(T, File), Error> {
    let run = move || -> Result<(T, File), Error> {
        match there {
            Some(there) => move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))?,
            // SAFETY: descriptors stay shared between threads.
            None => unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?,
        }
        Ok((work()?, File::open("/proc/thread-self/ns/net")?))
    };
    std::thread::scope(|scope| scope.spawn(run).join()).map_err(|_| "a thread in a namespace panicked")?
}

/// Commands of `ip`, in one run.
fn ip(commands: &str) -> Result<(), Error> {
    #[expect(clippy::disallowed_methods, reason = "a peer's network is made with what its people use")]
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut input) = child.stdin.take() {
        input.write_all(commands.as_bytes())?;
    }
    let done = child.wait_with_output()?;
    if done.status.success() { Ok(()) } else { Err(format!("ip: {}", String::from_utf8_lossy(&done.stderr)).into()) }
}

/// The tap of a guest, and the address that its server has.
fn lay_out() -> Result<(), Error> {
    ip(&format!(
        "link set lo up\naddr add {SHARED}/32 dev lo\ntuntap add dev {TAP} mode tap vnet_hdr\naddr add {GATEWAY}/30 dev {TAP}\nlink set {TAP} up\n"
    ))
}

fn guest_address() -> String {
    GUEST_HARDWARE.map(|octet| format!("{octet:02x}")).join(":")
}

/// Puts the device on the tap.
async fn put_device(api: &Api) -> Result<(), Error> {
    let device = json!({"iface_id": "eth0", "host_dev_name": TAP, "guest_mac": guest_address()});
    api.call("PUT", "/network-interfaces/eth0", device).await
}

/// Times set-up (namespace, tap, device) and teardown (the namespace, when its VMM is gone). Starting the process counts for neither.
async fn timed(program: &Path, metric: &str, samples: &mut Samples) -> Result<(), Error> {
    for _ in 0..TIMED {
        let dir = host::scratch()?;
        let begun = Instant::now();
        let ((), there) = in_a_namespace(None, lay_out)?;
        let laid_out = begun.elapsed();
        let (vmm, there) = in_a_namespace(Some(there), || Firecracker::spawn(program, dir.path(), "timed"))?;
        let vmm = vmm.ready().await?;
        let begun = Instant::now();
        put_device(&vmm.api).await?;
        samples.time(format!("network_setup{metric}"), laid_out + begun.elapsed());
        drop(vmm);
        let begun = Instant::now();
        let ((), there) = in_a_namespace(Some(there), || ip(&format!("link delete {TAP}\n")))?;
        drop(there);
        samples.time(format!("network_teardown{metric}"), begun.elapsed());
    }
    Ok(())
}

/// The Debian guest's files, and what its kernel is told.
struct Debian {
    kernel: PathBuf,
    initramfs: PathBuf,
    /// A copy, which is written to.
    disk: PathBuf,
    cmdline: String,
}

impl Debian {
    fn copy(to: &Path) -> Result<Self, Error> {
        let images = host::built("images/templates/debian-bookworm");
        let said: Value = serde_json::from_slice(&std::fs::read(images.join("template.json"))?)?;
        let file = |field: &str| {
            said[field].as_str().map(|name| images.join(name)).ok_or(format!("no {field} in its template"))
        };
        let disk = to.join("rootfs.ext4");
        #[expect(clippy::disallowed_methods, reason = "the disk is sparse, and the standard library fills holes")]
        let copied = Command::new("cp").arg("--sparse=always").args([&file("rootfs")?, &disk]).status()?;
        if !copied.success() {
            return Err("cannot copy the guest's disk".into());
        }
        let cmdline = said["cmdline"].as_str().unwrap_or_default();
        let cmdline = format!("{cmdline} stasis.net={GUEST}/30,{GATEWAY},{GATEWAY},{MTU}");
        Ok(Self { kernel: file("kernel")?, initramfs: file("initramfs")?, disk, cmdline })
    }

    /// Boots it, with its network, and a vsock device for its agent at `vsock`.
    async fn boot(&self, api: &Api, case: &Case, vsock: &Path) -> Result<(), Error> {
        api.call("PUT", "/machine-config", json!({"vcpu_count": 1, "mem_size_mib": case.memory_mib})).await?;
        let source = json!({
            "kernel_image_path": self.kernel, "initrd_path": self.initramfs, "boot_args": self.cmdline,
        });
        api.call("PUT", "/boot-source", source).await?;
        let drive = json!({
            "drive_id": "rootfs", "path_on_host": self.disk, "is_root_device": false, "is_read_only": false,
        });
        api.call("PUT", "/drives/rootfs", drive).await?;
        put_device(api).await?;
        api.call("PUT", "/vsock", json!({"guest_cid": CID, "uds_path": vsock})).await?;
        api.call("PUT", "/actions", json!({"action_type": "InstanceStart"})).await
    }
}

/// A server in the calling thread's namespace; what passed comes out, connection by connection.
fn serve() -> Result<Receiver<(u64, Duration)>, Error> {
    let listener = TcpListener::bind((SHARED, PORT))?;
    let (tell, passed) = sync_channel(1);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Ok(done) = pass(stream)
                && tell.send(done).is_err()
            {
                return;
            }
        }
    });
    Ok(passed)
}

async fn through_a_guest(program: &Path, case: &Case, samples: &mut Samples) -> Result<(), Error> {
    let dir = host::scratch()?;
    let guest = Debian::copy(dir.path())?;
    let ((vmm, passed), _there) = in_a_namespace(None, || {
        lay_out()?;
        let passed = serve()?;
        Ok((Firecracker::spawn(program, dir.path(), "guest")?, passed))
    })?;
    let vmm = vmm.ready().await?;
    guest.boot(&vmm.api, case, &dir.path().join(VSOCK_SOCKET)).await?;
    let agent = Agent::new(dir.path(), 1 << 20);
    let begun = Instant::now();
    while let Err(error) = agent.health(Duration::from_secs(1)).await {
        if begun.elapsed() > BOOT {
            return Err(format!("its guest's agent does not answer: {error}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for _ in 0..case.runs {
        for (direction, program) in programs() {
            let request = ExecRequest {
                command: format!("python3 -c '{program}'"),
                cwd: None,
                user: None,
                env: std::collections::BTreeMap::new(),
                timeout_ms: BOOT.as_millis() as u64,
                output_limit: 1 << 16,
            };
            let done = agent.exec(&request, BOOT).await?;
            if done.exit_code != 0 {
                return Err(format!("{direction}: {done:?}").into());
            }
            let (bytes, took) =
                passed.recv_timeout(PASSES).map_err(|_| format!("{direction}: the other end saw nothing"))?;
            samples.add(format!("network_throughput.{direction}"), "MiB/s", rate(bytes, took));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Read as _};
    use std::os::unix::net::UnixListener;

    /// Takes requests as Firecracker does; answers what was asked, with `refused` as an error.
    fn imitate(socket: &Path, refused: &'static str) -> Receiver<(String, Value)> {
        let listener = UnixListener::bind(socket).unwrap();
        let (tell, asked) = sync_channel(64);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut reader = BufReader::new(stream.unwrap());
                let (mut request, mut length) = (String::new(), 0);
                reader.read_line(&mut request).unwrap();
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    match line.trim().split_once(": ") {
                        None => break,
                        Some(("content-length", value)) => length = value.parse().unwrap(),
                        Some(_) => {}
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                let request = request.trim().trim_end_matches(" HTTP/1.1").to_owned();
                let answer = if request.ends_with(refused) {
                    "HTTP/1.1 400 \r\nContent-Length: 27\r\n\r\n{\"fault_message\":\"no tap0\"}"
                } else {
                    "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
                };
                reader.get_mut().write_all(answer.as_bytes()).unwrap();
                if tell.send((request, serde_json::from_slice(&body).unwrap())).is_err() {
                    return;
                }
            }
        });
        asked
    }

    #[tokio::test]
    async fn a_guest_is_asked_for_as_the_api_is_documented() {
        let dir = tempfile::tempdir().unwrap();
        let api = Api { socket: dir.path().join("api.sock") };
        let asked = imitate(&api.socket, "nothing");
        let guest = Debian {
            kernel: "/i/vmlinux".into(),
            initramfs: "/i/initramfs".into(),
            disk: "/d/rootfs.ext4".into(),
            cmdline: "quiet".to_owned(),
        };
        let case = Case { memory_mib: 512, ..Case::standard() };
        guest.boot(&api, &case, Path::new("/d/vsock.sock")).await.unwrap();
        let expected = [
            ("PUT /machine-config", json!({"vcpu_count": 1, "mem_size_mib": 512})),
            (
                "PUT /boot-source",
                json!({"kernel_image_path": "/i/vmlinux", "initrd_path": "/i/initramfs", "boot_args": "quiet"}),
            ),
            (
                "PUT /drives/rootfs",
                json!({
                    "drive_id": "rootfs", "path_on_host": "/d/rootfs.ext4", "is_root_device": false,
                    "is_read_only": false,
                }),
            ),
            (
                "PUT /network-interfaces/eth0",
                json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:53:54:41:53:02"}),
            ),
            ("PUT /vsock", json!({"guest_cid": 3, "uds_path": "/d/vsock.sock"})),
            ("PUT /actions", json!({"action_type": "InstanceStart"})),
        ];
        let asked: Vec<_> = asked.try_iter().collect();
        assert_eq!(asked, expected.map(|(request, body)| (request.to_owned(), body)));
    }

    #[tokio::test]
    async fn what_it_refuses_is_an_error_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let api = Api { socket: dir.path().join("api.sock") };
        let _asked = imitate(&api.socket, "/network-interfaces/eth0");
        let error = put_device(&api).await.unwrap_err().to_string();
        assert!(error.contains("PUT /network-interfaces/eth0") && error.contains("400"), "{error}");
    }

    #[test]
    fn a_namespace_has_the_tap_and_the_server_and_ends_with_its_handle() {
        if let Some(why) = crate::bench::network::lacking() {
            eprintln!("left out: {why}");
            return;
        }
        let (passed, there) = in_a_namespace(None, || {
            lay_out()?;
            serve()
        })
        .unwrap();
        let links = || Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?);
        let (found, there) = in_a_namespace(Some(there), links).unwrap();
        assert!(found.contains(TAP), "{found}");
        let send = || {
            let mut stream = std::net::TcpStream::connect((SHARED, PORT))?;
            stream.write_all(&[b"s".as_slice(), &vec![7; 100_000]].concat())?;
            Ok(())
        };
        let ((), there) = in_a_namespace(Some(there), send).unwrap();
        assert_eq!(passed.recv_timeout(Duration::from_secs(10)).unwrap().0, 100_000);
        let gone = || {
            ip(&format!("link delete {TAP}\n"))?;
            links()
        };
        let (found, _there) = in_a_namespace(Some(there), gone).unwrap();
        assert!(!found.contains(TAP), "{found}");
        assert!(!std::fs::read_to_string("/proc/net/dev").unwrap().contains(TAP));
    }
}
