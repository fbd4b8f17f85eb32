//! `pty/*`. The WebSocket ends here: the guest's end of a terminal is plain bytes, and how a terminal ended is told in the close frame.

use super::answers::with_timing;
use super::files::with_query;
use super::guest::WITHIN;
use super::table::Route;
use super::{Path, Shared, Tenant, json_body};
use crate::error::Error;
use crate::guest_requests::terminals as requests;
use crate::openapi::{Operation, Tag};
use crate::sources::rfc3339;
use crate::supervisor::operations::{Guest, reach};
use crate::wire::terminals::{self as wire, CreateTerminal, ResizeTerminal, TerminalList};
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use futures::{SinkExt as _, StreamExt as _};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde_json::json;
use stasis_agent::protocol::terminals::{ATTACH, Resize, Terminal, TerminalId, Terminals};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

const VERB: &str = "use terminals of";
/// Between pings to a client that is sent nothing else.
const PING: Duration = Duration::from_secs(30);
/// A client that sends nothing for so long, not even an answer to a ping, is gone.
const SILENCE: Duration = Duration::from_mins(2);
/// For a client to take a message, and for a shell to take keys.
const STALL: Duration = Duration::from_mins(1);
/// Octets of a message at most.
const MESSAGE: usize = 1 << 20;
const READ_SIZE: usize = 32 << 10;

pub(super) fn routes() -> Vec<Route> {
    let at = |rest: &str| format!("/v1/sandbox/{{id}}/pty{rest}");
    let op = |id: &str, summary| Operation::new(id, Tag::Pty, summary);
    vec![
        Route::get(
            at(""),
            list,
            op("listPtySessions", "List terminals").answers::<TerminalList>(200, "All of them.").asks_guest(),
        ),
        Route::post(
            at(""),
            create,
            op("createPtySession", "Make a terminal")
                .body::<CreateTerminal>()
                .answers::<wire::Terminal>(201, "It is there.")
                .asks_guest(),
        ),
        Route::get(
            at("/{session}"),
            one,
            op("getPtySession", "Show a terminal").answers::<wire::Terminal>(200, "As it is now.").asks_guest(),
        ),
        Route::delete(
            at("/{session}"),
            delete,
            op("deletePtySession", "Delete a terminal").done(204, "Its shell is killed.").asks_guest(),
        ),
        Route::post(
            at("/{session}/resize"),
            resize,
            op("resizePtySession", "Give a terminal another size")
                .body::<ResizeTerminal>()
                .answers::<wire::Terminal>(200, "It has that size.")
                .asks_guest(),
        ),
        Route::get(
            at("/{session}/connect"),
            connect,
            op("connectPtySession", "Connect to a terminal")
                .says(
                    "A WebSocket: what is sent is typed, what comes is shown, first the last 256 KiB. Close code 1000: its shell has ended; \
                     1012: the sandbox does not run any more.",
                )
                .done(101, "Connected.")
                .fails(426, "The request does not ask for a WebSocket.")
                .asks_guest(),
        ),
    ]
}

fn session(terminal: Terminal) -> wire::Terminal {
    wire::Terminal {
        id: terminal.id,
        cwd: terminal.cwd,
        envs: terminal.envs,
        cols: terminal.cols,
        rows: terminal.rows,
        created_at: rfc3339(terminal.created_at_ms),
        active: terminal.active,
        lazy_start: terminal.lazy_start,
        exit_code: terminal.exit_code,
    }
}

async fn list(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let mut guest = reach(&core, &sandbox, VERB).await?;
    let agent = guest.agent();
    let all: Terminals =
        guest.call("guest", "list terminals", agent.ask("/v1/terminals/list", &json!({}), WITHIN)).await?;
    let items = all.items.into_iter().map(session).collect();
    Ok(with_timing(Json(TerminalList { items }).into_response(), &guest.timing))
}

async fn create(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let mut request = requests::create(&json_body(&core, body).await?).map_err(Error::Invalid)?;
    let mut guest = reach(&core, &sandbox, VERB).await?;
    request.environment = guest.environment([].into());
    let agent = guest.agent();
    let made: Terminal =
        guest.call("guest", "make a terminal", agent.ask("/v1/terminals/create", &request, WITHIN)).await?;
    Ok(with_timing((StatusCode::CREATED, Json(session(made))).into_response(), &guest.timing))
}

