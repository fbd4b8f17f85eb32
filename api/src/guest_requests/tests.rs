use super::git::{OPERATIONS, Plan};
use super::{files, terminals};
use crate::validate::FieldError;
use serde_json::{Map, Value, json};
use stasis_agent::protocol::git::Remote;

fn body(value: &Value) -> &Map<String, Value> {
    value.as_object().unwrap()
}

fn names<T: std::fmt::Debug>(checked: Result<T, Vec<FieldError>>) -> Vec<String> {
    checked.unwrap_err().into_iter().map(|e| e.field).collect()
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let wrong = json!({"path": 7, "recursive": "x", "exclude": ["ok", ""]});
    assert_eq!(names(files::ls(body(&wrong))), ["path", "recursive", "exclude[1]"]);
    assert_eq!(names(files::transfer(body(&json!({})))), ["src_path", "dst_path"]);
    let edits = json!({"path": "/x", "edits": [{"find": "a"}, {"find": ""}, 7, {"find": "b", "replace": 1}]});
    assert_eq!(names(files::edit(body(&edits))), ["edits[1].find", "edits[2].find", "edits[3].replace"]);
    assert_eq!(
        names(terminals::create(body(&json!({"cols": 0, "rows": 2001, "id": "\u{7}"})))),
        ["id", "cols", "rows"]
    );
}

#[test]
fn what_may_be_null_or_empty_is_as_if_it_were_absent() {
    let read = files::mkdir(body(&json!({"path": "/x", "recursive": null, "permissions": null}))).unwrap();
    assert_eq!((read.recursive, read.permissions), (false, None));
    let glob = files::glob(body(&json!({"path": "/x", "pattern": "", "exclude": null}))).unwrap();
    assert_eq!((glob.pattern, glob.exclude.len()), (None, 0));
    let made = terminals::create(body(&json!({"id": "", "cwd": null, "envs": null}))).unwrap();
    assert_eq!((made.id, made.cwd, made.cols, made.rows, made.lazy_start), (None, None, 80, 24, false));
}

#[test]
fn limits_are_exact() {
    let path = |len: usize| files::path(body(&json!({"path": "x".repeat(len)})));
    assert!(path(4095).is_ok());
    assert_eq!(names(path(4096)), ["path"]);
    let paths = |count: usize| files::read_many(body(&json!({"paths": vec!["x"; count]})));
    assert!(paths(1000).is_ok());
    assert_eq!(names(paths(1001)), ["paths"]);
    for (mode, good) in
        [("755", true), ("0644", true), ("7777", true), ("07777", true), ("10000", false), ("75", false)]
    {
        let query = [("path".to_owned(), "/x".to_owned()), ("permissions".to_owned(), mode.to_owned())];
        assert_eq!(files::write(&query).is_ok(), good, "{mode}");
    }
}

fn plan(operation: &str, value: &Value) -> Result<Plan, Vec<FieldError>> {
    let (_, check) = OPERATIONS.into_iter().find(|(name, _)| *name == operation).unwrap();
    check(body(value))
}

fn runs(operation: &str, value: &Value) -> Vec<String> {
    plan(operation, value).unwrap().runs.iter().map(|run| run.args.join(" ")).collect()
}

#[test]
fn operations_are_runs_of_git() {
    for (operation, value, expected) in [
        ("status", json!({"path": "/r"}), "status --porcelain=v2 --branch"),
        (
            "branches",
            json!({"path": "/r", "branch_type": "all", "contains": "abc"}),
            "branch --list --no-color --all --contains abc",
        ),
        ("diff-unstaged", json!({"path": "/r"}), "diff --no-color --no-ext-diff --unified=3 --"),
        (
            "diff-staged",
            json!({"path": "/r", "context_lines": 0}),
            "diff --no-color --no-ext-diff --unified=0 --cached --",
        ),
        ("diff", json!({"path": "/r", "target": "main"}), "diff --no-color --no-ext-diff --unified=3 main --"),
        ("reset", json!({"path": "/r"}), "reset"),
        (
            "log",
            json!({"path": "/r", "start_timestamp": "2026-01-01"}),
            "log --no-color --max-count=10 --since=2026-01-01",
        ),
        ("show", json!({"path": "/r", "revision": "HEAD~1"}), "show --no-color --no-ext-diff HEAD~1 --"),
        ("create-branch", json!({"path": "/r", "name": "x"}), "branch x"),
        ("create-branch", json!({"path": "/r", "name": "x", "checkout": true, "base_branch": "y"}), "checkout -b x y"),
        ("delete-branch", json!({"path": "/r", "name": "x", "force": true}), "branch -D -- x"),
        ("add", json!({"path": "/r", "files": ["-A", "b"]}), "add -- -A b"),
        (
            "commit",
            json!({"path": "/r", "message": "-m x", "allow_empty": true}),
            "commit --message=-m x --allow-empty",
        ),
        ("push", json!({"path": "/r"}), "push origin HEAD"),
        (
            "push",
            json!({"path": "/r", "remote": "up", "branch": "b", "set_upstream": true}),
            "push --set-upstream up b",
        ),
        ("pull", json!({"path": "/r", "rebase": true, "branch": "b"}), "pull --rebase origin b"),
    ] {
        assert_eq!(runs(operation, &value), [expected]);
        assert_eq!(plan(operation, &value).unwrap().cwd.as_deref(), Some("/r"));
    }
    let shallow = json!({"url": "https://h/r.git", "path": "/r", "branch": "b", "depth": 2, "commit_id": "abc"});
    assert_eq!(
        runs("clone", &shallow),
        [
            "clone --branch b --depth=2 --no-checkout -- https://h/r.git /r",
            "-C /r fetch --depth=2 origin abc",
            "-C /r checkout --detach abc --"
        ]
    );
    let checkout = plan("checkout-branch", &json!({"path": "/r", "branch": "b", "create": true})).unwrap();
    assert_eq!(checkout.runs[0].args, ["checkout", "b", "--"]);
    let (branch, otherwise) = checkout.runs[0].unless_branch.clone().unwrap();
    assert_eq!((branch.as_str(), otherwise.join(" ").as_str()), ("b", "checkout -b b"));
    let commit = plan("commit", &json!({"path": "/r", "message": "m", "author": "Ann", "email": "a@b"})).unwrap();
    assert!(
        commit.tells_commit && commit.env["GIT_COMMITTER_NAME"] == "Ann" && commit.env["GIT_AUTHOR_EMAIL"] == "a@b"
    );
}

