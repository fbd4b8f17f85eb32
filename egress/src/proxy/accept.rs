//! The listening socket of a sandbox. What is one connection too many is accepted and reset: in the socket's queue it would hang.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt::ip_original_dst;
use tokio::net::{TcpListener, TcpStream};

use super::connection;
use crate::control::types::{RefusalKind, Via};
use crate::counters::Refused;
use crate::sandbox::Sandbox;

/// After a failed `accept`: if it fails for want of descriptors, the next one does too.
const PAUSE: Duration = Duration::from_millis(20);

/// Accepts connections until the task is dropped.
pub(crate) async fn run(sandbox: Arc<Sandbox>, listener: TcpListener) {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let era = sandbox.era();
        if let Err(refused) = admit(&sandbox) {
            reset(&stream);
            sandbox.refuse(era.rules.default_rule(), Via::Tcp, &refused, None);
            continue;
        }
        let open = sandbox.counters.connection();
        let sandbox = Arc::clone(&sandbox);
        era.clone().spawn(async move {
            match ip_original_dst(&stream) {
                Ok(destination) if stream.local_addr().ok() != Some(destination.into()) => {
                    connection::serve(&sandbox, &era, stream, destination).await;
                }
                _ => {
                    reset(&stream);
                    let reason = "the connection is to the proxy itself, which serves redirected ones only";
                    let refused = Refused::new(RefusalKind::NotRedirected, reason);
                    sandbox.refuse(era.rules.default_rule(), Via::Tcp, &refused, None);
                }
            }
            drop(open);
        });
    }
}

/// A connection more, if it is not one too many.
fn admit(sandbox: &Sandbox) -> Result<(), Refused> {
    let limits = &sandbox.shared.settings.limits;
    if sandbox.counters.connections() >= u64::from(limits.connections) {
        let reason = format!("more than {} connections at once", limits.connections);
        return Err(Refused::new(RefusalKind::TooManyConnections, reason));
    }
    let mut rate = sandbox.new_connections.lock().unwrap_or_else(PoisonError::into_inner);
    if rate.take(Instant::now()) {
        return Ok(());
    }
    Err(Refused::new(RefusalKind::TooFast, "too many new connections in a short time"))
}

/// Closing it from here on says so at once, whatever was not read.
fn reset(stream: &TcpStream) {
    // Without it the client sees an end instead of a reset.
    let _ = stream.set_zero_linger();
}
