//! What supervisor and proxy say to each other: JSON, one [`Message`] in a frame (`frame.rs`). Fields may be added (both sides ignore what
//! they do not know); a change of meaning is a new [`PROTOCOL`], and a frame of another protocol is refused.
//!
//! | request | with it | answer |
//! | --- | --- | --- |
//! | [`Request::Status`] | – | [`Answer::Status`] |
//! | [`Request::Put`] | the sockets, in the order of [`Sockets`] | [`Answer::Done`] |
//! | [`Request::Replace`] | – | [`Answer::Done`] |
//! | [`Request::Remove`] | – | [`Answer::Removed`] |
//! | [`Request::Sandbox`] | – | [`Answer::Sandbox`] |
//! | [`Request::Upstreams`] | – | [`Answer::Done`] |
//! | [`Request::Shutdown`] | – | [`Answer::Done`], then the process ends |
//!
//! Any of them may be answered by [`Answer::Refused`]. A sandbox is named by its key; its generation says which of two instructions is the
//! later one, so that a supervisor that was overtaken cannot undo what its successor said.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Version in every [`Message`].
pub const PROTOCOL: u32 = 1;
/// Bytes of a sandbox's key at most.
pub const MAX_KEY: usize = 128;
/// Entries of [`Policy::allow_domains`] at most.
pub const MAX_DOMAINS: usize = 50;
/// Entries of [`Policy::allow_cidrs`] at most.
pub const MAX_CIDRS: usize = 10;
/// Entries of [`Policy::transforms`] at most.
pub const MAX_TRANSFORMS: usize = 20;
/// Refusals that are kept of a sandbox.
pub const MAX_REFUSALS: usize = 64;

/// One frame's content.
#[derive(Debug, Serialize, Deserialize)]
pub struct Message<T> {
    /// [`PROTOCOL`] of the sender.
    pub protocol: u32,
    /// [`Request`] or [`Answer`].
    pub body: T,
}

/// What the supervisor asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// How the process does, and which sandboxes it has.
    Status,
    /// A sandbox, with its sockets. One of the same key and of the same or an earlier generation is replaced: its connections end, its
    /// counters go on. A later generation is left alone, and this is refused as [`RefusedCode::Stale`].
    Put(PutSandbox),
    /// Another policy. From the answer on nothing passes under the old one: connections made under it are ended.
    Replace(ReplacePolicy),
    /// Sockets closed, connections ended.
    Remove(SandboxRef),
    /// Counters and last refusals.
    Sandbox {
        /// Which.
        key: String,
    },
    /// The name servers that are asked from now on.
    Upstreams(Vec<SocketAddr>),
    /// Everything ends.
    Shutdown,
}

/// A sandbox and the least generation that the instruction is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxRef {
    /// The sandbox.
    pub key: String,
    /// Refused as [`RefusedCode::Stale`] when what the proxy has is of a later one.
    pub generation: u64,
}

/// Body of [`Request::Put`].
#[derive(Debug, Serialize, Deserialize)]
pub struct PutSandbox {
    /// Name of the sandbox, 1 to [`MAX_KEY`] bytes of visible ASCII.
    pub key: String,
    /// Which life of the sandbox: never lower in a later instruction.
    pub generation: u64,
    /// What it may reach.
    pub policy: Policy,
    /// What ends TLS for the domains of transforms; required with them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<Authority>,
    /// Which sockets come with the message.
    pub sockets: SocketKinds,
}

/// Body of [`Request::Replace`].
#[derive(Debug, Serialize, Deserialize)]
pub struct ReplacePolicy {
    /// The sandbox.
    pub key: String,
    /// As in [`SandboxRef`].
    pub generation: u64,
    /// What it may reach from now on.
    pub policy: Policy,
    /// Its authority from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authority: Option<Authority>,
}

/// Which descriptors follow, in this order. All are listening or bound in the sandbox's network namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SocketKinds {
    /// A listening TCP socket that TCP 80 and 443 are redirected to (`SO_ORIGINAL_DST` names the destination).
    pub proxy: bool,
    /// A bound UDP socket for DNS.
    pub dns_udp: bool,
    /// A listening TCP socket for DNS.
    pub dns_tcp: bool,
}

