//! `git/*`: which runs of git an operation is. Names that start with `-` are refused where git would take them for options.

use super::{Fields, NAME};
use crate::validate::FieldError;
use serde_json::{Map, Value};
use stasis_agent::protocol::git::{Credentials, Remote};
use std::collections::BTreeMap;

pub(crate) const URL: usize = 8 << 10;
/// One argument of a program has at most 128 KiB on Linux.
pub(crate) const MESSAGE: usize = 100 << 10;
pub(crate) const FILES: usize = 10_000;

/// What an operation runs, in order, until one fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The repository; `None` for the user's own directory.
    pub cwd: Option<String>,
    /// The runs.
    pub runs: Vec<Run>,
    /// Environment of all of them.
    pub env: BTreeMap<String, String>,
    /// For the remote that they talk to.
    pub credentials: Option<Credentials>,
    /// Asks for the commit that was made.
    pub tells_commit: bool,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What follows `git`.
    pub args: Vec<String>,
    /// What follows `git` when this branch does not exist.
    pub unless_branch: Option<(String, Vec<String>)>,
}

impl Plan {
    fn of(cwd: Option<String>, runs: impl IntoIterator<Item = Vec<String>>) -> Self {
        let runs = runs.into_iter().map(|args| Run { args, unless_branch: None }).collect();
        Self { cwd, runs, env: BTreeMap::new(), credentials: None, tells_commit: false }
    }
}

/// From a request to a plan.
pub type Check = fn(&Map<String, Value>) -> Result<Plan, Vec<FieldError>>;

/// The operations by their names in the API.
pub const OPERATIONS: [(&str, Check); 16] = [
    ("clone", clone),
    ("status", |body| simple(body, &["status", "--porcelain=v2", "--branch"])),
    ("branches", branches),
    ("diff-unstaged", |body| diff(body, &[], false)),
    ("diff-staged", |body| diff(body, &["--cached"], false)),
    ("diff", |body| diff(body, &[], true)),
    ("reset", |body| simple(body, &["reset"])),
    ("log", log),
    ("show", show),
    ("create-branch", create_branch),
    ("checkout-branch", checkout_branch),
    ("delete-branch", delete_branch),
    ("add", add),
    ("commit", commit),
    ("push", |body| exchange(body, true)),
    ("pull", |body| exchange(body, false)),
];

fn words<const N: usize>(words: [&str; N]) -> Vec<String> {
    words.map(str::to_owned).to_vec()
}

/// A branch, commit, tag, remote: nothing that git could take for an option.
fn name(fields: &mut Fields<'_>, field: &str, text: Option<String>) -> Option<String> {
    if text.as_ref().is_some_and(|text| text.starts_with('-') || text.chars().any(char::is_control)) {
        fields.errors.add(field, "must not start with '-' or have control characters");
    }
    text
}

fn required_name(fields: &mut Fields<'_>, field: &str) -> String {
    let text = fields.filled(field, NAME);
    name(fields, field, Some(text)).unwrap_or_default()
}

fn optional_name(fields: &mut Fields<'_>, field: &str) -> Option<String> {
    let text = fields.optional_filled(field, NAME);
    name(fields, field, text)
}

fn simple(body: &Map<String, Value>, args: &[&str]) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    fields.or(Plan::of(Some(path), [args.iter().map(|&arg| arg.to_owned()).collect()]))
}

