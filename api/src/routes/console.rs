//! The console of a guest: what it wrote to its serial port since its VMM was started. It is kept on this host while the VM exists, at most
//! some 2 MiB of it, and is no part of a snapshot.

use super::sandboxes::pairs;
use super::{Path, Shared, Tenant};
use crate::error::Error;
use crate::registry::Sandbox;
use crate::validate::FieldError;
use crate::vmm_process::Vmm;
use axum::body::{Body, Bytes};
use axum::extract::{RawQuery, State};
use axum::http::header::{CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse as _, Response};
use futures::stream;
use stasis_vmm::control::CONSOLE_LOG;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::fs::File;
use tokio::io::AsyncReadExt as _;

const CHUNK: usize = 32 << 10;
/// Between two looks for more.
const LOOK: Duration = Duration::from_millis(100);

/// 200 with the octets that the guest wrote; `?follow=true` goes on with what it writes, until its VM ends. 409 when there is no VM.
pub(super) async fn console(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let follow = follow(query.as_deref().unwrap_or_default()).map_err(|e| Error::Invalid(vec![e]))?;
    let verb = "read the console of";
    let no_vm = || Error::State { id: sandbox.id.clone(), state: sandbox.state(), verb };
    let vm = sandbox.vm().ok_or_else(no_vm)?;
    let path = vm.run_dir().join(CONSOLE_LOG);
    let mut older = path.clone().into_os_string();
    older.push(".1");
    let mut files = Vec::new();
    for path in [PathBuf::from(older), path.clone()] {
        match File::open(&path).await {
            Ok(file) => files.push(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Local { action: format!("read the console of {}", sandbox.id), source }),
        }
    }
    files.reverse();
    let reader = Reader { files, path, follow: follow.then_some((sandbox, vm)), ending: core.ending.clone() };
    let body = stream::try_unfold(reader, |mut reader| async move {
        Ok::<_, io::Error>(reader.next().await?.map(|bytes| (bytes, reader)))
    });
    let kind = [(CONTENT_TYPE, "text/plain; charset=utf-8"), (X_CONTENT_TYPE_OPTIONS, "nosniff")];
    Ok((kind, Body::from_stream(body)).into_response())
}

fn follow(query: &str) -> Result<bool, FieldError> {
    let value = pairs(query).into_iter().find_map(|(name, value)| (name == "follow").then_some(value));
    match value.as_deref() {
        None | Some("false" | "0") => Ok(false),
        Some("true" | "1" | "") => Ok(true),
        Some(_) => Err(FieldError { field: "follow".to_owned(), error: "must be true or false".to_owned() }),
    }
}

struct Reader {
    /// What is to be read, the first one last.
    files: Vec<File>,
    path: PathBuf,
    /// Whose end is waited for.
    follow: Option<(Arc<Sandbox>, Arc<Vmm>)>,
    ending: tokio_util::sync::CancellationToken,
}

impl Reader {
    async fn next(&mut self) -> io::Result<Option<Bytes>> {
        let mut buffer = vec![0; CHUNK];
        loop {
            // Asked before the read: what the guest wrote last is read after its end.
            let over = self.over();
            let Some(file) = self.files.last_mut() else { return Ok(None) };
            let len = file.read(&mut buffer).await?;
            if len > 0 {
                buffer.truncate(len);
                return Ok(Some(buffer.into()));
            }
            if self.files.len() > 1 {
                self.files.pop();
            } else if over {
                return Ok(None);
            } else if let Some(newer) = self.newer().await? {
                self.files.insert(0, newer);
            } else {
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    fn over(&self) -> bool {
        let Some((sandbox, vm)) = &self.follow else { return true };
        self.ending.is_cancelled() || vm.has_ended() || sandbox.vm().is_none_or(|now| !Arc::ptr_eq(&now, vm))
    }

    /// The log that was begun since this one was full.
    async fn newer(&self) -> io::Result<Option<File>> {
        let Some(ours) = self.files.last() else { return Ok(None) };
        let newer = match File::open(&self.path).await {
            Ok(file) => file,
            // Gone with its VM, or between two logs.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok((newer.metadata().await?.ino() != ours.metadata().await?.ino()).then_some(newer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follow_is_a_flag() {
        assert_eq!(
            (follow("").ok(), follow("follow=true").ok(), follow("follow=false").ok()),
            (Some(false), Some(true), Some(false))
        );
        assert_eq!(follow("follow=perhaps").unwrap_err().field, "follow");
    }
}
