//! What a sandbox's network does. An extension of ours.

use super::table::Route;
use super::{Path, Shared, Tenant};
use crate::error::Error;
use crate::openapi::{Operation, Tag};
use crate::wire::network::NetworkActivity;
use axum::Json;
use axum::extract::State;

pub(super) fn routes() -> Vec<Route> {
    let operation =
        Operation::new("getSandboxNetwork", Tag::Sandbox, "Show what a sandbox reached and what it was refused")
            .says("Counters by rule and the last refusals with their reasons. Wakes nothing.")
            .of_sandbox()
            .answers::<NetworkActivity>(200, "What is known.");
    vec![Route::get("/v1/sandbox/{id}/network", network, operation)]
}

async fn network(
    State(core): Shared,
    Tenant(tenant): Tenant,
    Path(id): Path<String>,
) -> Result<Json<NetworkActivity>, Error> {
    let sandbox = core.registry.find(&tenant, &id)?;
    core.network_activity(&sandbox).await.map(Json)
}
