//! More connections than a sandbox may have, and those that nobody redirected.

use std::sync::Arc;

use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};

use super::world::{World, custom, soon};
use crate::config::Settings;
use crate::control::types::RefusalKind;
use crate::proxy::accept;
use crate::rate::Rate;

/// Makes `count` connections to a proxy's socket and waits until each has ended; the refusals that there were.
async fn connect(count: usize, change: impl FnOnce(&mut Settings)) -> Vec<RefusalKind> {
    let world = World::with(&custom(&["a.example.com"], &[]), change).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = tokio::spawn(accept::run(Arc::clone(&world.sandbox), listener));
    for _ in 0..count {
        let mut guest = TcpStream::connect(address).await.unwrap();
        assert!(soon(guest.read_u8()).await.is_err(), "it is reset, not kept waiting");
    }
    soon(async {
        while world.refusals().len() < count || world.sandbox.counters.connections() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    })
    .await;
    accepting.abort();
    world.refusals()
}

#[tokio::test]
async fn connections_to_the_proxy_itself_are_reset() {
    assert_eq!(connect(2, |_| {}).await, [RefusalKind::NotRedirected; 2]);
}

#[tokio::test]
async fn one_connection_too_many_is_reset() {
    assert_eq!(connect(3, |s| s.limits.connections = 0).await, [RefusalKind::TooManyConnections; 3]);
}

#[tokio::test]
async fn connections_that_come_too_fast_are_reset() {
    let slow = Rate { a_second: 0, burst: 2 };
    let refusals = connect(4, |s| s.limits.new_connections = slow).await;
    assert_eq!(refusals.iter().filter(|kind| **kind == RefusalKind::TooFast).count(), 2);
}
