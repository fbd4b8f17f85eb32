//! What a request is for. A request that could be read in two ways is refused: the server may read it in the other one.

use http::header::HOST;
use http::request::Parts;
use http::uri::Authority;
use http::{Method, Version};

use crate::control::types::RefusalKind;
use crate::names::{Name, NameError};

/// Why a request is not passed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadTarget {
    /// Why.
    pub kind: RefusalKind,
    /// A sentence for people.
    pub reason: String,
}

fn bad<T>(kind: RefusalKind, reason: impl Into<String>) -> Result<T, BadTarget> {
    Err(BadTarget { kind, reason: reason.into() })
}

/// The name that the request is for.
pub fn name(request: &Parts) -> Result<Name, BadTarget> {
    if request.method == Method::CONNECT {
        return bad(RefusalKind::TargetForm, "CONNECT is for proxies that a client knows of; here it is not needed");
    }
    if request.version <= Version::HTTP_11 && request.uri.scheme_str().is_some_and(|scheme| scheme != "http") {
        return bad(RefusalKind::TargetForm, "the request's target has another scheme than http");
    }
    let mut hosts = request.headers.get_all(HOST).iter();
    let host = hosts.next().map(|host| of_host(host.as_bytes())).transpose()?;
    if hosts.next().is_some() {
        return bad(RefusalKind::AmbiguousHost, "the request has several Host headers");
    }
    let target = request.uri.authority().map(Authority::as_str).map(|a| of_host(a.as_bytes())).transpose()?;
    match (host, target) {
        (None, None) => bad(RefusalKind::NoName, "the request has no Host"),
        (Some(name), None) | (None, Some(name)) => Ok(name),
        (Some(host), Some(target)) if host == target => Ok(target),
        (Some(host), Some(target)) => {
            bad(RefusalKind::AmbiguousHost, format!("the request's target is {target} and its Host is {host}"))
        }
    }
}

/// `name`, `name:port`; ports say nothing here, since the connection's is used.
fn of_host(text: &[u8]) -> Result<Name, BadTarget> {
    let colon = text.iter().rposition(|b| *b == b':');
    let name = match colon.map(|at| text.split_at(at)) {
        // An IPv6 address in brackets has its port after them.
        Some((name, [_, port @ ..])) if port.iter().all(u8::is_ascii_digit) && port.len() <= 5 => name,
        _ => text,
    };
    Name::parse(name).or_else(|error| match error {
        NameError::Address => {
            bad(RefusalKind::IpLiteral, "the request's Host is an address: only names can be allowed")
        }
        NameError::Malformed => bad(RefusalKind::Malformed, "the request's Host is not a host name"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    fn of(uri: &str, hosts: &[&str], version: Version) -> Result<String, RefusalKind> {
        let mut request = Request::builder().uri(uri).version(version);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        name(&parts).map(|name| name.to_string()).map_err(|bad| bad.kind)
    }

    #[test]
    fn host_and_target_name_it() {
        let one = |uri, hosts: &[&str]| of(uri, hosts, Version::HTTP_11);
        assert_eq!(one("/", &["A.example.com:80"]).as_deref(), Ok("a.example.com"));
        assert_eq!(one("http://a.example.com/x", &["A.example.com."]).as_deref(), Ok("a.example.com"));
        assert_eq!(one("http://b.example.com/x", &["a.example.com"]), Err(RefusalKind::AmbiguousHost));
        assert_eq!(one("https://a.example.com/x", &["a.example.com"]), Err(RefusalKind::TargetForm));
        assert_eq!(one("http://user@a.example.com/x", &["a.example.com"]), Err(RefusalKind::Malformed));
        assert_eq!(one("/", &["a.example.com", "a.example.com"]), Err(RefusalKind::AmbiguousHost));
        assert_eq!(one("/", &[]), Err(RefusalKind::NoName));
        for (host, kind) in [
            ("1.2.3.4", RefusalKind::IpLiteral),
            ("1.2.3.4:80", RefusalKind::IpLiteral),
            ("[::1]:80", RefusalKind::IpLiteral),
            ("a.example.com:80:80", RefusalKind::Malformed),
            ("a.example.com, b.example.com", RefusalKind::Malformed),
            ("a.example.com\tb", RefusalKind::Malformed),
            ("", RefusalKind::Malformed),
        ] {
            assert_eq!(one("/", &[host]), Err(kind), "{host:?}");
        }
        let (mut connect, ()) = Request::builder().uri("a.example.com:443").body(()).unwrap().into_parts();
        connect.method = Method::CONNECT;
        assert_eq!(name(&connect).unwrap_err().kind, RefusalKind::TargetForm);
    }

    #[test]
    fn in_http2_the_authority_names_it() {
        let two = |uri, hosts: &[&str]| of(uri, hosts, Version::HTTP_2);
        assert_eq!(two("https://a.example.com/", &[]).as_deref(), Ok("a.example.com"));
        assert_eq!(two("https://a.example.com/", &["b.example.com"]), Err(RefusalKind::AmbiguousHost));
        assert_eq!(two("/", &["b.example.com"]).as_deref(), Ok("b.example.com"));
    }

    proptest! {
        #[test]
        fn what_is_taken_is_the_name_that_stands_there(host in "[ -~]{0,40}") {
            if let Ok(name) = of("/", &[&host], Version::HTTP_11) {
                prop_assert!(host.to_ascii_lowercase().starts_with(&name));
                let rest = &host[name.len()..];
                let rest = rest.strip_prefix('.').unwrap_or(rest);
                prop_assert!(rest.is_empty() || rest[1..].parse::<u32>().is_ok() || rest == ":", "{host} gave {name}");
            }
        }
    }
}
