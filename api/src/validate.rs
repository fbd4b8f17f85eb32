//! Requests of the API, from JSON to checked values. Pure: what is wrong is collected per field, everything at once, and becomes a 400.
//!
//! Both spellings of a field are read (`memory`/`memory_mib`, `timeout`/`timeout_min`, `env`/`envs`); giving both with different
//! meanings is an error. Unknown fields are ignored, as the contract's clients expect.

use crate::network_policy::NetworkPolicy;
use crate::states::State;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// The template of a sandbox when the request names none.
pub const DEFAULT_TEMPLATE: &str = "system/debian:bookworm";
/// The states that a list can be narrowed to.
pub(crate) const LISTED: [State; 8] = [
    State::Starting,
    State::Running,
    State::Snapshotting,
    State::Paused,
    State::Unpausing,
    State::Stopping,
    State::Stopped,
    State::Deleting,
];
/// Variables in `env_vars` or `envs` at most.
pub const MAX_ENV_VARS: usize = 256;

/// One field and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct FieldError {
    /// Path of the field in the request.
    pub field: String,
    /// What is wrong, as the end of a sentence that starts with the field.
    pub error: String,
}

/// Collects [`FieldError`]s.
#[derive(Debug, Default)]
pub struct FieldErrors(Vec<FieldError>);

impl FieldErrors {
    /// Adds one.
    pub fn add(&mut self, field: &str, error: impl Into<String>) {
        self.0.push(FieldError { field: field.to_owned(), error: error.into() });
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// None so far.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in the order found.
    pub fn into_list(self) -> Vec<FieldError> {
        self.0
    }

    /// `value`, if there are none.
    pub(crate) fn or<T>(self, value: T) -> Result<T, Vec<FieldError>> {
        if self.is_empty() { Ok(value) } else { Err(self.0) }
    }
}

/// What a template says about sandboxes made from it.
#[derive(Clone, Copy, Debug)]
pub struct TemplateLimits {
    /// The least memory, MiB.
    pub min_memory_mib: u32,
    /// Size of its disk, MiB.
    pub disk_mib: u64,
}

/// A checked create request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// vCPUs, 1 to 8.
    pub vcpu: u8,
    /// Memory, MiB.
    pub memory_mib: u32,
    /// Life after each entry to `running`, seconds.
    pub timeout_s: u32,
    /// Pause instead of deleting when the life is over.
    pub auto_pause: bool,
    /// Environment of every command.
    pub env_vars: BTreeMap<String, String>,
    /// Egress policy.
    pub network_policy: Option<NetworkPolicy>,
}

/// The template that a create request names. Comes first, since the template sets limits for the rest.
pub fn template_name(body: &Map<String, Value>) -> Result<String, Vec<FieldError>> {
    let wrong = |error: &str| Err(vec![FieldError { field: "template_name".to_owned(), error: error.to_owned() }]);
    match body.get("template_name") {
        None | Some(Value::Null) => Ok(DEFAULT_TEMPLATE.to_owned()),
        Some(Value::String(name)) if (1..=64).contains(&name.trim().chars().count()) => Ok(name.trim().to_owned()),
        Some(Value::String(_)) => wrong("must have 1 to 64 characters"),
        Some(_) => wrong("must be a string"),
    }
}

