//! The page for people at `/ui`: its files, which are in the program, and its sessions (`session`). It is a client of the REST API like
//! any other: what it shows comes from `/v1/events`, and what it does is a request that has a verb on the command line, too.
//!
//! The page loads nothing from elsewhere and runs no script but its own files: [`POLICY`] has the browser see to it.
//!
//! | file | what |
//! | --- | --- |
//! | `page/index.html`, `style.css` | the page and its looks |
//! | `page/app.js` | signing in and out, creating, what the connection is doing |
//! | `page/api.js` | requests, and the stream of events |
//! | `page/sandboxes.js` | the list: states, costs, buttons |
//! | `page/terminal.js` | the terminal: keys, the WebSocket, drawing |
//! | `page/screen.js` | what a terminal shows, from the bytes that it was sent; knows nothing of the page |

pub(crate) mod session;

use crate::supervisor::Core;
use axum::extract::Path;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{MethodRouter, get};
use std::sync::Arc;

/// Nothing but our own files, no inline code, no frame around us, no form that is sent, and no text that becomes markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// What browsers are told about each answer of the page.
const HEADERS: [(HeaderName, &str); 5] = [
    (HeaderName::from_static("content-security-policy"), POLICY),
    (HeaderName::from_static("x-content-type-options"), "nosniff"),
    (HeaderName::from_static("referrer-policy"), "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

struct File {
    name: &'static str,
    kind: &'static str,
    content: &'static str,
}

macro_rules! file {
    ($name:literal, $kind:literal) => {
        File { name: $name, kind: $kind, content: include_str!(concat!("page/", $name)) }
    };
}

const FILES: [File; 8] = [
    file!("index.html", "text/html; charset=utf-8"),
    file!("style.css", "text/css; charset=utf-8"),
    file!("icon.svg", "image/svg+xml"),
    file!("app.js", "text/javascript; charset=utf-8"),
    file!("api.js", "text/javascript; charset=utf-8"),
    file!("sandboxes.js", "text/javascript; charset=utf-8"),
    file!("terminal.js", "text/javascript; charset=utf-8"),
    file!("screen.js", "text/javascript; charset=utf-8"),
];

pub(crate) fn routes() -> impl Iterator<Item = (String, MethodRouter<Arc<Core>>)> {
    let session = get(session::show).post(session::open).delete(session::end);
    let routes = [("/ui", get(page)), ("/ui/session", session), ("/ui/{file}", get(file))];
    routes.into_iter().map(|(path, handler)| (path.to_owned(), handler))
}

async fn page(headers: HeaderMap) -> Response {
    answer("index.html", &headers)
}

async fn file(Path(name): Path<String>, headers: HeaderMap) -> Response {
    answer(&name, &headers)
}

fn answer(name: &str, headers: &HeaderMap) -> Response {
    let Some(file) = FILES.iter().find(|file| file.name == name) else {
        return (StatusCode::NOT_FOUND, HEADERS, "there is no such file\n").into_response();
    };
    // Asked for each time, so that a page never runs with files of another version.
    let tag = format!("\"{}\"", blake3::hash(file.content.as_bytes()).to_hex());
    let caching = [(ETAG, tag.as_str()), (CACHE_CONTROL, "no-cache")];
    if headers.get(IF_NONE_MATCH).is_some_and(|known| known == tag.as_str()) {
        return (StatusCode::NOT_MODIFIED, HEADERS, caching).into_response();
    }
    (HEADERS, caching, [(CONTENT_TYPE, file.kind)], file.content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_as_they_are_asked_for() {
        for file in &FILES {
            let response = answer(file.name, &HeaderMap::new());
            assert_eq!(response.status(), StatusCode::OK);
            let mut known = HeaderMap::new();
            known.insert(IF_NONE_MATCH, response.headers()[ETAG].clone());
            assert_eq!(answer(file.name, &known).status(), StatusCode::NOT_MODIFIED);
        }
        assert_eq!(answer("../mod.rs", &HeaderMap::new()).status(), StatusCode::NOT_FOUND);
    }

    #[test]
    fn the_page_names_only_its_own_files_and_has_no_inline_code() {
        let page = FILES[0].content;
        for part in page.split(['"', '\'']).filter(|part| part.starts_with('/') || part.contains("://")) {
            let own = part.strip_prefix("/ui/").is_some_and(|name| FILES.iter().any(|file| file.name == name));
            assert!(own, "{part}");
        }
        assert!(!page.contains("<style") && !page.contains("style=") && !page.contains(" onclick"));
    }
}
