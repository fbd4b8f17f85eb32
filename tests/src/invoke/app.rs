//! An app as a sandbox might run it: HTTP/1.1 on a port of the loopback.
//!
//! | request | answer |
//! | --- | --- |
//! | `/headers` | the request's method, target and headers, as JSON |
//! | `/echo` | the body, as it comes |
//! | `/count` | the body is counted under its own text |
//! | `/bytes/N` | N bytes |
//! | `/events` | server-sent events, each when the test asks for it |
//! | `/never` | nothing, and is counted under `never` |
//! | `/status/N` | that status |
//! | `/ws` | a WebSocket that echoes |

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use http::header::{CONNECTION, CONTENT_TYPE, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{Request, Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::vmm::Error;

type Body = BoxBody<Bytes, hyper::Error>;

/// The app. It ends when it is dropped.
pub struct App {
    /// Where it listens.
    pub addr: SocketAddr,
    /// Lets `/events` send one more.
    pub events: Arc<Semaphore>,
    counted: Arc<Mutex<BTreeMap<String, usize>>>,
    task: JoinHandle<()>,
}

impl App {
    /// Starts it on a free port.
    pub async fn start() -> Result<Self, Error> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let (events, counted) = (Arc::new(Semaphore::new(0)), Arc::new(Mutex::default()));
        let state = (events.clone(), counted.clone());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = state.clone();
                let service = service_fn(move |request| {
                    let state = state.clone();
                    async move { Ok::<_, Infallible>(answer(request, state).await) }
                });
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection.with_upgrades());
            }
        });
        Ok(Self { addr, events, counted, task })
    }

    /// What `/count` was asked, and how often each.
    pub fn counted(&self) -> BTreeMap<String, usize> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for App {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type State = (Arc<Semaphore>, Arc<Mutex<BTreeMap<String, usize>>>);

fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

fn plain(status: StatusCode, bytes: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(bytes));
    *response.status_mut() = status;
    response
}

async fn answer(request: Request<Incoming>, (events, counted): State) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let number = |prefix: &str| path.strip_prefix(prefix).and_then(|n| n.parse::<usize>().ok());
    if let Some(status) = number("/status/") {
        let status = u16::try_from(status).ok().and_then(|s| StatusCode::from_u16(s).ok()).unwrap_or_default();
        return plain(status, if status.is_success() && status != StatusCode::NO_CONTENT { "x" } else { "" });
    }
    if let Some(total) = number("/bytes/") {
        const CHUNK: usize = 256 << 10;
        let chunk = Bytes::from(vec![b'b'; CHUNK]);
        let sizes = std::iter::successors(Some(total), |left| left.checked_sub(CHUNK)).map(|left| left.min(CHUNK));
        let frames = futures::stream::iter(sizes.filter(|n| *n > 0).map(move |n| Ok(Frame::data(chunk.slice(..n)))));
        return Response::new(BodyExt::boxed(StreamBody::new(frames)));
    }
    match path.as_str() {
        "/headers" => {
            let headers: BTreeMap<_, Vec<_>> = request
                .headers()
                .keys()
                .map(|name| {
                    let all = request.headers().get_all(name).iter();
                    (
                        name.to_string(),
                        all.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned()).collect(),
                    )
                })
                .collect();
            let what = json!({
                "method": request.method().as_str(), "target": request.uri().to_string(), "headers": headers
            });
            plain(StatusCode::OK, what.to_string())
        }
        "/echo" => Response::new(request.into_body().boxed()),
        "/count" => {
            let Ok(body) = request.into_body().collect().await else { return plain(StatusCode::BAD_REQUEST, "") };
            let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
            *counted.lock().unwrap_or_else(PoisonError::into_inner).entry(text.clone()).or_default() += 1;
            plain(StatusCode::OK, text)
        }
        "/events" => {
            let frames = futures::stream::unfold((0_usize, events), |(number, events)| async move {
                events.acquire().await.ok()?.forget();
                Some((Ok(Frame::data(format!("data: {number}\n\n").into())), (number + 1, events)))
            });
            let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
            response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/event-stream"));
            response
        }
        "/never" => {
            *counted.lock().unwrap_or_else(PoisonError::into_inner).entry("never".to_owned()).or_default() += 1;
            std::future::pending().await
        }
        "/ws" => websocket(request),
        _ => plain(StatusCode::NOT_FOUND, "the app knows no such path"),
    }
}

fn websocket(mut request: Request<Incoming>) -> Response<Body> {
    let Some(key) = request.headers().get(SEC_WEBSOCKET_KEY) else { return plain(StatusCode::BAD_REQUEST, "no key") };
    let accept = derive_accept_key(key.as_bytes());
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, None).await;
        while let Some(Ok(message)) = socket.next().await {
            if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
                return;
            }
        }
    });
    let switching = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(UPGRADE, "websocket")
        .header(CONNECTION, "upgrade")
        .header(SEC_WEBSOCKET_ACCEPT, accept);
    let nothing = Empty::new().map_err(|never: Infallible| match never {}).boxed();
    switching.body(nothing).unwrap_or_else(|_| plain(StatusCode::INTERNAL_SERVER_ERROR, ""))
}
