//! Sessions. Whoever has an API key signs in with it once; from then on the browser sends a cookie that scripts cannot read.
//!
//! A browser sends a cookie whoever makes it do so, also a page of an app in a sandbox, which is of the same site when its domain is below
//! ours. So the cookie alone opens nothing: a request must say [`FROM_PAGE`], which a page of another origin cannot add without asking
//! (CORS, and we allow nobody), and an `Origin`, where there is one, must be our own. A WebSocket carries no headers of the page's, but
//! always its `Origin`, so that must be there and be our own.
//!
//! Over TLS the cookie's name begins with `__Host-`, so that no app below our domain can set one for us.

use crate::error::Error;
use crate::invoke::Client;
use crate::supervisor::Core;
use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, COOKIE, HOST, ORIGIN, SET_COOKIE, UPGRADE};
use axum::http::{Extensions, HeaderMap, HeaderName, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use http::uri::Authority;
use serde_json::json;
use std::sync::Arc;

/// Life of a session: a working day.
const LIFE_S: i64 = 12 * 3600;
/// What the page adds to its requests; the value does not matter.
const FROM_PAGE: HeaderName = HeaderName::from_static("stasis-page");
const SECURE_COOKIE: &str = "__Host-stasis-session";
const PLAIN_COOKIE: &str = "stasis-session";
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The tenant whose session this request carries; `None` when it carries none that is good.
pub(crate) fn tenant(core: &Core, uri: &Uri, headers: &HeaderMap) -> Result<Option<String>, Error> {
    let now = core.sources.now_ms();
    let mut found = None;
    for token in tokens(headers) {
        if found.is_none() {
            found = core.journal.tenant_of_session(token, now)?;
        }
    }
    if found.is_some() {
        ours(core, uri, headers)?;
    }
    Ok(found)
}

/// Session tokens in the cookies. A cookie that an app planted may stand beside ours.
fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok());
    cookies.flat_map(|text| text.split(';')).filter_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        (name == SECURE_COOKIE || name == PLAIN_COOKIE).then_some(value)
    })
}

/// Refuses what another origin's page has the browser send.
fn ours(core: &Core, uri: &Uri, headers: &HeaderMap) -> Result<(), Error> {
    let forwarded = headers.get(FORWARDED_HOST).filter(|_| core.config.invoke.trust_forwarded);
    let host = forwarded.or_else(|| headers.get(HOST)).and_then(|host| host.to_str().ok());
    let host = host.or_else(|| uri.authority().map(Authority::as_str));
    let origin = headers.get(ORIGIN).map(|origin| origin.to_str().unwrap_or_default());
    if same_origin(origin, host, headers.contains_key(UPGRADE), headers.contains_key(FROM_PAGE)) {
        Ok(())
    } else {
        Err(Error::CrossOrigin)
    }
}

fn same_origin(origin: Option<&str>, host: Option<&str>, upgrade: bool, from_page: bool) -> bool {
    let own = origin.map(|origin| {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        authority.is_some_and(|authority| host.is_some_and(|host| host.eq_ignore_ascii_case(authority)))
    });
    match own {
        Some(own) => own && (upgrade || from_page),
        None => from_page && !upgrade,
    }
}

/// 200 with whose session it is, and what the page needs to know; 401 when there is none.
pub(super) async fn show(State(core): State<Arc<Core>>, uri: Uri, headers: HeaderMap) -> Result<Response, Error> {
    let tenant = tenant(&core, &uri, &headers)?.ok_or(Error::Unauthorized)?;
    Ok(described(&core, &tenant))
}

fn described(core: &Core, tenant: &str) -> Response {
    let templates = core.templates.names().unwrap_or_default();
    let body = json!({ "tenant": tenant, "version": env!("CARGO_PKG_VERSION"), "templates": templates });
    ([(CACHE_CONTROL, "no-store")], Json(body)).into_response()
}

/// `{"key": …}`: 200 and the cookie, or 401.
pub(super) async fn open(
    State(core): State<Arc<Core>>,
    uri: Uri,
    headers: HeaderMap,
    extensions: Extensions,
    body: Body,
) -> Result<Response, Error> {
    ours(&core, &uri, &headers)?;
    let body = crate::routes::json_body(&core, body).await?;
    let key = body.get("key").and_then(|key| key.as_str()).unwrap_or_default().trim();
    let tenant = core.journal.tenant_of_key(key)?.ok_or(Error::Unauthorized)?;
    core.rates.take(&tenant, core.sources.now_ms())?;
    let token = core.journal.open_session(key, LIFE_S * 1000, &core.sources)?.ok_or(Error::Unauthorized)?;
    let cookie = cookie(is_secure(&core, &headers, &extensions), &token, LIFE_S);
    Ok(([(SET_COOKIE, cookie)], described(&core, &tenant)).into_response())
}

/// 204; the session is over, here and in the browser.
pub(super) async fn end(
    State(core): State<Arc<Core>>,
    uri: Uri,
    headers: HeaderMap,
    extensions: Extensions,
) -> Result<Response, Error> {
    ours(&core, &uri, &headers)?;
    for token in tokens(&headers) {
        core.journal.end_session(token)?;
    }
    let cookie = cookie(is_secure(&core, &headers, &extensions), "", 0);
    Ok((StatusCode::NO_CONTENT, [(SET_COOKIE, cookie)]).into_response())
}

/// The browser speaks TLS: to us, or to a proxy of the operator's.
fn is_secure(core: &Core, headers: &HeaderMap, extensions: &Extensions) -> bool {
    let forwarded = core.config.invoke.trust_forwarded && headers.get(FORWARDED_PROTO).is_some_and(|p| p == "https");
    forwarded || extensions.get::<Client>().is_some_and(|client| client.secure)
}

fn cookie(secure: bool, token: &str, life_s: i64) -> String {
    let (name, secure) = if secure { (SECURE_COOKIE, "; Secure") } else { (PLAIN_COOKIE, "") };
    format!("{name}={token}; Path=/; Max-Age={life_s}; HttpOnly; SameSite=Strict{secure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_page_is_listened_to() {
        let ours = Some("https://Stasis.example:7878");
        let host = Some("stasis.example:7878");
        assert!(same_origin(ours, host, false, true), "a request of the page");
        assert!(same_origin(None, host, false, true), "a GET of the page, which has no Origin");
        assert!(same_origin(ours, host, true, false), "a WebSocket of the page");
        assert!(!same_origin(None, host, true, true), "a WebSocket without an Origin");
        assert!(!same_origin(None, host, false, false), "a link, an image, a form's GET");
        assert!(!same_origin(ours, host, false, false), "a form of the page");
        for origin in ["https://evil.example", "https://stasis.example", "https://a.stasis.example:7878", "null", ""] {
            for (upgrade, from_page) in [(true, false), (false, true), (true, true)] {
                assert!(!same_origin(Some(origin), host, upgrade, from_page), "{origin}");
            }
        }
        assert!(!same_origin(ours, None, false, true));
    }

    #[test]
    fn every_token_in_the_cookies_is_seen() {
        let mut headers = HeaderMap::new();
        headers.append(COOKIE, "a=b; stasis-session=one".parse().unwrap());
        headers.append(COOKIE, "__Host-stasis-session=two;stasis-session-2=three".parse().unwrap());
        assert_eq!(tokens(&headers).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn a_cookie_is_kept_from_scripts_and_other_sites() {
        assert_eq!(
            cookie(true, "t", 60),
            "__Host-stasis-session=t; Path=/; Max-Age=60; HttpOnly; SameSite=Strict; Secure"
        );
        assert!(!cookie(false, "t", 60).contains("Secure"));
    }
}
