//! Commands in a sandbox. They hold no lock: a pause or a delete may cut them off, and then says so.

use super::Core;
use super::guest::reach;
use crate::error::Error;
use crate::registry::Sandbox;
use crate::timing::Timing;
use crate::validate::Execute;
use base64::Engine as _;
use stasis_agent::protocol::{ExecReply, ExecRequest};
use std::sync::Arc;
use std::time::Duration;

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
    let mut guest = reach(core, sandbox, "run a command in").await?;
    let limit = Duration::from_secs(u64::from(command.timeout_s));
    let request = ExecRequest {
        command: command.command,
        cwd: command.cwd,
        user: command.user,
        env: guest.environment(command.env),
        timeout_ms: u64::from(command.timeout_s) * 1000,
        output_limit: core.config.limits.output_bytes,
    };
    let agent = guest.agent();
    let reply = guest.call("exec", "run the command", agent.exec(&request, limit + MARGIN)).await?;
    let (stdout, stderr) = output(sandbox, &reply)?;
    Ok(Executed {
        exit_code: reply.exit_code,
        stdout,
        stderr,
        dropped: (reply.stdout_dropped, reply.stderr_dropped),
        timed_out: reply.timed_out,
        timing: guest.timing,
    })
}

/// Both streams as text.
pub(super) fn output(sandbox: &Sandbox, reply: &ExecReply) -> Result<(String, String), Error> {
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
    Ok((text("stdout", &reply.stdout)?, text("stderr", &reply.stderr)?))
}
