//! `stasis url`: presigned URLs.

use super::client::Client;
use super::commands::{escaped, path};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use clap::Subcommand;
use reqwest::Method;
use serde_json::json;
use std::time::Duration;

/// `stasis url …`.
#[derive(Debug, Subcommand)]
pub(super) enum Url {
    /// Make a URL that opens one port of a sandbox to whoever has it. It is shown once.
    Create {
        /// The sandbox.
        id: String,
        /// The port that the app listens on.
        port: u16,
        /// Life of the URL, at most 7d. A number with s, m, h or d.
        #[arg(long, default_value = "1h", value_parser = super::args::duration)]
        expires_in: Duration,
    },
    /// Have a URL lead nowhere from now on.
    Rm {
        /// The sandbox.
        id: String,
        /// The URL's id, psu-….
        #[arg(value_name = "URL")]
        presigned: String,
    },
}

pub(super) async fn run(client: &Client, url: Url, output: Output) -> Result<ExitStatus, Failure> {
    match url {
        Url::Create { id, port, expires_in } => {
            let body = json!({ "port": port, "expires_in": expires_in.as_secs() });
            let made = client.call(Method::POST, &path(&id, "/presigned-url"), Some(&body)).await?.body;
            if output.json {
                Output::value(&made);
            } else {
                let text = |name: &str| made[name].as_str().unwrap_or_default().to_owned();
                output::line(&text("url"));
                output::tell(&format!("{}, until {}; it is not shown again", text("id"), text("expires_at")));
            }
        }
        Url::Rm { id, presigned } => {
            let path = path(&id, &format!("/presigned-url/{}", escaped(&presigned)));
            client.call(Method::DELETE, &path, None).await?;
            if output.json {
                Output::value(&json!({ "id": presigned, "state": "deleted" }));
            } else {
                output::line(&presigned);
            }
        }
    }
    Ok(ExitStatus::Ok)
}