fn clone(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let url = fields.filled("url", URL);
    let path = fields.path("path");
    let (branch, commit) = (optional_name(&mut fields, "branch"), optional_name(&mut fields, "commit_id"));
    let depth = fields.number("depth", 1, i64::from(i32::MAX)).map(|depth| format!("--depth={depth}"));
    let credentials = name_and_secret(&mut fields);
    name(&mut fields, "url", Some(url.clone()));
    if url.contains("::") {
        fields.errors.add("url", "must not name a transport of its own");
    }
    let (url, in_url) = split_secret(&url);
    let mut first = words(["clone"]);
    if let Some(branch) = branch {
        first.extend(words(["--branch"]));
        first.push(branch);
    }
    first.extend(depth.clone());
    if commit.is_some() {
        first.extend(words(["--no-checkout"]));
    }
    first.extend([words(["--"]), vec![url.clone(), path.clone()]].concat());
    let mut runs = vec![first];
    if let Some(commit) = commit {
        let at = |args: &[&str]| {
            let args = args.iter().map(|&arg| arg.to_owned());
            ["-C".to_owned(), path.clone()].into_iter().chain(args).collect::<Vec<_>>()
        };
        // A shallow clone does not have it.
        if let Some(depth) = &depth {
            runs.push(at(&["fetch", depth, "origin", &commit]));
        }
        runs.push(at(&["checkout", "--detach", &commit, "--"]));
    }
    let credentials = credentials.or(in_url).map(|(username, password)| Credentials {
        username,
        password,
        remote: Remote::Url(url.clone()),
    });
    fields.or(Plan { credentials, ..Plan::of(None, runs) })
}

/// A URL without its user name and password, which would be seen in the list of processes, and those.
fn split_secret(url: &str) -> (String, Option<(String, String)>) {
    let parsed = reqwest::Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(mut parsed) = parsed else { return (url.to_owned(), None) };
    let decoded = |text: &str| {
        // The form decoder knows percent signs; a plus sign is itself here.
        let pairs = format!("x={}", text.replace('+', "%2B").replace('&', "%26"));
        reqwest::Url::parse(&format!("http://x/?{pairs}"))
            .ok()
            .and_then(|url| url.query_pairs().next().map(|(_, value)| value.into_owned()))
            .unwrap_or_default()
    };
    let (username, password) = (decoded(parsed.username()), parsed.password().map(decoded));
    if username.is_empty() && password.is_none() {
        return (url.to_owned(), None);
    }
    if parsed.set_username("").is_err() || parsed.set_password(None).is_err() {
        return (url.to_owned(), None);
    }
    (parsed.to_string(), Some((username, password.unwrap_or_default())))
}

fn name_and_secret(fields: &mut Fields<'_>) -> Option<(String, String)> {
    let (username, password) = (fields.optional_filled("username", NAME), fields.optional_filled("password", URL));
    for (field, text) in [("username", &username), ("password", &password)] {
        // They travel in lines.
        if text.as_ref().is_some_and(|text| text.contains(['\n', '\r'])) {
            fields.errors.add(field, "must be one line");
        }
    }
    // A token alone: hosts take it with any name.
    password.map(|password| (username.unwrap_or_else(|| "git".to_owned()), password))
}

fn branches(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let mut args = words(["branch", "--list", "--no-color"]);
    match fields.optional_filled("branch_type", NAME).as_deref() {
        None | Some("local") => {}
        Some("remote") => args.extend(words(["--remotes"])),
        Some("all") => args.extend(words(["--all"])),
        Some(_) => fields.errors.add("branch_type", "must be local, remote or all"),
    }
    for (field, option) in [("contains", "--contains"), ("not_contains", "--no-contains")] {
        if let Some(commit) = optional_name(&mut fields, field) {
            args.extend([option.to_owned(), commit]);
        }
    }
    fields.or(Plan::of(Some(path), [args]))
}

fn diff(body: &Map<String, Value>, options: &[&str], with_target: bool) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let context = fields.number("context_lines", 0, 100_000).unwrap_or(3);
    let mut args = words(["diff", "--no-color", "--no-ext-diff"]);
    args.push(format!("--unified={context}"));
    args.extend(options.iter().map(|&option| option.to_owned()));
    if with_target {
        args.push(required_name(&mut fields, "target"));
    }
    args.extend(words(["--"]));
    fields.or(Plan::of(Some(path), [args]))
}

