//! Control groups (version 2): one for each jailed process, below one of the warden's own.
//!
//! The kernel removes nothing by itself: a group is removed when its process is reaped, and what an earlier warden left is swept when the
//! next one starts.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};

use super::limits::{Disk, Limits};

/// Controllers without which groups would limit too little to be worth having.
const NEEDED: &[&str] = &["memory", "cpu", "pids"];
/// The one for disks, which not every kernel has.
const DISKS: &str = "io";
/// The group below which all others are, where the warden has none that is delegated to it.
const BASE: &str = "stasis-warden";
/// Microseconds in which a process may use its share of processor time.
const PERIOD_US: u64 = 100_000;

/// There are no groups that limit anything.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No version 2 hierarchy, or one without controllers.
    #[error("this host has no control groups of version 2 with the controllers {needed}: {0}", needed = NEEDED.join(", "))]
    Missing(String),
    /// The kernel refused a step.
    #[error("cannot {what} the control group {path}", path = path.display())]
    Step {
        /// What was tried.
        what: &'static str,
        /// On which group.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

fn step<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError::Step { what, path: path.to_owned(), source }
}

/// The warden's part of the hierarchy.
#[derive(Debug)]
pub struct Hierarchy {
    base: PathBuf,
    made: AtomicU64,
    /// Disks that can be limited.
    disks: Vec<String>,
}

impl Hierarchy {
    /// Finds or makes it. `delegated` says that the group in which this process is belongs to it, as a service manager gives it.
    pub fn find(delegated: bool) -> Result<Self, CgroupError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounted = mount_point(&mounts).ok_or_else(|| CgroupError::Missing("none is mounted".to_owned()))?;
        let there = fs::read_to_string(mounted.join("cgroup.controllers")).unwrap_or_default();
        if let Some(missing) = NEEDED.iter().find(|needed| !there.split_whitespace().any(|c| c == **needed)) {
            return Err(CgroupError::Missing(format!("{missing} is not in {}", mounted.display())));
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let base = match own_group(&own) {
            Some(own) if delegated => {
                let base = mounted.join(own.trim_start_matches('/'));
                // A group with groups below it that are limited has no processes of its own.
                let leaf = base.join("warden");
                make(&leaf)?;
                fs::write(leaf.join("cgroup.procs"), "0").map_err(step("move into", &leaf))?;
                base
            }
            _ => {
                let base = mounted.join(BASE);
                enable(&mounted)?;
                make(&base)?;
                base
            }
        };
        enable(&base)?;
        // In the root of the hierarchy as well, where it is not enabled yet; a service manager has done so for a group that it gave away.
        let limited = (delegated || allow(&mounted, DISKS).is_ok()) && allow(&base, DISKS).is_ok();
        if !limited {
            tracing::info!("this host does not limit what a process asks of its disks");
        }
        let disks = if limited { disks(Path::new("/sys/block")) } else { Vec::new() };
        let hierarchy = Self { base, made: AtomicU64::new(0), disks };
        hierarchy.sweep();
        Ok(hierarchy)
    }

    /// A group with these limits, empty.
    pub fn group(&self, limits: &Limits) -> Result<Group, CgroupError> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let path = self.base.join(format!("jail-{}-{number}", std::process::id()));
        make(&path)?;
        let group = Group { path, disks: self.disks.clone() };
        group.limit(limits)?;
        Ok(group)
    }

    /// The group in which the process `pid` is, if it is one of ours.
    pub fn group_of(&self, pid: i32) -> Option<Group> {
        let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = self.base.join(Path::new(own_group(&own)?).file_name()?);
        (path.file_name()?.to_str()?.starts_with("jail-") && path.is_dir())
            .then(|| Group { path, disks: self.disks.clone() })
    }

    /// Removes groups without processes, which an earlier warden left.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.base).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with("jail-") {
                // One with processes is refused.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }
}

/// One process's group.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    disks: Vec<String>,
}

