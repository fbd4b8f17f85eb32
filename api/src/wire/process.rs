//! Commands, and what the guest says of itself.

use super::text::{Command, Environment, Filled, Text};
use schemars::JsonSchema;
use serde::Serialize;

/// A command to be run.
#[derive(JsonSchema)]
pub struct Execute {
    /// For `/bin/sh -c`.
    #[schemars(example = "python3 --version")]
    pub command: Command,
    /// Where it starts; the user's home when absent.
    pub cwd: Option<Text>,
    /// Who runs it, a name or a number; root when absent.
    #[schemars(length(max = 64))]
    pub user: Option<Filled>,
    /// Environment of this command, over the sandbox's.
    pub envs: Option<Environment>,
    /// The same by its other name; it goes before `envs`.
    pub env: Option<Environment>,
    /// Time limit, seconds; 30 when absent.
    #[schemars(range(min = 1, max = 28_800))]
    pub timeout: Option<i64>,
}

/// What a command did.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Executed {
    /// Exit status; 128 + n after signal n; 124 after the time limit.
    pub exit_code: i32,
    /// What it wrote.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
    /// `stdout` by its older name.
    pub result: String,
    /// Bytes of stdout beyond the limit, which were dropped.
    pub stdout_dropped: u64,
    /// Bytes of stderr beyond the limit, which were dropped.
    pub stderr_dropped: u64,
    /// The time limit ended it.
    pub timed_out: bool,
}

/// Home of the user that commands run as.
#[derive(Debug, Serialize, JsonSchema)]
pub struct UserHomeDir {
    /// The directory.
    pub user_home_dir: String,
}

/// Where commands start.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Workdir {
    /// The directory.
    pub workdir: String,
}