/// Checks a create request against its template's limits.
pub fn create(body: &Map<String, Value>, limits: TemplateLimits) -> Result<Create, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let vcpu = integer(body, &["vcpu"], 1..=8, &mut errors).unwrap_or(1);
    let memory =
        integer(body, &["memory", "memory_mib"], i64::from(limits.min_memory_mib)..=8192, &mut errors).unwrap_or(1024);
    if memory % 2 != 0 {
        errors.add("memory", "must be an even number of MiB");
    }
    if let Some(disk) = integer(body, &["disk", "disk_mib"], 1..=i64::MAX, &mut errors)
        && u64::try_from(disk) != Ok(limits.disk_mib)
    {
        errors.add("disk", format!("cannot be chosen: the template's disk has {} MiB", limits.disk_mib));
    }
    let timeout_s = timeout(body, &mut errors);
    let auto_pause = boolean(body, "auto_pause", &mut errors).unwrap_or(false);
    let env_vars = environment(body, &["env_vars"], &mut errors);
    let network_policy = match body.get("network_policy") {
        None | Some(Value::Null) => None,
        Some(value) => NetworkPolicy::from_json(value, &mut errors),
    };
    match body.get("mounts") {
        None | Some(Value::Null) => {}
        Some(Value::Array(mounts)) if mounts.is_empty() => {}
        Some(_) => errors.add("mounts", "are not supported by this server"),
    }
    errors.or(Create {
        vcpu: u8::try_from(vcpu).unwrap_or(1),
        memory_mib: u32::try_from(memory).unwrap_or(1024),
        timeout_s,
        auto_pause,
        env_vars,
        network_policy,
    })
}

/// The life of a sandbox, seconds.
pub(crate) fn timeout(body: &Map<String, Value>, errors: &mut FieldErrors) -> u32 {
    let seconds = integer(body, &["timeout"], 1..=28_800, errors);
    let minutes = integer(body, &["timeout_min"], 1..=480, errors).map(|m| m * 60);
    if let (Some(s), Some(m)) = (seconds, minutes)
        && s != m
    {
        errors.add("timeout_min", "differs from timeout (which is in seconds)");
    }
    u32::try_from(seconds.or(minutes).unwrap_or(300)).unwrap_or(300)
}

/// A checked `process/execute` request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Execute {
    /// For `/bin/sh -c`.
    pub command: String,
    /// Working directory.
    pub cwd: Option<String>,
    /// User to run as.
    pub user: Option<String>,
    /// Environment of this command alone.
    pub env: BTreeMap<String, String>,
    /// Time limit, seconds.
    pub timeout_s: u32,
}

/// Checks a `process/execute` request.
pub fn execute(body: &Map<String, Value>) -> Result<Execute, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let command = match body.get("command") {
        Some(Value::String(command)) if command.trim().is_empty() => {
            errors.add("command", "must not be empty");
            String::new()
        }
        Some(Value::String(command)) if command.contains('\0') => {
            errors.add("command", "must not contain a NUL");
            String::new()
        }
        Some(Value::String(command)) => command.clone(),
        None | Some(Value::Null) => {
            errors.add("command", "is required");
            String::new()
        }
        Some(_) => {
            errors.add("command", "must be a string");
            String::new()
        }
    };
    let cwd = match body.get("cwd") {
        None | Some(Value::Null) => None,
        Some(Value::String(cwd)) if cwd.is_empty() => None,
        Some(Value::String(cwd)) if !cwd.contains('\0') => Some(cwd.clone()),
        Some(_) => {
            errors.add("cwd", "must be a path");
            None
        }
    };
    let user = match body.get("user") {
        None | Some(Value::Null) => None,
        Some(Value::String(user)) if !user.is_empty() && user.len() <= 64 => Some(user.clone()),
        Some(_) => {
            errors.add("user", "must be the name or number of a user in the guest");
            None
        }
    };
    let env = environment(body, &["envs", "env"], &mut errors);
    let timeout_s = integer(body, &["timeout"], 1..=28_800, &mut errors).unwrap_or(30);
    errors.or(Execute { command, cwd, user, env, timeout_s: u32::try_from(timeout_s).unwrap_or(30) })
}

/// How a list is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortBy {
    /// Time of creation.
    CreatedAt,
    /// Name of the state, then time of creation.
    State,
}

/// A checked list query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List {
    /// Only sandboxes in this state; all but `deleted` when absent.
    pub state: Option<State>,
    /// Sort field.
    pub sort: SortBy,
    /// Smallest first.
    pub ascending: bool,
    /// From 1.
    pub page: usize,
    /// 1 to 100.
    pub page_size: usize,
}

