//! One request on one connection to the app. The connection is used for nothing else: there is none from before a wake that could be dead,
//! and no request waits for another.

use super::idle::{Motion, Watched};
use crate::vmm_process::Vmm;
use axum::body::Body;
use bytes::Bytes;
use http::header::UPGRADE;
use http::{Request, Response, StatusCode};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncWriteExt as _, copy, split};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

/// Between the answer that agrees to an upgrade and the client's connection being free.
const UPGRADE_WAIT: Duration = Duration::from_secs(30);
/// Largest head of an answer, bytes.
const HEAD: usize = 256 * 1024;

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Failure {
    /// Nothing was sent: here it is again.
    Unsent(Box<Request<Body>>),
    /// Nothing moved for too long.
    Silent,
    /// The connection broke, or what came is no answer; the app may have got some or all of the request.
    Broken(String),
}

/// Ends the connection when nobody waits for it any more.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends the request and returns the answer once its head is there. The connection ends when the answer's body does, when it is dropped, or
/// when nothing has moved for `idle`. `kept` lives as long as the connection. `upgrade` is the client's connection, for an app that agrees
/// to another protocol; it ends with `vm` at the latest.
pub(super) async fn exchange(
    (stream, vm): (UnixStream, &Arc<Vmm>),
    request: Request<Body>,
    upgrade: &mut Option<OnUpgrade>,
    idle: Duration,
    kept: impl Send + Unpin + 'static,
) -> Result<Response<Body>, Failure> {
    let motion = Motion::new();
    let io = TokioIo::new(Watched::new(stream, motion.clone()));
    let Ok((mut sender, connection)) = http1::Builder::new().max_buf_size(HEAD).handshake(io).await else {
        return Err(Failure::Unsent(Box::new(request)));
    };
    let watch = motion.clone();
    let driver = Driver(tokio::spawn(async move {
        tokio::select! {
            // How it ends is seen by those who wait for answer and body.
            _ = connection.with_upgrades() => {}
            () = watch.silent_for(idle) => {}
        }
    }));
    let mut response = match sender.try_send_request(request).await {
        Ok(response) => response,
        Err(mut error) => {
            return Err(match error.take_message() {
                Some(request) => Failure::Unsent(Box::new(request)),
                None if motion.gave_up() => Failure::Silent,
                None => Failure::Broken(crate::error::chain(&error.into_error())),
            });
        }
    };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let protocol = response.headers().get(UPGRADE).cloned();
        let guest = hyper::upgrade::on(&mut response);
        let Some(client) = upgrade.take() else {
            return Err(Failure::Broken("it switches to a protocol that nobody asked for".to_owned()));
        };
        let vm = vm.clone();
        tokio::spawn(async move {
            tunnel(client, guest, &vm, &motion, idle).await;
            drop((driver, kept));
        });
        let mut switched = Response::new(Body::empty());
        *switched.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        *switched.headers_mut() = std::mem::take(response.headers_mut());
        super::headers::to_client(switched.headers_mut(), protocol);
        return Ok(switched);
    }
    super::headers::to_client(response.headers_mut(), None);
    Ok(response.map(|body| Body::new(Answer { body, _driver: driver, _kept: kept })))
}

/// Bytes in both directions until both have ended, or nothing moves. When the guest has said its last word and its VM is gone, nobody is left
/// who could hear the client: what it does not end itself would count as activity of the sandbox, which sleeps or was woken since.
async fn tunnel(client: OnUpgrade, guest: OnUpgrade, vm: &Vmm, motion: &Arc<Motion>, idle: Duration) {
    let both = async { tokio::try_join!(client, guest) };
    let Ok(Ok((client, guest))) = tokio::time::timeout(UPGRADE_WAIT, both).await else { return };
    let (mut from_client, mut to_client) = split(TokioIo::new(client));
    let (mut from_guest, mut to_guest) = split(TokioIo::new(guest));
    let mut answers = pin!(async {
        copy(&mut from_guest, &mut to_client).await?;
        to_client.shutdown().await
    });
    let mut asks = pin!(async {
        copy(&mut from_client, &mut to_guest).await?;
        to_guest.shutdown().await
    });
    let passed = async {
        tokio::select! {
            asked = &mut asks => {
                asked?;
                answers.await
            }
            answered = &mut answers => {
                answered?;
                tokio::select! {
                    asked = asks => asked,
                    () = vm.wait_ended() => Ok(()),
                }
            }
        }
    };
    tokio::select! {
        // Either side may go away at any time: the other one sees it.
        _ = passed => {}
        () = motion.silent_for(idle) => {}
    }
}

/// The body of an answer, and what must live as long as it.
struct Answer<K> {
    body: Incoming,
    _driver: Driver,
    _kept: K,
}

impl<K: Unpin> hyper::body::Body for Answer<K> {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
