//! Sandboxes: create, get, list, delete, undelete, pause, resume, recover.

use super::table::Route;
use super::{Path, Shared, Tenant, answers, json_body};
use crate::error::Error;
use crate::openapi::{Operation, Tag};
use crate::record::Record;
use crate::states;
use crate::supervisor::{catalogue, operations};
use crate::validate::{self, FieldErrors, List, SortBy, boolean};
use crate::wire::sandboxes::{CreateSandbox, ListSandboxes, Recover, Recovered, Sandbox, SandboxList};
use axum::Json;
use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

pub(super) fn routes() -> Vec<Route> {
    let op = |id: &str, summary| Operation::new(id, Tag::Sandbox, summary);
    vec![
        Route::post(
            "/v1/sandbox",
            create,
            op("createSandbox", "Make a sandbox")
                .says("Answers once it runs. It lives for its `timeout`, from each boot and each wake.")
                .body::<CreateSandbox>()
                .answers::<Sandbox>(201, "It runs.")
                .changes("The organisation has as many running sandboxes as it may have.")
                .timed(),
        ),
        Route::get(
            "/v1/sandboxes",
            list,
            op("listSandboxes", "List sandboxes")
                .says("Deleted ones are not listed.")
                .query::<ListSandboxes>()
                .answers::<SandboxList>(200, "One page."),
        ),
        Route::get(
            "/v1/sandbox/{id}",
            get,
            op("getSandbox", "Show a sandbox")
                .says("Wakes nothing and does not prolong its life. A deleted one is shown for a day, with the reason.")
                .of_sandbox()
                .answers::<Sandbox>(200, "As it is now."),
        ),
        Route::delete(
            "/v1/sandbox/{id}",
            delete,
            op("deleteSandbox", "Delete a sandbox")
                .says("One that runs is ended first. `undelete` puts it back until the collector has purged it.")
                .of_sandbox()
                .done(204, "It is deleted.")
                .changes("Another operation is under way."),
        ),
        Route::post(
            "/v1/sandbox/{id}/pause",
            pause,
            op("pauseSandbox", "Put a sandbox to sleep")
                .says(
                    "VM state, memory and disk are captured and uploaded, the head is committed, and the VM is ended. Answers once all of it \
                     is durable. A pause that fails leaves the sandbox running. The next request that needs the guest wakes it.",
                )
                .of_sandbox()
                .answers::<Sandbox>(201, "It is paused, and durable.")
                .changes("It does not run.")
                .timed(),
        ),
        Route::post(
            "/v1/sandbox/{id}/resume",
            resume,
            op("resumeSandbox", "Wake a sandbox")
                .says("One that runs already is answered as it is. Of several requests at once, one wakes and all wait.")
                .of_sandbox()
                .answers::<Sandbox>(200, "It runs.")
                .changes("It is neither paused nor running.")
                .timed(),
        ),
        Route::post(
            "/v1/sandbox/{id}/undelete",
            undelete,
            op("undeleteSandbox", "Put a deleted sandbox back")
                .says("It is paused, or stopped, as it was at its last pause or stop.")
                .fails(404, "There is no such sandbox, or it is purged.")
                .answers::<Sandbox>(200, "It is back.")
                .changes("It is not deleted, or was never paused."),
        ),
        Route::post(
            "/v1/recover",
            recover,
            op("recoverSandboxes", "Take up sandboxes that are in the bucket and unknown here")
                .body::<Recover>()
                .answers::<Recovered>(200, "What was found, head by head.")
                .changes("Another operation is under way."),
        ),
    ]
}

/// 201 with the sandbox, once it runs.
async fn create(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let (record, timing) = operations::create(&core, &tenant, &body).await?;
    Ok(answers::timed(StatusCode::CREATED, answers::sandbox(&record), &timing))
}

/// 200 with the sandbox as it is. Wakes nothing, or asking would defeat pausing.
async fn get(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    Ok(Json(answers::live_sandbox(&sandbox)).into_response())
}

/// 204.
async fn delete(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    operations::delete(&core, &sandbox).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// 200 with the sandbox, paused as it was at its last pause; 404 once the collector has purged it.
async fn undelete(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let record = operations::undelete(&core, &tenant, &id).await?;
    Ok(Json(answers::sandbox(&record)).into_response())
}

/// 201 with the sandbox, once its head is committed and its VM is gone.
async fn pause(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::pause(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::CREATED, answers::sandbox(&record), &timing))
}

/// 200 with the sandbox, once its guest knows that it is awake.
async fn resume(State(core): Shared, Tenant(tenant): Tenant, Path(id): Path<String>) -> Result<Response, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    let (record, timing) = operations::resume(&core, &sandbox).await?;
    Ok(answers::timed(StatusCode::OK, answers::sandbox(&record), &timing))
}

/// 200 with what was found in the bucket. `{"take_over": true}` also takes what a dead supervisor held.
async fn recover(State(core): Shared, Tenant(tenant): Tenant, body: Body) -> Result<Response, Error> {
    let body = json_body(&core, body).await?;
    let mut errors = FieldErrors::default();
    let take_over = boolean(&body, "take_over", &mut errors).unwrap_or(false);
    errors.or(()).map_err(Error::Invalid)?;
    let items = catalogue::recover(&core, Some(&tenant), take_over).await?;
    Ok(Json(Recovered { items }).into_response())
}

/// 200 with one page of the tenant's sandboxes. Deleted ones are not listed.
async fn list(State(core): Shared, Tenant(tenant): Tenant, RawQuery(query): RawQuery) -> Result<Response, Error> {
    let query = pairs(query.as_deref().unwrap_or_default());
    let list = validate::list(&query).map_err(Error::Invalid)?;
    let records = core.registry.all().into_iter().filter(|s| s.tenant == tenant).map(|s| s.record()).collect();
    let (items, total) = page(records, list);
    let items = items.iter().map(answers::item).collect();
    Ok(Json(SandboxList { items, total_items: total }).into_response())
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
