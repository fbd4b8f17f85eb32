//! What a Debian guest may reach, asked of curl in the guest: mode × destination × before a pause, after the wake, after a restore with another
//! policy. Servers, name server and site are namespaces of this test's own; nothing here is connected to the machine's network.
//!
//! Needs root, the kernel's parts for networks, and VT-x or AMD-V, or the rig. What needs no guest is tested in `warden/tests/network` and
//! `egress/tests/namespaces`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::time::Instant;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use serde_json::{Value, json};
use stasis_tests::host;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::Error;

/// What `allowed.example.com` and `other.example.com` both lead to.
const SHARED: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 34);
/// In the allowed range of the custom policy.
const IN_RANGE: Ipv4Addr = Ipv4Addr::new(93, 184, 220, 1);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(93, 184, 230, 1);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 20, 30, 40);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(93, 184, 1, 2);
/// The first sandbox's address as the host sees it, by the default range.
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 1);

fn main() {
    let lacking = lacking();
    if lacking.is_none() {
        // While the process has one thread: all of it, and the supervisor that it starts, is in this namespace.
        if let Err(error) = lay_out() {
            eprintln!("the test's own network cannot be made: {error}");
            std::process::exit(1);
        }
    }
    Suite::default().test("each_mode_holds_before_a_pause_after_a_wake_and_after_a_restore", lacking, matrix).main();
}

fn lacking() -> Option<String> {
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

/// The site: this process is the host, and a namespace behind a veth is everything else.
fn lay_out() -> Result<(), Error> {
    let home = fresh()?;
    ip("link set lo up")?;
    // Its sockets keep it.
    fresh()?;
    ip("link set lo up")?;
    let back = format!("/proc/{}/fd/{}", std::process::id(), home.as_raw_fd());
    ip(&format!("link add lan type veth peer name wan netns {back}"))?;
    ip(&format!("addr add {NAME_SERVER}/24 dev lan"))?;
    ip("link set lan up")?;
    for address in [SHARED, IN_RANGE, ELSEWHERE, PRIVATE, METADATA] {
        ip(&format!("addr add {address}/32 dev lo"))?;
    }
    // Sockets stay in the namespace that they were made in; the threads that serve them do not matter.
    for (address, port) in
        [(SHARED, 80), (IN_RANGE, 8080), (ELSEWHERE, 8080), (ELSEWHERE, 80), (PRIVATE, 8080), (METADATA, 80)]
    {
        serve(TcpListener::bind((address, port))?);
    }
    answer_names(UdpSocket::bind((NAME_SERVER, 53))?);
    echo(UdpSocket::bind((SHARED, 443))?);
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))?;
    ip(&format!("addr add {HOST}/24 dev wan"))?;
    ip("link set wan up")?;
    ip(&format!("route add default via {NAME_SERVER}"))?;
    serve(TcpListener::bind((HOST, 8080))?);
    Ok(())
}

