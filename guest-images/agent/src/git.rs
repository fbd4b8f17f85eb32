//! One run of git. Arguments come as a list and no shell sees them; nothing prompts; the secret of a remote goes through git's
//! environment to a credential helper that is bound to that remote's host, so it is in no argument list and a redirect to another host
//! does not get it.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use stasis_agent::protocol::ExecReply;
use stasis_agent::protocol::git::{Credentials, GitRequest, Remote};

use crate::exec::{self, ExecError};
use crate::reaper::Reaper;

/// As a shell says that there is no such program.
const EXIT_NOT_FOUND: i32 = 127;
const NOT_FOUND: &str = "git is not installed in this sandbox: install it, or use a template that has it\n";
/// For git to say what a remote's URL is.
const LOOK_UP: Duration = Duration::from_mins(1);
const URL_LIMIT: usize = 16 << 10;
/// Whoever asks the helper to store or forget gets nothing.
const HELPER: &str = r#"!f() { test "$1" = get && printf 'username=%s\npassword=%s\n' "$STASIS_GIT_USERNAME" "$STASIS_GIT_PASSWORD"; }; f"#;

/// Runs git.
pub(crate) async fn run(reaper: &Reaper, request: GitRequest) -> Result<ExecReply, ExecError> {
    let mut config = vec![
        // The agent is root, and repositories may be somebody else's of the same guest.
        ("safe.directory".to_owned(), "*".to_owned()),
        ("core.pager".to_owned(), "cat".to_owned()),
        ("advice.detachedHead".to_owned(), "false".to_owned()),
    ];
    let mut env = request.env.clone();
    for (name, value) in [
        ("GIT_TERMINAL_PROMPT", "0"),
        ("GIT_EDITOR", "true"),
        ("GIT_PAGER", "cat"),
        ("GIT_SSH_COMMAND", "ssh -o BatchMode=yes"),
        // `ext::` runs commands.
        ("GIT_ALLOW_PROTOCOL", "https:http:git:ssh:file"),
        // What a commit says whose author nobody named; git's own configuration comes first.
        ("EMAIL", "root@localhost"),
    ] {
        env.entry(name.to_owned()).or_insert_with(|| value.to_owned());
    }
    if let Some(credentials) = &request.credentials {
        let url = match &credentials.remote {
            Remote::Url(url) => Some(url.clone()),
            Remote::Fetch(name) => remote_url(reaper, &request, &env, &["remote", "get-url", name]).await?,
            Remote::Push(name) => remote_url(reaper, &request, &env, &["remote", "get-url", "--push", name]).await?,
        };
        // A remote over ssh or on disk has no use for them; one that does not exist is git's to complain about.
        if let Some(origin) = url.as_deref().and_then(origin) {
            bind(credentials, &origin, &mut config, &mut env);
        }
    }
    configure(&config, &mut env);
    git(reaper, &request, &env, &request.args, request.output_limit, Duration::from_millis(request.timeout_ms)).await
}

/// Offers `credentials` to `origin`, and nobody else's helpers to anybody: they might store them.
fn bind(
    credentials: &Credentials,
    origin: &str,
    config: &mut Vec<(String, String)>,
    env: &mut BTreeMap<String, String>,
) {
    config.push(("credential.helper".to_owned(), String::new()));
    config.push((format!("credential.{origin}.helper"), HELPER.to_owned()));
    env.insert("STASIS_GIT_USERNAME".to_owned(), credentials.username.clone());
    env.insert("STASIS_GIT_PASSWORD".to_owned(), credentials.password.clone());
}

/// Configuration for this run alone, in the variables that git reads it from.
fn configure(config: &[(String, String)], env: &mut BTreeMap<String, String>) {
    env.insert("GIT_CONFIG_COUNT".to_owned(), config.len().to_string());
    for (index, (key, value)) in config.iter().enumerate() {
        env.insert(format!("GIT_CONFIG_KEY_{index}"), key.clone());
        env.insert(format!("GIT_CONFIG_VALUE_{index}"), value.clone());
    }
}

/// What `git remote get-url` says. A remote that is a URL itself needs no looking up.
async fn remote_url(
    reaper: &Reaper,
    request: &GitRequest,
    env: &BTreeMap<String, String>,
    args: &[&str],
) -> Result<Option<String>, ExecError> {
    let name = args.last().copied().unwrap_or_default();
    if name.contains("://") {
        return Ok(Some(name.to_owned()));
    }
    let mut env = env.clone();
    configure(&[("safe.directory".to_owned(), "*".to_owned())], &mut env);
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    let reply = git(reaper, request, &env, &args, URL_LIMIT, LOOK_UP).await?;
    let said = STANDARD.decode(reply.stdout).unwrap_or_default();
    Ok((reply.exit_code == 0).then(|| String::from_utf8_lossy(&said).trim().to_owned()))
}

/// Scheme, host and port of an HTTP URL: what a helper can be bound to.
fn origin(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "https" && scheme != "http" {
        return None;
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte);
    (!host.is_empty() && host.bytes().all(plain)).then(|| format!("{scheme}://{host}"))
}

async fn git(
    reaper: &Reaper,
    request: &GitRequest,
    env: &BTreeMap<String, String>,
    args: &[String],
    output_limit: usize,
    within: Duration,
) -> Result<ExecReply, ExecError> {
    let user = exec::user(None)?;
    let mut command = exec::command("git", request.cwd.as_deref(), &user, env)?;
    command.args(args);
    match exec::collect(reaper, command, output_limit, within).await {
        Err(ExecError::Start { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(ExecReply {
            exit_code: EXIT_NOT_FOUND,
            stdout: String::new(),
            stderr: STANDARD.encode(NOT_FOUND),
            stdout_dropped: 0,
            stderr_dropped: 0,
            timed_out: false,
        }),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests;
