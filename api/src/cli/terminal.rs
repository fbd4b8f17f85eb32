//! `stasis exec -t`: a command, or a shell, on a terminal of its own in the sandbox. Keys go there as they are typed, the window's size
//! follows ours, and its exit status becomes ours.

use super::args::Exec;
use super::client::Client;
use super::commands::{path, shell_line};
use super::{ExitStatus, Failure, output};
use futures::{SinkExt as _, StreamExt as _};
use reqwest::{Method, Upgraded};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

/// The server pings every 30 s; one that is silent for longer than this is gone.
const SILENCE: Duration = Duration::from_mins(2);
const KEYS: usize = 16 << 10;
/// Size of the terminal where ours has none.
const SIZE: (u16, u16) = (80, 24);

/// Our terminal without line editing and echo, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Self, Failure> {
        let failed = |e| Failure::other(format!("cannot use this terminal: {e}"));
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing can be done for a terminal that is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// How a session ended.
enum Ended {
    /// With its command.
    Command,
    /// Somebody ended us.
    Signal,
    /// The sandbox does not run any more, or the connection broke.
    Cut(Failure),
}

pub(super) fn size() -> (u16, u16) {
    let size = tcgetwinsize(std::io::stdout()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
    size.map_or(SIZE, |size| (size.ws_col, size.ws_row))
}

/// Runs it; answers only when it could not be run, else the process ends with the command's exit status.
pub(super) async fn run(client: &Client, exec: Exec, output: output::Output) -> Result<ExitStatus, Failure> {
    let usage = |text: &str| Failure::new(ExitStatus::Usage, text);
    if output.json {
        return Err(usage("--json and a terminal exclude each other: leave out -t"));
    }
    if exec.timeout.is_some() {
        return Err(usage("a terminal has no time limit: leave out --timeout, or -t"));
    }
    if !std::io::stdin().is_terminal() {
        return Err(usage("standard input is no terminal: leave out -t"));
    }
    let terminals = path(&exec.id, "/pty");
    let made = client.call(Method::POST, &terminals, Some(&request(&exec))).await?.body;
    let id = made["id"].as_str().unwrap_or_default().to_owned();
    let own = format!("{terminals}/{}", super::commands::escaped(&id));
    let ended = attached(client, &own).await;
    let outcome = match ended {
        Ok(Ended::Command) => {
            let end = client.call(Method::GET, &own, None).await?.body;
            Ok(end["exit_code"].as_i64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1))
        }
        Ok(Ended::Signal) => Ok(ExitStatus::Interrupted as u8),
        Ok(Ended::Cut(failure)) => return Err(failure),
        Err(failure) => Err(failure),
    };
    // One that ended is not needed any more, and one that nobody sees must not run on.
    let _ = client.call(Method::DELETE, &own, None).await;
    match outcome {
        // At once: a read of keys that nobody will type would hold the runtime up.
        Ok(code) => std::process::exit(i32::from(code)),
        Err(failure) => Err(failure),
    }
}

/// Connects to a terminal that is there. It ends with its shell, whose exit status becomes ours, and stays when we are ended.
pub(super) async fn attach(client: &Client, terminal: &str, output: output::Output) -> Result<ExitStatus, Failure> {
    if output.json || !std::io::stdin().is_terminal() {
        return Err(Failure::new(ExitStatus::Usage, "only a terminal can be connected to one, and without --json"));
    }
    let (cols, rows) = size();
    client.call(Method::POST, &format!("{terminal}/resize"), Some(&json!({ "cols": cols, "rows": rows }))).await?;
    match attached(client, terminal).await? {
        Ended::Command => {
            let end = client.call(Method::GET, terminal, None).await?.body;
            let code = end["exit_code"].as_i64().and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
            let _ = client.call(Method::DELETE, terminal, None).await;
            std::process::exit(i32::from(code))
        }
        Ended::Signal => std::process::exit(ExitStatus::Interrupted as i32),
        Ended::Cut(failure) => Err(failure),
    }
}

fn request(exec: &Exec) -> Value {
    let (cols, rows) = size();
    let mut env: BTreeMap<_, _> = std::env::var("TERM").map(|term| ("TERM".to_owned(), term)).into_iter().collect();
    env.extend(exec.env.iter().cloned());
    let mut body = Map::new();
    let mut set = |name: &str, value: Option<Value>| body.extend(value.map(|value| (name.to_owned(), value)));
    set("cols", Some(cols.into()));
    set("rows", Some(rows.into()));
    set("envs", Some(json!(env)));
    // It starts when we are there to see what it writes.
    set("lazy_start", Some(true.into()));
    set("command", (!exec.command.is_empty()).then(|| shell_line(&exec.command).into()));
    set("cwd", exec.cwd.clone().map(Value::from));
    set("user", exec.user.clone().map(Value::from));
    Value::Object(body)
}

async fn attached(client: &Client, terminal: &str) -> Result<Ended, Failure> {
    let signals = |kind| signal(kind).map_err(|e| Failure::other(format!("cannot wait for signals: {e}")));
    let (mut resized, mut hung_up, mut terminated) =
        (signals(SignalKind::window_change())?, signals(SignalKind::hangup())?, signals(SignalKind::terminate())?);
    let connection = client.websocket(&format!("{terminal}/connect")).await?;
    let socket: WebSocketStream<Upgraded> = WebSocketStream::from_raw_socket(connection, Role::Client, None).await;
    let (mut to_shell, mut from_shell) = socket.split();
    let _raw = Raw::enter()?;
    let cut = |what: String| Ok(Ended::Cut(Failure::new(ExitStatus::Unavailable, what)));
    let mut stdin = output::input()?;
    let mut keys = vec![0; KEYS];
    let mut typing = true;
    loop {
        tokio::select! {
            message = timeout(SILENCE, from_shell.next()) => match message {
                Ok(Some(Ok(Message::Binary(bytes)))) => output::raw(&bytes, false),
                Ok(Some(Ok(Message::Text(text)))) => output::raw(text.as_bytes(), false),
                Ok(Some(Ok(Message::Close(Some(frame))))) if frame.code == CloseCode::Normal => return Ok(Ended::Command),
                Ok(Some(Ok(Message::Close(Some(frame))))) => {
                    let text = format!("the terminal is cut off: {}", frame.reason);
                    return Ok(Ended::Cut(Failure::new(ExitStatus::WrongState, text)));
                }
                Ok(Some(Ok(Message::Close(None))) | None) => return cut("the supervisor closed the connection".to_owned()),
                Ok(Some(Ok(_))) => {}
                Ok(Some(Err(error))) => return cut(format!("the connection broke: {error}")),
                Err(_) => return cut("the supervisor is silent".to_owned()),
            },
            read = stdin.read(&mut keys), if typing => match read {
                Ok(0) | Err(_) => typing = false,
                Ok(len) => {
                    let message = Message::Binary(keys[..len].to_vec().into());
                    if let Err(error) = to_shell.send(message).await {
                        return cut(format!("the connection broke: {error}"));
                    }
                }
            },
            _ = resized.recv() => {
                let (cols, rows) = size();
                let body = json!({ "cols": cols, "rows": rows });
                // The next change of the size tells again.
                let _ = client.call(Method::POST, &format!("{terminal}/resize"), Some(&body)).await;
            }
            _ = hung_up.recv() => return Ok(Ended::Signal),
            _ = terminated.recv() => return Ok(Ended::Signal),
        }
    }
}
