//! A request waits here until its sandbox runs and the app has taken a connection. Nothing of the request is sent meanwhile, so whatever
//! breaks is tried again.

use super::InvokeError;
use crate::error::Error;
use crate::registry::Sandbox;
use crate::states::State;
use crate::supervisor::{Core, operations};
use crate::timing::Timing;
use crate::vmm_process::Vmm;
use crate::vsock;
use stasis_agent::protocol::{FORWARD_PORT, Forwarded, MAX_FORWARD_LINE, forward_line};
use stasis_vmm::control::VSOCK_SOCKET;
use std::io;
use std::num::NonZeroU16;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

/// Between two tries to connect to a guest that has just begun to run.
const AGAIN: Duration = Duration::from_millis(20);

/// What a request does about the state of its sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Connect.
    Go,
    /// Wake it, or wait for the wake or the start that is under way.
    Wake,
    /// Wait for the end of a snapshot or a pause, and look again.
    Wait,
    /// Say that there is none.
    Gone,
    /// Say why not.
    Refuse,
}

fn step(state: State) -> Step {
    match state {
        State::Running => Step::Go,
        State::Paused | State::Starting | State::Unpausing => Step::Wake,
        State::Snapshotting => Step::Wait,
        // A stopped one is started by `start` alone.
        State::Stopping | State::Stopped => Step::Refuse,
        State::Deleting | State::Deleted => Step::Gone,
    }
}

/// A connection to the app.
pub(super) struct Reached {
    /// From here on every byte goes to the app.
    pub(super) stream: UnixStream,
    /// The VM in which it is.
    pub(super) vm: Arc<Vmm>,
    /// One of the connections that the sandbox may have.
    pub(super) place: OwnedSemaphorePermit,
}

/// Why there is no connection.
#[derive(Debug)]
enum DialFailure {
    /// The guest or its agent does not answer: it may be on its way to sleep.
    Broken(io::Error),
    /// Nobody listens on the port.
    Refused,
    /// The agent could not connect.
    Failed(String),
}

impl From<io::Error> for DialFailure {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

/// Waits until the sandbox runs, waking it if it is paused, and connects to the port. What a wake cost is added to `timing`.
pub(super) async fn reach(
    core: &Arc<Core>,
    sandbox: &Arc<Sandbox>,
    port: NonZeroU16,
    timing: &mut Timing,
) -> Result<Reached, Error> {
    let limit = core.config.deadlines.hold();
    let held = async {
        loop {
            await_running(core, sandbox, timing).await?;
            if let Some(reached) = connect(core, sandbox, port).await? {
                return Ok(reached);
            }
        }
    };
    match timeout(limit, held).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::Deadline { id: sandbox.id.clone(), what: "waiting for it to run", ms: limit.as_millis() }),
    }
}

async fn await_running(core: &Arc<Core>, sandbox: &Arc<Sandbox>, timing: &mut Timing) -> Result<(), Error> {
    loop {
        match step(sandbox.state()) {
            Step::Go => return Ok(()),
            Step::Wake => match operations::ensure_running(core, sandbox, "reach").await {
                Ok((_, cost)) => timing.append(cost),
                // It has changed meanwhile: looked at again.
                Err(Error::State { .. }) => {}
                Err(error) => return Err(error),
            },
            // Whoever changes it holds its lock until the change is over.
            Step::Wait => drop(sandbox.lock().await),
            Step::Gone => return Err(Error::NotFound(sandbox.id.to_string())),
            Step::Refuse => {
                return Err(Error::State { id: sandbox.id.clone(), state: sandbox.state(), verb: "reach" });
            }
        }
    }
}

/// `None` when the sandbox does not run any more, so that it must be waited for again.
async fn connect(core: &Core, sandbox: &Arc<Sandbox>, port: NonZeroU16) -> Result<Option<Reached>, Error> {
    let limit = core.config.deadlines.connect();
    let end = Instant::now() + limit;
    let id = || sandbox.id.clone();
    let Ok(Ok(place)) = timeout_at(end, sandbox.places().acquire_owned()).await else {
        return Err(InvokeError::Crowded { id: id() }.into());
    };
    loop {
        let Some(vm) = sandbox.vm().filter(|_| sandbox.state() == State::Running) else { return Ok(None) };
        let dialled = timeout_at(end, dial(vm.run_dir(), port)).await;
        // Asked after the connection was made: a guest that is being stopped takes it and then says nothing more.
        if sandbox.state() != State::Running || vm.has_ended() {
            return Ok(None);
        }
        let broken = match dialled {
            Ok(Ok(stream)) => return Ok(Some(Reached { stream, vm, place })),
            Ok(Err(DialFailure::Refused)) => return Err(InvokeError::NotListening { id: id(), port }.into()),
            Ok(Err(DialFailure::Failed(why))) => return Err(InvokeError::NoWay { id: id(), port, why }.into()),
            Ok(Err(DialFailure::Broken(error))) => error,
            Err(_) => return Err(InvokeError::NotTaken { id: id(), port, ms: limit.as_millis() }.into()),
        };
        if Instant::now() + AGAIN >= end {
            return Err(InvokeError::NoWay { id: id(), port, why: broken.to_string() }.into());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Connects to a TCP port of the guest through its agent.
async fn dial(run_dir: &Path, port: NonZeroU16) -> Result<UnixStream, DialFailure> {
    use tokio::io::AsyncWriteExt as _;
    let mut stream = vsock::connect(&run_dir.join(VSOCK_SOCKET), FORWARD_PORT).await?;
    stream.write_all(forward_line(port).as_bytes()).await?;
    let answer = vsock::read_line(&mut stream, MAX_FORWARD_LINE).await?;
    match Forwarded::parse(&answer) {
        Some(Forwarded::Connected) => Ok(stream),
        Some(Forwarded::Refused) => Err(DialFailure::Refused),
        Some(Forwarded::Failed(why)) => Err(DialFailure::Failed(why)),
        None => Err(DialFailure::Failed("its agent's answer makes no sense".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_wait_where_running_can_follow_and_are_refused_elsewhere() {
        let with = |wanted| State::ALL.into_iter().filter(|s| step(*s) == wanted).collect::<Vec<_>>();
        assert_eq!(with(Step::Go), [State::Running]);
        assert_eq!(with(Step::Wake), [State::Starting, State::Paused, State::Unpausing]);
        assert_eq!(with(Step::Wait), [State::Snapshotting]);
        assert_eq!(with(Step::Refuse), [State::Stopping, State::Stopped]);
        assert_eq!(with(Step::Gone), [State::Deleting, State::Deleted]);
    }
}
