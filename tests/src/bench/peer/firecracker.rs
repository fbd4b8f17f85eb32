//! Firecracker: full and diff snapshots into files over its API socket, and loads with the `File` backend; its network device (`network`).
//!
//! Run with v1.12.1 (`tests/peers/firecracker`); later versions take the same requests.

mod api;
pub mod network;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::{Value, json};

use super::{Ground, Killed, PATIENCE, settle, transfer, woken};
use crate::bench::console::{Watch, passes};
use crate::bench::process;
use crate::bench::samples::Samples;
use crate::vmm::{Error, pulse, until};
use api::Api;

struct Firecracker {
    process: Killed,
    api: Api,
    /// It writes the guest's serial port to its standard output.
    console: PathBuf,
}

impl Firecracker {
    /// Starts it in the calling thread's namespaces; its files are in `dir`.
    fn spawn(program: &Path, dir: &Path, name: &str) -> Result<Self, Error> {
        let (socket, console) = (dir.join(format!("{name}.sock")), dir.join(format!("{name}.console")));
        let log = dir.join(format!("{name}.log"));
        let errors = File::create(&log)?;
        #[expect(clippy::disallowed_methods, reason = "the one place that starts Firecracker as a peer")]
        let child = Command::new(program)
            // As in the reference measurement: a filter costs nothing that is measured, but may forbid what an unusual KVM needs.
            .args(["--no-seccomp", "--api-sock"])
            .arg(&socket)
            // Else it says what it does among the guest's output.
            .arg("--log-path")
            .arg(&log)
            .stdin(Stdio::null())
            .stdout(File::create(&console)?)
            .stderr(errors)
            .spawn()?;
        Ok(Self { process: Killed(child), api: Api { socket }, console })
    }

    /// Waits until it takes requests.
    async fn ready(self) -> Result<Self, Error> {
        let socket = &self.api.socket;
        until("Firecracker's API socket", || Ok(std::os::unix::net::UnixStream::connect(socket).ok())).await?;
        Ok(self)
    }

    async fn start(program: &Path, ground: &Ground<'_>, name: &str) -> Result<Self, Error> {
        Self::spawn(program, &ground.dir, name)?.ready().await
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> Result<(), Error> {
        self.api.call(method, path, body).await
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
        // The older name of `track_dirty_pages`, which versions before 1.13 do not know and later ones take, too.
        let request =
            json!({"snapshot_path": state, "mem_backend": backend, "enable_diff_snapshots": true, "resume_vm": true});
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
