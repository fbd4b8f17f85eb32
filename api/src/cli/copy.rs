//! `stasis cp`: files into a sandbox and out of it. A file is streamed as it is. A directory travels as a tar archive, which the guest's
//! own `tar` packs or unpacks beside a temporary file in its /tmp.

use super::client::{Client, broken};
use super::commands::{path, quote};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use clap::Args;
use reqwest::{Body, Method, Response};
use serde_json::{Value, json};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use tokio::io::AsyncWriteExt as _;
use tokio_util::io::ReaderStream;

/// What ids begin with, and what divides them from a path.
const ID: &str = "sbx-";
/// Longest that packing or unpacking in the guest may take, seconds.
const TAR_S: u64 = 3600;

/// `stasis cp SOURCE DESTINATION`.
#[derive(Debug, Args)]
pub(super) struct Copy {
    /// What is copied: a path here, `-` for standard input, or ID:/path in a sandbox.
    source: String,
    /// Where to: a path here, `-` for standard output, or ID:/path in a sandbox. Into it, where it is a directory.
    destination: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Standard,
    Here(PathBuf),
    Sandbox { id: String, path: String },
}

impl Place {
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            _ if text == "-" => Self::Standard,
            Some((id, path)) if id.starts_with(ID) && !id.contains('/') => {
                Self::Sandbox { id: id.to_owned(), path: path.to_owned() }
            }
            _ => Self::Here(PathBuf::from(text)),
        }
    }
}

pub(super) async fn run(client: &Client, copy: &Copy, output: Output) -> Result<ExitStatus, Failure> {
    let copied = match (Place::parse(&copy.source), Place::parse(&copy.destination)) {
        (Place::Standard, Place::Sandbox { id, path }) => {
            Remote { client, id }.write(&path, None, output::input()?.into()).await?;
            path
        }
        (Place::Here(from), Place::Sandbox { id, path }) => Remote { client, id }.take_in(&from, &path).await?,
        (Place::Sandbox { id, path }, Place::Standard) => {
            let mut answer = Remote { client, id }.read(&path).await?;
            while let Some(bytes) = answer.chunk().await.map_err(|e| broken(&e))? {
                output::raw(&bytes, false);
            }
            return Ok(ExitStatus::Ok);
        }
        (Place::Sandbox { id, path }, Place::Here(to)) => Remote { client, id }.take_out(&path, &to).await?,
        _ => {
            let text = "one of the two must be in a sandbox (sbx-…:/path), the other must not";
            return Err(Failure::new(ExitStatus::Usage, text));
        }
    };
    if output.json {
        Output::value(&json!({ "copied": copied }));
    }
    Ok(ExitStatus::Ok)
}

fn here(action: &str, path: &Path) -> impl FnOnce(io::Error) -> Failure {
    let text = format!("cannot {action} {}", path.display());
    move |error| Failure::other(format!("{text}: {error}"))
}

/// The last part of a path, which a copy into a directory keeps.
fn name(path: &Path) -> Result<String, Failure> {
    let named = path.file_name().map(|name| name.to_string_lossy().into_owned());
    named.ok_or_else(|| Failure::new(ExitStatus::Usage, format!("{} has no name to copy it under", path.display())))
}

fn below(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

/// The files of one sandbox.
struct Remote<'a> {
    client: &'a Client,
    id: String,
}

