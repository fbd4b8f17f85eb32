//! S3 servers of the tests, one that keeps objects and one that answers as it is told, and grants of what a store holds.

#![allow(dead_code, reason = "each test file uses its part")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{
    collections::HashMap,
    convert::Infallible,
    fs::File,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use stasis_snapshot::{
    capture::{CaptureRequest, ImageInput, Options},
    grant::{Access, GrantedObject},
    granted::{Direct, GrantedPacks, Patience, StoreClient},
    store::{ErrorKind, ObjectStore, RawGrant, StoreError, s3::S3Settings},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub(crate) const TTL: Duration = Duration::from_mins(1);

pub(crate) fn settings(address: SocketAddr) -> S3Settings {
    S3Settings {
        endpoint: format!("http://{address}"),
        region: "here".into(),
        bucket: "bucket".into(),
        access_key: "access".into(),
        secret_key: "secret".into(),
        path_style: true,
        request_timeout: Duration::from_secs(10),
        commit_timeout: Duration::from_secs(10),
    }
}

/// An S3 server over a directory. It lives as long as the runtime of the test.
pub(crate) async fn s3_server(root: &Path) -> SocketAddr {
    std::fs::create_dir(root.join("bucket")).unwrap();
    let service = {
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
        builder.set_auth(SimpleAuth::from_single("access", "secret"));
        builder.build()
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let service = service.clone();
            tokio::spawn(async move { http1::Builder::new().serve_connection(TokioIo::new(socket), service).await });
        }
    });
    address
}

/// A server that answers as `script` says: request number to status and body; `None` never answers.
pub(crate) async fn scripted(
    script: impl Fn(u32) -> Option<(u16, &'static str)> + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let script = Arc::new(script);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = count.clone();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let (seen, script) = (seen.clone(), script.clone());
            tokio::spawn(async move {
                let answer = service_fn(move |_: Request<Incoming>| {
                    let answer = script(seen.fetch_add(1, Ordering::SeqCst));
                    async move {
                        let Some((status, body)) = answer else { return std::future::pending().await };
                        let response = Response::builder().status(StatusCode::from_u16(status).unwrap());
                        Ok::<_, Infallible>(response.header("etag", "\"tag\"").body(body.to_owned()).unwrap())
                    }
                });
                http1::Builder::new().serve_connection(TokioIo::new(socket), answer).await
            });
        }
    });
    (address, count)
}

pub(crate) fn kind<T: std::fmt::Debug>(result: Result<T, StoreError>) -> ErrorKind {
    result.unwrap_err().kind
}

/// What a grant is for.
#[derive(Clone, Copy)]
pub(crate) enum Grant {
    Put,
    Get,
}

/// What a VMM gets.
pub(crate) fn direct() -> StoreClient {
    StoreClient::new(Arc::new(Direct)).unwrap()
}

pub(crate) async fn granted(store: &dyn ObjectStore, keys: &[&str], what: Grant) -> GrantedPacks {
    let mut files: HashMap<u64, File> = HashMap::new();
    let mut objects = Vec::new();
    for (token, key) in (0..).zip(keys) {
        let grant = match what {
            Grant::Put => store.grant_put(key, TTL).await.unwrap(),
            Grant::Get => store.grant_get(key, TTL).await.unwrap(),
        };
        let access = match grant {
            RawGrant::Url(url) => Access::Url(url),
            RawGrant::File(file) => {
                files.insert(token, file);
                Access::Fd(token)
            }
        };
        objects.push(GrantedObject { key: (*key).to_owned(), access, cache: None });
    }
    let packs = GrantedPacks::new(direct(), objects, &mut files, Patience::default()).unwrap();
    assert!(files.is_empty());
    packs
}

/// A capture of one image from nothing, into granted packs.
pub(crate) fn request(image: ImageInput, sink: GrantedPacks) -> CaptureRequest {
    CaptureRequest {
        images: vec![image],
        parent_packs: Vec::new(),
        threads: None,
        sink: Arc::new(sink),
        options: Options::default(),
        cancel: CancellationToken::new(),
        progress: None,
        connections: None,
        seal: None,
    }
}
