//! What of a request's headers goes to the guest, and what of an answer's headers goes to the client. Pure.
//!
//! - Hop-by-hop headers end here (RFC 9110 §7.6.1), but for an upgrade, which is passed on as this hop's own.
//! - An API key never reaches a guest: neither in our own header, nor in `authorization` when it authenticated the request or has the form of
//!   a key. Any other `authorization` is the app's.
//! - `X-Forwarded-For`, `-Host` and `-Proto` say what the client did; what it claims itself is believed only when it is a proxy of the operator.

use crate::journal::keys::looks_like_key;
use http::header::{
    AUTHORIZATION, CONNECTION, COOKIE, EXPECT, Entry, FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE,
};
use std::net::IpAddr;

/// Our own header for a key.
pub(super) const KEY_HEADER: HeaderName = HeaderName::from_static("leap0-authorization");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// How a request came in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arrival<'a> {
    /// Who sent it.
    pub(super) peer: IpAddr,
    /// Over TLS.
    pub(super) secure: bool,
    /// The name that it was sent to.
    pub(super) host: &'a str,
    /// What the peer says of its own clients is true.
    pub(super) trusted: bool,
}

/// The protocol that the client wants to go on with, when it may: what is not HTTP afterwards is none of our business. HTTP/2 in clear has
/// another way in.
pub(super) fn wanted_upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = tokens(headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let protocol = headers.get(UPGRADE).filter(|_| asked)?;
    let plain = protocol.to_str().is_ok_and(|text| !text.trim().to_ascii_lowercase().starts_with("h2c"));
    plain.then(|| protocol.clone())
}

/// Makes the headers of a client's request those of the request to the guest.
pub(super) fn to_guest(headers: &mut HeaderMap, arrival: Arrival<'_>) {
    let upgrade = wanted_upgrade(headers);
    let trailers = tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
    strip_hop_by_hop(headers);
    // The client's 100 comes from us, when its body is first read.
    headers.remove(EXPECT);
    headers.remove(PROXY_AUTHORIZATION);
    let ours = headers.remove(KEY_HEADER).is_some();
    let keyed = |value: &HeaderValue| {
        let word = value.to_str().unwrap_or_default().rsplit(' ').next().unwrap_or_default();
        looks_like_key(word)
    };
    if !ours || headers.get_all(AUTHORIZATION).iter().any(keyed) {
        headers.remove(AUTHORIZATION);
    }
    if let Some(protocol) = upgrade {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    } else if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.insert(CONNECTION, HeaderValue::from_static("te"));
    }
    join_cookies(headers);
    if let Ok(host) = HeaderValue::from_str(arrival.host) {
        headers.insert(HOST, host);
    }
    forwarded(headers, arrival);
}

/// The same for a presigned URL, which needs no key: an `authorization` that is no key is the app's.
pub(super) fn to_guest_of_presigned(headers: &mut HeaderMap, arrival: Arrival<'_>) {
    headers.entry(KEY_HEADER).or_insert(HeaderValue::from_static(""));
    to_guest(headers, arrival);
}

/// Makes the headers of the guest's answer those of the answer to the client. `upgraded` is the protocol that both go on with.
pub(super) fn to_client(headers: &mut HeaderMap, upgraded: Option<HeaderValue>) {
    strip_hop_by_hop(headers);
    headers.remove(PROXY_AUTHENTICATE);
    if let Some(protocol) = upgraded {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers, &CONNECTION).filter_map(|token| token.parse().ok()).collect();
    for name in named {
        headers.remove(name);
    }
    for name in [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
}

/// The comma-separated words of all headers of that name.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|token| !token.is_empty())
}

/// HTTP/2 may split a cookie header, HTTP/1.1 may not (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let cookies: Vec<_> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if cookies.len() > 1
        && let Ok(joined) = HeaderValue::from_bytes(&cookies.join(b"; ".as_slice()))
    {
        headers.insert(COOKIE, joined);
    }
}

