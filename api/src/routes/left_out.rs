//! Parts of the contract that this server does not have: their routes answer 501, after the same checks of key and sandbox as all others.

use super::{Shared, Tenant};
use crate::error::Error;
use crate::supervisor::Core;
use axum::extract::{RawPathParams, State};
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, on};
use std::sync::Arc;

/// Where left-out parts are.
const BELOW: &str = "/v1/sandbox/{id}/";

/// What is left out: a part of the API, a method, and the path below [`BELOW`]. The desktop and the code interpreter are no routes
/// of the contract but services in templates of theirs, which are not there either.
const LEFT_OUT: [(&str, MethodFilter, &str); 15] = [
    ("lsp", MethodFilter::POST, "lsp/start"),
    ("lsp", MethodFilter::POST, "lsp/stop"),
    ("lsp", MethodFilter::POST, "lsp/completions"),
    ("lsp", MethodFilter::POST, "lsp/document-symbols"),
    ("lsp", MethodFilter::POST, "lsp/did-open"),
    ("lsp", MethodFilter::POST, "lsp/did-close"),
    ("ssh", MethodFilter::POST, "ssh/access"),
    ("ssh", MethodFilter::DELETE, "ssh/{credential}"),
    ("ssh", MethodFilter::POST, "ssh/{credential}/validate"),
    ("ssh", MethodFilter::POST, "ssh/{credential}/regen"),
    ("mounts", MethodFilter::POST, "mounts"),
    ("mounts", MethodFilter::PATCH, "mounts/{mount}"),
    ("mounts", MethodFilter::DELETE, "mounts/{mount}"),
    ("desktop", ANY, "desktop/{*rest}"),
    ("code-interpreter", ANY, "code-interpreter/{*rest}"),
];

const ANY: MethodFilter =
    MethodFilter::GET.or(MethodFilter::POST).or(MethodFilter::PUT).or(MethodFilter::PATCH).or(MethodFilter::DELETE);

/// Methods and paths of what is left out, for the API's document.
pub(super) fn listed() -> Vec<(String, String)> {
    LEFT_OUT.iter().map(|(_, method, path)| (name(*method).to_owned(), format!("{BELOW}{path}"))).collect()
}

fn name(method: MethodFilter) -> &'static str {
    let named = [(MethodFilter::POST, "post"), (MethodFilter::PATCH, "patch"), (MethodFilter::DELETE, "delete")];
    named.into_iter().find_map(|(known, name)| (known == method).then_some(name)).unwrap_or("any")
}

pub(super) fn routes() -> impl Iterator<Item = (String, MethodRouter<Arc<Core>>)> {
    let mut routes: Vec<(String, MethodRouter<Arc<Core>>)> = Vec::new();
    for (part, method, path) in LEFT_OUT {
        let path = format!("{BELOW}{path}");
        let handler = on(method, move |core: Shared, tenant: Tenant, params: RawPathParams| {
            std::future::ready(refuse(core, tenant, &params, part))
        });
        match routes.iter_mut().find(|(other, _)| *other == path) {
            Some((_, methods)) => *methods = std::mem::take(methods).merge(handler),
            None => routes.push((path, handler)),
        }
    }
    routes.into_iter()
}

fn refuse(
    State(core): Shared,
    Tenant(tenant): Tenant,
    params: &RawPathParams,
    part: &'static str,
) -> Result<Response, Error> {
    let id = params.iter().find_map(|(name, value)| (name == "id").then_some(value)).unwrap_or_default();
    core.registry.find(&tenant, id)?;
    Err(Error::LeftOut(part))
}
