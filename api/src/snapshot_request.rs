//! Requests about named snapshots, from JSON and queries to checked values. Pure, as [`crate::validate`] is.

use crate::network_policy::NetworkPolicy;
use crate::validate::{FieldError, FieldErrors, boolean, environment, timeout};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Characters of a name at most.
const MAX_NAME: usize = 64;

/// A checked request for a named snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    /// Its name; one is made up when absent.
    pub name: Option<String>,
    /// Delete the sandbox when the snapshot is durable.
    pub kill_sandbox_after: bool,
}

/// A checked request for a sandbox from a named snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// The snapshot's name.
    pub name: String,
    /// Life after each entry to `running`, seconds.
    pub timeout_s: u32,
    /// Pause instead of deleting when the life is over.
    pub auto_pause: bool,
    /// Egress policy; the snapshot's when absent.
    pub network_policy: Option<NetworkPolicy>,
    /// Environment of every process, on top of the snapshot's.
    pub env_vars: BTreeMap<String, String>,
}

/// How a list is sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SortBy {
    /// Time of creation.
    CreatedAt,
    /// Template, then time of creation.
    TemplateId,
}

/// A checked list query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct List {
    /// Only snapshots with this in their name.
    pub query: String,
    /// Sort field.
    pub sort: SortBy,
    /// Smallest first.
    pub ascending: bool,
    /// From 1.
    pub page: usize,
    /// 1 to 100.
    pub page_size: usize,
}

fn name(body: &Map<String, Value>, field: &str, errors: &mut FieldErrors) -> Option<String> {
    match body.get(field) {
        None | Some(Value::Null) => None,
        Some(Value::String(name)) if (1..=MAX_NAME).contains(&name.trim().chars().count()) => {
            Some(name.trim().to_owned())
        }
        Some(Value::String(_)) => {
            errors.add(field, format!("must have 1 to {MAX_NAME} characters"));
            None
        }
        Some(_) => {
            errors.add(field, "must be a string");
            None
        }
    }
}

/// Checks a request for a named snapshot.
pub fn create(body: &Map<String, Value>) -> Result<Create, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let name = name(body, "name", &mut errors);
    let kill_sandbox_after = boolean(body, "kill_sandbox_after", &mut errors).unwrap_or(false);
    errors.or(Create { name, kill_sandbox_after })
}

/// Checks a request for a sandbox from a named snapshot.
pub fn restore(body: &Map<String, Value>) -> Result<Restore, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let name = name(body, "snapshot_name", &mut errors);
    if name.is_none() && errors.is_empty() {
        errors.add("snapshot_name", "is required");
    }
    let timeout_s = timeout(body, &mut errors);
    let auto_pause = boolean(body, "auto_pause", &mut errors).unwrap_or(false);
    let network_policy = match body.get("network_policy") {
        None | Some(Value::Null) => None,
        Some(value) => NetworkPolicy::from_json(value, &mut errors),
    };
    let env_vars = environment(body, &["env_vars"], &mut errors);
    errors.or(Restore { name: name.unwrap_or_default(), timeout_s, auto_pause, network_policy, env_vars })
}

/// Checks the query of a list. Names are matched with `-` and `_` alike.
pub fn list(query: &[(String, String)]) -> Result<List, Vec<FieldError>> {
    let mut errors = FieldErrors::default();
    let mut out = List { query: String::new(), sort: SortBy::CreatedAt, ascending: false, page: 1, page_size: 20 };
    for (name, value) in query {
        match name.replace('_', "-").as_str() {
            "query" if value.chars().count() <= MAX_NAME => out.query.clone_from(value),
            "query" => errors.add(name, format!("must have at most {MAX_NAME} characters")),
            "sort" => match value.as_str() {
                "created_at" => out.sort = SortBy::CreatedAt,
                "template_id" => out.sort = SortBy::TemplateId,
                _ => errors.add(name, "must be created_at or template_id"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn body(value: &Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn names_are_trimmed_and_bounded() {
        assert_eq!(create(&Map::new()).unwrap(), Create { name: None, kill_sandbox_after: false });
        assert_eq!(create(&body(&json!({"name": " a "}))).unwrap().name.unwrap(), "a");
        for bad in [
            json!({"name": " "}),
            json!({"name": 1}),
            json!({"name": "x".repeat(65)}),
            json!({"kill_sandbox_after": 1}),
        ] {
            assert_eq!(create(&body(&bad)).unwrap_err().len(), 1, "{bad}");
        }
    }

    #[test]
    fn a_restore_needs_a_name_and_takes_the_rest_from_the_snapshot() {
        assert_eq!(restore(&Map::new()).unwrap_err()[0].field, "snapshot_name");
        let asked = restore(&body(&json!({"snapshot_name": "a", "timeout": 60, "auto_pause": true}))).unwrap();
        assert_eq!((asked.timeout_s, asked.auto_pause, asked.network_policy), (60, true, None));
        assert_eq!(restore(&body(&json!({"snapshot_name": "a"}))).unwrap().timeout_s, 300);
    }

    #[test]
    fn an_empty_query_is_no_filter() {
        let query = [("query".to_owned(), String::new()), ("order_by".to_owned(), "asc".to_owned())];
        let asked = list(&query).unwrap();
        assert!(asked.query.is_empty() && asked.ascending);
        assert!(list(&[("sort".to_owned(), "size".to_owned())]).is_err());
    }
}