fn log(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let count = fields.number("max_count", 0, i64::from(i32::MAX)).unwrap_or(10);
    let mut args = words(["log", "--no-color"]);
    args.push(format!("--max-count={count}"));
    for (field, option) in [("start_timestamp", "--since"), ("end_timestamp", "--until")] {
        if let Some(time) = fields.optional_filled(field, NAME) {
            args.push(format!("{option}={time}"));
        }
    }
    fields.or(Plan::of(Some(path), [args]))
}

fn show(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let revision = required_name(&mut fields, "revision");
    let args = [words(["show", "--no-color", "--no-ext-diff"]), vec![revision], words(["--"])].concat();
    fields.or(Plan::of(Some(path), [args]))
}

fn create_branch(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let branch = required_name(&mut fields, "name");
    let base = optional_name(&mut fields, "base_branch");
    let mut args = if fields.flag("checkout") { words(["checkout", "-b"]) } else { words(["branch"]) };
    args.push(branch);
    args.extend(base);
    fields.or(Plan::of(Some(path), [args]))
}

fn checkout_branch(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let branch = required_name(&mut fields, "branch");
    let create = [words(["checkout", "-b"]), vec![branch.clone()]].concat();
    let unless_branch = fields.flag("create").then(|| (branch.clone(), create));
    let run = Run { args: [words(["checkout"]), vec![branch], words(["--"])].concat(), unless_branch };
    fields.or(Plan { runs: vec![run], ..Plan::of(Some(path), []) })
}

fn delete_branch(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let branch = required_name(&mut fields, "name");
    let option = if fields.flag("force") { "-D" } else { "-d" };
    fields.or(Plan::of(Some(path), [[words(["branch", option, "--"]), vec![branch]].concat()]))
}

fn add(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let files = fields.texts("files", 1..=FILES, super::GUEST_PATH);
    fields.or(Plan::of(Some(path), [[words(["add", "--"]), files].concat()]))
}

fn commit(body: &Map<String, Value>) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let message = fields.filled("message", MESSAGE);
    let mut args = vec!["commit".to_owned(), format!("--message={message}")];
    if fields.flag("allow_empty") {
        args.extend(words(["--allow-empty"]));
    }
    let mut plan = Plan { tells_commit: true, ..Plan::of(Some(path), [args]) };
    for (field, variables) in
        [("author", ["GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"]), ("email", ["GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"])]
    {
        if let Some(value) = fields.optional_filled(field, NAME) {
            plan.env.extend(variables.map(|variable| (variable.to_owned(), value.clone())));
        }
    }
    fields.or(plan)
}

fn exchange(body: &Map<String, Value>, push: bool) -> Result<Plan, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let remote = optional_name(&mut fields, "remote").unwrap_or_else(|| "origin".to_owned());
    if remote.contains("::") {
        fields.errors.add("remote", "must not name a transport of its own");
    }
    let branch = optional_name(&mut fields, "branch");
    let (upstream, rebase) = (fields.flag("set_upstream"), fields.flag("rebase"));
    let secret = name_and_secret(&mut fields);
    let (remote, in_url) = split_secret(&remote);
    let args = if push {
        let mut args = words(["push"]);
        if upstream {
            args.extend(words(["--set-upstream"]));
        }
        // Without a branch: the one that is checked out, under its own name.
        args.extend([remote.clone(), branch.unwrap_or_else(|| "HEAD".to_owned())]);
        args
    } else {
        let mut args = words(["pull", if rebase { "--rebase" } else { "--no-rebase" }]);
        args.push(remote.clone());
        args.extend(branch);
        args
    };
    let whose = if push { Remote::Push(remote) } else { Remote::Fetch(remote) };
    let credentials = secret.or(in_url).map(|(username, password)| Credentials { username, password, remote: whose });
    fields.or(Plan { credentials, ..Plan::of(Some(path), [args]) })
}
