//! `stasis git`: git in a sandbox, by the operations of the API. Credentials reach the remote's host alone. The exit code is git's.

use super::client::Client;
use super::commands::{On, body, interruptible, path};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde::Serialize;
use serde_json::Value;

/// Password or token of a remote.
const PASSWORD: &str = "STASIS_GIT_PASSWORD";

/// `stasis git …`.
#[derive(Debug, Subcommand)]
pub(super) enum Git {
    /// Clone a repository.
    Clone(On<Origin>),
    /// Show what is changed.
    Status(On<Repository>),
    /// List branches.
    Branches(On<Branches>),
    /// Show what is changed and not staged; with --staged what is staged, with --with what differs from that.
    Diff(On<Diff>),
    /// Unstage everything.
    Reset(On<Repository>),
    /// List commits.
    Log(On<Log>),
    /// Show a revision.
    Show(On<Show>),
    /// Make a branch.
    CreateBranch(On<CreateBranch>),
    /// Check a branch out.
    Checkout(On<Checkout>),
    /// Delete a branch.
    DeleteBranch(On<DeleteBranch>),
    /// Stage files.
    Add(On<Add>),
    /// Commit what is staged.
    Commit(On<Commit>),
    /// Push to a remote.
    Push(On<Push>),
    /// Pull from a remote.
    Pull(On<Pull>),
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Repository {
    /// The repository.
    path: String,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Origin {
    /// Its URL.
    // Not `url`, which is the supervisor's.
    #[arg(value_name = "URL")]
    #[serde(rename = "url")]
    from: String,
    /// Where it goes.
    path: String,
    /// The branch that is checked out.
    #[arg(long)]
    branch: Option<String>,
    /// The commit that is checked out.
    #[arg(long = "commit")]
    commit_id: Option<String>,
    /// So many commits only.
    #[arg(long)]
    depth: Option<u32>,
    /// Name for the URL's host; the password is in STASIS_GIT_PASSWORD.
    #[arg(long)]
    username: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Branches {
    /// The repository.
    path: String,
    /// local, remote or all.
    #[arg(long = "type")]
    branch_type: Option<String>,
    /// Only those with this commit.
    #[arg(long)]
    contains: Option<String>,
    /// Only those without this commit.
    #[arg(long)]
    not_contains: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Diff {
    /// The repository.
    path: String,
    /// What is staged.
    #[arg(long)]
    #[serde(skip)]
    staged: bool,
    /// A branch, a tag or a commit.
    #[arg(long = "with", conflicts_with = "staged")]
    target: Option<String>,
    /// Lines around a change.
    #[arg(long = "context")]
    context_lines: Option<u32>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Log {
    /// The repository.
    path: String,
    /// Commits at most.
    #[arg(long)]
    max_count: Option<u32>,
    /// Only those after.
    #[arg(long = "since")]
    start_timestamp: Option<String>,
    /// Only those before.
    #[arg(long = "until")]
    end_timestamp: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Show {
    /// The repository.
    path: String,
    /// A commit, a branch or a tag.
    revision: String,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct CreateBranch {
    /// The repository.
    path: String,
    /// The branch.
    name: String,
    /// Check it out.
    #[arg(long)]
    checkout: bool,
    /// Where it starts.
    #[arg(long = "base")]
    base_branch: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Checkout {
    /// The repository.
    path: String,
    /// The branch.
    branch: String,
    /// Make it if it is not there.
    #[arg(long)]
    create: bool,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct DeleteBranch {
    /// The repository.
    path: String,
    /// The branch.
    name: String,
    /// Also when it is not merged.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Add {
    /// The repository.
    path: String,
    /// The files.
    #[arg(required = true)]
    files: Vec<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Commit {
    /// The repository.
    path: String,
    /// Its message.
    #[arg(long, short)]
    message: String,
    /// Name of author and committer.
    #[arg(long)]
    author: Option<String>,
    /// Their address.
    #[arg(long)]
    email: Option<String>,
    /// Also when nothing is staged.
    #[arg(long)]
    allow_empty: bool,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Exchange {
    /// The repository.
    path: String,
    /// A remote's name or URL.
    #[arg(long)]
    remote: Option<String>,
    /// The branch.
    #[arg(long)]
    branch: Option<String>,
    /// Name for the remote's host; the password is in STASIS_GIT_PASSWORD.
    #[arg(long)]
    username: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Push {
    #[command(flatten)]
    #[serde(flatten)]
    exchange: Exchange,
    /// Note the remote branch as the one to pull from.
    #[arg(long)]
    set_upstream: bool,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Pull {
    #[command(flatten)]
    #[serde(flatten)]
    exchange: Exchange,
    /// Rebase instead of merging.
    #[arg(long)]
    rebase: bool,
}

/// The sandbox, the operation and its body.
fn request(git: &Git) -> (&str, &'static str, Value) {
    match git {
        Git::Clone(on) => (&on.id, "clone", body(&on.what)),
        Git::Status(on) => (&on.id, "status", body(&on.what)),
        Git::Branches(on) => (&on.id, "branches", body(&on.what)),
        Git::Diff(on) if on.what.staged => (&on.id, "diff-staged", body(&on.what)),
        Git::Diff(on) if on.what.target.is_some() => (&on.id, "diff", body(&on.what)),
        Git::Diff(on) => (&on.id, "diff-unstaged", body(&on.what)),
        Git::Reset(on) => (&on.id, "reset", body(&on.what)),
        Git::Log(on) => (&on.id, "log", body(&on.what)),
        Git::Show(on) => (&on.id, "show", body(&on.what)),
        Git::CreateBranch(on) => (&on.id, "create-branch", body(&on.what)),
        Git::Checkout(on) => (&on.id, "checkout-branch", body(&on.what)),
        Git::DeleteBranch(on) => (&on.id, "delete-branch", body(&on.what)),
        Git::Add(on) => (&on.id, "add", body(&on.what)),
        Git::Commit(on) => (&on.id, "commit", body(&on.what)),
        Git::Push(on) => (&on.id, "push", body(&on.what)),
        Git::Pull(on) => (&on.id, "pull", body(&on.what)),
    }
}

pub(super) async fn run(client: &Client, git: &Git, output: Output) -> Result<ExitStatus, Failure> {
    let (id, operation, mut body) = request(git);
    if !body["username"].is_null() {
        let password = std::env::var(PASSWORD).map_err(|_| {
            Failure::new(ExitStatus::Usage, format!("--username needs the password in the variable {PASSWORD}"))
        })?;
        body["password"] = password.into();
    }
    let path = path(id, &format!("/git/{operation}"));
    let answer = interruptible(client.call(Method::POST, &path, Some(&body)), "git goes on").await?.body;
    // A commit has what git said one level below.
    let said = answer.get("result").unwrap_or(&answer);
    if output.json {
        Output::value(&answer);
        return Ok(ExitStatus::Ok);
    }
    output::raw(said["output"].as_str().unwrap_or_default().as_bytes(), false);
    match said["exit_code"].as_i64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1) {
        0 => Ok(ExitStatus::Ok),
        code => std::process::exit(i32::from(code)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        git: Git,
    }

    #[test]
    fn arguments_become_operations() {
        let asked = |words: &[&str]| {
            let git = Line::try_parse_from([&["git"], words].concat()).map(|line| line.git).unwrap();
            let (id, operation, body) = request(&git);
            assert_eq!(id, "sbx-a");
            (operation, body)
        };
        assert_eq!(asked(&["diff", "sbx-a", "."]), ("diff-unstaged", json!({"path": "."})));
        assert_eq!(asked(&["diff", "sbx-a", ".", "--staged"]), ("diff-staged", json!({"path": "."})));
        assert_eq!(asked(&["diff", "sbx-a", ".", "--with", "v1"]), ("diff", json!({"path": ".", "target": "v1"})));
        assert_eq!(
            asked(&["clone", "sbx-a", "https://x/y.git", "y"]),
            ("clone", json!({"url": "https://x/y.git", "path": "y"}))
        );
        assert_eq!(
            asked(&["push", "sbx-a", ".", "--remote", "up", "--set-upstream"]),
            ("push", json!({"path": ".", "remote": "up", "set_upstream": true}))
        );
        assert_eq!(
            asked(&["commit", "sbx-a", ".", "-m", "why"]),
            ("commit", json!({"path": ".", "message": "why", "allow_empty": false}))
        );
    }
}
