//! The attempts, by what they are after. Each answers what it got, or the kernel's refusal.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::path::Path;

use super::{Outside, connect_tcp, connect_unix};

type Report<'a> = &'a mut dyn FnMut(&'static str, io::Result<String>);

/// A system call's answer.
fn call(number: i64, arguments: [i64; 5]) -> io::Result<String> {
    let [first, second, third, fourth, fifth] = arguments;
    // SAFETY: pointers among the arguments are null or point to strings and structs that live until it returns.
    let answer = unsafe { libc::syscall(number, first, second, third, fourth, fifth) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer.to_string()) }
}

fn text(what: &str) -> CString {
    CString::new(what).unwrap_or_default()
}

fn pointer(text: &CString) -> i64 {
    text.as_ptr() as i64
}

pub(crate) fn run(outside: &Outside, report: Report<'_>) {
    files(outside, report);
    networks(outside, report);
    processes(outside, report);
    privileges(report);
    kernel(report);
    resources(report);
}

fn listing(path: &str) -> io::Result<String> {
    let mut names: Vec<_> =
        fs::read_dir(path)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names.join(","))
}

fn files(outside: &Outside, report: Report<'_>) {
    let run_dir = Path::new(&outside.run_dir);
    report("list-root", listing("/"));
    report("read-other-console", fs::read(run_dir.join("console.log")).map(|found| found.len().to_string()));
    report("connect-other-control", connect_unix(&run_dir.join("control.sock")).map(|_| String::new()));
    report("read-passwd", fs::read("/etc/passwd").map(|found| found.len().to_string()));
    for (name, path) in [
        ("create-in-root", "/x"),
        ("create-in-tmp", "/tmp/x"),
        ("create-in-lib", "/lib/x"),
        ("write-program", "/stasis-intruder"),
    ] {
        report(name, File::options().write(true).create(true).truncate(false).open(path).map(|_| String::new()));
    }
    report("remount-writable", {
        let (root, none) = (text("/"), text("none"));
        let flags = (libc::MS_REMOUNT | libc::MS_BIND).cast_signed();
        call(libc::SYS_mount, [pointer(&none), pointer(&root), 0, flags, 0])
    });
    report(
        "chmod-program",
        fs::set_permissions("/stasis-intruder", std::os::unix::fs::PermissionsExt::from_mode(0o777))
            .map(|()| String::new()),
    );
    for (name, path) in
        [("open-mem", "/dev/mem"), ("open-kvm", "/dev/kvm"), ("open-null", "/dev/null"), ("open-kcore", "/proc/kcore")]
    {
        report(name, File::open(path).map(|_| String::new()));
    }
    let device = text("/x");
    let (character, block) = (i64::from(libc::S_IFCHR | 0o600), i64::from(libc::S_IFBLK | 0o600));
    report("mknod-mem", call(libc::SYS_mknod, [pointer(&device), character, 0x101, 0, 0]));
    report("mknod-disk", call(libc::SYS_mknod, [pointer(&device), block, 0xfe00, 0, 0]));
    let memory = text("x");
    report(
        "mknod-in-proc",
        File::open("/proc").and_then(|directory| {
            call(libc::SYS_mknodat, [i64::from(directory.as_raw_fd()), pointer(&memory), character, 0x101, 0])
        }),
    );
}

fn networks(outside: &Outside, report: Report<'_>) {
    report("connect-loopback", connect_tcp(outside.port).map(|_| String::new()));
    report("resolve-and-connect-out", {
        let out = std::net::SocketAddr::from(([1, 1, 1, 1], 443));
        std::net::TcpStream::connect_timeout(&out, std::time::Duration::from_secs(1)).map(|_| String::new())
    });
    report("send-datagram", {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0");
        socket.and_then(|socket| socket.send_to(b"x", ("127.0.0.1", outside.port))).map(|sent| sent.to_string())
    });
    let (packet, raw) = (i64::from(libc::AF_PACKET), i64::from(libc::SOCK_RAW));
    report("packet-socket", call(libc::SYS_socket, [packet, raw, 0x0300, 0, 0]));
    report("raw-socket", call(libc::SYS_socket, [i64::from(libc::AF_INET), raw, 1, 0, 0]));
    report("abstract-socket-of-the-host", {
        let address = SocketAddr::from_abstract_name(outside.name.as_bytes());
        address.and_then(|address| UnixStream::connect_addr(&address)).map(|_| String::new())
    });
    report("enter-network-of-the-host", call(libc::SYS_setns, [0, i64::from(libc::CLONE_NEWNET), 0, 0, 0]));
    report("interfaces", listing("/sys/class/net"));
}

fn processes(outside: &Outside, report: Report<'_>) {
    let pid = i64::from(outside.pid);
    report("own-pid", Ok(std::process::id().to_string()));
    report("list-processes", {
        listing("/proc").map(|names| {
            let numbers: Vec<_> = names.split(',').filter(|name| name.parse::<u32>().is_ok()).collect();
            numbers.join(",")
        })
    });
    report("proc-of-another", fs::read(format!("/proc/{pid}/cmdline")).map(|found| found.len().to_string()));
    report("proc-sys", listing("/proc/sys"));
    report("signal-another", call(libc::SYS_kill, [pid, 0, 0, 0, 0]));
    report("pidfd-of-another", call(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0]));
    report("trace-another", call(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), pid, 0, 0, 0]));
    let mut byte = 0_u8;
    let here = libc::iovec { iov_base: std::ptr::from_mut(&mut byte).cast(), iov_len: 1 };
    let at = std::ptr::from_ref(&here) as i64;
    report("read-memory-of-another", call(libc::SYS_process_vm_readv, [pid, at, 1, at, 1]));
}

