//! Which sandbox a request is for, by the name that it was sent to.
//!
//! ```text
//! <id>.<domain>           the sandbox's default port
//! <id>-<port>.<domain>    that port
//! <token>.<domain>        what the presigned URL says
//! anything else           the API
//! ```
//!
//! Ids never end in `-<digits>` (`crate::ids`) and tokens have no `-`, so no label reads in two ways.

use crate::ids::SandboxId;
use crate::journal::presigned;
use http::header::{HOST, HeaderMap};
use http::uri::Authority;
use http::{Uri, Version};
use std::num::NonZeroU16;

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The REST API.
    Api,
    /// A port of a sandbox, for whoever has a key; the default port when none is named.
    Sandbox(SandboxId, Option<NonZeroU16>),
    /// A presigned URL.
    Presigned(presigned::Token),
    /// A name below the domain that is nobody's.
    Nobody,
    /// It cannot be told: no name where there must be one, several names, or no name at all.
    Unclear,
}

/// The domain whose names are sandboxes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// As clients write it, with a port if they need one.
    public: String,
    /// Lower case, without port and final dot.
    name: String,
}

impl Domain {
    /// Reads `name` or `name:port`; none when a label before it would be no host name.
    pub fn parse(text: &str) -> Option<Self> {
        let authority: Authority = text.parse().ok()?;
        let name = canonical(authority.host())?;
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        // 253 octets of a whole name, with a label and its dot before this one.
        let fits = name.len() <= 253 - 64 && name.split('.').all(is_label);
        (fits && !text.contains('@')).then(|| Self { public: text.to_ascii_lowercase(), name })
    }

    /// The domain without a port.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The authority of `label` below the domain, as clients reach it.
    pub fn authority(&self, label: &str) -> String {
        format!("{label}.{}", self.public)
    }

    /// Where a request with this target and these headers goes. The target's own authority wins over `Host` (RFC 9112 §3.2.2).
    pub fn destination(&self, version: Version, uri: &Uri, headers: &HeaderMap) -> Destination {
        if let Some(authority) = uri.authority() {
            return self.of_name(authority.host());
        }
        let mut hosts = headers.get_all(HOST).iter();
        match (hosts.next(), hosts.next()) {
            (Some(host), None) => match host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()) {
                Some(authority) if !host.as_bytes().contains(&b'@') => self.of_name(authority.host()),
                _ => Destination::Unclear,
            },
            (None, _) if version < Version::HTTP_11 => Destination::Api,
            _ => Destination::Unclear,
        }
    }

    fn of_name(&self, host: &str) -> Destination {
        let Some(host) = canonical(host) else { return Destination::Unclear };
        let Some(label) = host.strip_suffix(&self.name).and_then(|rest| rest.strip_suffix('.')) else {
            return Destination::Api;
        };
        if let Some(token) = presigned::Token::parse(label) {
            return Destination::Presigned(token);
        }
        if let Some(id) = SandboxId::parse(label) {
            return Destination::Sandbox(id, None);
        }
        let with_port = label.rsplit_once('-').and_then(|(id, port)| Some((SandboxId::parse(id)?, port_of(port)?)));
        with_port.map_or(Destination::Nobody, |(id, port)| Destination::Sandbox(id, Some(port)))
    }
}

/// Lower case and without the final dot of a rooted name.
fn canonical(host: &str) -> Option<String> {
    let host = host.strip_suffix('.').unwrap_or(host);
    (!host.is_empty()).then(|| host.to_ascii_lowercase())
}

