//! QEMU: `stop`, `migrate` through `cat` into a file, `cont`; and an incoming migration from that file. It has no diff, so each of its pauses
//! sends all memory that is not zero.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::{Ground, Killed, PATIENCE, settle, transfer, woken};
use crate::bench::console::{Watch, passes};
use crate::bench::process;
use crate::bench::samples::Samples;
use crate::vmm::{Error, pulse, until};

/// No limit, as far as a machine can tell.
const BANDWIDTH: u64 = 1 << 40;

struct Qemu {
    process: Killed,
    qmp: BufReader<UnixStream>,
    console: PathBuf,
}

impl Qemu {
    async fn start(program: &Path, ground: &Ground<'_>, name: &str, incoming: bool) -> Result<Self, Error> {
        let (socket, console) = (ground.dir.join(format!("{name}.qmp")), ground.dir.join(format!("{name}.console")));
        #[expect(clippy::disallowed_methods, reason = "the one place that starts QEMU as a peer")]
        let mut command = Command::new(program);
        command
            .args(["-M", "microvm,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off", "-accel", "kvm"])
            // A software KVM offers the MSR of that feature and then refuses to set it.
            .args(["-cpu", "host,-arch-capabilities", "-m"])
            .arg(format!("{}M", ground.case.memory_mib))
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial"])
            .arg(format!("file:{}", console.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(pulse())
            .arg("-append")
            .arg(ground.case.pulse_command_line());
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let log = File::create(ground.dir.join(format!("{name}.log")))?;
        let process = Killed(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?);
        let stream = until("QEMU's QMP socket", || Ok(std::os::unix::net::UnixStream::connect(&socket).ok())).await?;
        stream.set_nonblocking(true)?;
        let mut qemu = Self { process, qmp: BufReader::new(UnixStream::from_std(stream)?), console };
        qemu.line().await?;
        qemu.call("qmp_capabilities", json!({})).await?;
        qemu.call("migrate-set-parameters", json!({"max-bandwidth": BANDWIDTH})).await?;
        Ok(qemu)
    }

    async fn line(&mut self) -> Result<Value, Error> {
        let mut line = String::new();
        tokio::time::timeout(PATIENCE, self.qmp.read_line(&mut line)).await??;
        serde_json::from_str(&line).map_err(|e| format!("QMP: {e}: {line:?}").into())
    }

    async fn call(&mut self, what: &str, arguments: Value) -> Result<Value, Error> {
        let request = json!({"execute": what, "arguments": arguments}).to_string();
        self.qmp.write_all(format!("{request}\n").as_bytes()).await?;
        loop {
            let mut answer = self.line().await?;
            if let Some(error) = answer.get("error") {
                return Err(format!("QEMU refuses {what}: {error}").into());
            }
            // Events come in between.
            if let Some(answer) = answer.get_mut("return") {
                return Ok(answer.take());
            }
        }
    }

    async fn migrated(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.call("query-migrate", json!({})).await?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(format!("QEMU's migration: {state}").into()),
                _ if Instant::now() > deadline => return Err(format!("QEMU's migration hangs: {state}").into()),
                _ => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        }
    }

    async fn save(&mut self, to: &Path) -> Result<(), Error> {
        self.call("stop", json!({})).await?;
        self.call("migrate", json!({"uri": format!("exec:cat > {}", to.display())})).await?;
        self.migrated().await
    }

    async fn load(&mut self, from: &Path) -> Result<(), Error> {
        self.call("migrate-incoming", json!({"uri": format!("exec:cat {}", from.display())})).await?;
        self.migrated().await?;
        self.call("cont", json!({})).await.map(drop)
    }
}

/// One boot, two saves, two loads.
pub async fn cycle(program: &Path, ground: &Ground<'_>, samples: &mut Samples) -> Result<(), Error> {
    let mut qemu = Qemu::start(program, ground, "first", false).await?;
    settle(&qemu.console).await?;
    let guest = (u64::from(ground.case.memory_mib) << 20) / 2;
    if let Some(overhead) = process::overhead(qemu.process.0.id(), guest) {
        overhead.note(samples);
    }
    for (metric, name, detail) in [("first_pause", "full", ".first"), ("repeat_pause", "again", "")] {
        let file = ground.dir.join(name);
        settle(&qemu.console).await?;
        let watch = Watch::start(qemu.console.clone());
        let begun = Instant::now();
        qemu.save(&file).await?;
        let saved = begun.elapsed();
        if metric == "repeat_pause" {
            qemu.call("cont", json!({})).await?;
            let resumed = Instant::now();
            samples.time("guest_stop", resumed - begun);
            let pass = watch
                .until("a pass after a save", PATIENCE, |beats| passes(beats).find(|pass| pass.began > resumed))
                .await?;
            samples.time("first_pass_after_snapshot", pass.took());
            // A guest that spins would slow the upload: ours is stopped too.
            qemu.call("stop", json!({})).await?;
        }
        drop(watch);
        let uploaded = transfer::upload(ground, &file, name).await?;
        samples.time(metric, saved + uploaded.took);
        samples.time(format!("{metric}.stop"), saved);
        samples.bytes(format!("bytes_sent{detail}"), uploaded.sent);
        samples.add(format!("requests{detail}"), "count", uploaded.parts.len() as f64);
        if metric == "first_pause" {
            for wake in ["warm", "cold"] {
                let mut next = Qemu::start(program, ground, wake, true).await?;
                let watch = Watch::start(next.console.clone());
                let begun = Instant::now();
                if wake == "cold" {
                    let fetched = ground.dir.join("fetched");
                    samples.time("resume_cold.download", transfer::download(ground, &uploaded, &fetched).await?);
                    next.load(&fetched).await?;
                } else {
                    next.load(&file).await?;
                }
                woken(samples, &watch, wake, begun).await?;
            }
            qemu.call("cont", json!({})).await?;
        }
        transfer::clear(ground, &uploaded).await?;
    }
    Ok(())
}
