//! What a Debian guest may reach, asked of curl in the guest: mode × destination × before a pause, after the wake, after a restore with another
//! policy. Servers, name server and site are namespaces of this test's own; nothing here is connected to the machine's network.
//!
//! Needs root, the kernel's parts for networks, and VT-x or AMD-V, or the rig. What needs no guest is tested in `warden/tests/network` and
//! `egress/tests/namespaces`.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

use serde_json::{Value, json};
use stasis_tests::site::{self, HOST, SHARED, Site, echo, serve_http};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::Error;

/// In the allowed range of the custom policy.
const IN_RANGE: Ipv4Addr = Ipv4Addr::new(93, 184, 220, 1);
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(93, 184, 230, 1);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 20, 30, 40);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Sandboxes as the host sees them, by the default range: each has the second address of a pair. More than there are.
const NEIGHBOURS: u8 = 8;

fn main() {
    let lacking = site::lacking();
    if lacking.is_none()
        && let Err(error) = lay_out()
    {
        eprintln!("the test's own network cannot be made: {error}");
        std::process::exit(1);
    }
    Suite::default().test("each_mode_holds_before_a_pause_after_a_wake_and_after_a_restore", lacking, matrix).main();
}

fn lay_out() -> Result<(), Error> {
    site::lay_out(&[IN_RANGE, ELSEWHERE, PRIVATE, METADATA], || {
        for (address, port) in
            [(SHARED, 80), (IN_RANGE, 8080), (ELSEWHERE, 8080), (ELSEWHERE, 80), (PRIVATE, 8080), (METADATA, 80)]
        {
            serve_http(TcpListener::bind((address, port))?);
        }
        echo(UdpSocket::bind((SHARED, 443))?);
        Ok(())
    })?;
    serve_http(TcpListener::bind((HOST, 8080))?);
    Ok(())
}

