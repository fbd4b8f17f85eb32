//! `git/*`. A git that fails is an answer too: 200 with its exit status.

use super::answers::with_timing;
use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::guest_requests::git::{Check, OPERATIONS};
use crate::openapi::{Operation, Tag};
use crate::supervisor::operations;
use crate::wire::git::{
    GitAdd, GitAnswer, GitBranches, GitCheckoutBranch, GitClone, GitCommit, GitCommitted, GitCreateBranch,
    GitDeleteBranch, GitDiff, GitDiffTarget, GitExchange, GitLog, GitRepository, GitResult, GitShow,
};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse as _;

pub(super) fn routes() -> Vec<Route> {
    OPERATIONS.into_iter().map(|(name, plan)| route(name, plan)).collect()
}

/// What the document says of an operation.
fn operation(name: &str) -> Operation {
    let op = |id: &str, summary| Operation::new(format!("git{id}"), Tag::Git, summary);
    match name {
        "clone" => op("Clone", "Clone a repository").body::<GitClone>(),
        "status" => op("Status", "Show what has changed").body::<GitRepository>(),
        "branches" => op("Branches", "List branches").body::<GitBranches>(),
        "diff-unstaged" => op("DiffUnstaged", "Show changes that are not staged").body::<GitDiff>(),
        "diff-staged" => op("DiffStaged", "Show changes that are staged").body::<GitDiff>(),
        "diff" => op("Diff", "Show differences from a branch, tag or commit").body::<GitDiffTarget>(),
        "reset" => op("Reset", "Unstage everything").body::<GitRepository>(),
        "log" => op("Log", "List commits").body::<GitLog>(),
        "show" => op("Show", "Show a revision").body::<GitShow>(),
        "create-branch" => op("CreateBranch", "Make a branch").body::<GitCreateBranch>(),
        "checkout-branch" => op("CheckoutBranch", "Check a branch out").body::<GitCheckoutBranch>(),
        "delete-branch" => op("DeleteBranch", "Delete a branch").body::<GitDeleteBranch>(),
        "add" => op("Add", "Stage files").body::<GitAdd>(),
        "commit" => op("Commit", "Commit what is staged").body::<GitCommit>(),
        "push" => op("Push", "Push to a remote").body::<GitExchange>(),
        _ => op("Pull", "Pull from a remote").body::<GitExchange>(),
    }
}

fn route(name: &str, plan: Check) -> Route {
    let handler = move |State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>, body: Body| async move {
        let sandbox = core.registry.find(&tenant, &id)?;
        let plan = plan(&json_body(&core, body).await?).map_err(Error::Invalid)?;
        let tells_commit = plan.tells_commit;
        let done = operations::git(&core, &sandbox, plan).await?;
        let result = GitResult { output: done.output, exit_code: done.exit_code };
        let body = if tells_commit {
            GitAnswer::Committed(GitCommitted { sha: done.commit.unwrap_or_default(), result })
        } else {
            GitAnswer::Result(result)
        };
        Ok::<_, Error>(with_timing(Json(body).into_response(), &done.timing))
    };
    let says = "What git said, and its exit status.";
    let operation = operation(name);
    let operation = if name == "commit" {
        operation.answers::<GitCommitted>(200, says)
    } else {
        operation.answers::<GitResult>(200, says)
    };
    Route::post(format!("/v1/sandbox/{{id}}/git/{name}"), handler, operation.asks_guest())
}