impl SocketKinds {
    /// How many descriptors that are.
    pub fn count(self) -> usize {
        usize::from(self.proxy) + usize::from(self.dns_udp) + usize::from(self.dns_tcp)
    }
}

/// What a sandbox may reach. The fields are those of the API's `network_policy`, so its JSON reads as this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The default.
    pub mode: Mode,
    /// Names: exact, or `*.suffix`, which covers every name below the suffix and not the suffix itself.
    #[serde(default)]
    pub allow_domains: Vec<String>,
    /// IPv4 ranges, `address/bits`.
    #[serde(default)]
    pub allow_cidrs: Vec<String>,
    /// Changes to requests.
    #[serde(default)]
    pub transforms: Vec<Transform>,
}

/// The default of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Every public address.
    AllowAll,
    /// Nothing.
    DenyAll,
    /// What the lists allow.
    Custom,
}

/// Changes to the requests for one domain, which is allowed by being here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transform {
    /// Exact, or `*.suffix`. Of several that cover a name the first exact one counts, else the one with the longest suffix.
    pub domain: String,
    /// Set after the stripping, in place of whatever the guest sent under the same name. Headers that frame a message or say where it goes
    /// (`Host`, `Connection`, `Content-Length`, `Transfer-Encoding`, `Upgrade`) are left as they are, here and below.
    #[serde(default)]
    pub inject_headers: BTreeMap<String, Secret>,
    /// Removed.
    #[serde(default)]
    pub strip_headers: Vec<String>,
}

/// A sandbox's certificate authority, as [`crate::authority::make`] makes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Authority {
    /// The common name of its certificate, and nothing else, is its subject.
    pub name: String,
    /// The certificate that the guest trusts.
    pub certificate_pem: String,
    /// Its key, PKCS #8.
    pub key_pem: Secret,
}

/// Text that is shown nowhere: `Debug` says `[redacted]`, and its memory is cleared when it is dropped. It is serialized as it is, since only
/// control messages are made of it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Keeps `text`.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

/// What the proxy answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is so.
    Done,
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Sandbox`].
    Sandbox(SandboxReport),
    /// To [`Request::Remove`]: its last counters; none when there was no such sandbox.
    Removed(Option<SandboxReport>),
    /// It is not so, and nothing was changed.
    Refused(Refused),
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// What to do about it.
    pub code: RefusedCode,
    /// What is wrong, for people.
    pub message: String,
}

/// Kinds of [`Refused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusedCode {
    /// The request makes no sense: mend it.
    Invalid,
    /// Another [`PROTOCOL`].
    Protocol,
    /// What is there is of a later generation.
    Stale,
    /// No such sandbox: put it.
    Unknown,
    /// The process has as many sandboxes as it takes.
    Full,
}

/// Answer of [`Request::Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// Since when it runs, ms since the epoch.
    pub started_ms: u64,
    /// The sandboxes it has.
    pub sandboxes: Vec<SandboxRef>,
    /// Connections that are open.
    pub connections: u64,
    /// What confines it, for people: `seccomp`, `landlock`, …
    pub confined_by: Vec<String>,
    /// The name servers it asks.
    pub upstreams: Vec<SocketAddr>,
}

/// What happened to one sandbox's traffic since its first [`Request::Put`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SandboxReport {
    /// As in the last instruction.
    pub generation: u64,
    /// Connections, requests and DNS questions that were let through.
    pub allowed: u64,
    /// Connections, requests and DNS questions that were refused.
    pub refused: u64,
    /// Bytes that the sandbox sent through the proxy.
    pub bytes_up: u64,
    /// Bytes that it got.
    pub bytes_down: u64,
    /// Connections that are open.
    pub connections: u64,
    /// The same by the rule that decided.
    pub rules: BTreeMap<String, RuleCounters>,
    /// The last [`MAX_REFUSALS`], oldest first.
    pub refusals: Vec<Refusal>,
}

/// Counters of one rule. Rules are named by what stands in the policy: `domain *.example.com`, `transform api.example.com`, `cidr 10.0.0.0/8`,
/// `default`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleCounters {
    /// Let through.
    pub allowed: u64,
    /// Refused.
    pub refused: u64,
    /// Bytes that the sandbox sent.
    pub bytes_up: u64,
    /// Bytes that it got.
    pub bytes_down: u64,
}

