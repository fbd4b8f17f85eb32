//! git.

use super::text::{GitName, GuestPath, OptionalGitName};
use crate::guest_requests::NAME;
use crate::guest_requests::git::{FILES, MESSAGE, URL};
use schemars::JsonSchema;
use serde::Serialize;

/// What git said.
#[derive(Debug, Serialize, JsonSchema)]
pub struct GitResult {
    /// What it wrote: results, and with a failure messages too.
    pub output: String,
    /// Its exit status; 124 after the time limit.
    pub exit_code: i32,
}

/// What a commit made.
#[derive(Debug, Serialize, JsonSchema)]
pub struct GitCommitted {
    /// The commit; empty when there is none.
    pub sha: String,
    /// What git said.
    pub result: GitResult,
}

/// What an operation answers.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum GitAnswer {
    /// Of `commit`.
    Committed(GitCommitted),
    /// Of all others.
    Result(GitResult),
}

/// A repository.
#[derive(JsonSchema)]
pub struct GitRepository {
    /// Where it is.
    pub path: GuestPath,
}

/// A repository to be cloned.
#[derive(JsonSchema)]
pub struct GitClone {
    /// Its URL. A name and a secret in it are treated as `username` and `password`.
    pub url: GitUrl,
    /// Where it goes.
    pub path: GuestPath,
    /// The branch that is checked out.
    pub branch: Option<OptionalGitName>,
    /// The commit that is checked out.
    pub commit_id: Option<OptionalGitName>,
    /// So many commits only.
    #[schemars(range(min = 1, max = i32::MAX))]
    pub depth: Option<i32>,
    /// Name for the URL's host.
    pub username: Option<OneLine>,
    /// Password or token for the URL's host. It reaches no other host and no list of processes.
    pub password: Option<OneLine>,
}

/// Branches to be listed.
#[derive(JsonSchema)]
pub struct GitBranches {
    /// The repository.
    pub path: GuestPath,
    /// Which; local ones when absent.
    pub branch_type: Option<BranchType>,
    /// Only those with this commit.
    pub contains: Option<OptionalGitName>,
    /// Only those without this commit.
    pub not_contains: Option<OptionalGitName>,
}

/// What a difference shows.
#[derive(JsonSchema)]
pub struct GitDiff {
    /// The repository.
    pub path: GuestPath,
    /// Lines around a change; 3 when absent.
    #[schemars(range(min = 0, max = 100_000))]
    pub context_lines: Option<i64>,
}

/// What a difference with something else shows.
#[derive(JsonSchema)]
pub struct GitDiffTarget {
    /// The repository.
    pub path: GuestPath,
    /// A branch, a tag or a commit.
    pub target: GitName,
    /// Lines around a change; 3 when absent.
    #[schemars(range(min = 0, max = 100_000))]
    pub context_lines: Option<i64>,
}

/// Commits to be listed.
#[derive(JsonSchema)]
pub struct GitLog {
    /// The repository.
    pub path: GuestPath,
    /// Commits at most; 10 when absent.
    #[schemars(range(min = 0, max = i32::MAX))]
    pub max_count: Option<i32>,
    /// Only those after.
    pub start_timestamp: Option<ShortText>,
    /// Only those before.
    pub end_timestamp: Option<ShortText>,
}

/// A revision to be shown.
#[derive(JsonSchema)]
pub struct GitShow {
    /// The repository.
    pub path: GuestPath,
    /// A commit, a branch or a tag.
    pub revision: GitName,
}

/// A branch to be made.
#[derive(JsonSchema)]
pub struct GitCreateBranch {
    /// The repository.
    pub path: GuestPath,
    /// The branch.
    pub name: GitName,
    /// Checks it out.
    pub checkout: Option<bool>,
    /// Where it starts; at what is checked out when absent.
    pub base_branch: Option<OptionalGitName>,
}

/// A branch to be checked out.
#[derive(JsonSchema)]
pub struct GitCheckoutBranch {
    /// The repository.
    pub path: GuestPath,
    /// The branch.
    pub branch: GitName,
    /// Makes it if it is not there.
    pub create: Option<bool>,
}

/// A branch to be deleted.
#[derive(JsonSchema)]
pub struct GitDeleteBranch {
    /// The repository.
    pub path: GuestPath,
    /// The branch.
    pub name: GitName,
    /// Also when it is not merged.
    pub force: Option<bool>,
}

/// Files to be staged.
#[derive(JsonSchema)]
pub struct GitAdd {
    /// The repository.
    pub path: GuestPath,
    /// The files.
    #[schemars(length(min = 1, max = FILES))]
    pub files: Vec<GuestPath>,
}

/// A commit to be made of what is staged.
#[derive(JsonSchema)]
pub struct GitCommit {
    /// The repository.
    pub path: GuestPath,
    /// Its message.
    pub message: Message,
    /// Name of author and committer; the repository's own when absent.
    pub author: Option<ShortText>,
    /// Their address.
    pub email: Option<ShortText>,
    /// Also when nothing is staged.
    pub allow_empty: Option<bool>,
}

/// What is pushed to or pulled from where.
#[derive(JsonSchema)]
pub struct GitExchange {
    /// The repository.
    pub path: GuestPath,
    /// A remote's name or URL; `origin` when absent.
    pub remote: Option<Remote>,
    /// The branch; the one that is checked out when absent.
    pub branch: Option<OptionalGitName>,
    /// Notes the remote branch as the one to pull from (push only).
    pub set_upstream: Option<bool>,
    /// Rebases instead of merging (pull only).
    pub rebase: Option<bool>,
    /// Name for the remote's host.
    pub username: Option<OneLine>,
    /// Password or token for the remote's host. It reaches no other host and no list of processes.
    pub password: Option<OneLine>,
}

inline_schemas! {
    /// Where a repository is.
    GitUrl = {
        "type": "string",
        "minLength": 1,
        "maxLength": URL,
        "pattern": r"^[^\u0000-\u001f\u007f-\u009f-][^\u0000-\u001f\u007f-\u009f]*$",
        "not": { "pattern": "::" },
        "examples": ["https://github.com/user/repo.git"],
    };
    /// A remote's name or URL, or nothing.
    Remote = {
        "type": "string",
        "maxLength": NAME,
        "pattern": r"^([^\u0000-\u001f\u007f-\u009f-][^\u0000-\u001f\u007f-\u009f]*)?$",
        "not": { "pattern": "::" },
    };
    /// A name or a secret, or nothing.
    OneLine = { "type": "string", "maxLength": NAME, "pattern": r"^[^\u0000\n\r]*$" };
    /// Kinds of branches; nothing is as if it were absent.
    BranchType = { "type": "string", "enum": ["local", "remote", "all", ""] };
    /// A moment in git's words, a name or an address, or nothing.
    ShortText = { "type": "string", "maxLength": NAME, "pattern": r"^[^\u0000]*$" };
    /// A message.
    Message = { "type": "string", "minLength": 1, "maxLength": MESSAGE, "pattern": r"^[^\u0000]+$" };
}
