//! `stasis fs`: files of a sandbox, without copying them out. Each verb is an operation of the API, and its arguments are the fields of that
//! operation's body.

use super::client::Client;
use super::commands::{On, body, path, rows, scalar};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde::Serialize;
use serde_json::Value;

/// `stasis fs …`. Paths that are not absolute are relative to the sandbox's working directory. `stasis cp` copies content.
#[derive(Debug, Subcommand)]
pub(super) enum Files {
    /// List a directory.
    Ls(On<Ls>),
    /// Show what a path is.
    Stat(On<OnePath>),
    /// Say whether a path is there: exit code 0, or 3.
    Exists(On<OnePath>),
    /// Make a directory.
    Mkdir(On<Mkdir>),
    /// Delete a file or directory.
    Rm(On<Remove>),
    /// Move to a new path.
    Mv(On<Transfer>),
    /// Copy within the sandbox, to a new path.
    Copy(On<Transfer>),
    /// Change mode, owner or group.
    Chmod(On<Chmod>),
    /// Print a file, or a part of it.
    Cat(On<Cat>),
    /// Find files by name.
    Glob(On<Glob>),
    /// Find lines that contain a text.
    Grep(On<Grep>),
    /// Replace a text in files.
    Edit(On<Edit>),
    /// Show a directory as a tree.
    Tree(On<Tree>),
    /// Print the home directory, with --working the directory that commands start in.
    Home {
        /// The sandbox.
        id: String,
        /// The working directory instead.
        #[arg(long)]
        working: bool,
    },
}