fn privileges(report: Report<'_>) {
    report("become-root", call(libc::SYS_setuid, [0, 0, 0, 0, 0]));
    report("become-root-group", call(libc::SYS_setgid, [0, 0, 0, 0, 0]));
    report("join-groups", call(libc::SYS_setgroups, [0, 0, 0, 0, 0]));
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        line.map(|value| value.split_whitespace().next().unwrap_or_default().to_owned())
            .ok_or(io::ErrorKind::NotFound.into())
    };
    report("uid", of("Uid:"));
    report("effective-capabilities", of("CapEff:"));
    report("permitted-capabilities", of("CapPrm:"));
    report("bounding-capabilities", of("CapBnd:"));
    report("ambient-capabilities", of("CapAmb:"));
    report("no-new-privileges", of("NoNewPrivs:"));
    report("seccomp", of("Seccomp:"));
    report("securebits", call(libc::SYS_prctl, [i64::from(libc::PR_GET_SECUREBITS), 0, 0, 0, 0]));
    report("keep-capabilities", call(libc::SYS_prctl, [i64::from(libc::PR_SET_KEEPCAPS), 1, 0, 0, 0]));
    for (name, flag) in [
        ("user-namespace", libc::CLONE_NEWUSER),
        ("mount-namespace", libc::CLONE_NEWNS),
        ("network-namespace", libc::CLONE_NEWNET),
    ] {
        report(name, call(libc::SYS_unshare, [i64::from(flag), 0, 0, 0, 0]));
    }
    // As `fork` with a flag: the child, should there be one, ends at once.
    let child = call(libc::SYS_clone, [i64::from(libc::CLONE_NEWUSER | libc::SIGCHLD), 0, 0, 0, 0]);
    if child.as_deref().is_ok_and(|pid| pid == "0") {
        std::process::exit(0);
    }
    report("born-in-user-namespace", child);
    let (root, tmpfs) = (text("/"), text("tmpfs"));
    report("mount", call(libc::SYS_mount, [pointer(&tmpfs), pointer(&root), pointer(&tmpfs), 0, 0]));
    report("unmount", call(libc::SYS_umount2, [pointer(&root), i64::from(libc::MNT_DETACH), 0, 0, 0]));
    report("chroot", call(libc::SYS_chroot, [pointer(&root), 0, 0, 0, 0]));
    report("environment", Ok(std::env::vars_os().count().to_string()));
}

fn kernel(report: Report<'_>) {
    let (user, key) = (text("user"), text("k"));
    let ring = i64::from(libc::KEY_SPEC_SESSION_KEYRING);
    report("add-key", call(libc::SYS_add_key, [pointer(&user), pointer(&key), pointer(&key), 1, ring]));
    report("session-keyring", call(libc::SYS_keyctl, [0, ring, 0, 0, 0]));
    report("request-key", call(libc::SYS_request_key, [pointer(&user), pointer(&key), 0, ring, 0]));
    report("bpf", call(libc::SYS_bpf, [0, 0, 0, 0, 0]));
    report("perf", call(libc::SYS_perf_event_open, [0, 0, -1, -1, 0]));
    report("io-uring", call(libc::SYS_io_uring_setup, [1, 0, 0, 0, 0]));
    report("userfaultfd", call(libc::SYS_userfaultfd, [0, 0, 0, 0, 0]));
    report("load-module", call(libc::SYS_finit_module, [0, 0, 0, 0, 0]));
    report("kernel-log", call(libc::SYS_syslog, [3, 0, 0, 0, 0]));
    report("reboot", call(libc::SYS_reboot, [0, 0, 0, 0, 0]));
    report("set-clock", call(libc::SYS_clock_settime, [0, 0, 0, 0, 0]));
    report("host-name", call(libc::SYS_sethostname, [pointer(&key), 1, 0, 0, 0]));
}

fn resources(report: Report<'_>) {
    let limit = |resource| {
        // SAFETY: zeroes are a value of it, and the kernel writes one.
        let mut found: libc::rlimit = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let done = unsafe { libc::getrlimit(resource, &raw mut found) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(found.rlim_max.to_string()) }
    };
    report("core-limit", limit(libc::RLIMIT_CORE));
    let more = libc::rlimit { rlim_cur: 1 << 20, rlim_max: 1 << 20 };
    for (name, resource) in [
        ("raise-core", libc::RLIMIT_CORE),
        ("raise-files", libc::RLIMIT_NOFILE),
        ("raise-processes", libc::RLIMIT_NPROC),
    ] {
        // SAFETY: reads one struct.
        let done = unsafe { libc::setrlimit(resource, &raw const more) };
        report(name, if done < 0 { Err(io::Error::last_os_error()) } else { Ok(String::new()) });
    }
    report("real-time", {
        let parameters = libc::sched_param { sched_priority: 1 };
        call(
            libc::SYS_sched_setscheduler,
            [0, i64::from(libc::SCHED_FIFO), std::ptr::from_ref(&parameters) as i64, 0, 0],
        )
    });
    report("higher-priority", call(libc::SYS_setpriority, [0, 0, -10, 0, 0]));
    report("descriptors", listing("/proc/self/fd").map(|names| names.split(',').count().to_string()));
    // Last: its children stay until this process ends.
    let mut born = 0;
    let refused = loop {
        // SAFETY: the child makes one call.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: waits for its end, which comes with that of the namespace's first process.
                unsafe { libc::pause() };
            }
            ..0 => break io::Error::last_os_error(),
            _ => born += 1,
        }
        if born > 2000 {
            break io::ErrorKind::Other.into();
        }
    };
    report("fork-bomb-size", Ok(born.to_string()));
    report("fork-bomb", Err(refused));
}