#[test]
fn nothing_of_a_request_becomes_an_option_of_git() {
    for (operation, field, extra) in [
        ("clone", "url", json!({"path": "/r"})),
        ("clone", "branch", json!({"path": "/r", "url": "https://h/r"})),
        ("clone", "commit_id", json!({"path": "/r", "url": "https://h/r"})),
        ("diff", "target", json!({"path": "/r"})),
        ("show", "revision", json!({"path": "/r"})),
        ("branches", "contains", json!({"path": "/r"})),
        ("branches", "not_contains", json!({"path": "/r"})),
        ("create-branch", "name", json!({"path": "/r"})),
        ("create-branch", "base_branch", json!({"path": "/r", "name": "x"})),
        ("checkout-branch", "branch", json!({"path": "/r"})),
        ("delete-branch", "name", json!({"path": "/r"})),
        ("push", "remote", json!({"path": "/r"})),
        ("push", "branch", json!({"path": "/r"})),
        ("pull", "remote", json!({"path": "/r"})),
        ("pull", "branch", json!({"path": "/r"})),
    ] {
        for text in ["--upload-pack=x", "-x", "a\nb"] {
            let mut value = extra.clone();
            value[field] = json!(text);
            assert_eq!(names(plan(operation, &value)), [field], "{operation} {text:?}");
        }
    }
    assert_eq!(names(plan("clone", &json!({"url": "ext::sh -c x", "path": "/r"}))), ["url"]);
    assert_eq!(names(plan("pull", &json!({"remote": "ext::sh -c x", "path": "/r"}))), ["remote"]);
}

#[test]
fn secrets_travel_apart_from_the_arguments() {
    let clone = |value: Value| {
        let plan = plan("clone", &value).unwrap();
        assert!(!format!("{plan:?}").contains("s3cret"), "{plan:?}");
        let credentials = plan.credentials.unwrap();
        (plan.runs[0].args.join(" "), credentials.username, credentials.password, credentials.remote)
    };
    let (args, username, password, remote) =
        clone(json!({"url": "https://ann:s3cret%2B%26+x@h:8443/r.git", "path": "/r"}));
    assert_eq!(args, "clone -- https://h:8443/r.git /r");
    assert_eq!((username.as_str(), password.as_str()), ("ann", "s3cret+&+x"));
    assert_eq!(remote, Remote::Url("https://h:8443/r.git".to_owned()));
    // Fields go before what the URL says; a token needs no name.
    let (_, username, password, _) = clone(json!({"url": "https://old:s3cret@h/r", "path": "/r", "password": "new"}));
    assert_eq!((username.as_str(), password.as_str()), ("git", "new"));
    let push = plan("push", &json!({"path": "/r", "username": "u", "password": "s3cret"})).unwrap();
    assert_eq!(push.credentials.unwrap().remote, Remote::Push("origin".to_owned()));
    let pull = plan("pull", &json!({"path": "/r", "remote": "https://u:p@h/r"})).unwrap();
    assert_eq!(
        (pull.runs[0].args.join(" ").as_str(), pull.credentials.is_some()),
        ("pull --no-rebase https://h/r", true)
    );
    assert!(plan("clone", &json!({"url": "ssh://git@h/r", "path": "/r"})).unwrap().credentials.is_none());
    assert_eq!(names(plan("push", &json!({"path": "/r", "password": "a\nb"}))), ["password"]);
}
