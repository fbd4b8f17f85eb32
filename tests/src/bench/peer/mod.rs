//! Other VMMs on the same pulse guest, in the way they are used with an object store today: a snapshot to a local file, then a parallel
//! upload of it; a download, then a load. Processes are started before the clock runs, which favours them.
//!
//! | module | what |
//! | --- | --- |
//! | [`firecracker`] | full and diff snapshots over its API socket; its network |
//! | [`qemu`] | `migrate` to a file over QMP, on a `microvm` machine |
//! | [`transfer`] | parts of 8 MiB, zstd level 1, up and down |

pub mod firecracker;
pub mod qemu;
pub mod transfer;

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use super::bare::Bare;
use super::case::{Case, Peer, Wake};
use super::console::{Watch, passes};
use super::samples::Samples;
use super::stasis::{CONNECTIONS, Home, Setting};
use crate::vmm::Error;

/// How long a peer may take for anything.
const PATIENCE: Duration = Duration::from_mins(1);

impl Peer {
    /// Its word in rows.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Firecracker(_) => "firecracker",
            Self::Qemu(_) => "qemu",
        }
    }

    /// What it says of itself when asked for its version: the first line.
    pub fn version(&self) -> String {
        let (Self::Firecracker(program) | Self::Qemu(program)) = self;
        #[expect(clippy::disallowed_methods, reason = "a report says which peers were measured")]
        let said = Command::new(program).arg("--version").output().map(|said| said.stdout).unwrap_or_default();
        match String::from_utf8_lossy(&said).lines().next() {
            Some(line) => line.trim().to_owned(),
            None => format!("{} of an unknown version", self.word()),
        }
    }
}

/// What a peer needs to run: the guest, a store, a place for files.
pub struct Ground<'a> {
    /// The case.
    pub case: &'a Case,
    /// Moves parts.
    pub bare: &'a Bare,
    /// A service's store; the service itself is not used.
    pub home: &'a Home,
    /// For sockets, logs and snapshots; on a disk.
    pub dir: PathBuf,
}

/// Measures a peer as often as the case says.
pub async fn measure(peer: &Peer, case: &Case, samples: &mut Samples) -> Result<(), Error> {
    let bare = Bare::new(CONNECTIONS)?;
    let home = Home::start(case, Setting::Wakes(Wake::Cold)).await?;
    for run in 0..case.runs {
        let dir = crate::host::scratch()?;
        let ground = Ground { case, bare: &bare, home: &home, dir: dir.path().to_owned() };
        let done = match peer {
            Peer::Firecracker(program) => firecracker::cycle(program, &ground, samples).await,
            Peer::Qemu(program) => qemu::cycle(program, &ground, samples).await,
        };
        done.map_err(|e| format!("run {run}: {e}; {}", logs(&ground.dir)))?;
    }
    Ok(())
}

/// The peer's network instead.
pub async fn measure_network(
    peer: &Peer,
    case: &Case,
    samples: &mut Samples,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    match peer {
        Peer::Firecracker(program) => firecracker::network::measure(program, case, samples, notes).await,
        Peer::Qemu(_) => {
            notes.push("the network of QEMU: it is not driven".to_owned());
            Ok(())
        }
    }
}

/// What the processes said.
fn logs(dir: &Path) -> String {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let logs = entries.filter(|path| path.extension().is_some_and(|e| e == "log"));
    logs.filter_map(|path| std::fs::read_to_string(path).ok()).map(|log| log.trim().replace('\n', " | ")).collect()
}

/// A process that is killed when it is dropped.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the guest has run undisturbed for some passes.
async fn settle(console: &Path) -> Result<(), Error> {
    let watch = Watch::start(console.to_owned());
    watch.until("passes of the peer's guest", PATIENCE, |beats| passes(beats).nth(8)).await?;
    Ok(())
}

/// What a loaded guest shows: first output and first pass, as metrics of a wake.
async fn woken(samples: &mut Samples, watch: &Watch, wake: &str, since: std::time::Instant) -> Result<(), Error> {
    let first =
        watch.until("the first output after a load", PATIENCE, |beats| beats.first().map(|beat| beat.at)).await?;
    let pass = watch.until("the first pass after a load", PATIENCE, |beats| passes(beats).next()).await?;
    samples.time(format!("resume_{wake}"), first - since);
    samples.time(format!("resume_{wake}.hot_set"), pass.ended - since);
    let metric =
        if wake == "warm" { "first_pass_after_resume".to_owned() } else { format!("first_pass_after_resume.{wake}") };
    samples.time(metric, pass.took());
    Ok(())
}