fn forwarded(headers: &mut HeaderMap, arrival: Arrival<'_>) {
    if !arrival.trusted {
        for name in [FORWARDED, FORWARDED_FOR, FORWARDED_HOST, FORWARDED_PROTO] {
            headers.remove(name);
        }
    }
    let mut way: Vec<String> = tokens(headers, &FORWARDED_FOR).map(str::to_owned).collect();
    way.push(arrival.peer.to_canonical().to_string());
    if let Ok(value) = HeaderValue::from_str(&way.join(", ")) {
        headers.insert(FORWARDED_FOR, value);
    }
    if let (Entry::Vacant(entry), Ok(host)) = (headers.entry(FORWARDED_HOST), HeaderValue::from_str(arrival.host)) {
        entry.insert(host);
    }
    let proto = HeaderValue::from_static(if arrival.secure { "https" } else { "http" });
    headers.entry(FORWARDED_PROTO).or_insert(proto);
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "sk_abcdefgh_0123456789012345678901234567890123456";

    fn arrival(trusted: bool) -> Arrival<'static> {
        Arrival { peer: "::ffff:203.0.113.7".parse().unwrap(), secure: true, host: "sbx-a.box.test:8443", trusted }
    }

    fn map(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect_all()
    }

    trait CollectAll {
        fn collect_all(self) -> HeaderMap;
    }

    impl<I: Iterator<Item = (HeaderName, HeaderValue)>> CollectAll for I {
        fn collect_all(self) -> HeaderMap {
            let mut headers = HeaderMap::new();
            for (name, value) in self {
                headers.append(name, value);
            }
            headers
        }
    }

    fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
        headers.get(name).map(|value| value.to_str().unwrap())
    }

    #[test]
    fn no_key_reaches_the_guest() {
        for (pairs, left) in [
            (vec![("authorization", KEY)], None),
            (vec![("authorization", "Bearer x")], None),
            (vec![("leap0-authorization", KEY)], None),
            (vec![("leap0-authorization", KEY), ("authorization", "Basic app")], Some("Basic app")),
            (vec![("leap0-authorization", KEY), ("authorization", KEY)], None),
            (vec![("leap0-authorization", KEY), ("authorization", &format!("bearer {KEY}"))], None),
        ] {
            let mut headers = map(&pairs);
            to_guest(&mut headers, arrival(false));
            assert_eq!(text(&headers, "authorization"), left, "{pairs:?}");
            assert_eq!(text(&headers, "leap0-authorization"), None);
        }
        let mut headers = map(&[("authorization", "Basic app")]);
        to_guest_of_presigned(&mut headers, arrival(false));
        assert_eq!(text(&headers, "authorization"), Some("Basic app"));
        let mut headers = map(&[("authorization", KEY), ("leap0-authorization", KEY)]);
        to_guest_of_presigned(&mut headers, arrival(false));
        assert_eq!(text(&headers, "authorization").or(text(&headers, "leap0-authorization")), None);
    }

    #[test]
    fn hop_by_hop_headers_end_here() {
        let mut headers = map(&[
            ("connection", "close, X-Hop"),
            ("connection", "keep-alive"),
            ("x-hop", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-authorization", "Basic x"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("expect", "100-continue"),
            ("x-end", "2"),
        ]);
        to_guest(&mut headers, arrival(false));
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["host", "x-end", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"]);
        let mut headers =
            map(&[("connection", "x-hop"), ("x-hop", "1"), ("transfer-encoding", "chunked"), ("etag", "e")]);
        to_client(&mut headers, None);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["etag"]);
    }

    #[test]
    fn an_upgrade_is_passed_on_and_http2_in_clear_is_not() {
        let mut headers =
            map(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket"), ("sec-websocket-key", "k")]);
        to_guest(&mut headers, arrival(false));
        assert_eq!((text(&headers, "connection"), text(&headers, "upgrade")), (Some("upgrade"), Some("websocket")));
        assert_eq!(text(&headers, "sec-websocket-key"), Some("k"));
        let mut headers =
            map(&[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "AAMA")]);
        assert_eq!(wanted_upgrade(&headers), None);
        to_guest(&mut headers, arrival(false));
        assert!(
            text(&headers, "upgrade").or(text(&headers, "connection")).or(text(&headers, "http2-settings")).is_none()
        );
        let mut headers = map(&[("connection", "te"), ("te", "trailers, deflate")]);
        to_guest(&mut headers, arrival(false));
        assert_eq!(text(&headers, "te"), Some("trailers"));
        let mut headers = map(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        to_client(&mut headers, Some(HeaderValue::from_static("websocket")));
        assert_eq!(text(&headers, "connection"), Some("upgrade"));
    }

    #[test]
    fn forwarded_headers_say_what_we_saw_unless_a_proxy_of_ours_says_more() {
        let claimed = [
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-proto", "http"),
            ("x-forwarded-host", "x"),
            ("forwarded", "for=1"),
        ];
        let mut headers = map(&claimed);
        to_guest(&mut headers, arrival(false));
        assert_eq!(text(&headers, "x-forwarded-for"), Some("203.0.113.7"));
        assert_eq!(text(&headers, "x-forwarded-proto"), Some("https"));
        assert_eq!(text(&headers, "x-forwarded-host"), Some("sbx-a.box.test:8443"));
        assert_eq!(text(&headers, "forwarded"), None);
        let mut headers = map(&claimed);
        to_guest(&mut headers, arrival(true));
        assert_eq!(text(&headers, "x-forwarded-for"), Some("1.1.1.1, 203.0.113.7"));
        assert_eq!(text(&headers, "x-forwarded-proto"), Some("http"));
        assert_eq!(text(&headers, "x-forwarded-host"), Some("x"));
    }

    #[test]
    fn cookies_of_http2_become_one_and_the_host_is_named() {
        let mut headers = map(&[("cookie", "a=1"), ("cookie", "b=2")]);
        to_guest(&mut headers, arrival(false));
        assert_eq!(headers.get_all("cookie").iter().count(), 1);
        assert_eq!(text(&headers, "cookie"), Some("a=1; b=2"));
        assert_eq!(text(&headers, "host"), Some("sbx-a.box.test:8443"));
    }
}
