//! Where the time of a pause and of a wake goes: both processors sampled while one of each runs, by `perf`, and each sample put under what was
//! being done. Percentages are of the processors' whole time, so what is idle shows, too.
//!
//! Left out where there is no `perf`.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};

use super::case::{Case, Wake};
use super::stasis::{Home, Setting};
use crate::vmm::Error;

/// Samples a second of each processor.
const RATE: &str = "2999";
/// From its start until it samples.
const WARM_UP: Duration = Duration::from_millis(500);
/// Sampled after the answer of a wake: the guest's hot set comes then.
const AFTER_WAKE: Duration = Duration::from_millis(50);

/// Shares of one operation.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Profile {
    /// What ran.
    pub what: String,
    /// How long it took, ms.
    pub took_ms: f64,
    /// What the processors did, per cent of their time, the largest first.
    pub shares: Vec<(String, f64)>,
}

/// What of a symbol's name tells what was done, in this order.
const DOING: &[(&str, &str)] = &[
    ("lz4", "compression (lz4)"),
    ("zstd", "compression (zstd)"),
    ("blake3", "digests of frames and packs (BLAKE3)"),
    ("page_hash", "digests of pages"),
    ("is_zero", "search for zero pages"),
    ("clear_page", "the kernel clears fresh pages"),
    ("folio_zero", "the kernel clears fresh pages"),
    ("memmove", "copies"),
    ("copy_user", "copies"),
    ("_copy_from_iter", "copies into sockets"),
    ("_copy_to_iter", "copies from sockets"),
    ("decode_frame", "decompression"),
    ("decompress", "decompression"),
];

/// Profiles a first pause, a repeat pause and a cold wake of this case. `Err` says why there are no more.
pub async fn measure(case: &Case, profiles: &mut Vec<Profile>) -> Result<(), Error> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("perf.data");
    // In a jail the program has another path, by which perf does not find its symbols.
    let home = Home::start_unjailed(case, Setting::Wakes(Wake::Cold)).await?;
    let (id, _) = home.create().await?;
    for what in ["a first pause", "a repeat pause"] {
        let recorder = Recorder::start(&file).await?;
        let begun = now();
        home.pause(&id).await?;
        profiles.push(recorder.end(what, begun, Duration::ZERO, &file)?);
        let recorder = Recorder::start(&file).await?;
        let begun = now();
        home.service.resume(&id).await?.expect_success()?;
        let answered = now();
        tokio::time::sleep(AFTER_WAKE).await;
        if profiles.len() == 2 {
            profiles.push(recorder.end("a cold wake", begun, now().saturating_sub(answered), &file)?);
        } else {
            drop(recorder);
        }
        home.settle(&id).await?;
    }
    home.delete(&id).await
}

/// The clock that samples carry.
fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// A `perf record` that runs.
struct Recorder(Child);

impl Recorder {
    #[expect(clippy::disallowed_methods, reason = "the profiler is a program of the machine")]
    async fn start(file: &Path) -> Result<Self, Error> {
        let child = Command::new("perf")
            .args(["record", "-q", "-a", "-e", "cpu-clock", "-F", RATE, "-k", "CLOCK_MONOTONIC", "-o"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("perf cannot be started: {e}"))?;
        tokio::time::sleep(WARM_UP).await;
        Ok(Self(child))
    }

    /// Stops it and reads what was sampled between `begun` and now; `after` of that is not counted as the operation's time.
    #[expect(clippy::disallowed_methods, reason = "the profiler is a program of the machine")]
    fn end(mut self, what: &'static str, begun: Duration, after: Duration, file: &Path) -> Result<Profile, Error> {
        let ended = now();
        self.stop();
        let script = Command::new("perf").args(["script", "-F", "comm,time,ip,sym", "-i"]).arg(file).output()?;
        let text = String::from_utf8_lossy(&script.stdout);
        let shares = shares(&text, begun, ended);
        if shares.is_empty() {
            return Err(format!("perf has no samples: {}", String::from_utf8_lossy(&script.stderr)).into());
        }
        Ok(Profile {
            what: what.to_owned(),
            took_ms: ended.saturating_sub(begun).saturating_sub(after).as_secs_f64() * 1000.0,
            shares,
        })
    }

    fn stop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // Gone already: then there is nothing to stop.
            let _ = kill_process(pid, Signal::INT);
        }
        let _ = self.0.wait();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Per cent of the samples between the two times, by what was done. Lines are `COMM TIME: ADDRESS SYMBOL`.
fn shares(script: &str, begun: Duration, ended: Duration) -> Vec<(String, f64)> {
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    let mut total = 0_u32;
    for line in script.lines() {
        let Some((head, rest)) = line.split_once(": ") else { continue };
        let Some((comm, time)) = head.trim().rsplit_once(' ') else { continue };
        let Ok(time) = time.trim().parse::<f64>() else { continue };
        if time < begun.as_secs_f64() || time > ended.as_secs_f64() {
            continue;
        }
        let symbol = rest.trim().split_once(' ').map_or("", |(_, symbol)| symbol);
        total += 1;
        *counts.entry(label(comm.trim(), symbol)).or_default() += 1;
    }
    let mut shares: Vec<_> =
        counts.into_iter().map(|(name, count)| (name, f64::from(count) * 100.0 / f64::from(total.max(1)))).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    shares
}

/// Who did what, in a few words.
fn label(comm: &str, symbol: &str) -> String {
    if comm == "swapper" {
        return "idle".to_owned();
    }
    let who = match comm {
        _ if comm.starts_with("vcpu") => return "the guest".to_owned(),
        _ if comm.starts_with("vmm-") || comm.starts_with("background") || comm.starts_with("faults") => "VMM",
        "stasis-vmm" | "fds" => "VMM",
        _ if comm.starts_with("stasis-worker") => return "supervisor".to_owned(),
        _ if comm.starts_with("tokio-rt") || comm.starts_with("stasis-bench") => {
            return "S3 server and benchmark".to_owned();
        }
        _ => return "everything else".to_owned(),
    };
    let doing = DOING.iter().find(|(part, _)| symbol.contains(part)).map_or("the rest", |(_, doing)| *doing);
    format!("{who}: {doing}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_in_the_window_are_put_under_what_was_done() {
        let script = "\
vmm-worker   10.100000:   55d0 lz4_flex::block::compress::compress_internal
vmm-worker   10.200000:   ffff clear_page_erms
swapper      10.300000:   ffff pv_native_safe_halt
vcpu0        10.400000:   ffff [unknown]
vmm-worker    9.000000:   55d0 lz4_flex::block::compress::compress_internal
VM Periodic T 10.450000:  7f00 something else
";
        let found = shares(script, Duration::from_secs(10), Duration::from_secs(11));
        let of = |name: &str| found.iter().find(|(found, _)| found == name).map(|(_, share)| *share);
        assert_eq!(of("VMM: compression (lz4)"), Some(20.0));
        assert_eq!(of("VMM: the kernel clears fresh pages"), Some(20.0));
        assert_eq!((of("idle"), of("the guest"), of("everything else")), (Some(20.0), Some(20.0), Some(20.0)));
    }
}
