//! Commands in a sandbox. They hold no lock: a pause or a delete may cut them off, and then says so.

use super::Core;
use super::resume::ensure_running;
use crate::agent_client::AgentFailure;
use crate::error::Error;
use crate::registry::Sandbox;
use crate::states::State;
use crate::timing::Timing;
use crate::validate::Execute;
use base64::Engine as _;
use stasis_agent::protocol::ExecRequest;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the agent may need beyond the command's own time limit.
const MARGIN: Duration = Duration::from_secs(15);

/// What a command did.
#[derive(Clone, Debug)]
pub struct Executed {
    /// Exit status; 124 after a time-out.
    pub exit_code: i32,
    /// Standard output, as text.
    pub stdout: String,
    /// Standard error, as text.
    pub stderr: String,
    /// Bytes of both that were dropped.
    pub dropped: (u64, u64),
    /// The time limit ended it.
    pub timed_out: bool,
    /// What a wake before it cost.
    pub timing: Timing,
}

/// Runs a command; wakes the sandbox first.
pub async fn execute(core: &Arc<Core>, sandbox: &Arc<Sandbox>, command: Execute) -> Result<Executed, Error> {
    let spec = sandbox.record().spec;
    if !spec.agent {
        return Err(Error::NoAgent { id: sandbox.id.clone(), template: spec.template_name });
    }
    let (_, mut timing) = ensure_running(core, sandbox, "run a command in").await?;
    let gone = || Error::State { id: sandbox.id.clone(), state: sandbox.state(), verb: "run a command in" };
    let vm = sandbox.vm().ok_or_else(gone)?;
    let mut env = spec.env_vars;
    env.extend(command.env);
    let limit = Duration::from_secs(u64::from(command.timeout_s));
    let request = ExecRequest {
        command: command.command,
        cwd: command.cwd,
        env,
        timeout_ms: u64::from(command.timeout_s) * 1000,
        output_limit: core.config.limits.output_bytes,
    };
    // A timer does not pause it under the command.
    let _visit = sandbox.visit(&core.sources);
    let begun = Instant::now();
    let reply = match core.agent(&vm).exec(&request, limit + MARGIN).await {
        Ok(reply) => reply,
        Err(AgentFailure::Refused { status: 400, message }) => return Err(Error::Command(message)),
        Err(AgentFailure::Deadline(after)) => {
            return Err(Error::Deadline { id: sandbox.id.clone(), what: "the command", ms: after.as_millis() });
        }
        // A pause or the end of the VM cuts the connection.
        Err(_) if sandbox.state() != State::Running || vm.has_ended() => return Err(gone()),
        Err(failure) => {
            return Err(Error::Agent { id: sandbox.id.clone(), action: "run the command", what: failure.to_string() });
        }
    };
    timing.since("exec", begun);
    let text = |name: &str, encoded: &str| {
        base64::engine::general_purpose::STANDARD
            .decode(encoded)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|e| Error::Agent {
                id: sandbox.id.clone(),
                action: "send what the command wrote",
                what: format!("{name} is no base64: {e}"),
            })
    };
    Ok(Executed {
        exit_code: reply.exit_code,
        stdout: text("stdout", &reply.stdout)?,
        stderr: text("stderr", &reply.stderr)?,
        dropped: (reply.stdout_dropped, reply.stderr_dropped),
        timed_out: reply.timed_out,
        timing,
    })
}