#[derive(Debug, Args, Serialize)]
pub(super) struct OnePath {
    /// The path.
    path: String,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Ls {
    /// The directory.
    #[arg(default_value = ".")]
    path: String,
    /// With everything below it.
    #[arg(long, short)]
    recursive: bool,
    /// Pattern of names that are left out; may be repeated.
    #[arg(long)]
    exclude: Vec<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Mkdir {
    /// The directory.
    path: String,
    /// Make parents, too, and take one that is there for done.
    #[arg(long, short = 'p')]
    recursive: bool,
    /// Mode, octal.
    #[arg(long = "mode")]
    permissions: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Remove {
    /// The path.
    path: String,
    /// A directory goes with what is in it.
    #[arg(long, short)]
    recursive: bool,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Transfer {
    /// From.
    src_path: String,
    /// To: the new path itself, never a directory to put it into.
    dst_path: String,
    /// A directory goes with what is in it.
    #[arg(long, short)]
    recursive: bool,
    /// Take the place of what is there.
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Chmod {
    /// The path.
    path: String,
    /// Mode, octal.
    #[arg(long, required_unless_present_any = ["owner", "group"])]
    mode: Option<String>,
    /// Owner, by name or number.
    #[arg(long)]
    owner: Option<String>,
    /// Group, by name or number.
    #[arg(long)]
    group: Option<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Cat {
    /// The file.
    path: String,
    /// Octets left out at the start.
    #[arg(long)]
    offset: Option<u64>,
    /// Octets at most.
    #[arg(long)]
    limit: Option<u64>,
    /// The first lines only.
    #[arg(long, conflicts_with = "tail")]
    head: Option<u32>,
    /// The last lines only.
    #[arg(long)]
    tail: Option<u32>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Glob {
    /// Where to look.
    path: String,
    /// `*`, `?`, `[…]`, `{a,b}`, `**`.
    pattern: String,
    /// Pattern of names that are left out; may be repeated.
    #[arg(long)]
    exclude: Vec<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Grep {
    /// The text, as it is: no expression.
    pattern: String,
    /// A directory or a file.
    #[arg(default_value = ".")]
    path: String,
    /// Pattern of the files to look at.
    #[arg(long)]
    include: Option<String>,
    /// Pattern of names that are left out; may be repeated.
    #[arg(long)]
    exclude: Vec<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Edit {
    /// The text that goes.
    find: String,
    /// The text that comes.
    replace: String,
    /// The files.
    #[arg(required = true)]
    files: Vec<String>,
}

#[derive(Debug, Args, Serialize)]
pub(super) struct Tree {
    /// The directory.
    #[arg(default_value = ".")]
    path: String,
    /// So many levels only.
    #[arg(long)]
    max_depth: Option<u32>,
    /// Pattern of names that are left out; may be repeated.
    #[arg(long)]
    exclude: Vec<String>,
}

pub(super) async fn run(client: &Client, files: &Files, output: Output) -> Result<ExitStatus, Failure> {
    let (id, operation, body) = match files {
        Files::Home { id, working } => return home(client, id, *working, output).await,
        Files::Cat(on) => return cat(client, &on.id, &body(&on.what)).await,
        Files::Ls(on) => (&on.id, "ls", body(&on.what)),
        Files::Stat(on) => (&on.id, "stat", body(&on.what)),
        Files::Exists(on) => (&on.id, "exists", body(&on.what)),
        Files::Mkdir(on) => (&on.id, "mkdir", body(&on.what)),
        Files::Rm(on) => (&on.id, "delete", body(&on.what)),
        Files::Mv(on) => (&on.id, "move", body(&on.what)),
        Files::Copy(on) => (&on.id, "copy", body(&on.what)),
        Files::Chmod(on) => (&on.id, "set-permissions", body(&on.what)),
        Files::Glob(on) => (&on.id, "glob", body(&on.what)),
        Files::Grep(on) => (&on.id, "grep", body(&on.what)),
        Files::Edit(on) => (&on.id, "edit-files", body(&on.what)),
        Files::Tree(on) => (&on.id, "tree", body(&on.what)),
    };
    let path = path(id, &format!("/filesystem/{operation}"));
    let answer = client.call(Method::POST, &path, Some(&body)).await?.body;
    if output.json {
        Output::value(&answer);
    } else {
        show(files, &answer, output);
    }
    Ok(match files {
        Files::Exists(_) if answer["exists"] != true => ExitStatus::NotFound,
        Files::Edit(_) if answer["items"].as_array().into_iter().flatten().any(|item| item["success"] != true) => {
            ExitStatus::Usage
        }
        _ => ExitStatus::Ok,
    })
}

fn show(files: &Files, answer: &Value, output: Output) {
    let items = answer["items"].as_array().cloned().unwrap_or_default();
    match files {
        Files::Ls(_) => output.table(&listing(&items)),
        Files::Stat(_) => output.table(&listing(std::slice::from_ref(answer))),
        Files::Exists(_) => output::line(if answer["exists"] == true { "yes" } else { "no" }),
        Files::Glob(_) => items.iter().for_each(|item| output::line(&scalar(item))),
        Files::Grep(_) => items.iter().for_each(|item| {
            output::line(&format!("{}:{}:{}", scalar(&item["path"]), scalar(&item["line"]), scalar(&item["content"])));
        }),
        Files::Edit(_) => items.iter().for_each(|item| match item["error"].as_str() {
            None => output::line(&scalar(&item["file"])),
            Some(error) => output::tell(&format!("{}: {error}", scalar(&item["file"]))),
        }),
        Files::Tree(_) => branches(&items, 0),
        // What is done is done: there is nothing to say.
        Files::Mkdir(_)
        | Files::Rm(_)
        | Files::Mv(_)
        | Files::Copy(_)
        | Files::Chmod(_)
        | Files::Cat(_)
        | Files::Home { .. } => {}
    }
    if answer["truncated"] == true {
        output::tell("there is more: the answer was cut");
    }
}

fn listing(items: &[Value]) -> Vec<Vec<String>> {
    let mut table =
        rows(&["MODE", "OWNER", "GROUP", "SIZE", "PATH"], &["mode", "owner", "group", "size", "path"], items);
    for (row, item) in table.iter_mut().skip(1).zip(items) {
        if let Some(path) = row.last_mut() {
            match item["link_target"].as_str() {
                Some(target) => path.extend([" -> ", target]),
                None if item["is_dir"] == true => path.push('/'),
                None => {}
            }
        }
    }
    table
}

fn branches(items: &[Value], depth: usize) {
    for item in items {
        let slash = if item["type"] == "directory" { "/" } else { "" };
        output::line(&format!("{}{}{slash}", "  ".repeat(depth), scalar(&item["name"])));
        branches(item["children"].as_array().map_or(&[][..], Vec::as_slice), depth + 1);
    }
}

async fn home(client: &Client, id: &str, working: bool, output: Output) -> Result<ExitStatus, Failure> {
    let (operation, field) = if working { ("workdir", "workdir") } else { ("user-home-dir", "user_home_dir") };
    let answer = client.call(Method::GET, &path(id, &format!("/system/{operation}")), None).await?.body;
    if output.json {
        Output::value(&answer);
    } else {
        output::line(&scalar(&answer[field]));
    }
    Ok(ExitStatus::Ok)
}

async fn cat(client: &Client, id: &str, body: &Value) -> Result<ExitStatus, Failure> {
    let path = path(id, "/filesystem/read-file");
    let mut content = client.stream(Method::POST, &path, Some(body.to_string().into())).await?;
    while let Some(piece) = content.chunk().await.map_err(|e| super::client::broken(&e))? {
        output::raw(&piece, false);
    }
    Ok(ExitStatus::Ok)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use serde_json::json;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        files: Files,
    }

    #[test]
    fn arguments_become_the_fields_of_the_operation() {
        let parsed = |words: &[&str]| Line::try_parse_from([&["fs"], words].concat()).map(|line| line.files);
        let Ok(Files::Mkdir(made)) = parsed(&["mkdir", "sbx-a", "/a/b", "-p"]) else { panic!("no mkdir") };
        assert_eq!((made.id.as_str(), body(&made.what)), ("sbx-a", json!({"path": "/a/b", "recursive": true})));
        let Ok(Files::Edit(edit)) = parsed(&["edit", "sbx-a", "old", "new", "x", "y"]) else { panic!("no edit") };
        assert_eq!(body(&edit.what), json!({"find": "old", "replace": "new", "files": ["x", "y"]}));
        assert!(parsed(&["chmod", "sbx-a", "x"]).is_err(), "nothing is changed");
        assert!(parsed(&["chmod", "sbx-a", "x", "--owner", "root", "--mode", "600"]).is_ok());
        assert!(parsed(&["cat", "sbx-a", "x", "--head", "1", "--tail", "1"]).is_err());
    }

    #[test]
    fn links_and_directories_are_seen_as_such() {
        let item = |more: Value| {
            let mut item = json!({"mode": "755", "owner": "root", "group": "root", "size": 3, "path": "/x"});
            item.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            listing(&[item]).remove(1).pop().unwrap()
        };
        assert_eq!(item(json!({"is_dir": true})), "/x/");
        assert_eq!(item(json!({"link_target": "y"})), "/x -> y");
        assert_eq!(item(json!({})), "/x");
    }
}
