//! Firecracker: full and diff snapshots into files over its API socket, and loads with the `File` backend.
//!
//! Written from the documented API (v1.7 and later); on the machine this was written on there was no binary to run it with.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

use super::{Ground, Killed, PATIENCE, settle, transfer, woken};
use crate::bench::console::{Watch, passes};
use crate::bench::process;
use crate::bench::samples::Samples;
use crate::vmm::{Error, pulse, until};

/// More than any answer of its API.
const MAX_ANSWER: usize = 64 << 10;

struct Firecracker {
    process: Killed,
    socket: PathBuf,
    /// It writes the guest's serial port to its standard output.
    console: PathBuf,
}

impl Firecracker {
    async fn start(program: &Path, ground: &Ground<'_>, name: &str) -> Result<Self, Error> {
        let (socket, console) = (ground.dir.join(format!("{name}.sock")), ground.dir.join(format!("{name}.console")));
        let log = File::create(ground.dir.join(format!("{name}.log")))?;
        #[expect(clippy::disallowed_methods, reason = "the one place that starts Firecracker as a peer")]
        let child = Command::new(program)
            // As in the reference measurement: a filter costs nothing that is measured, but may forbid what an unusual KVM needs.
            .args(["--no-seccomp", "--api-sock"])
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(File::create(&console)?)
            .stderr(log)
            .spawn()?;
        let process = Killed(child);
        until("Firecracker's API socket", || Ok(std::os::unix::net::UnixStream::connect(&socket).ok())).await?;
        Ok(Self { process, socket, console })
    }

    /// One request on a connection of its own; any answer but a success is an error.
    async fn call(&self, method: &str, path: &str, body: Value) -> Result<(), Error> {
        let body = body.to_string();
        let mut stream = UnixStream::connect(&self.socket).await?;
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).await?;
        let mut answer = Vec::new();
        let done = async {
            // The connection stays open after the answer: its head says where it ends, and only an error's body is of interest.
            while !answer.windows(4).any(|four| four == b"\r\n\r\n") && answer.len() < MAX_ANSWER {
                if stream.read_buf(&mut answer).await? == 0 {
                    break;
                }
            }
            Ok::<_, std::io::Error>(())
        };
        tokio::time::timeout(PATIENCE, done).await??;
        let text = String::from_utf8_lossy(&answer);
        match text.split(' ').nth(1) {
            Some(status) if status.starts_with('2') => Ok(()),
            _ => Err(format!("Firecracker refuses {method} {path}: {text}").into()),
        }
    }

    async fn boot(&self, ground: &Ground<'_>) -> Result<(), Error> {
        let machine = json!({"vcpu_count": 1, "mem_size_mib": ground.case.memory_mib, "track_dirty_pages": true});
        self.call("PUT", "/machine-config", machine).await?;
        let source = json!({"kernel_image_path": pulse(), "boot_args": ground.case.pulse_command_line()});
        self.call("PUT", "/boot-source", source).await?;
        self.call("PUT", "/actions", json!({"action_type": "InstanceStart"})).await
    }

    async fn snapshot(&self, kind: &str, state: &Path, memory: &Path) -> Result<(), Error> {
        self.call("PATCH", "/vm", json!({"state": "Paused"})).await?;
        let request = json!({"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory});
        self.call("PUT", "/snapshot/create", request).await
    }

    async fn load(&self, state: &Path, memory: &Path) -> Result<(), Error> {
        let backend = json!({"backend_type": "File", "backend_path": memory});
        let request =
            json!({"snapshot_path": state, "mem_backend": backend, "track_dirty_pages": true, "resume_vm": true});
        self.call("PUT", "/snapshot/load", request).await
    }
}

/// One boot, a full and a diff snapshot, two loads of the full one.
pub async fn cycle(program: &Path, ground: &Ground<'_>, samples: &mut Samples) -> Result<(), Error> {
    let vmm = Firecracker::start(program, ground, "first").await?;
    vmm.boot(ground).await?;
    settle(&vmm.console).await?;
    let guest = (u64::from(ground.case.memory_mib) << 20) / 2;
    if let Some(overhead) = process::overhead(vmm.process.0.id(), guest) {
        overhead.note(samples);
    }
    for (metric, kind, detail) in [("first_pause", "Full", ".first"), ("repeat_pause", "Diff", "")] {
        let (state, memory) = (ground.dir.join(format!("{kind}.state")), ground.dir.join(format!("{kind}.memory")));
        settle(&vmm.console).await?;
        let watch = Watch::start(vmm.console.clone());
        let begun = Instant::now();
        vmm.snapshot(kind, &state, &memory).await?;
        let saved = begun.elapsed();
        if kind == "Diff" {
            vmm.call("PATCH", "/vm", json!({"state": "Resumed"})).await?;
            let resumed = Instant::now();
            samples.time("guest_stop", resumed - begun);
            let pass = watch
                .until("a pass after a snapshot", PATIENCE, |beats| passes(beats).find(|pass| pass.began > resumed))
                .await?;
            samples.time("first_pass_after_snapshot", pass.took());
            // A guest that spins would slow the upload: ours is stopped too.
            vmm.call("PATCH", "/vm", json!({"state": "Paused"})).await?;
        }
        drop(watch);
        let uploaded = transfer::upload(ground, &memory, kind).await?;
        samples.time(metric, saved + uploaded.took);
        samples.time(format!("{metric}.stop"), saved);
        samples.bytes(format!("bytes_sent{detail}"), uploaded.sent);
        samples.add(format!("requests{detail}"), "count", uploaded.parts.len() as f64);
        if kind == "Full" {
            for wake in ["warm", "cold"] {
                let next = Firecracker::start(program, ground, wake).await?;
                let watch = Watch::start(next.console.clone());
                let begun = Instant::now();
                if wake == "cold" {
                    let fetched = ground.dir.join("fetched");
                    samples.time("resume_cold.download", transfer::download(ground, &uploaded, &fetched).await?);
                    next.load(&state, &fetched).await?;
                } else {
                    next.load(&state, &memory).await?;
                }
                woken(samples, &watch, wake, begun).await?;
            }
            vmm.call("PATCH", "/vm", json!({"state": "Resumed"})).await?;
        }
        transfer::clear(ground, &uploaded).await?;
    }
    Ok(())
}
