//! Calls that are not one JSON text for another: those without an answer, those whose bodies are streamed, and connections that become
//! something else.

use super::{Agent, AgentFailure, encode, refusal};
use crate::vsock;
use axum::body::{Body, Bytes, HttpBody};
use futures::stream;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::client::conn::http1::handshake;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_agent::protocol::AGENT_PORT;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// For a connection to be accepted by the guest.
const CONNECT: Duration = Duration::from_secs(20);
/// Pieces of a streamed answer that its reader may be behind.
const QUEUE: usize = 4;
/// Bytes of a refusal that are read.
const REFUSAL: usize = 64 << 10;

impl Agent {
    /// `POST` of JSON for JSON.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        within: Duration,
    ) -> Result<T, AgentFailure> {
        self.call(Method::POST, path, Some(body), within).await
    }

    /// `GET` of JSON.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, within: Duration) -> Result<T, AgentFailure> {
        self.call(Method::GET, path, None::<&()>, within).await
    }

    /// `POST` of JSON for nothing but success.
    pub async fn act(&self, path: &str, body: &impl Serialize, within: Duration) -> Result<(), AgentFailure> {
        match timeout(within, self.exchange(Method::POST, path, || encode(body))).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(AgentFailure::Deadline(within)),
        }
    }

    /// `POST` whose body is passed on as it comes and whose answer is passed on as it is read; neither is held. It ends when nothing moved
    /// for `stall`. The answer has status and `content-type` of the guest.
    pub async fn stream(
        &self,
        path: &str,
        content_type: &HeaderValue,
        body: Body,
        stall: Duration,
    ) -> Result<Response<Body>, AgentFailure> {
        let broken = |e: &dyn std::fmt::Display| AgentFailure::Connection(e.to_string());
        let connected = timeout(CONNECT, vsock::connect(&self.socket, AGENT_PORT))
            .await
            .map_err(|_| AgentFailure::Deadline(CONNECT))?;
        let (mut sender, connection) =
            handshake(TokioIo::new(connected.map_err(|e| broken(&e))?)).await.map_err(|e| broken(&e))?;
        let pump = EndedOnDrop(tokio::spawn(async move { drop(connection.await) }));
        let moved = Arc::new(AtomicU64::new(0));
        let request = Request::post(path)
            .header(HOST, "agent")
            .header(CONTENT_TYPE, content_type)
            .body(Counted { body, moved: moved.clone() })
            .map_err(|e| broken(&e))?;
        let mut answer = pin!(sender.send_request(request));
        let mut seen = 0;
        let response = loop {
            if let Ok(response) = timeout(stall, &mut answer).await {
                break response.map_err(|e| broken(&e))?;
            }
            let now = moved.load(Ordering::Relaxed);
            if now == seen {
                return Err(AgentFailure::Deadline(stall));
            }
            seen = now;
        };
        let (parts, incoming) = response.into_parts();
        if !parts.status.is_success() {
            let said = timeout(stall, Limited::new(incoming, REFUSAL).collect()).await;
            let said = said.map_err(|_| AgentFailure::Deadline(stall))?.map_err(|e| broken(&e))?;
            return Err(refusal(parts.status, &said.to_bytes()));
        }
        let mut passed_on = Response::new(pass_on(incoming, pump, stall));
        *passed_on.status_mut() = parts.status;
        if let Some(kind) = parts.headers.get(CONTENT_TYPE) {
            passed_on.headers_mut().insert(CONTENT_TYPE, kind.clone());
        }
        Ok(passed_on)
    }

    /// `GET` that turns the connection into `protocol`.
    pub async fn upgrade(
        &self,
        path: &str,
        protocol: &'static str,
        within: Duration,
    ) -> Result<TokioIo<Upgraded>, AgentFailure> {
        let broken = |e: &dyn std::fmt::Display| AgentFailure::Connection(e.to_string());
        let upgraded = async {
            let stream = vsock::connect(&self.socket, AGENT_PORT).await.map_err(|e| broken(&e))?;
            let (mut sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| broken(&e))?;
            // It ends by itself once the connection has been handed over, or when both ends of the request are dropped.
            tokio::spawn(async move { drop(connection.with_upgrades().await) });
            let request = Request::get(path)
                .header(HOST, "agent")
                .header(CONNECTION, "upgrade")
                .header(UPGRADE, protocol)
                .body(Empty::<Bytes>::new())
                .map_err(|e| broken(&e))?;
            let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
            let status = response.status();
            if status != StatusCode::SWITCHING_PROTOCOLS {
                let said =
                    Limited::new(response.into_body(), REFUSAL).collect().await.map_err(|e| broken(&e))?.to_bytes();
                return Err(refusal(status, &said));
            }
            hyper::upgrade::on(response).await.map(TokioIo::new).map_err(|e| broken(&e))
        };
        timeout(within, upgraded).await.map_err(|_| AgentFailure::Deadline(within))?
    }
}

struct EndedOnDrop(JoinHandle<()>);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A body that counts the pieces that were taken of it.
struct Counted {
    body: Body,
    moved: Arc<AtomicU64>,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if polled.is_ready() {
            self.moved.fetch_add(1, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The guest's answer, through a task that gives up on a guest, or on a client, that does nothing for `stall`. An answer that breaks off is
/// an error of the body, so that the client does not take it for whole.
fn pass_on(mut incoming: Incoming, pump: EndedOnDrop, stall: Duration) -> Body {
    let (tell, told) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    tokio::spawn(async move {
        let _pump = pump;
        loop {
            let piece = match timeout(stall, incoming.frame()).await {
                Ok(None) => break,
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => Ok(data),
                    Err(_trailers) => continue,
                },
                Ok(Some(Err(error))) => Err(io::Error::other(error)),
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
            };
            let last = piece.is_err();
            if tell.send_timeout(piece, stall).await.is_err() || last {
                break;
            }
        }
    });
    Body::from_stream(stream::unfold(told, async |mut told| told.recv().await.map(|piece| (piece, told))))
}