impl Remote<'_> {
    /// Whether there is a directory; `None` when there is nothing.
    async fn is_directory(&self, file: &str) -> Result<Option<bool>, Failure> {
        let stat = path(&self.id, "/filesystem/stat");
        match self.client.call(Method::POST, &stat, Some(&json!({ "path": file }))).await {
            Ok(answer) => Ok(answer.body["is_dir"].as_bool()),
            // The sandbox itself may be what is not there: the request that follows says so.
            Err(failure) if failure.status == ExitStatus::NotFound => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    async fn write(&self, file: &str, mode: Option<u32>, content: Body) -> Result<(), Failure> {
        let mut query = vec![("path", file.to_owned())];
        query.extend(mode.map(|mode| ("permissions", format!("{:o}", mode & 0o777))));
        let route = self.client.with_query(&path(&self.id, "/filesystem/write-file"), &query)?;
        self.client.stream(Method::POST, &route, Some(content)).await.map(drop)
    }

    async fn read(&self, file: &str) -> Result<Response, Failure> {
        let body = json!({ "path": file }).to_string();
        self.client.stream(Method::POST, &path(&self.id, "/filesystem/read-file"), Some(body.into())).await
    }

    /// Runs a command of ours; its failure is ours.
    async fn run(&self, command: &str) -> Result<(), Failure> {
        let body = json!({ "command": command, "timeout": TAR_S });
        let done = self.client.call(Method::POST, &path(&self.id, "/process/execute"), Some(&body)).await?.body;
        if done["exit_code"] == 0 {
            return Ok(());
        }
        let said = done["stderr"].as_str().unwrap_or_default().trim().to_owned();
        Err(Failure::other(format!("in {}: {said} ({command})", self.id)))
    }

    async fn take_in(&self, from: &Path, to: &str) -> Result<String, Failure> {
        let found = std::fs::metadata(from).map_err(here("read", from))?;
        let into = to.ends_with('/') || self.is_directory(to).await? == Some(true);
        let to = if into { below(to, &name(from)?) } else { to.to_owned() };
        if found.is_dir() {
            self.pack_in(from.to_owned(), &to).await?;
        } else {
            let file = tokio::fs::File::open(from).await.map_err(here("read", from))?;
            self.write(&to, Some(found.permissions().mode()), file.into()).await?;
        }
        Ok(to)
    }

    async fn pack_in(&self, from: PathBuf, to: &str) -> Result<(), Failure> {
        let archive = temporary();
        let (theirs, ours) = pipe()?;
        let packing = tokio::task::spawn_blocking(move || {
            let mut tar = tar::Builder::new(ours);
            tar.follow_symlinks(false);
            tar.append_dir_all(".", &from).map_err(here("pack", &from))?;
            tar.finish().map_err(here("pack", &from))
        });
        let sent = self
            .write(&archive, Some(0o600), Body::wrap_stream(ReaderStream::new(tokio::fs::File::from(theirs))))
            .await;
        let packed = packing.await.map_err(|e| Failure::other(e.to_string()))?;
        let outcome = match sent.and(packed) {
            Ok(()) => {
                let (archive, to) = (quote(&archive), quote(to));
                self.run(&format!("mkdir -p -- {to} && tar -xf {archive} -C {to}")).await
            }
            Err(failure) => Err(failure),
        };
        self.remove(&archive).await;
        outcome
    }

    async fn take_out(&self, from: &str, to: &Path) -> Result<String, Failure> {
        let directory = self.is_directory(from).await? == Some(true);
        let to = if to.is_dir() { to.join(name(Path::new(from))?) } else { to.to_owned() };
        if directory {
            self.unpack_out(from, &to).await?;
        } else {
            let answer = self.read(from).await?;
            // Whole or not at all.
            let mut part = to.clone().into_os_string();
            part.push(".part");
            let part = PathBuf::from(part);
            let outcome =
                self.save(answer, &part).await.and_then(|()| std::fs::rename(&part, &to).map_err(here("write", &to)));
            if outcome.is_err() {
                let _ = std::fs::remove_file(&part);
            }
            outcome?;
        }
        Ok(to.display().to_string())
    }

    async fn save(&self, mut answer: Response, to: &Path) -> Result<(), Failure> {
        let mut file = tokio::fs::File::create(to).await.map_err(here("write", to))?;
        while let Some(bytes) = answer.chunk().await.map_err(|e| broken(&e))? {
            file.write_all(&bytes).await.map_err(here("write", to))?;
        }
        file.flush().await.map_err(here("write", to))
    }

    async fn unpack_out(&self, from: &str, to: &Path) -> Result<(), Failure> {
        let archive = temporary();
        let packed = self.run(&format!("tar -cf {} -C {} .", quote(&archive), quote(from))).await;
        let outcome = match packed {
            Ok(()) => self.unpack(&archive, to.to_owned()).await,
            Err(failure) => Err(failure),
        };
        self.remove(&archive).await;
        outcome
    }

    async fn unpack(&self, archive: &str, to: PathBuf) -> Result<(), Failure> {
        let mut answer = self.read(archive).await?;
        let (ours, theirs) = pipe()?;
        let unpacking = tokio::task::spawn_blocking(move || {
            std::fs::create_dir_all(&to).map_err(here("make", &to))?;
            // Comes from a guest: `unpack` writes nothing outside `to`, and sets no owner.
            tar::Archive::new(ours).unpack(&to).map_err(here("unpack into", &to))
        });
        let mut into = tokio::fs::File::from(theirs);
        let mut received = Ok(());
        while let Some(bytes) = answer.chunk().await.map_err(|e| broken(&e)).transpose() {
            let Ok(bytes) = bytes else {
                received = bytes.map(drop);
                break;
            };
            // Nobody reads any more: what is unpacked is whole, or its own error says more.
            if into.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = into.flush().await;
        drop(into);
        let unpacked = unpacking.await.map_err(|e| Failure::other(e.to_string()))?;
        received.and(unpacked)
    }

    async fn remove(&self, file: &str) {
        let body: Value = json!({ "path": file });
        // It is in /tmp; the copy itself is what is answered for.
        let _ = self.client.call(Method::POST, &path(&self.id, "/filesystem/delete"), Some(&body)).await;
    }
}

/// Between a thread that packs or unpacks and a request: what is read, and what is written.
fn pipe() -> Result<(std::fs::File, std::fs::File), Failure> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|e| Failure::other(format!("cannot make a pipe: {e}")))?;
    Ok((read.into(), write.into()))
}

/// A name that nothing in the guest has.
fn temporary() -> String {
    format!("/tmp/.stasis-cp-{}.tar", crate::sources::Sources::system().word(16))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_in_a_sandbox_when_it_begins_with_an_id() {
        let remote = |id: &str, path: &str| Place::Sandbox { id: id.to_owned(), path: path.to_owned() };
        assert_eq!(Place::parse("sbx-a:/x:y"), remote("sbx-a", "/x:y"));
        assert_eq!(Place::parse("sbx-a:rel"), remote("sbx-a", "rel"));
        assert_eq!(Place::parse("-"), Place::Standard);
        for here in ["x", "/sbx-a:/x", "./sbx-a:/x", "a:b", "sbx-a"] {
            assert_eq!(Place::parse(here), Place::Here(PathBuf::from(here)));
        }
        assert_eq!(below("/a/", "b"), "/a/b");
        assert_eq!(below("/", "b"), "/b");
    }
}