async fn one(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path((id, terminal)): Path<(String, String)>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let mut guest = reach(&core, &sandbox, VERB).await?;
    let agent = guest.agent();
    let request = TerminalId { id: terminal };
    let found: Terminal =
        guest.call("guest", "find a terminal", agent.ask("/v1/terminals/get", &request, WITHIN)).await?;
    Ok(with_timing(Json(session(found)).into_response(), &guest.timing))
}

async fn delete(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path((id, terminal)): Path<(String, String)>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let mut guest = reach(&core, &sandbox, VERB).await?;
    let agent = guest.agent();
    let request = TerminalId { id: terminal };
    guest.call("guest", "delete a terminal", agent.act("/v1/terminals/delete", &request, WITHIN)).await?;
    Ok(with_timing(StatusCode::NO_CONTENT.into_response(), &guest.timing))
}

async fn resize(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path((id, terminal)): Path<(String, String)>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (cols, rows) = requests::resize(&json_body(&core, body).await?).map_err(Error::Invalid)?;
    let mut guest = reach(&core, &sandbox, VERB).await?;
    let agent = guest.agent();
    let request = Resize { id: terminal, cols, rows };
    let resized: Terminal =
        guest.call("guest", "resize a terminal", agent.ask("/v1/terminals/resize", &request, WITHIN)).await?;
    Ok(with_timing(Json(session(resized)).into_response(), &guest.timing))
}

/// The guest is asked first: 404 comes as an answer, and after a 101 there is a terminal.
async fn connect(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path((id, terminal)): Path<(String, String)>,
    socket: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let socket = socket.map_err(|rejection| Error::NoWebSocket(rejection.body_text()))?;
    let mut guest = reach(&core, &sandbox, VERB).await?;
    let agent = guest.agent();
    let path = with_query("/v1/terminals/attach", [("id", terminal)])?;
    let shell = guest.call("guest", "attach to a terminal", agent.upgrade(&path, ATTACH, WITHIN)).await?;
    let timing = guest.timing.clone();
    // A terminal that nobody types into keeps no sandbox awake.
    guest.may_sleep();
    let response =
        socket.max_message_size(MESSAGE).max_frame_size(MESSAGE).on_upgrade(move |socket| carry(socket, shell, guest));
    Ok(with_timing(response, &timing))
}

/// Carries bytes between a client and a terminal until either has ended.
async fn carry(socket: WebSocket, shell: TokioIo<Upgraded>, guest: Guest) {
    let (mut to_client, mut from_client) = socket.split();
    let (mut from_shell, mut to_shell) = tokio::io::split(shell);
    let keys = async {
        loop {
            let bytes = match timeout(SILENCE, from_client.next()).await {
                Ok(Some(Ok(Message::Binary(bytes)))) => bytes,
                Ok(Some(Ok(Message::Text(text)))) => text.into(),
                Ok(Some(Ok(Message::Ping(_) | Message::Pong(_)))) => continue,
                Ok(None | Some(Ok(Message::Close(_)) | Err(_))) | Err(_) => return,
            };
            guest.touch();
            if !matches!(timeout(STALL, to_shell.write_all(&bytes)).await, Ok(Ok(()))) {
                // Nobody takes keys. If the terminal has ended the other direction knows why, and what it showed last.
                return std::future::pending().await;
            }
        }
    };
    let screen = async {
        let mut buffer = vec![0; READ_SIZE];
        loop {
            let message = match timeout(PING, from_shell.read(&mut buffer)).await {
                Ok(Ok(len)) if len > 0 => Message::Binary(buffer[..len].to_vec().into()),
                Ok(_) => return Some(farewell(guest.is_gone())),
                Err(_) => Message::Ping(axum::body::Bytes::new()),
            };
            if !matches!(timeout(STALL, to_client.send(message)).await, Ok(Ok(()))) {
                return None;
            }
        }
    };
    let farewell = tokio::select! {
        () = keys => None,
        farewell = screen => farewell,
    };
    if let Some(farewell) = farewell {
        let _ = timeout(STALL, to_client.send(Message::Close(Some(farewell)))).await;
    }
    let _ = timeout(STALL, to_client.close()).await;
}

fn farewell(guest_is_gone: bool) -> CloseFrame {
    if guest_is_gone {
        CloseFrame {
            code: close_code::RESTART,
            reason: "the sandbox does not run any more; connect again to wake it".into(),
        }
    } else {
        CloseFrame { code: close_code::NORMAL, reason: "the terminal has ended".into() }
    }
}
