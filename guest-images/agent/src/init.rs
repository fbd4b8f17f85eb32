//! What PID 1 does before it serves, and how it ends the guest.
//!
//! Started as `/init` of an initramfs it loads the modules named in `/modules/order`, mounts the disk that the kernel command line calls
//! `root=` and moves into it; the process goes on, so the root file system needs no agent of its own. Started as init of a root file
//! system that the kernel mounted itself, it finds no modules and no initramfs and skips those steps.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FsWord, statfs, sync};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Resource, Rlimit, Signal, WaitOptions, chdir, chroot, setrlimit, setsid, wait};
use rustix::system::{RebootCommand, finit_module, reboot, sethostname};

use crate::network::Network;

/// A file system of the kernel's own that a Linux guest expects.
struct Mount {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    options: &'static str,
}

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const DATA: MountFlags = PLAIN.union(MountFlags::NOEXEC);

/// Needed to find the root disk; they move with us into it.
const EARLY: [Mount; 3] = [
    Mount { kind: "proc", at: "/proc", flags: DATA, options: "" },
    Mount { kind: "sysfs", at: "/sys", flags: DATA, options: "" },
    Mount { kind: "devtmpfs", at: "/dev", flags: MountFlags::NOSUID, options: "mode=755" },
];
/// `/tmp` is left to the disk, as Debian has it: half of a small guest's memory would be too little for it.
const LATE: [Mount; 4] = [
    Mount {
        kind: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: "gid=5,mode=620,ptmxmode=666",
    },
    Mount { kind: "tmpfs", at: "/dev/shm", flags: PLAIN, options: "mode=1777" },
    Mount { kind: "tmpfs", at: "/run", flags: PLAIN, options: "mode=755" },
    Mount { kind: "cgroup2", at: "/sys/fs/cgroup", flags: DATA, options: "nsdelegate" },
];
/// What programs expect in /dev beside the devices.
const LINKS: [(&str, &str); 4] =
    [("/proc/self/fd", "/dev/fd"), ("fd/0", "/dev/stdin"), ("fd/1", "/dev/stdout"), ("fd/2", "/dev/stderr")];

const MODULES: &str = "/modules";
const NEW_ROOT: &str = "/new-root";
/// For the root disk's device to appear, after its driver was loaded.
const ROOT_DEADLINE: Duration = Duration::from_secs(10);
/// For processes to end by themselves before the guest goes down.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// The kernel's limit of 1024 for a process whose init does not raise it is too low for servers.
const OPEN_FILES: Rlimit = Rlimit { current: Some(65_536), maximum: Some(1 << 20) };

/// The magic numbers that `statfs` gives for an initramfs.
const RAMFS: FsWord = 0x8584_58f6;
const TMPFS: FsWord = 0x0102_1994;

/// A step that failed; the guest cannot go on.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {object}")]
pub(crate) struct InitError {
    operation: &'static str,
    object: String,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(operation: &'static str, object: impl Into<String>) -> impl FnOnce(E) -> InitError {
    move |source| InitError { operation, object: object.into(), source: source.into() }
}

/// Makes a Linux guest of what the kernel left.
pub(crate) fn set_up() -> Result<(), InitError> {
    mount_all(&EARLY)?;
    load_modules()?;
    let line = fs::read_to_string("/proc/cmdline").map_err(failed("read", "/proc/cmdline"))?;
    if let Some(root) = RootDisk::from_command_line(&line)
        && in_initramfs()?
    {
        root.enter()?;
    }
    mount_all(&LATE)?;
    // Comfort, whose want would stop only who needs it.
    for (target, link) in LINKS {
        warn(
            std::os::unix::fs::symlink(target, link)
                .or_else(unless(io::ErrorKind::AlreadyExists))
                .map_err(failed("make", link)),
        );
    }
    warn(set_host_name());
    warn(loopback_up().map_err(failed("bring up", "lo")));
    // Nothing that the host needs runs over it: a guest without it can still be asked what is wrong.
    if let Err(error) =
        Network::from_command_line(&line).and_then(|network| network.map_or(Ok(()), |n| n.apply(Path::new("/"))))
    {
        crate::report(&error);
    }
    warn(setrlimit(Resource::Nofile, OPEN_FILES).map_err(failed("raise the limit of", "open files")));
    // Already a session leader when the kernel started us; it is the children that must not share the console's.
    let _ = setsid();
    Ok(())
}

fn warn(step: Result<(), InitError>) {
    if let Err(error) = step {
        crate::report(&error);
    }
}

fn unless(kind: io::ErrorKind) -> impl FnOnce(io::Error) -> io::Result<()> {
    move |error| {
        if error.kind() == kind { Ok(()) } else { Err(error) }
    }
}

fn mount_all(mounts: &[Mount]) -> Result<(), InitError> {
    for Mount { kind, at, flags, options } in mounts {
        // A read-only root has them or not; the mount below says which.
        let _ = fs::create_dir_all(at);
        let options = std::ffi::CString::new(*options).unwrap_or_default();
        match mount(*kind, *at, *kind, *flags, options.as_c_str()) {
            // The kernel mounts /dev by itself when it mounts the root.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(failed("mount", *at)(error)),
        }
    }
    Ok(())
}

/// Loads what the initramfs brought, in its order, and frees the memory of the files.
fn load_modules() -> Result<(), InitError> {
    let directory = Path::new(MODULES);
    let order = match fs::read_to_string(directory.join("order")) {
        Ok(order) => order,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("read", "/modules/order")(error)),
    };
    for name in order.lines() {
        let path = directory.join(name);
        let load = || {
            let file = fs::File::open(&path)?;
            match finit_module(&file, c"", 0) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(error) => Err(io::Error::from(error)),
            }
        };
        load().map_err(failed("load module", name))?;
    }
    fs::remove_dir_all(directory).map_err(failed("remove", MODULES))
}

