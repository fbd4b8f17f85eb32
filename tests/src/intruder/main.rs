//! What stands in a VMM's place in the tests of the jail: a program that a guest has taken over completely. It tries what such a program
//! would, and writes what came of it to standard output, one line an attempt: its name, and the kernel's answer.
//!
//! With `--role NAME` it enters a thread's role of the VMM instead, and makes a system call that no role has. With `--eat MIB` it uses memory, with
//! `--spin SECONDS` two processors, and says how much of them it got.

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use stasis_vmm::seccomp::{Role, enter, prepare};

mod attempts;

/// What the test tells of the world outside.
#[derive(Default)]
pub(crate) struct Outside {
    /// A process of the host.
    pid: i32,
    /// A TCP port of the host that listens.
    port: u16,
    /// A run directory of another sandbox.
    run_dir: String,
    /// An abstract unix socket of the host that listens.
    name: String,
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut outside = Outside::default();
    while let Some(flag) = arguments.next() {
        if flag.starts_with("--fd=") {
            continue;
        }
        let value = arguments.next().unwrap_or_default();
        match flag.as_str() {
            "--pid" => outside.pid = value.parse().unwrap_or_default(),
            "--port" => outside.port = value.parse().unwrap_or_default(),
            "--run-dir" => outside.run_dir = value,
            "--name" => outside.name = value,
            "--role" => return break_role(&value),
            "--eat" => return eat(value.parse().unwrap_or_default()),
            "--spin" => return spin(Duration::from_secs(value.parse().unwrap_or_default())),
            _ => std::process::exit(64),
        }
    }
    let mut out = io::stdout().lock();
    attempts::run(&outside, &mut |name, outcome: Result<String, io::Error>| {
        let text = match outcome {
            Ok(got) => format!("got {got}"),
            Err(error) => format!("refused {}", error.raw_os_error().unwrap_or_default()),
        };
        let _ = writeln!(out, "{name}: {text}");
        let _ = out.flush();
    });
    let _ = writeln!(out, "done");
}

/// Makes a call that is in no table, on a thread of this role. The exit note is standard output.
fn break_role(name: &str) {
    let Some(role) = Role::ALL.into_iter().find(|role| role.name() == name) else { std::process::exit(64) };
    let note = File::options().write(true).open("/proc/self/fd/1");
    if note.map_err(|e| e.to_string()).and_then(|note| prepare(&note).map_err(|e| e.to_string())).is_err() {
        std::process::exit(65);
    }
    let thread = std::thread::spawn(move || {
        enter(role);
        // SAFETY: takes numbers. It is what must not come back.
        unsafe { libc::syscall(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0) };
    });
    let _ = thread.join();
    std::process::exit(66)
}

/// Touches memory.
fn eat(mib: usize) {
    let mut eaten = Vec::new();
    for _ in 0..mib {
        eaten.push(std::hint::black_box(vec![1_u8; 1 << 20]));
    }
    println!("ate {} MiB", eaten.len());
}

/// Uses two processors for a time.
fn spin(time: Duration) {
    let until = Instant::now() + time;
    let turn = move || {
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    };
    let other = std::thread::spawn(turn);
    turn();
    let _ = other.join();
    // SAFETY: zeroes are a value of it, and the kernel writes one.
    let mut used: libc::timespec = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut used) };
    println!("spun-ms: got {}", used.tv_sec * 1000 + used.tv_nsec / 1_000_000);
}

/// A connection over TCP within a second.
pub(crate) fn connect_tcp(port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), Duration::from_secs(1))
}

/// A connection to a socket in a directory.
pub(crate) fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    UnixStream::connect(path)
}
