//! `stasis template`: templates from container images, through the supervisor.

use super::args::{TemplateCreate, TemplateVerb};
use super::client::{Answer, Client};
use super::commands::{escaped, interruptible, scalar};
use super::output::{self, Output, bytes};
use super::{ExitStatus, Failure};
use reqwest::Method;
use serde_json::{Value, json};
use std::time::Duration;

/// Between two looks at a build.
const LOOK: Duration = Duration::from_millis(500);
const PASSWORD: &str = "STASIS_REGISTRY_PASSWORD";

pub(super) async fn run(client: &Client, verb: TemplateVerb, output: Output) -> Result<(), Failure> {
    match verb {
        TemplateVerb::Create(create) => show(&make(client, create, output).await?.body, output),
        TemplateVerb::Ls => {
            let mut items = Vec::new();
            for page in 1.. {
                let path = format!("/v1/template?page={page}&page-size=100");
                let answer = client.call(Method::GET, &path, None).await?;
                let more = answer.body["items"].as_array().cloned().unwrap_or_default();
                items.extend(more.iter().cloned());
                if more.is_empty() || answer.body["total_items"].as_u64() <= Some(items.len() as u64) {
                    break;
                }
            }
            if output.json {
                Output::value(&json!({ "total_items": items.len(), "items": items }));
            } else {
                output.table(&table(&items));
            }
        }
        TemplateVerb::Get(one) => show(&client.call(Method::GET, &path(&one.id), None).await?.body, output),
        TemplateVerb::Rename { id, name } => {
            client.call(Method::PATCH, &path(&id), Some(&json!({ "name": name }))).await?;
            show(&client.call(Method::GET, &path(&id), None).await?.body, output);
        }
        TemplateVerb::Rm(many) => {
            for id in &many.ids {
                client.call(Method::DELETE, &path(id), None).await?;
                if output.json {
                    Output::value(&json!({ "id": id, "state": "deleted" }));
                } else {
                    output::line(id);
                }
            }
        }
    }
    Ok(())
}

fn path(id: &str) -> String {
    format!("/v1/template/{}", escaped(id))
}

/// Asks for the template, and says meanwhile how far it is.
async fn make(client: &Client, create: TemplateCreate, output: Output) -> Result<Answer, Failure> {
    let mut body = json!({ "name": create.name, "uri": create.image });
    if let Some(username) = create.username {
        let password = std::env::var(PASSWORD).map_err(|_| {
            Failure::new(ExitStatus::Usage, format!("--username needs the password in the variable {PASSWORD}"))
        })?;
        body["credentials"] = json!({ "type": "basic", "username": username, "password": password });
    }
    let making = interruptible(client.call(Method::POST, "/v1/template", Some(&body)), "the build goes on");
    if output.json || !output::moves() {
        return making.await;
    }
    let bar = indicatif::ProgressBar::new_spinner();
    let answer = tokio::select! {
        answer = making => answer,
        () = watch(client, &create.name, &bar) => Err(Failure::other("the watch over a build ended")),
    };
    bar.finish_and_clear();
    answer
}

/// Shows how far the template of that name is, until the bar is finished.
async fn watch(client: &Client, name: &str, bar: &indicatif::ProgressBar) {
    let list = format!("/v1/template?query={}", escaped(name));
    while !bar.is_finished() {
        tokio::time::sleep(LOOK).await;
        // What cannot be asked now is asked again; the request itself says what went wrong.
        let Ok(answer) = client.call(Method::GET, &list, None).await else { continue };
        let items = answer.body["items"].as_array().cloned().unwrap_or_default();
        if let Some(item) = items.iter().find(|item| item["name"] == name) {
            bar.set_message(progress(item));
            bar.tick();
        }
    }
}

/// Where a build stands, in words.
fn progress(item: &Value) -> String {
    let number = |field: &str| item[field].as_u64().unwrap_or(0);
    let phase = scalar(&item["phase"]);
    match (number("bytes"), number("total_bytes")) {
        (0, 0) => phase,
        (done, 0) => format!("{phase}: {}", bytes(done)),
        (done, total) => format!("{phase}: {} of {}", bytes(done), bytes(total)),
    }
}

fn table(items: &[Value]) -> Vec<Vec<String>> {
    let mut rows = vec![["ID", "NAME", "STATE", "IMAGE", "CREATED"].map(str::to_owned).to_vec()];
    rows.extend(items.iter().map(|item| {
        let system = item["is_system"].as_bool() == Some(true);
        let created = if system { String::new() } else { scalar(&item["created_at"]) };
        vec![scalar(&item["id"]), scalar(&item["name"]), scalar(&item["state"]), scalar(&item["uri"]), created]
    }));
    rows
}

fn show(template: &Value, output: Output) {
    if output.json {
        return Output::value(template);
    }
    output.table(&table(std::slice::from_ref(template)));
    match template["state"].as_str() {
        Some("building") => output::tell(&progress(template)),
        Some("failed") => output::tell(&format!("reason: {}", scalar(&template["reason"]))),
        _ => output::tell(&format!("digest: {}", scalar(&template["digest"]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_says_where_it_stands() {
        let said =
            |bytes: u64, total: u64| progress(&json!({"phase": "layer 1 of 2", "bytes": bytes, "total_bytes": total}));
        assert_eq!(said(0, 0), "layer 1 of 2");
        assert!(said(1 << 20, 0).starts_with("layer 1 of 2: 1"));
        assert!(said(1 << 20, 4 << 20).contains(" of 4"));
    }
}
