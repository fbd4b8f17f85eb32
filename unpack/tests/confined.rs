//! What the unpacker cannot do once it is confined: everything but read, write and compute. This program confines itself as the unpacker
//! does, and then tries.
#![expect(clippy::disallowed_methods, reason = "the test starts itself")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus};

use libtest_mimic::{Arguments, Trial};
use stasis_unpack::confine;

/// Octets of the disk.
const DISK: u64 = 1 << 20;

fn call(number: i64, arguments: [i64; 4]) -> bool {
    let [first, second, third, fourth] = arguments;
    // SAFETY: pointers among the arguments are null, or of texts that are never freed.
    unsafe { libc::syscall(number, first, second, third, fourth) >= 0 }
}

fn text(text: &'static std::ffi::CStr) -> i64 {
    text.as_ptr() as i64
}

/// Each ends the process when it is tried behind the filter.
fn attempts(disk: &File) -> Vec<(&'static str, i64, [i64; 4])> {
    let (cwd, descriptor) = (i64::from(libc::AT_FDCWD), i64::from(disk.as_raw_fd()));
    let (unix, stream) = (i64::from(libc::AF_UNIX), i64::from(libc::SOCK_STREAM));
    let parent = i64::from(std::os::unix::process::parent_id());
    let executable = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let private = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    vec![
        ("open-a-file", libc::SYS_openat, [cwd, text(c"/etc/passwd"), 0, 0]),
        ("open-a-file-the-old-way", libc::SYS_open, [text(c"/etc/passwd"), 0, 0, 0]),
        ("look-at-a-file", libc::SYS_newfstatat, [cwd, text(c"/etc/passwd"), 0, 0]),
        ("remove-a-file", libc::SYS_unlinkat, [cwd, text(c"/tmp/none"), 0, 0]),
        ("lengthen-the-disk", libc::SYS_ftruncate, [descriptor, 1 << 30, 0, 0]),
        ("allocate-the-disk", libc::SYS_fallocate, [descriptor, 0, 0, 4096]),
        ("socket", libc::SYS_socket, [unix, stream, 0, 0]),
        ("internet-socket", libc::SYS_socket, [i64::from(libc::AF_INET), stream, 0, 0]),
        ("socket-pair", libc::SYS_socketpair, [unix, stream, 0, 0]),
        ("connect", libc::SYS_connect, [descriptor, 0, 0, 0]),
        ("receive-descriptors", libc::SYS_recvmsg, [descriptor, 0, 0, 0]),
        ("run-a-program", libc::SYS_execve, [text(c"/bin/true"), 0, 0, 0]),
        ("run-a-program-by-descriptor", libc::SYS_execveat, [descriptor, text(c""), 0, 0]),
        ("fork", libc::SYS_fork, [0; 4]),
        ("clone", libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0; 4]),
        ("executable-memory", libc::SYS_mmap, [0, 4096, executable, private]),
        ("make-memory-executable", libc::SYS_mprotect, [0, 4096, executable, 0]),
        ("signal-the-parent", libc::SYS_kill, [parent, 0, 0, 0]),
        ("signal-a-thread-of-the-parent", libc::SYS_tgkill, [parent, parent, 0, 0]),
        ("trace", libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), parent, 0, 0]),
        ("namespace", libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0]),
        ("memory-file", libc::SYS_memfd_create, [text(c"x"), 0, 0, 0]),
        ("duplicate", libc::SYS_dup, [descriptor, 0, 0, 0]),
        ("duplicate-otherwise", libc::SYS_fcntl, [descriptor, i64::from(libc::F_DUPFD), 0, 0]),
        ("io-uring", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        ("ioctl", libc::SYS_ioctl, [descriptor, 0, 0, 0]),
        ("process-control", libc::SYS_prctl, [i64::from(libc::PR_SET_DUMPABLE), 1, 0, 0]),
        ("another-limit", libc::SYS_prlimit64, [0, 0, 0, 0]),
        ("become-somebody", libc::SYS_setuid, [0; 4]),
    ]
}

/// The confined process. Ends with 0 when the attempt came to something.
fn child(name: &str) -> ! {
    let mut disk = tempfile::tempfile().unwrap();
    disk.set_len(DISK).unwrap();
    let attempts = attempts(&disk);
    confine::limit(DISK).unwrap();
    // What holds without the filter, too.
    match name {
        "open-without-the-filter" => std::process::exit(i32::from(File::open("/etc/passwd").is_err())),
        "socket-without-the-filter" => std::process::exit(i32::from(std::net::UdpSocket::bind("127.0.0.1:0").is_err())),
        "duplicate-without-the-filter" => std::process::exit(i32::from(disk.try_clone().is_err())),
        _ => {}
    }
    confine::filter_calls().unwrap();
    let done = match name {
        "work" => {
            let eaten = std::hint::black_box(vec![1_u8; 200 << 20]);
            disk.write_all(&eaten[..4096]).unwrap();
            disk.write_all_at(b"end", DISK - 3).unwrap();
            drop(disk);
            true
        }
        "write-beyond-the-disk" => disk.write_all_at(b"x", DISK).is_ok(),
        "too-much-memory" => std::hint::black_box(vec![1_u8; 3 << 30])[1 << 30] == 1,
        "abort" => std::process::abort(),
        name => attempts.iter().find(|(other, ..)| *other == name).is_some_and(|(_, number, of)| call(*number, *of)),
    };
    // SAFETY: ends the process.
    unsafe { libc::_exit(i32::from(!done)) }
}

fn run(name: &str) -> ExitStatus {
    let own = std::env::current_exe().unwrap();
    Command::new(own).env_clear().arg("--attempt").arg(name).output().unwrap().status
}

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, flag, name] = arguments.as_slice()
        && flag == "--attempt"
    {
        child(name);
    }
    let named = |name: &'static str, wanted: fn(ExitStatus) -> bool| {
        Trial::test(name, move || {
            let status = run(name);
            if wanted(status) { Ok(()) } else { Err(format!("{status}").into()) }
        })
    };
    let disk = tempfile::tempfile().unwrap();
    let killed = |status: ExitStatus| status.signal() == Some(libc::SIGSYS);
    let mut trials: Vec<_> = attempts(&disk).into_iter().map(|(name, ..)| named(name, killed)).collect();
    trials.extend([
        named("work", |status| status.success()),
        named("write-beyond-the-disk", |status| status.signal() == Some(libc::SIGXFSZ)),
        named("too-much-memory", |status| status.signal() == Some(libc::SIGABRT)),
        named("abort", |status| status.signal() == Some(libc::SIGABRT)),
    ]);
    for name in ["open-without-the-filter", "socket-without-the-filter", "duplicate-without-the-filter"] {
        trials.push(named(name, |status| status.code() == Some(1)));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit();
}
