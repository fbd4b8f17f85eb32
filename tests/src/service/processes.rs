//! The processes of a service: supervisors, the VMMs and wardens that they start, and the end of all of them.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process, pidfd_send_signal};
use serde_json::Value;
use stasis_api::vmm_process::find_under;
use stasis_warden::jail::start::{ProcessNote, find};

use super::Options;
use super::place::{Place, environment};
use crate::host;
use crate::vmm::Error;

/// A process of ours has ended: it is ours to wait for, so it stays as a zombie until then.
pub(super) fn is_dead(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

/// Ends what a killed supervisor left, idle VMMs too: no other comes that would. The warden first, which may be starting one.
pub(super) fn end_processes(data: &Path) {
    let note = std::fs::read(data.join("warden.json")).ok();
    let note = note.and_then(|note| serde_json::from_slice::<ProcessNote>(&note).ok());
    if let Some(warden) = note.and_then(|note| find(&note)) {
        let _ = pidfd_send_signal(warden, Signal::KILL);
    }
    for pid in vmms(&data.join("run"), |_| true) {
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Process ids of VMMs whose run directory is one of `root` with a name that is `wanted`.
pub(super) fn vmms(root: &Path, wanted: impl Fn(&str) -> bool) -> Vec<u32> {
    let found = find_under(root).unwrap_or_default().into_iter();
    found
        .filter(|(_, dir)| dir.file_name().is_some_and(|name| wanted(&name.to_string_lossy())))
        .filter_map(|(identity, _)| u32::try_from(identity.pid).ok())
        // A killed one has no command line any more, though it may not be reaped yet.
        .filter(|pid| std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
        .collect()
}

#[expect(clippy::disallowed_methods, reason = "this is the tests' one place that starts supervisors")]
pub(super) fn spawn(dir: &Path, data: &Path, options: &Options, place: &Place, port: u16) -> Result<Child, Error> {
    let log = File::options().create(true).append(true).open(dir.join("supervisor.log"))?;
    let child = std::process::Command::new(host::program("stasis"))
        .arg("serve")
        .envs(environment(data, options, place, port))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(child)
}

#[expect(clippy::disallowed_methods, reason = "a program run as an operator runs it")]
pub(super) fn make_key(data: &Path, tenant: &str) -> Result<String, Error> {
    let made = std::process::Command::new(host::program("stasis"))
        .args(["--json", "key", "create", "--tenant", tenant, "--data-dir"])
        .arg(data)
        .output()?;
    let answer: Value = serde_json::from_slice(&made.stdout)
        .map_err(|e| format!("stasis key create: {e}: {}", String::from_utf8_lossy(&made.stderr)))?;
    Ok(answer["key"].as_str().unwrap_or_default().to_owned())
}
