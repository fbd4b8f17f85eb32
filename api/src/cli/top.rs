//! `stasis top`: the sandboxes as they are now, and what their last pauses and resumes cost.

use super::client::Client;
use super::commands::scalar;
use super::output::{self, Output, bytes};
use super::{ExitStatus, Failure};
use clap::Args;
use reqwest::Method;
use serde_json::Value;
use std::io::IsTerminal as _;
use std::time::Duration;

const EVERY: Duration = Duration::from_secs(1);
/// Clears what is below, after the cursor has gone home.
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const CLEAR: &str = "\x1b[2J";

/// `stasis top [--once]`.
#[derive(Debug, Args)]
pub(super) struct Top {
    /// Print the table once. So it is where nobody watches: with --json, or when the output is no terminal.
    #[arg(long)]
    once: bool,
}

pub(super) async fn run(client: &Client, top: &Top, output: Output) -> Result<ExitStatus, Failure> {
    let live = async || Ok::<_, Failure>(client.call(Method::GET, "/v1/live", None).await?.body);
    if output.json {
        Output::value(&live().await?);
        return Ok(ExitStatus::Ok);
    }
    if top.once || !std::io::stdout().is_terminal() {
        output.table(&table(&live().await?));
        return Ok(ExitStatus::Ok);
    }
    output::raw(CLEAR.as_bytes(), false);
    loop {
        let lines = output.rendered(&table(&live().await?)).join(&format!("{CLEAR_LINE}\n"));
        output::raw(format!("{HOME}{lines}{CLEAR_LINE}\n{CLEAR_BELOW}").as_bytes(), false);
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(ExitStatus::Ok),
        }
    }
}

fn table(live: &Value) -> Vec<Vec<String>> {
    let heads = ["ID", "STATE", "VCPU", "MEMORY", "TEMPLATE", "LAST PAUSE", "LAST RESUME"];
    let head = heads.map(str::to_owned).to_vec();
    let items = live["items"].as_array().cloned().unwrap_or_default();
    let row = |item: &Value| {
        let state = match item["phase"].as_str() {
            Some(phase) => format!("{} ({phase})", scalar(&item["state"])),
            None => scalar(&item["state"]),
        };
        vec![
            scalar(&item["id"]),
            state,
            scalar(&item["vcpu"]),
            format!("{} MiB", scalar(&item["memory_mib"])),
            scalar(&item["template_name"]),
            cost(item, "pause"),
            cost(item, "resume"),
        ]
    };
    std::iter::once(head).chain(items.iter().map(row)).collect()
}

/// The last operation of this kind: time and bytes, or that it failed.
fn cost(item: &Value, operation: &str) -> String {
    let operations = item["operations"].as_array().map(Vec::as_slice).unwrap_or_default();
    let Some(last) = operations.iter().rfind(|o| o["operation"] == operation) else { return "-".to_owned() };
    if last.get("failure").is_some() {
        return "failed".to_owned();
    }
    let moved = last["bytes"].as_array().into_iter().flatten();
    let moved = moved.map(|b| bytes(b["bytes"].as_u64().unwrap_or(0)));
    let took = format!("{:.0} ms", last["ms"].as_f64().unwrap_or(0.0));
    std::iter::once(took).chain(moved).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_last_cost_of_each_kind_is_shown() {
        let live = json!({"items": [{
            "id": "sbx-a", "state": "snapshotting", "phase": "upload", "vcpu": 1, "memory_mib": 64, "template_name": "t",
            "operations": [
                {"operation": "pause", "ms": 99.0, "bytes": []},
                {"operation": "pause", "ms": 12.4, "bytes": [{"name": "sent", "bytes": 2048}]},
                {"operation": "resume", "ms": 1.0, "bytes": [], "failure": "no store"},
            ],
        }]});
        let rows = table(&live);
        assert_eq!(rows[1][1], "snapshotting (upload)");
        assert_eq!(&rows[1][5..], ["12 ms, 2.0 KiB", "failed"]);
    }
}
