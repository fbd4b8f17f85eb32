//! Bytes passed on as they are. An idle tunnel holds no buffer: bytes go through one that all tunnels of a thread share, and only what a slow
//! reader does not take at once is kept, up to a bound for the whole sandbox.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use rustix::net::{Shutdown, shutdown};
use tokio::net::TcpStream;

use super::meter::Meter;
use crate::control::types::RefusalKind;
use crate::counters::Refused;
use crate::sandbox::{Held, Sandbox};

/// Bytes read at once.
const SCRATCH: usize = 256 << 10;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH]);
}

/// How one direction ended early.
enum Broken {
    Io,
    Full,
}

impl From<io::Error> for Broken {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

/// Passes bytes on until both sides have ended, one breaks, or nothing moves for too long. `first` is what the guest has sent already.
pub(super) async fn run(
    sandbox: &Sandbox,
    guest: &TcpStream,
    server: &TcpStream,
    first: &[u8],
    meter: &Arc<Meter>,
) -> Result<(), Refused> {
    let _ = server.set_nodelay(true);
    let up = async {
        write_all(server, first).await?;
        meter.up(first.len());
        one_way(sandbox, guest, server, |bytes| meter.up(bytes)).await
    };
    let down = one_way(sandbox, server, guest, |bytes| meter.down(bytes));
    let both = async { tokio::try_join!(up, down).map(|_| ()) };
    let ended = tokio::select! {
        ended = both => ended,
        () = meter.silent_for(sandbox.shared.settings.deadlines.idle) => Ok(()),
    };
    match ended {
        Ok(()) => Ok(()),
        // Either side may break off at any time; the other one is told so.
        Err(Broken::Io) => {
            let _ = guest.set_zero_linger();
            let _ = server.set_zero_linger();
            Ok(())
        }
        Err(Broken::Full) => {
            let most = sandbox.shared.settings.limits.buffered;
            let reason = format!("more than {most} bytes wait for slow readers of this sandbox");
            Err(Refused::new(RefusalKind::TooMuchBuffered, reason))
        }
    }
}

async fn one_way(sandbox: &Sandbox, from: &TcpStream, to: &TcpStream, count: impl Fn(usize)) -> Result<(), Broken> {
    loop {
        from.readable().await?;
        match BUFFER.with_borrow_mut(|buffer| step(sandbox, from, to, buffer))? {
            Step::Nothing => {}
            Step::End => {
                // The other side may have gone; then the other direction ends, too.
                let _ = shutdown(to, Shutdown::Write);
                return Ok(());
            }
            Step::Passed(bytes) => count(bytes),
            Step::Kept(bytes, rest, held) => {
                write_all(to, &rest).await?;
                drop(held);
                count(bytes);
            }
        }
        // A fast pair must not keep the thread from the others.
        tokio::task::coop::consume_budget().await;
    }
}

/// What one read came to.
enum Step {
    Nothing,
    End,
    Passed(usize),
    /// So many bytes, of which these are still to be written.
    Kept(usize, Vec<u8>, Held),
}

fn step(sandbox: &Sandbox, from: &TcpStream, to: &TcpStream, buffer: &mut [u8]) -> Result<Step, Broken> {
    let length = match from.try_read(buffer) {
        Ok(0) => return Ok(Step::End),
        Ok(length) => length,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Nothing),
        Err(error) => return Err(error.into()),
    };
    let mut rest = buffer.get(..length).unwrap_or_default();
    while !rest.is_empty() {
        match to.try_write(rest) {
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let held = sandbox.buffered.hold(rest.len(), sandbox.shared.settings.limits.buffered);
                return Ok(Step::Kept(length, rest.to_vec(), held.ok_or(Broken::Full)?));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Step::Passed(length))
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
