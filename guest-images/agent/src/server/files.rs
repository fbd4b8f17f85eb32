//! The routes of `protocol::files`: what blocks goes to a thread that may, and contents of files are streamed both ways, never held whole.

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::multipart::Field;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Query, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use hyper::body::Frame;
use serde::Serialize;
use serde::de::DeserializeOwned;
use stasis_agent::protocol::AgentError;
use stasis_agent::protocol::files::{
    Delete, EditFile, EditFiles, Exists, Glob, Grep, Ls, Mkdir, PathOnly, Read, ReadMany, SetPermissions, Transfer,
    Tree, Write,
};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncSeekExt, ReadBuf};
use tokio::time::timeout;

use super::{Refusal, parse};
use crate::chain;
use crate::exec::directory;
use crate::files::part::{self, Part};
use crate::files::path::resolve;
use crate::files::replace::{Replacement, random};
use crate::files::{FileError, change, edit, find, list, mode};

/// Bytes read from a file at once.
const CHUNK: usize = 128 << 10;
/// Bytes gathered from a request before they are written.
const GATHERED: usize = 512 << 10;
/// Files read or written by one request.
const FILES: usize = 1000;
/// For the next bytes of a request to come.
const STALL: Duration = Duration::from_mins(1);
/// Of a request that was refused, so much is read before the answer: who still sends would see a broken connection instead.
const IGNORED: u64 = 1 << 30;

pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let base = || Path::new(directory());
    let json = Router::new()
        .route(
            "/v1/files/ls",
            post(call(move |r: Ls| list::ls(&resolve("path", &r.path, base())?, r.recursive, &r.exclude))),
        )
        .route("/v1/files/stat", post(call(move |r: PathOnly| list::stat(&resolve("path", &r.path, base())?))))
        .route(
            "/v1/files/exists",
            post(call(move |r: PathOnly| Ok(Exists { exists: list::exists(&resolve("path", &r.path, base())?)? }))),
        )
        .route(
            "/v1/files/tree",
            post(call(move |r: Tree| list::tree(&resolve("path", &r.path, base())?, r.max_depth, &r.exclude))),
        )
        .route(
            "/v1/files/glob",
            post(call(move |r: Glob| find::glob(&resolve("path", &r.path, base())?, r.pattern.as_deref(), &r.exclude))),
        )
        .route("/v1/files/grep", post(call(move |r: Grep| find::grep(&resolve("path", &r.path, base())?, &r))))
        .route(
            "/v1/files/edit",
            post(call(move |r: EditFile| edit::edit(&resolve("path", &r.path, base())?, &r.edits))),
        )
        .route("/v1/files/edit-many", post(call(move |r: EditFiles| edit::edit_many(&r, base()))))
        .route(
            "/v1/files/mkdir",
            post(act(move |r: Mkdir| {
                change::mkdir(&resolve("path", &r.path, base())?, r.recursive, r.permissions.as_deref())
            })),
        )
        .route(
            "/v1/files/delete",
            post(act(move |r: Delete| change::delete(&resolve("path", &r.path, base())?, r.recursive))),
        )
        .route(
            "/v1/files/set-permissions",
            post(act(move |r: SetPermissions| change::set_permissions(&resolve("path", &r.path, base())?, &r))),
        )
        .route(
            "/v1/files/move",
            post(act(move |r: Transfer| {
                let (from, to) = (resolve("src_path", &r.src_path, base())?, resolve("dst_path", &r.dst_path, base())?);
                change::move_to(&from, &to, r.overwrite)
            })),
        )
        .route(
            "/v1/files/copy",
            post(act(move |r: Transfer| {
                let (from, to) = (resolve("src_path", &r.src_path, base())?, resolve("dst_path", &r.dst_path, base())?);
                change::copy_to(&from, &to, r.recursive, r.overwrite)
            })),
        )
        .route("/v1/files/read", post(read))
        .route("/v1/files/read-many", post(read_many));
    let contents = Router::new()
        .route("/v1/files/write", post(write))
        .route("/v1/files/write-many", post(write_many))
        .layer(DefaultBodyLimit::disable());
    json.merge(contents)
}

/// What a handler waits for.
type Answering<A> = Pin<Box<dyn Future<Output = Result<Json<A>, Refusal>> + Send>>;

/// A handler of an operation that answers JSON.
fn call<Q, A>(
    operation: impl Fn(Q) -> Result<A, FileError> + Clone + Send + 'static,
) -> impl Fn(Bytes) -> Answering<A> + Clone + Send + 'static
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    move |body| {
        let operation = operation.clone();
        Box::pin(async move {
            let request = parse(&body)?;
            Ok(Json(blocking(move || operation(request)).await?))
        })
    }
}

