//! `stasis snapshot`: named snapshots.

use super::args::variable;
use super::client::Client;
use super::commands::{escaped, path, rows, show};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use clap::Subcommand;
use reqwest::Method;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Snapshots a page of `stasis snapshot ls`.
const PAGE: u32 = 100;

/// `stasis snapshot …`.
#[derive(Debug, Subcommand)]
pub(super) enum Snapshot {
    /// Take a snapshot of a running sandbox, which goes on; done when it is durable.
    Create {
        /// The sandbox.
        id: String,
        /// Name of the snapshot [default: one that is made up].
        #[arg(long)]
        name: Option<String>,
        /// Delete the sandbox once the snapshot is durable.
        #[arg(long)]
        delete: bool,
    },
    /// List snapshots.
    Ls {
        /// Only those with this in their name.
        #[arg(long)]
        name: Option<String>,
        /// Page, from 1.
        #[arg(long, default_value_t = 1)]
        page: u32,
    },
    /// Make a sandbox from a snapshot and wait until it runs.
    Restore {
        /// Name of the snapshot.
        name: String,
        /// Life, seconds.
        #[arg(long)]
        timeout: Option<u64>,
        /// Pause instead of deleting when the life is over.
        #[arg(long)]
        auto_pause: bool,
        /// Environment of every command, over the snapshot's, NAME=VALUE; may be repeated.
        #[arg(long = "env", short = 'e', value_parser = variable)]
        env: Vec<(String, String)>,
    },
    /// Delete snapshots. One that a running sandbox was made from stays.
    Rm {
        /// Ids of snapshots, snap-….
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

pub(super) async fn run(client: &Client, snapshot: Snapshot, output: Output) -> Result<ExitStatus, Failure> {
    match snapshot {
        Snapshot::Create { id, name, delete } => {
            let mut body = Map::new();
            if let Some(name) = name {
                body.insert("name".to_owned(), name.into());
            }
            body.insert("kill_sandbox_after".to_owned(), delete.into());
            let answer = client.call(Method::POST, &path(&id, "/snapshot/create"), Some(&Value::Object(body))).await?;
            if output.json {
                Output::value(&answer.body);
            } else {
                table(std::slice::from_ref(&answer.body), output);
                output::timing(answer.timing.as_deref());
            }
        }
        Snapshot::Ls { name, page } => {
            let query = name.map(|name| format!("&query={}", escaped(&name))).unwrap_or_default();
            let path = format!("/v1/snapshots?page={page}&page-size={PAGE}{query}");
            let answer = client.call(Method::GET, &path, None).await?.body;
            if output.json {
                Output::value(&answer);
            } else {
                let items = answer["items"].as_array().cloned().unwrap_or_default();
                table(&items, output);
                output::more(items.len(), &answer["total_items"], page);
            }
        }
        Snapshot::Restore { name, timeout, auto_pause, env } => {
            let env: BTreeMap<_, _> = env.into_iter().collect();
            let mut body = json!({ "snapshot_name": name, "auto_pause": auto_pause, "env_vars": env });
            if let Some(timeout) = timeout {
                body["timeout"] = timeout.into();
            }
            show(&client.call(Method::POST, "/v1/snapshot/restore", Some(&body)).await?, output);
        }
        Snapshot::Rm { ids } => {
            for id in ids {
                client.call(Method::DELETE, &format!("/v1/snapshot/{}", escaped(&id)), None).await?;
                if output.json {
                    Output::value(&json!({ "id": id, "state": "deleted" }));
                } else {
                    output::line(&id);
                }
            }
        }
    }
    Ok(ExitStatus::Ok)
}

fn table(items: &[Value], output: Output) {
    let heads = ["ID", "NAME", "VCPU", "MEMORY MIB", "TEMPLATE", "CREATED"];
    output.table(&rows(&heads, &["id", "name", "vcpu", "memory_mib", "template_id", "created_at"], items));
}