/// Checks the query of a list. Names are matched with `-` and `_` alike.
pub fn list(query: &[(String, String)]) -> Result<List, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let mut out = List { state: None, sort: SortBy::CreatedAt, ascending: false, page: 1, page_size: 20 };
    for (name, value) in query {
        match name.replace('_', "-").as_str() {
            "state" => match State::parse(value) {
                Some(state) if LISTED.contains(&state) => out.state = Some(state),
                _ => errors.add(name, format!("{value:?} is not a state that can be listed")),
            },
            "sort" => match value.as_str() {
                "created_at" => out.sort = SortBy::CreatedAt,
                "state" => out.sort = SortBy::State,
                _ => errors.add(name, "must be created_at or state"),
            },
            "order-by" => match value.as_str() {
                "asc" => out.ascending = true,
                "desc" => out.ascending = false,
                _ => errors.add(name, "must be asc or desc"),
            },
            "page" => match value.parse() {
                Ok(page @ 1..=1_000_000) => out.page = page,
                _ => errors.add(name, "must be a whole number from 1"),
            },
            "page-size" => match value.parse() {
                Ok(size @ 1..=100) => out.page_size = size,
                _ => errors.add(name, "must be a whole number from 1 to 100"),
            },
            _ => {}
        }
    }
    errors.or(out)
}

/// The integer under any of `names`; an error when it is no integer, out of range, or when two names disagree.
pub(crate) fn integer(
    body: &Map<String, Value>,
    names: &[&str],
    range: std::ops::RangeInclusive<i64>,
    errors: &mut FieldErrors,
) -> Option<i64> {
    let mut found: Option<(i64, &str)> = None;
    for name in names {
        let value = match body.get(*name) {
            None | Some(Value::Null) => continue,
            // Some clients send 1024.0 for 1024.
            Some(value) => {
                value.as_i64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 1e15).map(whole))
            }
        };
        match value {
            Some(n) if range.contains(&n) => match found {
                Some((other, before)) if other != n => errors.add(name, format!("differs from {before}")),
                _ => found = Some((n, name)),
            },
            Some(_) if *range.end() == i64::MAX => errors.add(name, format!("must be at least {}", range.start())),
            Some(_) => errors.add(name, format!("must be between {} and {}", range.start(), range.end())),
            None => errors.add(name, "must be a whole number"),
        }
    }
    found.map(|(n, _)| n)
}

#[expect(clippy::cast_possible_truncation, reason = "callers pass whole numbers below 1e15")]
fn whole(f: f64) -> i64 {
    f as i64
}

pub(crate) fn boolean(body: &Map<String, Value>, name: &str, errors: &mut FieldErrors) -> Option<bool> {
    match body.get(name) {
        None | Some(Value::Null) => None,
        Some(Value::Bool(b)) => Some(*b),
        Some(_) => {
            errors.add(name, "must be true or false");
            None
        }
    }
}