impl Group {
    /// Sets its limits, which hold at once.
    pub fn limit(&self, limits: &Limits) -> Result<(), CgroupError> {
        for (file, value) in settings(limits) {
            let path = self.path.join(file);
            fs::write(&path, value).map_err(step("limit", &path))?;
        }
        for disk in &self.disks {
            let path = self.path.join("io.max");
            // One that went since the start has nothing to limit.
            if let Err(error) = fs::write(&path, disk_setting(disk, limits.disk)) {
                tracing::debug!(%error, disk, "a disk is not limited");
            }
        }
        Ok(())
    }

    /// For a process to be born into.
    pub fn open(&self) -> Result<OwnedFd, CgroupError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&self.path, flags, Mode::empty());
        opened.map_err(|error| step("open", &self.path)(error.into()))
    }

    /// Removes it; its process is gone.
    pub fn remove(self) {
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::debug!(%error, group = %self.path.display(), "a control group stays until the next start");
        }
    }
}

/// What is written where.
fn settings(limits: &Limits) -> [(&'static str, String); 4] {
    let quota = u64::from(limits.cpu_percent) * PERIOD_US / 100;
    [
        ("memory.max", limits.memory.to_string()),
        // A VMM without one of its threads is none.
        ("memory.oom.group", "1".to_owned()),
        ("cpu.max", format!("{quota} {PERIOD_US}")),
        ("pids.max", limits.threads.to_string()),
    ]
}

fn disk_setting(disk: &str, Disk { bytes, requests }: Disk) -> String {
    format!("{disk} rbps={bytes} wbps={bytes} riops={requests} wiops={requests}")
}

/// The numbers of the host's disks, `major:minor`. What is kept in memory is none.
fn disks(block: &Path) -> Vec<String> {
    let entries = fs::read_dir(block).into_iter().flatten().flatten();
    let real = entries.filter(|entry| {
        let name = entry.file_name();
        !["loop", "ram", "zram"].iter().any(|kind| name.to_string_lossy().starts_with(kind))
    });
    real.filter_map(|entry| Some(fs::read_to_string(entry.path().join("dev")).ok()?.trim().to_owned())).collect()
}

fn make(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(step("make", path)(error)),
        _ => Ok(()),
    }
}

/// Lets groups below `path` be limited.
fn enable(path: &Path) -> Result<(), CgroupError> {
    NEEDED.iter().try_for_each(|controller| allow(path, controller).map_err(step("limit what is below", path)))
}

fn allow(path: &Path, controller: &str) -> io::Result<()> {
    fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"))
}

/// Where the hierarchy is mounted.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        right.starts_with("cgroup2 ").then(|| left.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The group that `/proc/…/cgroup` tells of, from the root of the hierarchy.
fn own_group(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::limits::Size;

    #[test]
    fn the_hierarchy_is_found_among_mounts() {
        let hybrid = "30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n36 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point("30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"), None);
        assert_eq!(own_group("9:name=systemd:/\n0::/system.slice/x.service\n"), Some("/system.slice/x.service"));
        assert_eq!(own_group("9:name=systemd:/\n"), None);
    }

    #[test]
    fn limits_are_written_as_the_kernel_reads_them() {
        let limits = Limits::of_vmm(Size { vcpus: 1, memory_mib: 128, capture_mib: 64 });
        let settings = settings(&limits);
        assert!(settings.contains(&("cpu.max", "400000 100000".to_owned())), "{settings:?}");
        assert!(settings.contains(&("pids.max", "97".to_owned())), "{settings:?}");
        assert_eq!(disk_setting("254:0", limits.disk), "254:0 rbps=805306368 wbps=805306368 riops=24000 wiops=24000");
    }

    #[test]
    fn disks_are_found_and_what_is_kept_in_memory_is_none() {
        let block = tempfile::tempdir().unwrap();
        for (name, number) in [("vda", "254:0\n"), ("loop0", "7:0\n"), ("zram0", "253:0\n")] {
            fs::create_dir(block.path().join(name)).unwrap();
            fs::write(block.path().join(name).join("dev"), number).unwrap();
        }
        assert_eq!(disks(block.path()), ["254:0"]);
        assert!(disks(&block.path().join("nowhere")).is_empty());
    }
}
