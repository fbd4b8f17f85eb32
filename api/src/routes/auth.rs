//! Who asks: an API key in `leap0-authorization` or, when that is absent, in `authorization`; `Bearer ` is optional in both.
//!
//! The first wins because it exists for requests whose `authorization` belongs to somebody else. A request without either may carry a
//! session of the page for people ([`crate::ui`]).

use crate::error::Error;
use crate::supervisor::Core;
use crate::ui::session;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, Uri, header};
use std::sync::Arc;

/// The tenant that the request's key speaks for. Each request that takes this counts against the rates.
pub(super) struct Tenant(pub(super) String);

impl FromRequestParts<Arc<Core>> for Tenant {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Self, Error> {
        let tenant = authenticated(core, &parts.uri, &parts.headers)?;
        core.rates.take(&tenant, core.sources.now_ms())?;
        Ok(Self(tenant))
    }
}

/// The tenant that a key or a session speaks for.
pub(super) fn authenticated(core: &Core, uri: &Uri, headers: &HeaderMap) -> Result<String, Error> {
    if key_of(headers).is_some() {
        return tenant_of(core, headers);
    }
    session::tenant(core, uri, headers)?.ok_or(Error::Unauthorized)
}

/// The tenant that the key in these headers speaks for.
pub(crate) fn tenant_of(core: &Core, headers: &HeaderMap) -> Result<String, Error> {
    let key = key_of(headers).ok_or(Error::Unauthorized)?;
    core.journal.tenant_of_key(key)?.ok_or(Error::Unauthorized)
}

fn key_of(headers: &HeaderMap) -> Option<&str> {
    let value =
        headers.get("leap0-authorization").or_else(|| headers.get(header::AUTHORIZATION))?.to_str().ok()?.trim();
    let key = match value.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => key.trim(),
        Some(_) => return None,
        None => value,
    };
    (!key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(pairs: &[(&'static str, &'static str)]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        key_of(&headers).map(str::to_owned)
    }

    #[test]
    fn both_headers_with_and_without_bearer() {
        for name in ["authorization", "leap0-authorization"] {
            for value in ["k", "Bearer k", "bearer  k ", "BEARER k"] {
                assert_eq!(key(&[(name, value)]).as_deref(), Some("k"), "{name} {value}");
            }
            for value in ["", " ", "Bearer ", "Basic k"] {
                assert_eq!(
                    key(&[(name, value)]),
                    if value == "Bearer " { Some("Bearer".to_owned()) } else { None },
                    "{name} {value:?}"
                );
            }
        }
        assert_eq!(key(&[]), None);
    }

    #[test]
    fn our_own_header_wins() {
        assert_eq!(key(&[("authorization", "Basic x"), ("leap0-authorization", "k")]).as_deref(), Some("k"));
    }
}
