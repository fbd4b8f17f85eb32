//! Headers of requests and answers on their way through: those that are between two neighbours stay behind, then a transform's are taken out
//! and put in. In that order: a guest that lists a header in `Connection` would otherwise have it taken out behind us.

use http::header::{CONNECTION, HOST, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::rules::Rewrite;

/// Between neighbours (RFC 9110 §7.6.1, and two that were never standard).
const NEIGHBOURS: [HeaderName; 5] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The request asks for a WebSocket, the only protocol that HTTP/1.1 connections are handed over to. After a change to HTTP/2 (`h2c`) requests
/// could no longer be seen.
pub(super) fn wants_websocket(headers: &HeaderMap) -> bool {
    let has = |name, token: &str| {
        let values = headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
        values.flat_map(|v| v.split(',')).any(|t| t.trim().eq_ignore_ascii_case(token))
    };
    has(CONNECTION, "upgrade") && headers.get_all(UPGRADE).iter().count() == 1 && has(UPGRADE, "websocket")
}

/// Takes out what is between neighbours.
fn between_neighbours(headers: &mut HeaderMap) {
    let listed: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|token| HeaderName::from_bytes(token.trim().as_bytes()).ok())
        // The name that was checked is not for the guest to take back.
        .filter(|name| name != HOST)
        .collect();
    let trailers = headers.get(TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in listed.iter().chain(&NEIGHBOURS) {
        headers.remove(name);
    }
    headers.remove(TE);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

fn hand_over(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// A request's headers as they go to the server.
pub(super) fn to_server(headers: &mut HeaderMap, websocket: bool, rewrite: Option<&Rewrite>) {
    between_neighbours(headers);
    if let Some(rewrite) = rewrite {
        for name in &rewrite.strip {
            headers.remove(name);
        }
        for (name, value) in &rewrite.inject {
            // It was one when the policy was read.
            if let Ok(mut value) = HeaderValue::from_str(value.reveal()) {
                value.set_sensitive(true);
                headers.insert(name, value);
            }
        }
    }
    if websocket {
        hand_over(headers);
    }
}

/// An answer's headers as they go to the guest.
pub(super) fn to_guest(headers: &mut HeaderMap, websocket: bool) {
    between_neighbours(headers);
    if websocket {
        hand_over(headers);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::Secret;

    fn map(headers: &[(&str, &str)]) -> HeaderMap {
        let pair = |(n, v): &(&str, &str)| (n.parse::<HeaderName>().unwrap(), v.parse::<HeaderValue>().unwrap());
        headers.iter().map(pair).collect()
    }

    #[test]
    fn a_guest_cannot_have_an_injected_header_taken_out() {
        let rewrite = Rewrite {
            strip: vec!["cookie".parse().unwrap()],
            inject: vec![("authorization".parse().unwrap(), Secret::new("Bearer s3cret".to_owned()))],
        };
        let mut headers = map(&[
            ("host", "a.example.com"),
            ("connection", "authorization, Host, x-hop"),
            ("authorization", "mine"),
            ("authorization", "mine too"),
            ("cookie", "a=b"),
            ("x-hop", "1"),
            ("keep-alive", "5"),
            ("te", "trailers"),
        ]);
        to_server(&mut headers, false, Some(&rewrite));
        assert_eq!(headers, map(&[("host", "a.example.com"), ("authorization", "Bearer s3cret"), ("te", "trailers")]));
        assert!(!format!("{headers:?}").contains("s3cret"));
    }

    #[test]
    fn only_websockets_are_handed_over() {
        assert!(wants_websocket(&map(&[("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket")])));
        assert!(!wants_websocket(&map(&[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c")])));
        assert!(!wants_websocket(&map(&[("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "h2c")])));
        assert!(!wants_websocket(&map(&[("upgrade", "websocket")])));
        let mut headers = map(&[("connection", "upgrade"), ("upgrade", "h2c"), ("accept", "a")]);
        to_server(&mut headers, false, None);
        assert_eq!(headers, map(&[("accept", "a")]));
        let mut headers = map(&[("connection", "upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "k")]);
        to_server(&mut headers, true, None);
        assert_eq!(headers.len(), 3);
    }
}