/// HTTP that says 200 to everything.
fn serve(listener: TcpListener) {
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

fn echo(socket: UdpSocket) {
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// A name server that has every name at [`SHARED`].
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

/// One destination: its name here, and what says in the guest whether it is reached.
fn probes() -> Vec<(&'static str, String)> {
    let curl = |more: String| format!("curl -s -o /dev/null --noproxy '*' -m 6 --connect-timeout 5 -f {more}");
    let named = |name: &str| curl(format!("--resolve {name}:80:{SHARED} http://{name}/"));
    // Sends a datagram and waits for its echo.
    let echo = |port: u16| {
        let script = format!(
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.connect((\"{SHARED}\", {port})); \
             s.send(b\"x\" * 32); s.recv(64)"
        );
        format!("python3 -c '{script}' 2>/dev/null")
    };
    vec![
        ("allowed name", curl("http://allowed.example.com/".to_owned())),
        ("other name, same address", named("other.example.com")),
        ("allowed range", curl(format!("http://{IN_RANGE}:8080/"))),
        ("other address", curl(format!("http://{ELSEWHERE}:8080/"))),
        ("other address, web", curl(format!("http://{ELSEWHERE}/"))),
        ("private", curl(format!("http://{PRIVATE}:8080/"))),
        ("metadata", curl(format!("http://{METADATA}/latest/meta-data/"))),
        ("host", curl(format!("http://{HOST}:8080/"))),
        ("neighbour", curl(format!("http://{NEIGHBOUR}:8080/"))),
        ("DNS tunnel", "getent hosts c2VjcmV0.tunnel.example.net >/dev/null".to_owned()),
        ("QUIC", echo(443)),
        ("IPv6", curl("-6 http://[2606:2800:220:1::1]/".to_owned())),
    ]
}

/// Which destinations a mode reaches.
fn reached(mode: &str) -> &'static [&'static str] {
    match mode {
        "allow-all" => &[
            "allowed name",
            "other name, same address",
            "allowed range",
            "other address",
            "other address, web",
            "DNS tunnel",
            "QUIC",
        ],
        "custom" => &["allowed name", "allowed range"],
        _ => &[],
    }
}

fn policy(mode: &str) -> Value {
    match mode {
        "custom" => {
            json!({"mode": mode, "allow_domains": ["allowed.example.com"], "allow_cidrs": ["93.184.220.0/24"]})
        }
        _ => json!({"mode": mode}),
    }
}

struct Site {
    service: Service,
    began: Instant,
    _config: tempfile::TempDir,
}

impl Site {
    async fn start() -> Result<Self, Error> {
        let config = tempfile::tempdir()?;
        let file = config.path().join("stasis.toml");
        std::fs::write(&file, format!("[network]\nenabled = \"on\"\ndns = [\"{NAME_SERVER}:53\"]\n"))?;
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
    fn say(&self, what: &str) {
        eprintln!("{:7.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    async fn run(&self, id: &str, command: &str) -> Result<Value, Error> {
        let body = json!({"command": command, "timeout": 240});
        let path = format!("/v1/sandbox/{id}/process/execute");
        Ok(self.service.call("POST", &path, Some(body)).await?.expect(200)?.json)
    }

    /// Asks everything of one guest at once, and compares.
    async fn check(&self, id: &str, mode: &str, when: &str) -> Result<(), Error> {
        let lines = probes()
            .into_iter()
            .map(|(name, probe)| format!("( if {probe}; then echo 'yes {name}'; else echo \"no {name}\"; fi ) &"));
        let script = lines.collect::<Vec<_>>().join("\n") + "\nwait";
        let done = self.run(id, &script).await?;
        let said = done["stdout"].as_str().unwrap_or_default();
        let seen: BTreeMap<_, _> =
            said.lines().filter_map(|line| line.split_once(' ')).map(|(yes, name)| (name, yes)).collect();
        self.say(&format!("{mode}, {when}: {seen:?}"));
        for (name, _) in probes() {
            let expected = if reached(mode).contains(&name) { "yes" } else { "no" };
            let got = seen.get(name).copied();
            if got != Some(expected) {
                return Err(format!("{mode}, {when}, {name}: {got:?}, not {expected}; {done}").into());
            }
        }
        Ok(())
    }

    async fn refusals(&self, id: &str) -> Result<Vec<String>, Error> {
        let answer = self.service.call("GET", &format!("/v1/sandbox/{id}/network"), None).await?.expect(200)?;
        let refusals = answer.json["refusals"].as_array().cloned().unwrap_or_default();
        Ok(refusals.iter().map(|refusal| format!("{} {}", refusal["address"], refusal["reason"])).collect())
    }
}

async fn matrix() -> Outcome {
    let site = Site::start().await?;
    let mut ids = Vec::new();
    for mode in ["allow-all", "deny-all", "custom"] {
        let body = json!({
            "template_name": "system/debian:bookworm", "memory": 256, "vcpu": 1, "network_policy": policy(mode),
        });
        let id = site.service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
        site.say(&format!("{mode} is made"));
        site.run(&id, "(python3 -m http.server 8080 >/dev/null 2>&1 &) ; sleep 1").await?;
        site.check(&id, mode, "before a pause").await?;
        ids.push((mode, id));
    }
    let (_, custom) = &ids[2];
    let refused = site.refusals(custom).await?;
    for (address, reason) in [(METADATA, "reserved-address"), (PRIVATE, "reserved-address"), (HOST, "host-address")] {
        let expected = format!("\"{address}\" \"{reason}\"");
        if !refused.contains(&expected) {
            return Err(format!("{expected} is not among {refused:?}").into());
        }
    }
    for (mode, id) in &ids {
        site.service.pause(id).await?.expect(201)?;
        site.service.resume(id).await?.expect(200)?;
        site.check(id, mode, "after a wake").await?;
    }
    let made =
        site.service.call("POST", &format!("/v1/sandbox/{custom}/snapshot/create"), Some(json!({"name": "s"}))).await?;
    made.expect(201)?;
    for mode in ["deny-all", "allow-all"] {
        let body = json!({"snapshot_name": "s", "network_policy": policy(mode)});
        let id = site.service.call("POST", "/v1/snapshot/restore", Some(body)).await?.expect(201)?.text("id");
        site.check(&id, mode, "after a restore with another policy").await?;
        site.service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?;
    }
    let id = site
        .service
        .call("POST", "/v1/snapshot/restore", Some(json!({"snapshot_name": "s"})))
        .await?
        .expect(201)?
        .text("id");
    site.check(&id, "custom", "after a restore with its own policy").await
}