/// One destination: its name here, and what says in the guest whether it is reached.
fn probes() -> Vec<(&'static str, String)> {
    // What is refused is refused at once; the time is for what passes, in a guest that the rig emulates.
    let curl = |more: String| format!("curl -s -o /dev/null --noproxy '*' -m 60 --connect-timeout 50 -f {more}");
    let named = |name: &str| curl(format!("--resolve {name}:80:{SHARED} http://{name}/"));
    // Sends a datagram and waits for its echo.
    let echo = |port: u16| {
        let script = format!(
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20); s.connect((\"{SHARED}\", {port})); \
             s.send(b\"x\" * 32); s.recv(64)"
        );
        format!("python3 -c '{script}' 2>/dev/null")
    };
    let each = (0..NEIGHBOURS).map(|n| curl(format!("http://100.96.0.{}:8080/", 2 * n + 1)));
    let neighbours = each.collect::<Vec<_>>().join(" || ");
    vec![
        ("allowed name", curl("http://allowed.example.com/".to_owned())),
        ("other name, same address", named("other.example.com")),
        ("allowed range", curl(format!("http://{IN_RANGE}:8080/"))),
        ("other address", curl(format!("http://{ELSEWHERE}:8080/"))),
        ("other address, web", curl(format!("http://{ELSEWHERE}/"))),
        ("private", curl(format!("http://{PRIVATE}:8080/"))),
        ("metadata", curl(format!("http://{METADATA}/latest/meta-data/"))),
        ("host", curl(format!("http://{HOST}:8080/"))),
        ("neighbour", neighbours),
        ("DNS tunnel", "getent hosts c2vjcmv0.tunnel.example.net >/dev/null".to_owned()),
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

/// Asks everything of one guest at once, and compares.
async fn check(site: &Site, id: &str, mode: &str, when: &str) -> Result<(), Error> {
    let lines = probes()
        .into_iter()
        .map(|(name, probe)| format!("( if {probe}; then echo 'yes {name}'; else echo \"no {name}\"; fi ) &"));
    let script = lines.collect::<Vec<_>>().join("\n") + "\nwait";
    let done = site.run(id, &script).await?;
    let said = done["stdout"].as_str().unwrap_or_default();
    let seen: BTreeMap<_, _> =
        said.lines().filter_map(|line| line.split_once(' ')).map(|(yes, name)| (name, yes)).collect();
    site.say(&format!("{mode}, {when}: {seen:?}"));
    let mut wrong = Vec::new();
    for (name, _) in probes() {
        let expected = if reached(mode).contains(&name) { "yes" } else { "no" };
        let got = seen.get(name).copied();
        if got != Some(expected) {
            wrong.push(format!("{name}: {got:?}, not {expected}"));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let network = site.network(id).await?;
    Err(format!("{mode}, {when}: {wrong:?}; {done}; {network}").into())
}

/// A program of the guest that tries what its policy refuses, through pause and wake, until it is told that it is enough. What it ever reached is
/// in a file.
fn trier() -> String {
    let places = [(ELSEWHERE, 8080), (PRIVATE, 8080), (METADATA, 80), (HOST, 8080)];
    let places: Vec<String> = places.iter().map(|(address, port)| format!("(\"{address}\",{port})")).collect();
    format!(
        "import os,socket,time\nn=0\nwhile not os.path.exists(\"/root/enough\"):\n for place in [{}]:\n  try:\n   socket.create_connection(place,2).close()\n   \
         open(\"/root/reached\",\"a\").write(repr(place))\n  except OSError: pass\n n+=1\n open(\"/root/tries.new\",\"w\").write(str(n))\n \
         os.replace(\"/root/tries.new\",\"/root/tries\")\n \
         time.sleep(0.3)\n",
        places.join(",")
    )
}

/// How often the program of [`trier`] has tried; an error when anything was reached.
async fn tries(site: &Site, id: &str) -> Result<u64, Error> {
    let done = site.run(id, "cat /root/reached 2>/dev/null; cat /root/tries").await?;
    let said = done["stdout"].as_str().unwrap_or_default();
    said.trim().parse().map_err(|_| format!("what is refused was reached: {done}").into())
}

/// The sum of the series of a family that have this label.
async fn metric(site: &Site, family: &str, label: &str) -> Result<f64, Error> {
    let request = reqwest::Client::new().get(format!("{}/metrics", site.service.url)).bearer_auth(&site.service.key);
    let text = request.send().await?.error_for_status()?.text().await?;
    let lines = text.lines().filter(|line| line.starts_with(family) && line.contains(label));
    Ok(lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum())
}

/// What the custom policy let pass is counted by its rules, and what it refused is said with the reason.
async fn check_report(site: &Site, id: &str) -> Result<(), Error> {
    let network = site.network(id).await?;
    for rule in ["domain allowed.example.com", "cidr 93.184.220.0/24"] {
        let rules = network["rules"].as_array().ok_or("no rules")?;
        let found = rules.iter().find(|counted| counted["rule"] == rule).ok_or_else(|| format!("{rule}: {network}"))?;
        assert!(found["allowed"].as_u64() > Some(0) && found["bytes_in"].as_u64() > Some(0), "{rule}: {network}");
    }
    let refused = site.refusals(id).await?;
    for (address, reason) in [
        (METADATA, "reserved-address"),
        (PRIVATE, "reserved-address"),
        (HOST, "host-address"),
        (ELSEWHERE, "policy"),
        (SHARED, "policy"),
    ] {
        let expected = format!("{address} - {reason}");
        assert!(refused.contains(&expected), "{expected} is not among {refused:?}");
    }
    // The name that is not allowed, at an address that is; and the one that carries data.
    for name in ["other.example.com", "c2vjcmv0.tunnel.example.net"] {
        let names = |line: &String| line.contains(&format!(" {name} "));
        assert!(refused.iter().any(names), "{name} is not among {refused:?}");
    }
    Ok(())
}

async fn matrix() -> Outcome {
    let site = Site::start("").await?;
    let mut ids = Vec::new();
    for mode in ["allow-all", "deny-all", "custom"] {
        let id = site.create(policy(mode)).await?;
        site.say(&format!("{mode} is made"));
        site.run(&id, "(python3 -m http.server 8080 >/dev/null 2>&1 &) ; sleep 1").await?;
        if mode != "allow-all" {
            site.run(&id, &format!("(python3 -c '{}' >/dev/null 2>&1 &) ; sleep 2", trier())).await?;
        }
        ids.push((mode, id));
    }
    // All at once: each is the neighbour of the others.
    for (mode, id) in &ids {
        check(&site, id, mode, "before a pause").await?;
    }
    let (_, custom) = &ids[2];
    check_report(&site, custom).await?;
    for (mode, id) in &ids {
        let tried = if *mode == "allow-all" { 0 } else { tries(&site, id).await? };
        site.service.pause(id).await?.expect(201)?;
        site.service.resume(id).await?.expect(200)?;
        check(&site, id, mode, "after a wake").await?;
        // There was no moment with a weaker policy.
        if *mode != "allow-all" {
            assert!(tries(&site, id).await? > tried, "{mode}: nothing was tried after the wake");
            // In the rig it takes the time of what follows.
            site.run(id, "touch /root/enough").await?;
        }
    }
    let path = format!("/v1/sandbox/{custom}/snapshot/create");
    site.service.call("POST", &path, Some(json!({"name": "s"}))).await?.expect(201)?;
    for mode in ["deny-all", "allow-all", "custom"] {
        let mut body = json!({"snapshot_name": "s"});
        if mode != "custom" {
            body["network_policy"] = policy(mode);
        }
        let id = site.service.call("POST", "/v1/snapshot/restore", Some(body)).await?.expect(201)?.text("id");
        check(&site, &id, mode, "after a restore").await?;
        site.service.call("DELETE", &format!("/v1/sandbox/{id}"), None).await?;
    }
    // Three pauses and two ends.
    assert!(metric(&site, "stasis_network_seconds_count", "claim").await? >= 9.0);
    assert!(metric(&site, "stasis_network_decisions_total", "allowed").await? > 0.0);
    assert!(metric(&site, "stasis_network_decisions_total", "refused").await? > 0.0);
    assert!(metric(&site, "stasis_vmm_network_bytes", "in").await? > 0.0);
    Ok(())
}
