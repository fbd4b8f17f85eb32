//! Progress of a pause: a line on a terminal that follows the phase which the supervisor publishes; nothing elsewhere.

use super::client::Client;
use super::output::{self, Output};
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::Method;
use std::time::Duration;
use tokio::task::JoinHandle;

/// The phases of a pause in order, with what they mean.
const PHASES: [(&str, &str); 3] =
    [("stop", "stopping the guest"), ("upload", "capturing and uploading"), ("commit", "verifying and committing")];
const EVERY: Duration = Duration::from_millis(150);

/// A bar that follows one sandbox until it is dropped.
pub(super) struct Progress {
    bar: ProgressBar,
    follower: JoinHandle<()>,
}

impl Progress {
    /// `None` where a bar does not belong.
    pub(super) fn start(client: &Client, id: &str, output: Output) -> Option<Self> {
        if output.json || !output::moves() {
            return None;
        }
        let bar = ProgressBar::new(PHASES.len() as u64 + 1);
        if let Ok(style) = ProgressStyle::with_template("{spinner} [{bar:24}] {msg} ({elapsed})") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message("asking for a pause");
        bar.enable_steady_tick(EVERY);
        let (client, path, shown) = (client.clone(), format!("/v1/sandbox/{id}"), bar.clone());
        let follower = tokio::spawn(async move {
            loop {
                tokio::time::sleep(EVERY).await;
                let Ok(answer) = client.call(Method::GET, &path, None).await else { continue };
                let phase = answer.body["phase"].as_str().unwrap_or_default();
                if let Some(n) = PHASES.iter().position(|(name, _)| *name == phase) {
                    shown.set_position(n as u64 + 1);
                    shown.set_message(PHASES[n].1);
                }
            }
        });
        Some(Self { bar, follower })
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.follower.abort();
        self.bar.finish_and_clear();
    }
}
