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
        .test("a_stop_keeps_the_disk_and_drops_memory", lacking(), stop_and_start)
        .test("two_resumes_of_one_snapshot_draw_different_randomness", lacking(), two_resumes)
        .main();
}

struct Guest {
    service: Service,
    id: String,
    started: Instant,
}

impl Guest {
    async fn start() -> Result<Self, Error> {
        let options = Options {
            images: Some(host::built("images")),
            environment: [("STASIS_DEADLINES_BOOT_MS", "300000"), ("STASIS_DEADLINES_WAKE_MS", "60000")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .to_vec(),
        };
        let started = Instant::now();
        let service = Service::start(options).await?;
        let body = json!({
            "template_name": "system/debian:bookworm", "memory": 512, "vcpu": 2, "env_vars": {"GREETING": "hello, env"},
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
        let body = json!({"command": command, "timeout": 120});
        let path = format!("/v1/sandbox/{}/process/execute", self.id);
        let done = self.service.call("POST", &path, Some(body)).await?.expect(200)?;
        self.say(command.lines().next().unwrap_or_default());
        if done.json["exit_code"] != json!(0) {
            return Err(format!("{command}: {:?}", done.json).into());
        }
        Ok(done.text("stdout").trim().to_owned())
    }

    async fn stop_and_start(&self) -> Result<(), Error> {
        for verb in ["stop", "start"] {
            let path = format!("/v1/sandbox/{}/{verb}", self.id);
            let done = self.service.call("POST", &path, None).await?.expect(200)?;
            self.say(&format!("{verb}: {}", done.timing));
        }
        Ok(())
    }

    async fn sleep_and_wake(&self) -> Result<(), Error> {
        self.say("pause");
        let paused = self.service.pause(&self.id).await?.expect(201)?;
        self.say(&format!("paused: {}", paused.timing));
        assert!(self.service.vmm_pids().is_empty());
        let resumed = self.service.resume(&self.id).await?.expect(200)?;
        self.say(&format!("resumed: {}", resumed.timing));
        Ok(())
    }
}

async fn stop_and_start() -> Outcome {
    const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";
    let guest = Guest::start().await?;
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
    let guest = Guest::start().await?;
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

/// The same snapshot is resumed twice (the second time after its VMM was killed), and each time UUIDs are drawn.
async fn two_resumes() -> Outcome {
    let guest = Guest::start().await?;
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
