//! `pty/*`.

use super::Fields;
use crate::validate::{FieldError, environment};
use serde_json::{Map, Value};
use stasis_agent::protocol::terminals::{Create, DEFAULT_SIZE};

const ID: usize = 128;
const USER: usize = 64;
const COMMAND: usize = 64 << 10;
const SIDE: u16 = 2000;

/// `POST pty`. The sandbox's own environment is added later.
pub fn create(body: &Map<String, Value>) -> Result<Create, Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let id = fields.optional_filled("id", ID).map(|id| id.trim().to_owned());
    if id.as_ref().is_some_and(|id| id.is_empty() || id.chars().any(char::is_control)) {
        fields.errors.add("id", "must have visible characters only");
    }
    let command = fields.optional_filled("command", COMMAND);
    let user = fields.optional_filled("user", USER);
    let cwd = fields.optional_filled("cwd", super::GUEST_PATH);
    let envs = environment(body, &["envs", "env"], &mut fields.errors);
    let (cols, rows) = (side(&mut fields, "cols"), side(&mut fields, "rows"));
    let lazy_start = fields.flag("lazy_start");
    fields.or(Create {
        id,
        command,
        user,
        cwd,
        envs,
        environment: std::collections::BTreeMap::new(),
        cols: cols.unwrap_or(DEFAULT_SIZE.0),
        rows: rows.unwrap_or(DEFAULT_SIZE.1),
        lazy_start,
    })
}

/// `POST pty/{id}/resize`: columns and rows.
pub fn resize(body: &Map<String, Value>) -> Result<(u16, u16), Vec<FieldError>> {
    let mut fields = Fields::of(body);
    let mut required = |name| {
        if matches!(body.get(name), None | Some(Value::Null)) {
            fields.errors.add(name, "is required");
        }
        side(&mut fields, name).unwrap_or(1)
    };
    let size = (required("cols"), required("rows"));
    fields.or(size)
}

fn side(fields: &mut Fields<'_>, name: &str) -> Option<u16> {
    fields.number(name, 1, i64::from(SIDE)).and_then(|n| u16::try_from(n).ok())
}
