//! git in a guest: the runs of a plan, one after the other, until one fails.

use super::Core;
use super::execute::output;
use super::guest::{Guest, reach};
use crate::error::Error;
use crate::guest_requests::git::Plan;
use crate::registry::Sandbox;
use crate::timing::Timing;
use stasis_agent::protocol::git::GitRequest;
use std::sync::Arc;
use std::time::Duration;

/// For one run; git and what it started are killed then.
const RUN: Duration = Duration::from_mins(10);
/// How long the agent may need beyond that.
const MARGIN: Duration = Duration::from_secs(15);
const TIMED_OUT: &str = "git did not end in time and was killed\n";

/// What git did.
#[derive(Clone, Debug)]
pub struct GitDone {
    /// Exit status of the last run; 124 after a time-out.
    pub exit_code: i32,
    /// What the runs wrote: results, and with a failure messages too.
    pub output: String,
    /// The commit that was made; `None` unless the plan asks for it and all went well.
    pub commit: Option<String>,
    /// What it cost.
    pub timing: Timing,
}

/// Carries a plan out; wakes the sandbox first.
pub async fn git(core: &Arc<Core>, sandbox: &Arc<Sandbox>, plan: Plan) -> Result<GitDone, Error> {
    let mut guest = reach(core, sandbox, "run git in").await?;
    let mut all = GitDone { exit_code: 0, output: String::new(), commit: None, timing: Timing::default() };
    for run in &plan.runs {
        let args = match &run.unless_branch {
            Some((branch, otherwise)) => {
                let probe = ["rev-parse", "--verify", "--quiet"].map(str::to_owned).into_iter();
                let probe = probe.chain([format!("refs/heads/{branch}")]).collect();
                if once(core, sandbox, &mut guest, &plan, probe).await?.0 == 0 { &run.args } else { otherwise }
            }
            None => &run.args,
        };
        let (exit_code, output) = once(core, sandbox, &mut guest, &plan, args.clone()).await?;
        all.exit_code = exit_code;
        all.output.push_str(&output);
        if exit_code != 0 {
            break;
        }
    }
    if plan.tells_commit && all.exit_code == 0 {
        let probe = ["rev-parse", "HEAD"].map(str::to_owned).to_vec();
        let (exit_code, commit) = once(core, sandbox, &mut guest, &plan, probe).await?;
        all.commit = (exit_code == 0).then(|| commit.trim().to_owned());
    }
    all.timing = guest.timing;
    Ok(all)
}

async fn once(
    core: &Core,
    sandbox: &Sandbox,
    guest: &mut Guest,
    plan: &Plan,
    args: Vec<String>,
) -> Result<(i32, String), Error> {
    let request = GitRequest {
        cwd: plan.cwd.clone(),
        args,
        env: guest.environment(plan.env.clone()),
        credentials: plan.credentials.clone(),
        timeout_ms: u64::try_from(RUN.as_millis()).unwrap_or(u64::MAX),
        output_limit: core.config.limits.output_bytes,
    };
    let agent = guest.agent();
    let reply = guest.call("git", "run git", agent.git(&request, RUN + MARGIN)).await?;
    let (stdout, stderr) = output(sandbox, &reply)?;
    Ok((reply.exit_code, said(reply.exit_code, reply.timed_out, stdout, &stderr)))
}

/// Results alone when there are any and all went well: they are read by programs. Else what git says to people too.
fn said(exit_code: i32, timed_out: bool, stdout: String, stderr: &str) -> String {
    let mut text = stdout;
    if exit_code != 0 || text.is_empty() {
        text.push_str(stderr);
    }
    if timed_out {
        text.push_str(TIMED_OUT);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_alone_and_failures_with_their_reason() {
        let said = |exit_code, timed_out, stdout: &str, stderr| said(exit_code, timed_out, stdout.to_owned(), stderr);
        assert_eq!(said(0, false, "# branch.head main\n", "warning: x\n"), "# branch.head main\n");
        assert_eq!(said(0, false, "", "Switched to branch 'x'\n"), "Switched to branch 'x'\n");
        assert_eq!(said(1, false, "CONFLICT\n", "error: y\n"), "CONFLICT\nerror: y\n");
        assert!(said(124, true, "", "").contains("in time"));
    }
}
