//! Terminals: a shell on a pseudo-terminal that lives on while nobody is attached, through a pause and a wake too.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `POST /v1/terminals/create` | [`Create`] | [`Terminal`]; 409 when the id is taken |
//! | `POST /v1/terminals/list` | – | [`Terminals`] |
//! | `POST /v1/terminals/get`, `/delete` | [`TerminalId`] | [`Terminal`]; 204 |
//! | `POST /v1/terminals/resize` | [`Resize`] | [`Terminal`] |
//! | `GET /v1/terminals/attach?id=…` with `upgrade: `[`ATTACH`] | – | 101, then bytes both ways: first what the terminal showed last, then what it shows now |
//!
//! The end of the bytes from the guest: the shell has ended, or the terminal was deleted, or the reader was too slow.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The protocol that an attached connection is upgraded to.
pub const ATTACH: &str = "stasis-terminal";
/// Columns and rows when the request has none.
pub const DEFAULT_SIZE: (u16, u16) = (80, 24);

/// Makes a terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// Its id; a random one when absent.
    #[serde(default)]
    pub id: Option<String>,
    /// What runs on it, for `/bin/sh -c`; the user's shell when absent.
    #[serde(default)]
    pub command: Option<String>,
    /// Whose shell or command it is, by name or number; root when absent.
    #[serde(default)]
    pub user: Option<String>,
    /// Where the shell starts; the user's own directory when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Environment of the shell, as answers show it.
    #[serde(default)]
    pub envs: BTreeMap<String, String>,
    /// Environment of the shell that answers do not show; `envs` comes over it.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
    /// The shell starts when somebody attaches for the first time.
    #[serde(default)]
    pub lazy_start: bool,
}

/// Names a terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalId {
    /// Its id.
    pub id: String,
}

/// Gives a terminal another size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resize {
    /// Which.
    pub id: String,
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Its id.
    pub id: String,
    /// Where its shell started.
    pub cwd: String,
    /// [`Create::envs`].
    pub envs: BTreeMap<String, String>,
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
    /// When it was made, by the guest's clock, ms since the epoch.
    pub created_at_ms: i64,
    /// Its shell runs.
    pub active: bool,
    /// [`Create::lazy_start`].
    pub lazy_start: bool,
    /// Exit status of its shell or command, once that has ended.
    #[serde(default)]
    pub exit_code: Option<i32>,
}

/// All terminals, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminals {
    /// The terminals.
    pub items: Vec<Terminal>,
}