/// A handler of an operation that answers 204.
fn act<Q: DeserializeOwned + Send + 'static>(
    operation: impl Fn(Q) -> Result<(), FileError> + Clone + Send + 'static,
) -> impl Fn(Bytes) -> Pin<Box<dyn Future<Output = Result<StatusCode, Refusal>> + Send>> + Clone + Send + 'static {
    move |body| {
        let operation = operation.clone();
        Box::pin(async move {
            let request = parse(&body)?;
            blocking(move || operation(request)).await?;
            Ok(StatusCode::NO_CONTENT)
        })
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => Ok(outcome?),
        Err(error) => {
            Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, format!("the operation did not end: {error}")))
        }
    }
}

async fn read(body: Bytes) -> Result<Response, Refusal> {
    let request: Read = parse(&body)?;
    let part = blocking(move || part::part(&resolve("path", &request.path, Path::new(directory()))?, &request)).await?;
    let mut contents = Contents::default();
    contents.push(part).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream".to_owned())], Body::new(contents)).into_response())
}

/// Opens all files first: one that cannot be read refuses the request.
async fn read_many(body: Bytes) -> Result<Response, Refusal> {
    let request: ReadMany = parse(&body)?;
    if request.paths.is_empty() || request.paths.len() > FILES {
        return Err(FileError::invalid("paths", format!("must have 1 to {FILES} entries")).into());
    }
    let paths = request.paths.clone();
    let parts = blocking(move || {
        let whole = |path: &String| part::whole(&resolve("paths", path, Path::new(directory()))?);
        paths.iter().map(whole).collect::<Result<Vec<_>, _>>()
    })
    .await?;
    let boundary = format!("stasis-{:016x}{:016x}", random(), random());
    let mut contents = Contents::default();
    for (path, part) in request.paths.iter().zip(parts) {
        let name = Path::new(path).file_name().unwrap_or_default().to_string_lossy().into_owned();
        let head = format!(
            "--{boundary}\r\ncontent-disposition: form-data; name=\"{}\"; filename=\"{}\"\r\ncontent-type: application/octet-stream\r\n\r\n",
            escape(path),
            escape(&name)
        );
        contents.parts.push_back(Content::Bytes(head.into()));
        contents.push(part).await?;
        contents.parts.push_back(Content::Bytes(Bytes::from_static(b"\r\n")));
    }
    contents.parts.push_back(Content::Bytes(format!("--{boundary}--\r\n").into()));
    let kind = format!("multipart/form-data; boundary={boundary}");
    Ok(([(header::CONTENT_TYPE, kind)], Body::new(contents)).into_response())
}

/// A name in a part's head, as browsers write it.
fn escape(name: &str) -> String {
    name.replace('"', "%22").replace('\r', "%0D").replace('\n', "%0A")
}

/// A name out of a part's head. Browsers escape quotes and line ends; the Python client's library doubles backslashes too.
fn unescape(name: &str) -> String {
    name.replace("%22", "\"").replace("%0D", "\r").replace("%0A", "\n").replace("\\\\", "\\")
}

async fn write(Query(query): Query<Write>, body: Body) -> Result<StatusCode, Refusal> {
    let mut incoming = Incoming(body);
    let written = async {
        let permissions = query.permissions.as_deref().map(|text| mode("permissions", text)).transpose()?;
        let path = resolve("path", &query.path, Path::new(directory()))?;
        let replacement = blocking(move || Replacement::begin(&path, permissions)).await?;
        fill(replacement, &mut incoming).await
    }
    .await;
    if written.is_err() {
        incoming.ignore().await;
    }
    written.map(|()| StatusCode::NO_CONTENT)
}

async fn write_many(request: Request) -> Result<StatusCode, Refusal> {
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    let mut files = 0;
    let written = async {
        while let Some(field) = next(&mut form).await? {
            files += 1;
            if files > FILES {
                return Err(FileError::TooLarge(format!("more than {FILES} files in one request")).into());
            }
            let name = field.name().map(unescape).unwrap_or_default();
            if name.is_empty() {
                return Err(FileError::invalid("name", "of a part must be the path of a file").into());
            }
            let path = resolve("path", &name, Path::new(directory()))?;
            let replacement = blocking(move || Replacement::begin(&path, None)).await?;
            fill(replacement, &mut FormPart(field)).await?;
        }
        if files == 0 {
            return Err(FileError::invalid("files", "must not be empty").into());
        }
        Ok(StatusCode::NO_CONTENT)
    }
    .await;
    if written.is_err() {
        let mut left = IGNORED;
        while let Ok(Some(mut field)) = next(&mut form).await {
            while let Ok(Ok(Some(chunk))) = timeout(STALL, field.chunk()).await {
                match left.checked_sub(chunk.len() as u64) {
                    Some(less) => left = less,
                    None => return written,
                }
            }
        }
    }
    written
}

async fn next(form: &mut Multipart) -> Result<Option<Field<'_>>, Refusal> {
    match timeout(STALL, form.next_field()).await {
        Ok(field) => field.map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.body_text())),
        Err(_) => Err(stalled()),
    }
}

