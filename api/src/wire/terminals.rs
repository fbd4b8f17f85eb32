//! Terminals.

use super::text::{Account, Environment, Moment, OptionalPath};
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;

/// A terminal to be made.
#[derive(JsonSchema)]
pub struct CreateTerminal {
    /// Its id, of visible characters; a random one when absent or empty.
    pub id: Option<TerminalName>,
    /// What runs on it, for `/bin/sh -c`; the user's shell when absent or empty.
    pub command: Option<TerminalCommand>,
    /// Whose shell or command it is, by name or number; root when absent or empty.
    pub user: Option<Account>,
    /// Where the shell starts; the user's home when absent.
    pub cwd: Option<OptionalPath>,
    /// Environment of the shell.
    pub envs: Option<Environment>,
    /// The same by its other name; it goes before `envs`.
    pub env: Option<Environment>,
    /// Columns; 80 when absent.
    #[schemars(range(min = 1, max = 2000))]
    pub cols: Option<i64>,
    /// Rows; 24 when absent.
    #[schemars(range(min = 1, max = 2000))]
    pub rows: Option<i64>,
    /// The shell starts when somebody connects for the first time.
    pub lazy_start: Option<bool>,
}

/// A terminal's new size.
#[derive(JsonSchema)]
pub struct ResizeTerminal {
    /// Columns.
    #[schemars(range(min = 1, max = 2000))]
    pub cols: i64,
    /// Rows.
    #[schemars(range(min = 1, max = 2000))]
    pub rows: i64,
}

/// A terminal.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Terminal {
    /// Its id.
    pub id: String,
    /// Where its shell started.
    pub cwd: String,
    /// The environment that it was made with.
    pub envs: BTreeMap<String, String>,
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
    /// When it was made, by the guest's clock.
    #[schemars(with = "Moment")]
    pub created_at: String,
    /// Its shell runs.
    pub active: bool,
    /// Its shell started, or will start, when somebody connects.
    pub lazy_start: bool,
    /// Exit status of its shell or command, once that has ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}

/// All terminals of a sandbox, oldest first.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TerminalList {
    /// The terminals.
    pub items: Vec<Terminal>,
}

inline_schemas! {
    /// A command line, or nothing.
    TerminalCommand = { "type": "string", "maxLength": 65536, "pattern": r"^[^\u0000]*$" };
    /// Id of a terminal to be made, or nothing.
    TerminalName = {
        "type": "string",
        "maxLength": 128,
        "pattern": r"^([^\u0000-\u001f\u007f-\u009f]*[^\s\u0000-\u001f\u007f-\u009f][^\u0000-\u001f\u007f-\u009f]*)?$",
    };
}
