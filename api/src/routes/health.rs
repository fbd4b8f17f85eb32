//! Health: no key needed, nothing secret said.

use super::Shared;
use super::table::Route;
use crate::error::chain;
use crate::host::Kvm;
use crate::openapi::{Operation, Tag};
use crate::wire::host::{Health, NotReady, Ready, StoreHealth};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get(
            "/healthz",
            health,
            Operation::new("getHealth", Tag::Host, "Ask whether the supervisor lives")
                .open()
                .answers::<Health>(200, "It does; what does not work is said."),
        ),
        Route::get(
            "/readyz",
            ready,
            Operation::new("getReadiness", Tag::Host, "Ask whether sandboxes can be made and paused now")
                .open()
                .answers::<Ready>(200, "They can.")
                .fails_with::<NotReady>(503, "They cannot."),
        ),
    ]
}

/// Alive, and what it cannot do.
async fn health(State(core): Shared) -> Json<Health> {
    let mut caveats = core.store.caveats().to_vec();
    if !core.store.is_shared() {
        caveats.push("the store has no conditional writes: only this supervisor may use it".to_owned());
    }
    caveats.extend(core.kvm.advice());
    caveats.extend(core.network.caveat());
    caveats.extend(core.launcher.caveats().iter().cloned());
    Json(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
        owner: core.owner.clone(),
        store: StoreHealth { conditional_writes: core.store.is_shared() },
        caveats,
    })
}

/// 200 when sandboxes can be made and paused now: the store answers and KVM is there. 503 with the reason otherwise.
async fn ready(State(core): Shared) -> Response {
    let unready = |reason: &str| {
        let body = Json(NotReady { status: "not ready", message: reason.to_owned() });
        (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
    };
    if let (Kvm::Missing | Kvm::Forbidden(_), Some(advice)) = (&core.kvm, core.kvm.advice()) {
        return unready(&advice);
    }
    match core.store.objects().list("v1/probe/", None).await {
        Ok(_) => {
            let store = StoreHealth { conditional_writes: core.store.is_shared() };
            Json(Ready { status: "ready", store, kvm: true }).into_response()
        }
        Err(error) => unready(&chain(&error)),
    }
}
