//! The verbs of the client.

use super::args::{self, Connection};
use super::client::{Answer, Client};
use super::output::{self, Output, bytes};
use super::profile::{self, Profile};
use super::progress::Progress;
use super::{ExitStatus, Failure, copy, files, git, logs, network, presigned, sessions, snapshot, terminal, top};
use reqwest::Method;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

pub(super) async fn run(verb: args::Client, connection: &Connection, output: Output) -> Result<ExitStatus, Failure> {
    let kept = profile::path().map_or(Ok(None), |path| Profile::read(&path))?;
    let client = Client::new(Profile::choose(connection.url.clone(), connection.api_key.clone(), kept)?)?;
    match verb {
        args::Client::Create(create) => {
            let answer =
                interruptible(client.call(Method::POST, "/v1/sandbox", Some(&create_body(create))), "it goes on")
                    .await?;
            show(&answer, output);
        }
        args::Client::Ls(ls) => list(&client, ls, output).await?,
        args::Client::Get(one) => show(&client.call(Method::GET, &path(&one.id, ""), None).await?, output),
        args::Client::Exec(exec) if exec.tty => return terminal::run(&client, exec, output).await,
        args::Client::Exec(exec) => return execute(&client, exec, output).await,
        args::Client::Logs(arguments) => return logs::run(&client, &arguments).await,
        args::Client::Cp(arguments) => return copy::run(&client, &arguments, output).await,
        args::Client::Fs(arguments) => return files::run(&client, &arguments, output).await,
        args::Client::Git(arguments) => return git::run(&client, &arguments, output).await,
        args::Client::Pty(arguments) => return sessions::run(&client, arguments, output).await,
        args::Client::Snapshot(arguments) => return snapshot::run(&client, arguments, output).await,
        args::Client::Top(arguments) => return top::run(&client, &arguments, output).await,
        args::Client::Url(arguments) => return presigned::run(&client, arguments, output).await,
        args::Client::Pause(one) => {
            let progress = Progress::start(&client, &one.id, output);
            let answer =
                interruptible(client.call(Method::POST, &path(&one.id, "/pause"), None), "the pause goes on").await;
            drop(progress);
            show(&answer?, output);
        }
        args::Client::Resume(one) => {
            let answer =
                interruptible(client.call(Method::POST, &path(&one.id, "/resume"), None), "the resume goes on").await?;
            show(&answer, output);
        }
        args::Client::Stop(one) => {
            let answer =
                interruptible(client.call(Method::POST, &path(&one.id, "/stop"), None), "the stop goes on").await?;
            show(&answer, output);
        }
        args::Client::Start(one) => {
            let answer =
                interruptible(client.call(Method::POST, &path(&one.id, "/start"), None), "the start goes on").await?;
            show(&answer, output);
        }
        args::Client::Rm(many) => {
            for id in &many.ids {
                client.call(Method::DELETE, &path(id, ""), None).await?;
                if output.json {
                    Output::value(&json!({ "id": id, "state": "deleted" }));
                } else {
                    output::line(id);
                }
            }
        }
        args::Client::Undelete(one) => {
            show(&client.call(Method::POST, &path(&one.id, "/undelete"), None).await?, output);
        }
        args::Client::Template(template) => super::template::run(&client, template.verb, output).await?,
        args::Client::Network(one) => return network::run(&client, &one.id, output).await,
        args::Client::Inspect(one) => inspect(&client, &one.id, output).await?,
        args::Client::Recover(recover) => {
            let body = json!({ "take_over": recover.take_over });
            let answer = client.call(Method::POST, "/v1/recover", Some(&body)).await?;
            if output.json {
                Output::value(&answer.body);
            } else {
                let items = answer.body["items"].as_array().cloned().unwrap_or_default();
                output.table(&rows(&["ID", "OUTCOME", "NOTE"], &["id", "outcome", "note"], &items));
            }
        }
    }
    Ok(ExitStatus::Ok)
}

/// An operation on something in a sandbox.
#[derive(Debug, clap::Args)]
pub(super) struct On<T: clap::Args> {
    /// The sandbox.
    pub(super) id: String,
    #[command(flatten)]
    pub(super) what: T,
}

