//! `stasis network`: what a sandbox reached, and why something did not connect.

use super::client::Client;
use super::commands::path;
use super::output::{self, Output, bytes};
use super::{ExitStatus, Failure};
use reqwest::Method;
use serde_json::Value;

pub(super) async fn run(client: &Client, id: &str, output: Output) -> Result<ExitStatus, Failure> {
    let answer = client.call(Method::GET, &path(id, "/network"), None).await?.body;
    if output.json {
        Output::value(&answer);
        return Ok(ExitStatus::Ok);
    }
    let text = |value: &Value, name: &str| value[name].as_str().unwrap_or_default().to_owned();
    let number = |value: &Value, name: &str| value[name].as_u64().unwrap_or(0);
    output::line(&format!("policy    {}", text(&answer["policy"], "mode")));
    match answer["reason"].as_str() {
        Some(reason) => output::line(&format!("network   none: {reason}")),
        None => output::line("network   up"),
    }
    for missing in answer["missing_values"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        output::line(&format!("missing   the value of {missing} is not on this host"));
    }
    let rules = answer["rules"].as_array().cloned().unwrap_or_default();
    if !rules.is_empty() {
        let mut rows = vec![["RULE", "ALLOWED", "REFUSED", "OUT", "IN"].map(str::to_owned).to_vec()];
        rows.extend(rules.iter().map(|rule| {
            vec![
                text(rule, "rule"),
                number(rule, "allowed").to_string(),
                number(rule, "refused").to_string(),
                bytes(number(rule, "bytes_out")),
                bytes(number(rule, "bytes_in")),
            ]
        }));
        output::line("");
        output.table(&rows);
    }
    let refusals = answer["refusals"].as_array().cloned().unwrap_or_default();
    if !refusals.is_empty() {
        let mut rows = vec![["REFUSED AT", "TIMES", "TO", "WHY"].map(str::to_owned).to_vec()];
        rows.extend(refusals.iter().map(|refusal| {
            let place = refusal["name"].as_str().or_else(|| refusal["address"].as_str()).unwrap_or("?");
            let port = refusal["port"].as_u64().map(|port| format!(":{port}")).unwrap_or_default();
            let to = format!("{} {place}{port}", text(refusal, "protocol"));
            vec![text(refusal, "at"), number(refusal, "times").to_string(), to, text(refusal, "message")]
        }));
        output::line("");
        output.table(&rows);
    }
    Ok(ExitStatus::Ok)
}
