//! `stasis pty`: the terminals of a sandbox. They live on when nobody is connected, and through pause and wake.

use super::client::Client;
use super::commands::{escaped, path, rows};
use super::output::{self, Output};
use super::{ExitStatus, Failure, terminal};
use clap::Subcommand;
use reqwest::Method;
use serde_json::json;

/// `stasis pty …`.
#[derive(Debug, Subcommand)]
pub(super) enum Pty {
    /// List terminals.
    Ls {
        /// The sandbox.
        id: String,
    },
    /// Make a terminal with a shell, to be connected to.
    Create {
        /// The sandbox.
        id: String,
        /// User, by name or number [default: root].
        #[arg(long)]
        user: Option<String>,
        /// Working directory.
        #[arg(long)]
        cwd: Option<String>,
    },
    /// Connect this terminal to one. It stays when this ends by a signal; end its shell to end both.
    Attach {
        /// The sandbox.
        id: String,
        /// The terminal's id.
        session: String,
    },
    /// Delete a terminal, with what runs on it.
    Rm {
        /// The sandbox.
        id: String,
        /// The terminal's id.
        session: String,
    },
}

pub(super) async fn run(client: &Client, pty: Pty, output: Output) -> Result<ExitStatus, Failure> {
    let terminals = |id: &str| path(id, "/pty");
    let own = |id: &str, session: &str| format!("{}/{}", terminals(id), escaped(session));
    match pty {
        Pty::Ls { id } => {
            let answer = client.call(Method::GET, &terminals(&id), None).await?.body;
            if output.json {
                Output::value(&answer);
            } else {
                let items = answer["items"].as_array().cloned().unwrap_or_default();
                let heads = ["ID", "ACTIVE", "CWD", "COLS", "ROWS", "CREATED"];
                output.table(&rows(&heads, &["id", "active", "cwd", "cols", "rows", "created_at"], &items));
            }
        }
        Pty::Create { id, user, cwd } => {
            let (cols, rows) = terminal::size();
            let body = json!({ "user": user, "cwd": cwd, "cols": cols, "rows": rows });
            let made = client.call(Method::POST, &terminals(&id), Some(&body)).await?.body;
            if output.json {
                Output::value(&made);
            } else {
                output::line(made["id"].as_str().unwrap_or_default());
            }
        }
        Pty::Attach { id, session } => return terminal::attach(client, &own(&id, &session), output).await,
        Pty::Rm { id, session } => {
            client.call(Method::DELETE, &own(&id, &session), None).await?;
            if output.json {
                Output::value(&json!({ "id": session, "state": "deleted" }));
            } else {
                output::line(&session);
            }
        }
    }
    Ok(ExitStatus::Ok)
}