/// The fields of an operation's body, from the arguments of the same names; what was not said is not sent.
pub(super) fn body(arguments: &impl serde::Serialize) -> Value {
    let mut body = json!(arguments);
    if let Value::Object(fields) = &mut body {
        fields.retain(|_, value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty()));
    }
    body
}

/// Ctrl-C ends the waiting, not the operation, and says so.
pub(super) async fn interruptible(
    call: impl Future<Output = Result<Answer, Failure>>,
    what: &str,
) -> Result<Answer, Failure> {
    tokio::select! {
        answer = call => answer,
        _ = tokio::signal::ctrl_c() => {
            Err(Failure::new(ExitStatus::Interrupted, format!("interrupted: {what} in the supervisor; ask with `stasis ls`")))
        }
    }
}

/// An id goes into a path: what is no id is escaped, and the server says that there is none.
pub(super) fn path(id: &str, rest: &str) -> String {
    format!("/v1/sandbox/{}{rest}", escaped(id))
}

/// For a part of a path, or a value of a query.
pub(super) fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => out.push(char::from(byte)),
            _ => {
                use std::fmt::Write as _;
                // Writing to a String cannot fail.
                let _ = write!(out, "%{byte:02X}");
            }
        }
        out
    })
}

fn create_body(create: args::Create) -> Value {
    let mut body = Map::new();
    let mut set = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            body.insert(name.to_owned(), value);
        }
    };
    set("template_name", create.template.map(Value::from));
    set("vcpu", create.vcpu.map(Value::from));
    set("memory", create.memory.map(Value::from));
    set("timeout", create.timeout.map(Value::from));
    set("auto_pause", create.auto_pause.then_some(Value::Bool(true)));
    let env: BTreeMap<_, _> = create.env.into_iter().collect();
    set("env_vars", (!env.is_empty()).then(|| json!(env)));
    Value::Object(body)
}

/// One sandbox: its id alone when nobody watches would hide its state, so id and state, then what it cost.
pub(super) fn show(answer: &Answer, output: Output) {
    if output.json {
        return Output::value(&answer.body);
    }
    let text = |name: &str| scalar(&answer.body[name]);
    let mut rows = vec![vec![
        "ID".to_owned(),
        "STATE".to_owned(),
        "VCPU".to_owned(),
        "MEMORY".to_owned(),
        "TEMPLATE".to_owned(),
        "CREATED".to_owned(),
    ]];
    rows.push(vec![
        text("id"),
        text("state"),
        text("vcpu"),
        format!("{} MiB", text("memory")),
        text("template_name"),
        text("created_at"),
    ]);
    output.table(&rows);
    if let Some(reason) = answer.body["reason"].as_str() {
        output::tell(&format!("reason: {reason}"));
    }
    output::timing(answer.timing.as_deref());
}

pub(super) fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

pub(super) fn rows(heads: &[&str], fields: &[&str], items: &[Value]) -> Vec<Vec<String>> {
    let head = heads.iter().map(|h| (*h).to_owned()).collect();
    std::iter::once(head).chain(items.iter().map(|item| fields.iter().map(|f| scalar(&item[*f])).collect())).collect()
}

async fn list(client: &Client, ls: args::Ls, output: Output) -> Result<(), Failure> {
    let mut query = vec![("page", ls.page.to_string()), ("page-size", ls.page_size.to_string())];
    let said = [("state", ls.state), ("sort", ls.sort), ("order-by", ls.order_by)];
    query.extend(said.into_iter().filter_map(|(name, value)| Some((name, value?))));
    let answer = client.call(Method::GET, &client.with_query("/v1/sandboxes", &query)?, None).await?;
    if output.json {
        Output::value(&answer.body);
        return Ok(());
    }
    let items = answer.body["items"].as_array().cloned().unwrap_or_default();
    output.table(&rows(
        &["ID", "STATE", "TEMPLATE", "CREATED", "SINCE"],
        &["id", "state", "template_id", "created_at", "state_change_time"],
        &items,
    ));
    output::more(items.len(), &answer.body["total_items"], ls.page);
    Ok(())
}

