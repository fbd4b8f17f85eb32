//! `stasis logs`: the console of a guest.

use super::client::Client;
use super::commands::path;
use super::{ExitStatus, Failure, output};
use clap::Args;
use futures::StreamExt as _;
use reqwest::Method;

/// `stasis logs ID [-f]`.
#[derive(Debug, Args)]
pub(super) struct Logs {
    /// The sandbox. It must run: the console is no part of what sleeps.
    id: String,
    /// Go on with what the guest writes, until its VM ends.
    #[arg(long, short)]
    follow: bool,
}

pub(super) async fn run(client: &Client, logs: &Logs) -> Result<ExitStatus, Failure> {
    let query = if logs.follow { "/console?follow=true" } else { "/console" };
    let answer = client.stream(Method::GET, &path(&logs.id, query), None).await?;
    let mut chunks = answer.bytes_stream();
    loop {
        let chunk = tokio::select! {
            chunk = chunks.next() => chunk,
            // What has no end by itself is ended so.
            _ = tokio::signal::ctrl_c(), if logs.follow => return Ok(ExitStatus::Ok),
        };
        match chunk {
            Some(Ok(bytes)) => output::raw(&bytes, false),
            Some(Err(error)) => return Err(super::client::broken(&error)),
            None => return Ok(ExitStatus::Ok),
        }
    }
}
