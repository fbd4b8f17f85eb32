//! The API's description: `GET /openapi.json` for programs, `GET /docs` for people. Neither needs a key.
//!
//! The page is `docs.html`, which draws `/openapi.json` without anything from elsewhere.

use super::document;
use super::table::Route;
use crate::openapi::{Operation, Tag};
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use std::sync::OnceLock;

const PAGE: &str = include_str!("docs.html");
/// What the page may do: run its own script, and ask this server for the document.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get(
            "/openapi.json",
            json,
            Operation::new("getOpenAPI", Tag::Host, "Show this document")
                .open()
                .answers::<serde_json::Map<String, serde_json::Value>>(200, "OpenAPI 3.1."),
        ),
        Route::get(
            "/docs",
            page,
            Operation::new("getDocs", Tag::Host, "Show this document as a page")
                .open()
                .answers_text("A page.", "text/html"),
        ),
    ]
}

async fn json() -> Response {
    static DOCUMENT: OnceLock<Bytes> = OnceLock::new();
    let text = DOCUMENT.get_or_init(|| document().to_string().into()).clone();
    ([(CONTENT_TYPE, "application/json")], text).into_response()
}

async fn page() -> Response {
    ([(CONTENT_TYPE, "text/html; charset=utf-8"), (CONTENT_SECURITY_POLICY, POLICY)], PAGE).into_response()
}