fn stalled() -> Refusal {
    Refusal::new(StatusCode::REQUEST_TIMEOUT, format!("nothing came for {} s", STALL.as_secs()))
}

/// Something that gives bytes until it is through.
trait Source {
    async fn more(&mut self) -> Result<Option<Bytes>, Refusal>;
}

struct Incoming(Body);

impl Incoming {
    async fn frame(&mut self) -> Option<Result<Frame<Bytes>, axum::Error>> {
        std::future::poll_fn(|context| Pin::new(&mut self.0).poll_frame(context)).await
    }

    async fn ignore(&mut self) {
        let mut left = IGNORED;
        while let Ok(Some(Ok(frame))) = timeout(STALL, self.frame()).await {
            let len = frame.data_ref().map_or(0, Bytes::len) as u64;
            match left.checked_sub(len) {
                Some(less) => left = less,
                None => break,
            }
        }
    }
}

impl Source for Incoming {
    async fn more(&mut self) -> Result<Option<Bytes>, Refusal> {
        loop {
            match timeout(STALL, self.frame()).await {
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Ok(Some(Err(error))) => {
                    return Err(Refusal::new(
                        StatusCode::BAD_REQUEST,
                        format!("the request broke off: {}", chain(&error)),
                    ));
                }
                Ok(None) => return Ok(None),
                Err(_) => return Err(stalled()),
            }
        }
    }
}

struct FormPart<'a>(Field<'a>);

impl Source for FormPart<'_> {
    async fn more(&mut self) -> Result<Option<Bytes>, Refusal> {
        match timeout(STALL, self.0.chunk()).await {
            Ok(chunk) => chunk.map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, error.body_text())),
            Err(_) => Err(stalled()),
        }
    }
}

/// Writes all of `source`, then lets the file have it.
async fn fill(mut replacement: Replacement, source: &mut impl Source) -> Result<(), Refusal> {
    let mut gathered = Vec::new();
    loop {
        let more = source.more().await?;
        gathered.extend_from_slice(more.as_deref().unwrap_or_default());
        if more.is_none() {
            return blocking(move || {
                replacement.write(&gathered)?;
                replacement.finish()
            })
            .await;
        }
        if gathered.len() >= GATHERED {
            (replacement, gathered) = blocking(move || {
                replacement.write(&gathered)?;
                gathered.clear();
                Ok((replacement, gathered))
            })
            .await?;
        }
    }
}

/// A body made of bytes and parts of files, read as it is sent.
#[derive(Default)]
struct Contents {
    parts: VecDeque<Content>,
    buffer: Vec<u8>,
}

enum Content {
    Bytes(Bytes),
    File { file: File, left: u64 },
}

impl Contents {
    async fn push(&mut self, part: Part) -> Result<(), Refusal> {
        self.parts.push_back(match part {
            Part::Bytes(bytes) => Content::Bytes(bytes.into()),
            Part::OfFile { file, from, to } => {
                let mut file = File::from_std(file);
                file.set_max_buf_size(CHUNK);
                file.seek(io::SeekFrom::Start(from)).await.map_err(|error| {
                    Refusal::new(
                        StatusCode::INTERNAL_SERVER_ERROR,
                        format!("cannot find the part of the file: {error}"),
                    )
                })?;
                Content::File { file, left: to - from }
            }
        });
        Ok(())
    }
}

impl HttpBody for Contents {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let this = &mut *self;
        loop {
            match this.parts.front_mut() {
                None => return Poll::Ready(None),
                Some(Content::Bytes(bytes)) => {
                    let bytes = std::mem::take(bytes);
                    this.parts.pop_front();
                    if !bytes.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(bytes))));
                    }
                }
                Some(Content::File { file, left }) => {
                    let want = CHUNK.min(usize::try_from(*left).unwrap_or(CHUNK));
                    this.buffer.resize(CHUNK, 0);
                    let mut buffer = ReadBuf::new(&mut this.buffer[..want]);
                    ready!(Pin::new(file).poll_read(context, &mut buffer))?;
                    let read = buffer.filled().len();
                    *left -= read as u64;
                    // A file that became shorter ends here.
                    if read == 0 || *left == 0 {
                        this.parts.pop_front();
                    }
                    if read > 0 {
                        return Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(&this.buffer[..read])))));
                    }
                }
            }
        }
    }
}

impl From<FileError> for Refusal {
    fn from(error: FileError) -> Self {
        let status = match &error {
            FileError::NotFound(_) => StatusCode::NOT_FOUND,
            FileError::Exists(_) => StatusCode::CONFLICT,
            FileError::Denied { .. } => StatusCode::FORBIDDEN,
            FileError::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            FileError::Full { .. } => StatusCode::INSUFFICIENT_STORAGE,
            FileError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            FileError::Invalid { field, message } => {
                let (field, message) = (Some(field.clone()), message.clone());
                return Self(StatusCode::BAD_REQUEST, AgentError { message, field });
            }
        };
        Self::new(status, chain(&error))
    }
}
