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
use stasis_vmm::control::{CONSOLE_LOG, OLDER_CONSOLE_LOG};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, SeekFrom};

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
    let older = vm.run_dir().join(OLDER_CONSOLE_LOG);
    let mut files = Vec::new();
    for path in [older.clone(), path.clone()] {
        match File::open(&path).await {
            Ok(file) => files.push(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(Error::Local { action: format!("read the console of {}", sandbox.id), source }),
        }
    }
    files.reverse();
    let reader = Reader { files, older, at: 0, follow: follow.then_some((sandbox, vm)), ending: core.ending.clone() };
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
    /// Where the log goes when it is full and starts over.
    older: PathBuf,
    /// How much of the first of `files` was read.
    at: u64,
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
                if self.files.len() == 1 {
                    self.at += len as u64;
                }
                buffer.truncate(len);
                return Ok(Some(buffer.into()));
            }
            if self.files.len() > 1 {
                self.files.pop();
            } else if over {
                return Ok(None);
            } else if !self.start_over().await? {
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    fn over(&self) -> bool {
        let Some((sandbox, vm)) = &self.follow else { return true };
        self.ending.is_cancelled() || vm.has_ended() || sandbox.vm().is_none_or(|now| !Arc::ptr_eq(&now, vm))
    }

    /// A log that is shorter than what was read of it was full and has started over: the rest of what it held is in the older one.
    async fn start_over(&mut self) -> io::Result<bool> {
        let Some(log) = self.files.last_mut() else { return Ok(false) };
        if log.metadata().await?.len() >= self.at {
            return Ok(false);
        }
        log.seek(SeekFrom::Start(0)).await?;
        match File::open(&self.older).await {
            Ok(mut older) => {
                older.seek(SeekFrom::Start(self.at)).await?;
                self.files.push(older);
            }
            // Gone with its VM.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        self.at = 0;
        Ok(true)
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