/// One thing that did not pass.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// When, ms since the epoch.
    pub at_ms: u64,
    /// What kind of traffic.
    pub via: Via,
    /// Why.
    pub kind: RefusalKind,
    /// The name it was for, as far as it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The address it was for; that of the name when the name's was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The port it was for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// A sentence for people.
    pub reason: String,
}

/// What kind of traffic was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// A TLS connection that would have been passed on as it is.
    Tls,
    /// A request over HTTP, or over TLS that is ended here.
    Http,
    /// A TCP connection before anything was known of it.
    Tcp,
    /// A DNS question.
    Dns,
}

/// Why something did not pass. Kinds may be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// No rule allows the name.
    NameNotAllowed,
    /// The policy allows nothing.
    DeniedByMode,
    /// Nothing names the destination: no SNI, no Host.
    NoName,
    /// An address stands where a name is needed.
    IpLiteral,
    /// The true name may be hidden.
    EncryptedClientHello,
    /// It is neither TLS nor HTTP, or breaks their rules.
    Malformed,
    /// HTTP/2 without TLS, by prior knowledge.
    CleartextHttp2,
    /// A head larger than is read.
    TooLarge,
    /// A head that did not come in time.
    TooSlow,
    /// A request for another name than its TLS connection.
    Misdirected,
    /// More than one Host, or one that is not the target's.
    AmbiguousHost,
    /// CONNECT or another form of target that is for proxies.
    TargetForm,
    /// The name leads to an address that is not public.
    AddressNotPublic,
    /// The connection did not come by redirection.
    NotRedirected,
    /// The name could not be resolved.
    NotResolved,
    /// Nobody answered there.
    NotReachable,
    /// The server's certificate is not trusted.
    UpstreamCertificate,
    /// The client does not trust the sandbox's authority.
    ClientDistrust,
    /// Too many connections at once.
    TooManyConnections,
    /// Too many new connections or questions.
    TooFast,
    /// Too many bytes wait for a slow reader.
    TooMuchBuffered,
    /// A type of DNS question that is not answered.
    QuestionType,
    /// More names below wildcards than a client needs.
    TooManyNames,
}

/// Descriptors that go with [`Request::Put`], as [`SocketKinds`] says.
#[derive(Debug, Default)]
pub struct Sockets {
    /// See [`SocketKinds::proxy`].
    pub proxy: Option<std::net::TcpListener>,
    /// See [`SocketKinds::dns_udp`].
    pub dns_udp: Option<std::net::UdpSocket>,
    /// See [`SocketKinds::dns_tcp`].
    pub dns_tcp: Option<std::net::TcpListener>,
}

impl Sockets {
    /// Which there are.
    pub fn kinds(&self) -> SocketKinds {
        SocketKinds { proxy: self.proxy.is_some(), dns_udp: self.dns_udp.is_some(), dns_tcp: self.dns_tcp.is_some() }
    }
}

/// An IPv4 range as policies and configurations write it.
pub(crate) fn parse_cidr(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, bits) = text.split_once('/')?;
    let bits = bits.bytes().all(|b| b.is_ascii_digit()).then_some(bits)?.parse().ok().filter(|bits| *bits <= 32)?;
    Some((address.parse().ok()?, bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_apis_policy_reads_as_ours_and_its_values_are_not_shown() {
        let text = r#"{"mode":"custom","allow_domains":["*.example.com"],"transforms":
            [{"domain":"api.example.com","inject_headers":{"authorization":"Bearer s3cret"},"strip_headers":["cookie"]}]}"#;
        let policy: Policy = serde_json::from_str(text).unwrap();
        assert_eq!(policy.transforms[0].inject_headers["authorization"].reveal(), "Bearer s3cret");
        let shown = format!("{policy:?}");
        assert!(shown.contains("[redacted]") && !shown.contains("s3cret"), "{shown}");
        let authority = Authority {
            name: String::new(),
            certificate_pem: String::new(),
            key_pem: Secret::new("s3cret".to_owned()),
        };
        assert!(!format!("{authority:?}").contains("s3cret"));
    }

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!(parse_cidr("10.0.0.0/8"), Some((Ipv4Addr::new(10, 0, 0, 0), 8)));
        for text in ["10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0.0/+8", "10.0.0/8", "::/0", "10.0.0.0/8/8"] {
            assert_eq!(parse_cidr(text), None, "{text}");
        }
    }
}
