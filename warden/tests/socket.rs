//! The warden's socket with the real program at its other end.
#![expect(clippy::disallowed_methods, reason = "the test starts the program")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::process::{Child, Command};
use std::time::{Duration, Instant};

use stasis_warden::client::{Client, ClientError};
use stasis_warden::protocol::{RefusalCode, Request};

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `None`, said on standard error, without the rights that it takes.
fn start(dir: &std::path::Path) -> Option<(Running, Client)> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("left out: a warden needs root");
        return None;
    }
    let socket = &dir.join("warden.sock");
    let dialler = env!("CARGO_BIN_EXE_stasis-dialler");
    // Any program does for a tree here.
    let child = Command::new(env!("CARGO_BIN_EXE_stasis-warden"))
        .arg("--socket")
        .arg(socket)
        .args(["--vmm", dialler, "--dialler", dialler, "--unpacker", dialler, "--trees"])
        .arg(dir.join("trees"))
        .spawn()
        .unwrap();
    let (running, client) = (Running(child), Client::new(socket));
    let started = Instant::now();
    while let Err(error) = client.hello() {
        assert!(started.elapsed() < Duration::from_secs(20), "{error}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
    Some((running, client))
}

#[test]
fn it_says_who_it_is_and_refuses_another_version() {
    let dir = tempfile::tempdir().unwrap();
    let Some((warden, client)) = start(dir.path()) else { return };
    assert_eq!(client.hello().unwrap().pid, warden.0.id());
    match client.call(&Request::Hello { version: 9 }, &[]) {
        Err(ClientError::Refused(refusal)) => assert_eq!(refusal.code, RefusalCode::BadRequest),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_outlives_its_warden() {
    let dir = tempfile::tempdir().unwrap();
    let Some((first, client)) = start(dir.path()) else { return };
    drop(first);
    assert!(matches!(client.hello(), Err(ClientError::Unreachable { .. })));
    let Some((second, _)) = start(dir.path()) else { return };
    assert_eq!(client.hello().unwrap().pid, second.0.id());
}