pub(crate) fn environment(
    body: &Map<String, Value>,
    names: &[&str],
    errors: &mut FieldErrors,
) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    for name in names {
        match body.get(*name) {
            None | Some(Value::Null) => {}
            Some(Value::Object(vars)) if vars.len() > MAX_ENV_VARS => {
                errors.add(name, format!("has {} entries; at most {MAX_ENV_VARS} are allowed", vars.len()));
            }
            Some(Value::Object(vars)) => {
                for (key, value) in vars {
                    match value {
                        Value::String(value) if is_variable(key) && !value.contains('\0') => {
                            out.insert(key.clone(), value.clone());
                        }
                        _ => errors.add(&format!("{name}.{key}"), "must be a variable name with a string"),
                    }
                }
            }
            Some(_) => errors.add(name, "must be an object of strings"),
        }
    }
    out
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LIMITS: TemplateLimits = TemplateLimits { min_memory_mib: 512, disk_mib: 10_240 };

    fn fields(value: &Value) -> Vec<String> {
        create(value.as_object().unwrap(), LIMITS).unwrap_err().into_iter().map(|e| e.field).collect()
    }

    fn ok(value: &Value) -> Create {
        create(value.as_object().unwrap(), LIMITS).unwrap()
    }

    #[test]
    fn an_empty_request_gets_the_defaults() {
        assert_eq!(template_name(&Map::new()).unwrap(), DEFAULT_TEMPLATE);
        let create = ok(&json!({}));
        assert_eq!((create.vcpu, create.memory_mib, create.timeout_s, create.auto_pause), (1, 1024, 300, false));
    }

    #[test]
    fn both_spellings_mean_the_same() {
        assert_eq!(
            ok(&json!({"memory": 2048, "disk": 10240, "timeout": 120})),
            ok(&json!({"memory_mib": 2048, "disk_mib": 10240, "timeout_min": 2}))
        );
        assert_eq!(ok(&json!({"memory": 2048, "memory_mib": 2048.0})).memory_mib, 2048);
        assert_eq!(fields(&json!({"memory": 2048, "memory_mib": 1024})), ["memory_mib"]);
        assert_eq!(fields(&json!({"timeout": 60, "timeout_min": 2})), ["timeout_min"]);
    }

    #[test]
    fn each_limit_is_exact() {
        for (field, low, high) in
            [("vcpu", 1, 8), ("memory", 512, 8192), ("timeout", 1, 28_800), ("timeout_min", 1, 480)]
        {
            for (value, good) in [(low - 1, false), (low, true), (high, true), (high + 1, false)] {
                assert_eq!(
                    create(json!({ field: value }).as_object().unwrap(), LIMITS).is_ok(),
                    good,
                    "{field} {value}"
                );
            }
        }
        assert_eq!(fields(&json!({"memory": 1023})), ["memory"]);
        assert_eq!(fields(&json!({"disk": 10})), ["disk"]);
        assert_eq!(
            fields(&json!({"vcpu": 1.5, "memory": "1024", "auto_pause": "yes", "env_vars": {"A": 1}})),
            ["vcpu", "memory", "auto_pause", "env_vars.A"]
        );
        assert_eq!(fields(&json!({"mounts": [{"bucket": "b"}]})), ["mounts"]);
        let small = TemplateLimits { min_memory_mib: 64, disk_mib: 0 };
        assert_eq!(create(json!({"memory": 64}).as_object().unwrap(), small).unwrap().memory_mib, 64);
    }

    #[test]
    fn execute_takes_env_and_envs() {
        let read = |v: Value| execute(v.as_object().unwrap());
        let got = read(json!({"command": "true", "envs": {"A": "1"}, "env": {"B": "2"}})).unwrap();
        assert_eq!(got.env.len(), 2);
        assert_eq!(got.timeout_s, 30);
        assert_eq!(read(json!({})).unwrap_err()[0].field, "command");
        assert_eq!(read(json!({"command": "x", "timeout": 0})).unwrap_err()[0].field, "timeout");
    }

    #[test]
    fn list_queries_are_checked() {
        let read = |pairs: &[(&str, &str)]| {
            list(&pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect::<Vec<_>>())
        };
        let got =
            read(&[("state", "paused"), ("sort", "state"), ("order-by", "asc"), ("page", "2"), ("page-size", "100")])
                .unwrap();
        assert_eq!(
            got,
            List { state: Some(State::Paused), sort: SortBy::State, ascending: true, page: 2, page_size: 100 }
        );
        for bad in [
            ("state", "deleted"),
            ("state", "x"),
            ("page", "0"),
            ("page-size", "101"),
            ("order-by", "up"),
            ("sort", "id"),
        ] {
            assert_eq!(read(&[bad]).unwrap_err()[0].field, bad.0);
        }
        assert!(read(&[("query", "")]).is_ok());
    }
}
