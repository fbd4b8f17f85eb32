//! git, run in the guest: `POST /v1/git` with a [`GitRequest`] answers a [`super::ExecReply`], whatever git's exit status.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// One run of git. No shell is involved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitRequest {
    /// The repository, or where a relative destination starts; the user's own directory when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// What follows `git`.
    pub args: Vec<String>,
    /// Added to the agent's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// For the remote that this run talks to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
    /// git and what it started are killed after this long, ms.
    pub timeout_ms: u64,
    /// As in [`super::ExecRequest`].
    pub output_limit: usize,
}

/// A name and a secret for one remote over HTTP. They reach git through its environment and are offered to that remote's host alone.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// User name.
    pub username: String,
    /// Password or token.
    pub password: String,
    /// Whose they are.
    pub remote: Remote,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("remote", &self.remote).finish_non_exhaustive()
    }
}

/// A remote repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Remote {
    /// By its URL.
    Url(String),
    /// By its name in the repository's configuration: where it fetches from.
    Fetch(String),
    /// By its name in the repository's configuration: where it pushes to.
    Push(String),
}
