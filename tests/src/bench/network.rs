//! Networks of sandboxes: how long one takes to make, to claim and to take away, with few and with many on the host; and what passes through a
//! Debian guest's device, where one can run.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::json;
use stasis_warden::network::policy::{Mode, Policy};
use stasis_warden::network::{Networks, Settings};

use super::case::Case;
use super::debian;
use super::samples::Samples;
use crate::site::{self, SHARED, Site};
use crate::vmm::Error;

/// Networks that are timed.
pub(super) const TIMED: usize = 40;
/// Networks that a host with many has beside those.
pub(super) const MANY: usize = 300;
/// Where bytes go to and come from.
pub(super) const PORT: u16 = 8080;
/// How long bytes pass in one run, each way.
pub(super) const PASSES: Duration = Duration::from_secs(5);

/// What passed at the other end: bytes, and in what time.
static PASSED: Mutex<Option<(u64, Duration)>> = Mutex::new(None);

/// Why no network can be made here.
pub fn lacking() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("networks need root".to_owned());
    }
    let missing = ["/dev/net/tun", "/usr/sbin/ip"].iter().find(|path| !std::path::Path::new(path).exists());
    missing.map(|path| format!("networks need {path}"))
}

/// Makes the site whose server the guest's bytes go to, while the process has one thread.
pub fn lay_out() -> Result<(), Error> {
    site::lay_out(&[], || {
        let listener = TcpListener::bind((SHARED, PORT))?;
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if let Ok(passed) = pass(stream) {
                    *PASSED.lock().unwrap_or_else(PoisonError::into_inner) = Some(passed);
                }
            }
        });
        Ok(())
    })
}

/// Takes bytes until there are no more (`s`), or sends them for as long as they pass (`r`), as the client's first byte says.
pub(super) fn pass(mut stream: TcpStream) -> std::io::Result<(u64, Duration)> {
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    let (mut bytes, begun) = (0, Instant::now());
    let mut buffer = vec![0; 1 << 20];
    if &wish == b"r" {
        while begun.elapsed() < PASSES {
            stream.write_all(&buffer)?;
            bytes += buffer.len() as u64;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        // The client's farewell: it has all of them.
        stream.read_exact(&mut wish)?;
        return Ok((bytes, begun.elapsed()));
    }
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok((bytes, begun.elapsed())),
            more => bytes += more as u64,
        }
    }
}

/// All of it.
pub async fn measure(case: &Case, samples: &mut Samples, notes: &mut Vec<String>) -> Result<(), Error> {
    // In namespaces of a thread's own: the networks of this host stay what they are.
    let timed = std::thread::spawn(timed);
    let joined = tokio::task::spawn_blocking(move || timed.join()).await?;
    *samples = joined.map_err(|_| "the thread that makes networks panicked")??;
    match debian::lacking() {
        Some(why) => notes.push(format!("what passes through a guest's network device: {why}")),
        None => through_a_guest(case, samples).await?,
    }
    Ok(())
}

fn settings(dir: &tempfile::TempDir, ready: usize) -> Settings {
    Settings { state_dir: dir.path().join("networks"), ready, ..Settings::default() }
}

fn timed() -> Result<Samples, Error> {
    // SAFETY: descriptors stay shared between threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }?;
    // Each network holds some descriptors.
    let open = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: open.maximum, maximum: open.maximum })?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // The namespace's own handle, so that it does not end before what is in it.
    let _here = File::open("/proc/thread-self/ns/net")?;
    let mut samples = Samples::default();
    let dir = tempfile::tempdir()?;
    let networks = Networks::open(settings(&dir, 0))?;
    let policy = Policy { mode: Mode::Custom, allow: vec!["93.184.216.0/24".parse()?], proxy: true };
    let mut each = |metric: &str| -> Result<(), Error> {
        for n in 0..TIMED {
            let owner = format!("timed-{n}");
            let begun = Instant::now();
            let claimed = networks.claim(&owner, &policy)?;
            networks.set_up(&owner, true)?;
            samples.time(format!("network_setup{metric}"), begun.elapsed());
            drop(claimed);
            let begun = Instant::now();
            networks.release(&owner)?;
            samples.time(format!("network_teardown{metric}"), begun.elapsed());
        }
        Ok(())
    };
    each("")?;
    for n in 0..MANY {
        drop(networks.claim(&format!("other-{n}"), &policy)?);
    }
    each(&format!(".among_{MANY}"))?;
    for n in 0..MANY {
        networks.release(&format!("other-{n}"))?;
    }
    drop(networks);
    // One that was made ahead, as a wake finds it.
    let networks = Networks::open(settings(&dir, TIMED))?;
    while networks.refill()? {}
    for n in 0..TIMED {
        let owner = format!("ready-{n}");
        let begun = Instant::now();
        let _claimed = networks.claim(&owner, &policy)?;
        networks.set_up(&owner, true)?;
        samples.time("network_setup.ready", begun.elapsed());
    }
    for n in 0..TIMED {
        networks.release(&format!("ready-{n}"))?;
    }
    networks.drain()?;
    Ok(samples)
}

/// MiB a second.
pub(super) fn rate(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / took.as_secs_f64()
}

/// A program of the guest that sends for some seconds, and one that receives as long as there is something.
pub(super) fn programs() -> [(&'static str, String); 2] {
    let connect = format!("import socket,time\ns=socket.create_connection((\"{SHARED}\",{PORT}))\n");
    let seconds = PASSES.as_secs();
    let send = format!(
        "{connect}s.sendall(b\"s\")\nb=bytes(1<<20)\ne=time.time()+{seconds}\nwhile time.time()<e: s.sendall(b)\ns.close()\n"
    );
    let receive =
        format!("{connect}s.sendall(b\"r\")\nb=bytearray(1<<20)\nwhile s.recv_into(b): pass\ns.sendall(b\"r\")\n");
    [("from_guest", send), ("to_guest", receive)]
}

async fn through_a_guest(case: &Case, samples: &mut Samples) -> Result<(), Error> {
    let site = Site::start("").await?;
    let id = site.create(json!({"mode": "custom", "allow_cidrs": ["93.184.216.0/24"]})).await?;
    for _ in 0..case.runs {
        for (direction, program) in programs() {
            let done = site.run(&id, &format!("python3 -c '{program}'")).await?;
            if done["exit_code"] != json!(0) {
                return Err(format!("{direction}: {done}").into());
            }
            let begun = Instant::now();
            let (bytes, took) = loop {
                if let Some(passed) = PASSED.lock().unwrap_or_else(PoisonError::into_inner).take() {
                    break passed;
                }
                if begun.elapsed() > PASSES {
                    return Err(format!("{direction}: the other end saw nothing").into());
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            samples.add(format!("network_throughput.{direction}"), "MiB/s", rate(bytes, took));
        }
    }
    Ok(())
}
