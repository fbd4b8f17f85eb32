//! A Debian guest sleeps and wakes with its program running: needs VT-x or AMD-V, or the rig.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;
use stasis_tests::host;
use stasis_tests::service::{Options, Service};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::Error;

fn lacking() -> Option<String> {
    let images = host::built("images/templates/debian-bookworm/template.json");
    host::no_linux_guest().or_else(|| host::missing(&images, "guest-images/linux/build makes it"))
}

fn main() {
    Suite::default()
        .test("five_cycles_keep_memory_disk_processes_and_time", lacking(), five_cycles)
        .test("a_server_in_the_guest_is_reached_and_woken_by_its_host_name", lacking(), invoke)
        .test("a_stop_keeps_the_disk_and_drops_memory", lacking(), stop_and_start)
        .test("two_resumes_of_one_snapshot_draw_different_randomness", lacking(), two_resumes)
        .test("clones_differ_in_everything_that_must", lacking(), clones)
        .main();
}

struct Guest {
    service: Service,
    id: String,
    started: Instant,
}

impl Guest {
    /// One vCPU unless a test is about several: the rig emulates them all.
    async fn start(vcpus: u32) -> Result<Self, Error> {
        let options = Options {
            images: Some(host::built("images")),
            environment: [("STASIS_DEADLINES_BOOT_MS", "300000"), ("STASIS_DEADLINES_WAKE_MS", "60000")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .to_vec(),
        };
        let started = Instant::now();
        let service = Service::start(options).await?;
        let body = json!({
            "template_name": "system/debian:bookworm", "memory": 512, "vcpu": vcpus, "env_vars": {"GREETING": "hello, env"},
        });
        let id = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?.text("id");
        let guest = Self { service, id, started };
        guest.say("created");
        Ok(guest)
    }

    /// Where the time goes: the rig is slow, and a test that says nothing for minutes looks like one that hangs.
    fn say(&self, what: &str) {
        eprintln!("{:7.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// Standard output of a command that must succeed.
    async fn run(&self, command: &str) -> Result<String, Error> {
        self.run_in(&self.id, command).await
    }

    /// The same in another sandbox of the same service.
    async fn run_in(&self, id: &str, command: &str) -> Result<String, Error> {
        let body = json!({"command": command, "timeout": 120});
        let path = format!("/v1/sandbox/{id}/process/execute");
        let done = match self.service.call("POST", &path, Some(body)).await?.expect(200) {
            Ok(done) => done,
            Err(error) => return Err(self.told(&error.to_string())),
        };
        self.say(command.lines().next().unwrap_or_default());
        if done.json["exit_code"] != json!(0) {
            return Err(format!("{command}: {:?}", done.json).into());
        }
        Ok(done.text("stdout").trim().to_owned())
    }

    /// What failed, with what the supervisor said last.
    fn told(&self, what: &str) -> Error {
        let log = self.service.log();
        let last = log.lines().count().saturating_sub(20);
        format!("{what}; log: {}", log.lines().skip(last).collect::<Vec<_>>().join("\n")).into()
    }

    async fn stop_and_start(&self) -> Result<(), Error> {
        for verb in ["stop", "start"] {
            let path = format!("/v1/sandbox/{}/{verb}", self.id);
            let done = self.service.call("POST", &path, None).await?.expect(200)?;
            self.say(&format!("{verb}: {}", done.timing));
            if verb == "stop" {
                self.service.await_no_vmm().await?;
            }
        }
        Ok(())
    }

    async fn sleep_and_wake(&self) -> Result<(), Error> {
        self.say("pause");
        let paused = self.service.pause(&self.id).await?.expect(201)?;
        self.say(&format!("paused: {}", paused.timing));
        self.service.await_no_vmm().await?;
        let resumed = self.service.resume(&self.id).await?.expect(200)?;
        self.say(&format!("resumed: {}", resumed.timing));
        Ok(())
    }
}

async fn stop_and_start() -> Outcome {
    const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";
    let guest = Guest::start(1).await?;
    assert_eq!(guest.run("echo \"$GREETING\"").await?, "hello, env");
    let mut boots = vec![guest.run(BOOT).await?];
    let mut sums = Vec::new();
    guest.run("echo gone > /dev/shm/gone").await?;
    for n in 1..=2 {
        // Not written out by the guest itself yet.
        sums.push(guest.run(&format!("head -c 3000000 /dev/urandom > /root/kept{n}; sha256sum /root/kept{n}")).await?);
        guest.stop_and_start().await?;
        let boot = guest.run(BOOT).await?;
        assert!(!boots.contains(&boot), "it booted");
        boots.push(boot);
        for (n, sum) in sums.iter().enumerate() {
            assert_eq!(&guest.run(&format!("sha256sum /root/kept{}", n + 1)).await?, sum);
        }
        assert_eq!(guest.run("test ! -e /dev/shm/gone && echo \"$GREETING\"").await?, "hello, env");
    }
    // A started one sleeps and wakes as any other, over the disk that it was started with.
    guest.sleep_and_wake().await?;
    assert_eq!(guest.run(BOOT).await?, boots[2]);
    assert_eq!(guest.run("echo 3 > /proc/sys/vm/drop_caches; sha256sum /root/kept1").await?, sums[0]);
    Ok(())
}

/// A process that holds random bytes in its memory, counts, and on SIGUSR1 draws new bytes; it prints hash and counter when asked.
const HOLDER: &str = r"
import hashlib, os, signal, time
held = os.urandom(4 << 20)
def tell(*_):
    with open('/run/holder.new', 'w') as f:
        f.write(hashlib.sha256(held).hexdigest() + ' %d' % count)
    os.rename('/run/holder.new', '/run/holder')
def draw(*_):
    global held
    held = os.urandom(4 << 20)
    tell()
count = 0
signal.signal(signal.SIGUSR1, draw)
signal.signal(signal.SIGUSR2, tell)
open('/run/holder.pid', 'w').write(str(os.getpid()))
while True:
    count += 1
    time.sleep(0.05)
";

/// What a kernel says that was hurt. Some of it belongs to every boot under emulation.
const COMPLAINTS: &str = "dmesg | grep -E 'BUG:|lockup|stall|I/O error|EXT4-fs error|Call Trace' || true";

async fn ask(guest: &Guest, signal: &str) -> Result<(String, u64), Error> {
    let command = format!(
        "rm -f /run/holder; kill -{signal} $(cat /run/holder.pid); \
         for i in $(seq 100); do [ -e /run/holder ] && break; sleep 0.1; done; cat /run/holder"
    );
    let answer = guest.run(&command).await?;
    let (hash, count) = answer.split_once(' ').ok_or_else(|| format!("the holder said {answer:?}"))?;
    Ok((hash.to_owned(), count.parse()?))
}

async fn five_cycles() -> Outcome {
    let guest = Guest::start(2).await?;
    guest.run(&format!("cat > /root/holder.py <<'EOF'\n{HOLDER}\nEOF\nsetsid python3 /root/holder.py >/dev/null 2>&1 &\nfor i in $(seq 200); do [ -s /run/holder.pid ] && break; sleep 0.1; done")).await?;
    let pid = guest.run("cat /run/holder.pid").await?;
    let boot = guest.run("cat /proc/sys/kernel/random/boot_id").await?;
    let at_boot = guest.run(COMPLAINTS).await?;
    for cycle in 1..=5 {
        let written =
            guest.run("head -c 3000000 /dev/urandom > /root/data && sha256sum /root/data | cut -d' ' -f1").await?;
        let (held, count) = ask(&guest, "USR1").await?;
        guest.sleep_and_wake().await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let told: f64 = guest.run("date +%s.%N").await?.parse()?;
        let after = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        assert!(
            told > now - 2.0 && told < after + 2.0,
            "cycle {cycle}: the guest's clock says {told}, the host's {now} to {after}"
        );
        let (held_now, count_now) = ask(&guest, "USR2").await?;
        assert_eq!(held_now, held, "cycle {cycle}: memory of the process");
        assert!(count_now > count, "cycle {cycle}: the process goes on");
        let read = guest.run("sha256sum /root/data | cut -d' ' -f1").await?;
        assert_eq!(read, written, "cycle {cycle}: the file, never synced");
        assert_eq!(guest.run("kill -0 $(cat /run/holder.pid) && cat /run/holder.pid").await?, pid);
        assert_eq!(guest.run("cat /proc/sys/kernel/random/boot_id").await?, boot, "cycle {cycle}: not a reboot");
        assert_eq!(
            guest.run("cat /root/data | sha256sum | cut -d' ' -f1; sync; echo ok").await?,
            format!("{written}\nok")
        );
    }
    let complained = guest.run(COMPLAINTS).await?;
    assert_eq!(complained, at_boot, "the guest's kernel is content");
    Ok(())
}

/// A server that counts its requests in memory and sends bodies back, half-closing after each answer as HTTP/1.0 does.
const SERVER: &str = r"
import http.server, threading
count, lock = 0, threading.Lock()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        global count
        with lock:
            count += 1
        # A request without a body need not say that it has none.
        body = self.rfile.read(int(self.headers['content-length'] or 0))
        self.send_response(200)
        self.send_header('x-count', str(count))
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128
Server(('127.0.0.1', 8000), Handler).serve_forever()
";

async fn invoke() -> Outcome {
    const LARGE: usize = 100 << 20;
    let guest = Guest::start(1).await?;
    guest.run(&format!("cat > /root/server.py <<'EOF'\n{SERVER}\nEOF\nsetsid python3 /root/server.py >/dev/null 2>&1 &\nfor i in $(seq 300); do grep -q ' 0100007F:1F40 00000000:0000 0A' /proc/net/tcp && exit 0; sleep 0.1; done; exit 1")).await?;
    let client = reqwest::Client::builder().timeout(Duration::from_mins(10)).build()?;
    let post = |port: u16, body: Vec<u8>| {
        let host = format!("{}-{port}.sandbox.localhost", guest.id);
        client
            .post(format!("{}/x", guest.service.url))
            .header("host", host)
            .bearer_auth(&guest.service.key)
            .body(body)
            .send()
    };
    let count = |answer: &reqwest::Response| answer.headers()["x-count"].to_str().unwrap_or_default().to_owned();
    assert_eq!(post(8000, vec![1]).await?.bytes().await?, vec![1]);
    guest.say("invoked");
    assert_eq!(post(8001, vec![1]).await?.status().as_u16(), 502, "nobody listens there");
    // Made and compared by copies and not octet by octet: in the rig that would take longer than a server keeps an idle connection.
    let pattern: Vec<u8> = (0..=250).collect();
    let large = pattern.repeat(LARGE.div_ceil(pattern.len()));
    let answer = post(8000, large.clone()).await?.bytes().await?;
    guest.say("100 MiB there and back");
    if answer != large {
        let at = answer.iter().zip(&large).position(|(here, there)| here != there);
        let around = at.map(|at| (at, &answer[at..(at + 16).min(answer.len())], large[at]));
        return Err(format!("100 MiB both ways: {} of {} bytes, first {around:?}", answer.len(), large.len()).into());
    }
    let many = futures::future::try_join_all((0..100).map(|n| post(8000, vec![n; 10_000]))).await?;
    assert!(many.iter().all(|answer| answer.status().is_success()));
    drop(many);
    guest.say("100 at once");
    guest.service.pause(&guest.id).await?.expect(201)?;
    guest.say("paused");
    let woken = post(8000, b"wake".to_vec()).await?;
    guest.say(&format!("woken: {:?}", woken.headers().get("server-timing")));
    if woken.status() != 200 {
        return Err(guest.told(&format!("{} {}", woken.status(), woken.text().await?)));
    }
    assert_eq!((woken.status().as_u16(), count(&woken).as_str()), (200, "103"), "the same process, and none twice");
    assert_eq!(woken.bytes().await?, b"wake".as_slice());
    // A storm: half of it for the app, half of it commands.
    guest.service.pause(&guest.id).await?.expect(201)?;
    guest.say("paused");
    let path = format!("/v1/sandbox/{}/process/execute", guest.id);
    let invokes = futures::future::try_join_all((0..50).map(|n| post(8000, vec![n; 100])));
    let commands = futures::future::try_join_all(
        (0..50)
            .map(|n| guest.service.call("POST", &path, Some(json!({"command": format!("echo {n}"), "timeout": 300})))),
    );
    let (invokes, commands) = tokio::join!(invokes, commands);
    let (invokes, commands) = (invokes?, commands?);
    guest.say("100 at once to a paused one");
    for answer in invokes {
        let status = answer.status();
        assert!(status.is_success(), "{status} {:?}", answer.text().await);
    }
    for (n, done) in commands.into_iter().enumerate() {
        assert_eq!(done.expect(200)?.text("stdout").trim(), n.to_string());
    }
    assert_eq!(guest.service.operations("resume", "ok").await?, 2, "the storm has caused one wake");
    assert_eq!(guest.service.operations("resume", "error").await?, 0);
    let last = post(8000, Vec::new()).await?;
    assert_eq!(count(&last), "154", "none lost, none twice");
    Ok(())
}

/// The same snapshot is resumed twice (the second time after its VMM was killed), and each time UUIDs are drawn.
async fn two_resumes() -> Outcome {
    let guest = Guest::start(1).await?;
    guest.service.pause(&guest.id).await?.expect(201)?;
    let mut drawn = std::collections::BTreeSet::new();
    for _ in 0..2 {
        guest.service.resume(&guest.id).await?.expect(200)?;
        guest.say("resumed");
        let uuids = guest.run("for i in 1 2 3 4 5 6 7 8; do cat /proc/sys/kernel/random/uuid; done; python3 -c 'import uuid; print(uuid.uuid4())'").await?;
        for uuid in uuids.lines() {
            assert!(drawn.insert(uuid.to_owned()), "{uuid} was drawn twice");
        }
        for pid in guest.service.vmm_pids() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
            }
        }
        guest.service.await_state(&guest.id, "paused").await?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(drawn.len(), 18);
    Ok(())
}

/// What the guest is told by the host or draws: host name, machine id, random numbers of kernel and user space. Its kernel has no driver for
/// the VM generation id and lets nobody read the page that it is in.
const UNIQUE: &str = "hostname; cat /etc/hostname | sed 's/^/file /'; cat /etc/machine-id; \
     cat /proc/sys/kernel/random/uuid; head -c 32 /dev/urandom | sha256sum; \
     python3 -c 'import os, random; print(os.urandom(16).hex(), random.random())'";

/// Two sandboxes that began as one booted template, two more that began as one named snapshot of the first, and the one that booted.
async fn clones() -> Outcome {
    let guest = Guest::start(1).await?;
    let service = &guest.service;
    let made = || service.log().contains("the template was booted and captured");
    for _ in 0..3000 {
        if made() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(made(), "no booted template: {}", service.log());
    guest.say("the template is captured");
    let mut ids = vec![guest.id.clone()];
    for _ in 0..2 {
        let body = json!({"template_name": "system/debian:bookworm", "memory": 512, "vcpu": 1});
        let created = service.call("POST", "/v1/sandbox", Some(body)).await?.expect(201)?;
        assert!(created.timing.contains("restore;"), "a clone, not a boot: {}", created.timing);
        guest.say(&format!("cloned: {}", created.timing));
        ids.push(created.text("id"));
    }
    let path = format!("/v1/sandbox/{}/snapshot/create", ids[1]);
    service.call("POST", &path, Some(json!({"name": "source"}))).await?.expect(201)?;
    for _ in 0..2 {
        let body = json!({"snapshot_name": "source"});
        let restored = service.call("POST", "/v1/snapshot/restore", Some(body)).await?.expect(201)?;
        guest.say(&format!("restored: {}", restored.timing));
        ids.push(restored.text("id"));
    }
    let mut all: Vec<Vec<String>> = Vec::new();
    for id in &ids {
        let told: Vec<String> = guest.run_in(id, UNIQUE).await?.lines().map(str::to_owned).collect();
        assert_eq!(told.len(), 6, "{told:?}");
        assert_eq!(told[1], format!("file {}", told[0]), "{id}: host name");
        assert!(told[2].len() == 32 && told[2].bytes().any(|digit| digit != b'0'), "{id}: machine id {:?}", told[2]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let clock: f64 = guest.run_in(id, "date +%s.%N").await?.parse()?;
        let after = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        assert!(clock > now - 2.0 && clock < after + 2.0, "{id}: its clock says {clock}, the host's {now} to {after}");
        for other in &all {
            for (ours, theirs) in told.iter().zip(other) {
                assert_ne!(ours, theirs, "two clones have it");
            }
        }
        all.push(told);
    }
    // A wake is no clone: the same sandbox keeps its names, and draws other numbers.
    let id = &ids[2];
    service.pause(id).await?.expect(201)?;
    service.resume(id).await?.expect(200)?;
    let told: Vec<String> = guest.run_in(id, UNIQUE).await?.lines().map(str::to_owned).collect();
    assert_eq!(told[..3], all[2][..3]);
    assert!(told[3..].iter().zip(&all[2][3..]).all(|(now, before)| now != before), "{told:?} after {:?}", all[2]);
    Ok(())
}