fn in_initramfs() -> Result<bool, InitError> {
    let root = statfs("/").map_err(failed("look at", "/"))?;
    Ok(matches!(root.f_type, RAMFS | TMPFS))
}

/// What the kernel command line says about the root file system.
#[derive(Debug, PartialEq, Eq)]
struct RootDisk {
    device: String,
    kind: String,
    flags: MountFlags,
    options: String,
}

impl RootDisk {
    /// The options the kernel itself knows: `root=` (a path), `rootfstype=`, `rootflags=`, `ro`, `rw`. `None` without a root.
    fn from_command_line(line: &str) -> Option<Self> {
        let mut device = None;
        let mut root =
            Self { device: String::new(), kind: "ext4".to_owned(), flags: MountFlags::RDONLY, options: String::new() };
        for word in line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("root", value)) => device = Some(value.to_owned()),
                Some(("rootfstype", value)) => value.clone_into(&mut root.kind),
                Some(("rootflags", value)) => value.clone_into(&mut root.options),
                None if word == "rw" => root.flags = MountFlags::empty(),
                None if word == "ro" => root.flags = MountFlags::RDONLY,
                _ => {}
            }
        }
        device.map(|device| Self { device, ..root })
    }

    /// Mounts the disk and makes it `/`, with the early file systems in it.
    fn enter(&self) -> Result<(), InitError> {
        wait_for(Path::new(&self.device)).map_err(failed("find the root disk", &self.device))?;
        fs::create_dir_all(NEW_ROOT).map_err(failed("make", NEW_ROOT))?;
        let options =
            std::ffi::CString::new(self.options.as_str()).map_err(failed("read the options of", &self.device))?;
        mount(&self.device, NEW_ROOT, &self.kind, self.flags, options.as_c_str())
            .map_err(failed("mount the root disk", &self.device))?;
        for Mount { at, .. } in EARLY {
            let target = format!("{NEW_ROOT}{at}");
            let _ = fs::create_dir_all(&target);
            mount_move(at, &target).map_err(failed("move into the root disk", at))?;
        }
        // As switch_root(8) does: an initramfs cannot be unmounted or pivoted, so the new root is moved on top of it.
        chdir(NEW_ROOT).map_err(failed("enter", NEW_ROOT))?;
        mount_move(".", "/").map_err(failed("move to / the root disk", &self.device))?;
        chroot(".").map_err(failed("enter the root disk", &self.device))?;
        chdir("/").map_err(failed("enter", "/"))
    }
}

/// Until the path exists. Drivers make device nodes in their own time and there is nothing to wait on before /dev has them.
#[expect(clippy::disallowed_methods, reason = "a poll with a deadline; no other task runs yet")]
fn wait_for(path: &Path) -> io::Result<()> {
    let begun = Instant::now();
    while !path.exists() {
        if begun.elapsed() > ROOT_DEADLINE {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("not there after {} s", ROOT_DEADLINE.as_secs()),
            ));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn set_host_name() -> Result<(), InitError> {
    let name = match fs::read_to_string("/etc/hostname") {
        Ok(name) => name,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("read", "/etc/hostname")(error)),
    };
    sethostname(name.trim().as_bytes()).map_err(failed("set the host name", name.trim()))
}

pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: an ifreq is plain data, for which all zeros is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the kernel reads one ifreq, whose name ends in a zero byte; it lives through the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends all processes, writes everything out and resets the machine, at which its VMM ends. Returns only if the kernel refuses.
pub(crate) fn shut_down() {
    eprintln!("stasis-agent: shutting down");
    end_processes(Signal::TERM, TERM_GRACE);
    end_processes(Signal::KILL, TERM_GRACE);
    sync();
    if let Err(error) = reboot(RebootCommand::Restart) {
        eprintln!("stasis-agent: cannot reset the machine: {error}");
    }
}

/// Signals all processes but this one and reaps until none is left or the time is up.
#[expect(clippy::disallowed_methods, reason = "a poll with a deadline; the runtime is gone by now")]
fn end_processes(signal: Signal, grace: Duration) {
    // To all it may signal: for PID 1 everybody else.
    // SAFETY: kill touches no memory; that it reaches every process is what is wanted.
    unsafe { libc::kill(-1, signal.as_raw()) };
    let begun = Instant::now();
    while begun.elapsed() < grace {
        match wait(WaitOptions::NOHANG) {
            Ok(Some(_)) => {}
            Ok(None) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_disk_is_read_as_the_kernel_reads_it() {
        let line = "console=ttyS0 panic=1 root=/dev/vda rw rootflags=discard,noatime rootfstype=ext4 quiet";
        assert_eq!(
            RootDisk::from_command_line(line),
            Some(RootDisk {
                device: "/dev/vda".to_owned(),
                kind: "ext4".to_owned(),
                flags: MountFlags::empty(),
                options: "discard,noatime".to_owned()
            })
        );
        // The last word wins, and without one the root is read-only.
        assert_eq!(RootDisk::from_command_line("root=/dev/vdb rw ro").unwrap().flags, MountFlags::RDONLY);
        assert_eq!(RootDisk::from_command_line("root=/dev/vdb").unwrap().flags, MountFlags::RDONLY);
        assert_eq!(RootDisk::from_command_line("console=ttyS0 rw"), None);
    }
}