/// A port in decimal: one way of writing each, so that a sandbox has one name for each of them.
fn port_of(text: &str) -> Option<NonZeroU16> {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| digits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    fn domain() -> Domain {
        Domain::parse("Box.example.test:8443").unwrap()
    }

    fn of(host: &str) -> Destination {
        let request = Request::builder().uri("/x").header(HOST, host).body(()).unwrap();
        domain().destination(request.version(), request.uri(), request.headers())
    }

    fn sandbox(id: &str, port: u16) -> Destination {
        Destination::Sandbox(SandboxId::parse(id).unwrap(), NonZeroU16::new(port))
    }

    #[test]
    fn names_below_the_domain_are_sandboxes_with_or_without_port() {
        for (host, expected) in [
            ("sbx-a1.box.example.test", sandbox("sbx-a1", 0)),
            ("sbx-a1.box.example.test:8443", sandbox("sbx-a1", 0)),
            ("SBX-A1-8080.Box.Example.TEST.", sandbox("sbx-a1", 8080)),
            ("sbx-a1-1.box.example.test", sandbox("sbx-a1", 1)),
            ("sbx-a1-65535.box.example.test:1", sandbox("sbx-a1", 65535)),
            // An id of digits would be none; read as a port it leaves none either.
            ("sbx-123.box.example.test", Destination::Nobody),
        ] {
            assert_eq!(of(host), expected, "{host}");
        }
    }

    #[test]
    fn other_names_are_the_api_or_nobodys() {
        for host in
            ["127.0.0.1:7878", "[::1]:7878", "box.example.test", "api.example.test", "xbox.example.test", "test"]
        {
            assert_eq!(of(host), Destination::Api, "{host}");
        }
        for host in [
            "sbx-a1-0",
            "sbx-a1-080",
            "sbx-a1-65536",
            "sbx-a1-",
            "sbx-a1-80-80",
            "a.sbx-a1",
            "sbx-a1.b",
            "www",
            "-",
            "sbx-",
            "snp-a1",
            "sbx-a1-8o",
        ] {
            assert_eq!(of(&format!("{host}.box.example.test")), Destination::Nobody, "{host}");
        }
        for host in ["", "a b", "x@sbx-a1.box.example.test", "."] {
            assert_eq!(of(host), Destination::Unclear, "{host:?}");
        }
    }

    #[test]
    fn the_targets_own_authority_wins_and_two_hosts_are_none() {
        let request = Request::builder()
            .uri("http://sbx-b2.box.example.test/x")
            .header(HOST, "api.example.test")
            .body(())
            .unwrap();
        let found = domain().destination(request.version(), request.uri(), request.headers());
        assert_eq!(found, sandbox("sbx-b2", 0));
        let mut request = Request::builder().uri("/x").header(HOST, "a").header(HOST, "b").body(()).unwrap();
        let to = |request: &Request<()>| domain().destination(request.version(), request.uri(), request.headers());
        assert_eq!(to(&request), Destination::Unclear);
        request.headers_mut().clear();
        assert_eq!(to(&request), Destination::Unclear);
        *request.version_mut() = Version::HTTP_10;
        assert_eq!(to(&request), Destination::Api);
    }

    #[test]
    fn tokens_are_told_from_ids() {
        let token = "a".repeat(presigned::TOKEN_CHARS);
        assert!(matches!(of(&format!("{token}.box.example.test")), Destination::Presigned(_)));
        assert_eq!(of(&format!("{token}a.box.example.test")), Destination::Nobody);
    }

    #[test]
    fn domains_are_host_names() {
        assert_eq!(domain().name(), "box.example.test");
        assert_eq!(domain().authority("sbx-a1"), "sbx-a1.box.example.test:8443");
        for bad in ["", ".", "a b", "-a.test", "a..test", "user@a.test", "a.test/x", "a_b.test", &"a".repeat(64)] {
            assert_eq!(Domain::parse(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_host_goes_somewhere_and_sandboxes_only_below_the_domain(host in "\\PC{0,80}") {
            if let Ok(value) = http::HeaderValue::from_str(&host) {
                let mut headers = HeaderMap::new();
                headers.insert(HOST, value);
                let found = domain().destination(Version::HTTP_11, &Uri::from_static("/"), &headers);
                if matches!(found, Destination::Sandbox(..) | Destination::Presigned(_)) {
                    prop_assert!(host.to_ascii_lowercase().contains(".box.example.test"));
                }
            }
        }

        #[test]
        fn what_is_written_is_read(word in "[a-z][a-z0-9]{0,19}", port in 1..=u16::MAX) {
            let id = format!("sbx-{word}");
            prop_assert_eq!(of(&domain().authority(&format!("{id}-{port}"))), sandbox(&id, port));
            prop_assert_eq!(of(&domain().authority(&id)), sandbox(&id, 0));
        }
    }
}