async fn execute(client: &Client, exec: args::Exec, output: Output) -> Result<ExitStatus, Failure> {
    let env: BTreeMap<_, _> = exec.env.into_iter().collect();
    let mut body = json!({ "command": shell_line(&exec.command), "envs": env });
    if let Some(cwd) = exec.cwd {
        body["cwd"] = cwd.into();
    }
    if let Some(timeout) = exec.timeout {
        body["timeout"] = timeout.into();
    }
    if let Some(user) = exec.user {
        body["user"] = user.into();
    }
    let path = path(&exec.id, "/process/execute");
    let call = client.call(Method::POST, &path, Some(&body));
    let answer = interruptible(call, "the command goes on").await?;
    if output.json {
        Output::value(&answer.body);
        return Ok(ExitStatus::Ok);
    }
    output::raw(answer.body["stderr"].as_str().unwrap_or_default().as_bytes(), true);
    output::raw(answer.body["stdout"].as_str().unwrap_or_default().as_bytes(), false);
    if answer.body["timed_out"].as_bool() == Some(true) {
        output::tell("stasis: the command was ended by its time limit");
    }
    let code = answer.body["exit_code"].as_i64().unwrap_or(1);
    // The command's own exit status, which is no ExitStatus of ours.
    match u8::try_from(code).unwrap_or(1) {
        0 => Ok(ExitStatus::Ok),
        code => std::process::exit(i32::from(code)),
    }
}

/// One word is a shell line already; several are quoted, so that each arrives as one.
pub(super) fn shell_line(words: &[String]) -> String {
    match words {
        [line] => line.clone(),
        words => words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
    }
}

pub(super) fn quote(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_./=:,@%+".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

async fn inspect(client: &Client, id: &str, output: Output) -> Result<(), Failure> {
    let answer = client.call(Method::GET, &path(id, "/inspect"), None).await?;
    if output.json {
        Output::value(&answer.body);
        return Ok(());
    }
    let body = &answer.body;
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let head = &body["head"]["body"];
    output::line(&format!("{} {} ({})", output.bold("sandbox"), id, scalar(&body["sandbox"]["state"])));
    output::line(&format!(
        "{} state {}, epoch {}, seq {}, commit {}, owner {}",
        output.bold("head"),
        scalar(&head["state"]),
        scalar(&head["epoch"]),
        scalar(&head["seq"]),
        scalar(&head["commit"]),
        scalar(&head["owner"])
    ));
    let manifest = &body["manifest"];
    if !manifest.is_null() {
        output::line(&format!(
            "{} {} ({})",
            output.bold("manifest"),
            scalar(&manifest["key"]),
            bytes(number(&manifest["bytes"]))
        ));
        if let Some(problem) = manifest["problem"].as_str() {
            output::line(&format!("  damaged: {problem}"));
        }
        for image in manifest["images"].as_array().into_iter().flatten() {
            output::line(&format!(
                "  {}: {} pages of 4 KiB; {} zero, {} in packs, {} from the template",
                scalar(&image["kind"]),
                scalar(&image["pages"]),
                scalar(&image["zero"]),
                scalar(&image["packed"]),
                scalar(&image["base"])
            ));
        }
    }
    let objects = body["objects"].as_array().cloned().unwrap_or_default();
    output::line(&format!(
        "{} {}, {} in all",
        output.bold("objects"),
        objects.len(),
        bytes(number(&body["objects_bytes"]))
    ));
    for object in &objects {
        output::line(&format!("  {:>10}  {}", bytes(number(&object["bytes"])), scalar(&object["key"])));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_arrive_as_words() {
        let line = |words: &[&str]| shell_line(&words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>());
        assert_eq!(line(&["echo $HOME; ls"]), "echo $HOME; ls");
        assert_eq!(line(&["echo", "a b", "it's", ""]), r"echo 'a b' 'it'\''s' ''");
    }

    #[test]
    fn ids_cannot_leave_their_path() {
        assert_eq!(path("sbx-a", "/pause"), "/v1/sandbox/sbx-a/pause");
        assert_eq!(path("../x?y", ""), "/v1/sandbox/%2E%2E%2Fx%3Fy");
    }
}
