//! Sandboxes: create, get, list, delete, undelete, pause, resume, execute, recover.

use super::{Shared, Tenant, answers, json_body};
use crate::error::Error;
use crate::record::Record;
use crate::states;
use crate::supervisor::{catalogue, operations};
use crate::validate::{self, List, SortBy};
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

/// 201 with the sandbox, once it runs.
pub(super) async fn create(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let (record, timing) = operations::create(&core, &tenant, &body).await?;
    Ok(answers::timed(StatusCode::CREATED, answers::sandbox(&record), &timing))
}

/// 200 with the sandbox as it is. Wakes nothing, or asking would defeat pausing.
pub(super) async fn get(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    Ok(Json(answers::live_sandbox(&sandbox)).into_response())
}

/// 204.
pub(super) async fn delete(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    operations::delete(&core, &sandbox).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// 200 with the sandbox, paused as it was at its last pause; 404 once the collector has purged it.
pub(super) async fn undelete(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let record = operations::undelete(&core, &tenant, &id).await?;
    Ok(Json(answers::sandbox(&record)).into_response())
}

/// 201 with the sandbox, once its head is committed and its VM is gone.
pub(super) async fn pause(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::pause(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::CREATED, answers::sandbox(&record), &timing))
}

/// 200 with the sandbox, once its guest knows that it is awake.
pub(super) async fn resume(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::resume(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::OK, answers::sandbox(&record), &timing))
}

/// 200 with what the command wrote, whatever its exit status.
pub(super) async fn execute(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
    body: Body,
) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let body = json_body(&core, body).await?;
    let command = validate::execute(&body).map_err(Error::Invalid)?;
    let done = operations::execute(&core, &sandbox, command).await?;
    let body = json!({
        "exit_code": done.exit_code,
        "stdout": done.stdout,
        "stderr": done.stderr,
        "result": done.stdout,
        "stdout_dropped": done.dropped.0,
        "stderr_dropped": done.dropped.1,
        "timed_out": done.timed_out,
    });
    Ok(answers::timed(StatusCode::OK, body, &done.timing))
}

/// 200 with what was found in the bucket. `{"take_over": true}` also takes what a dead supervisor held.
pub(super) async fn recover(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let take_over = body.get("take_over").and_then(Value::as_bool).unwrap_or(false);
    let found = catalogue::recover(&core, Some(&tenant), take_over).await?;
    Ok(Json(json!({ "items": found })).into_response())
}

/// 200 with one page of the tenant's sandboxes. Deleted ones are not listed.
pub(super) async fn list(
    State(core): Shared,
    Tenant(tenant): Tenant,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let query = pairs(query.as_deref().unwrap_or_default());
    let list = validate::list(&query).map_err(Error::Invalid)?;
    let records = core.registry.all().into_iter().filter(|s| s.tenant == tenant).map(|s| s.record()).collect();
    let (items, total) = page(records, list);
    let items = items.iter().map(answers::item).collect::<Vec<_>>();
    Ok(Json(json!({ "items": items, "total_items": total })).into_response())
}

/// The names and values of a query.
pub(super) fn pairs(query: &str) -> Vec<(String, String)> {
    reqwest::Url::parse(&format!("http://x/?{query}"))
        .map(|url| url.query_pairs().map(|(a, b)| (a.into_owned(), b.into_owned())).collect())
        .unwrap_or_default()
}

fn page(mut records: Vec<Record>, list: List) -> (Vec<Record>, usize) {
    records.retain(|r| r.state != states::State::Deleted && list.state.is_none_or(|state| r.state == state));
    records.sort_by(|a, b| {
        let by_time = (a.spec.created_at, &a.id).cmp(&(b.spec.created_at, &b.id));
        match list.sort {
            SortBy::CreatedAt => by_time,
            SortBy::State => a.state.as_str().cmp(b.state.as_str()).then(by_time),
        }
    });
    if !list.ascending {
        records.reverse();
    }
    let total = records.len();
    let items = records.into_iter().skip((list.page - 1) * list.page_size).take(list.page_size).collect();
    (items, total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;
    use crate::states::State;

    fn records() -> Vec<Record> {
        ["sbx-a", "sbx-b", "sbx-c", "sbx-d"]
            .into_iter()
            .zip([State::Running, State::Paused, State::Deleted, State::Paused])
            .enumerate()
            .map(|(i, (id, state))| {
                let mut record = sample(id);
                record.state = state;
                record.spec.created_at = i64::try_from(i).unwrap();
                record
            })
            .collect()
    }

    fn ids(query: &str) -> (String, usize) {
        let (items, total) = page(records(), validate::list(&pairs(query)).unwrap());
        (items.iter().map(|r| r.id.as_str().trim_start_matches("sbx-")).collect(), total)
    }

    #[test]
    fn pages_are_sorted_filtered_and_counted_before_paging() {
        assert_eq!(ids(""), ("dba".to_owned(), 3));
        assert_eq!(ids("order-by=asc"), ("abd".to_owned(), 3));
        assert_eq!(ids("state=paused"), ("db".to_owned(), 2));
        assert_eq!(ids("sort=state&order-by=asc"), ("bda".to_owned(), 3));
        assert_eq!(ids("page=2&page-size=2"), ("a".to_owned(), 3));
        assert_eq!(ids("page=9&page-size=2"), (String::new(), 3));
    }
}
