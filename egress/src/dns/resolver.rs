//! Addresses of names for one sandbox: its cache, what it may ask in a time, and which of the addresses may be connected to. Both its DNS
//! questions and the connections that the proxy makes for it go through here, so that neither is a way around the other's bounds. The cache is
//! the sandbox's own: what another one asked is not to be seen in how long an answer takes.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name as DnsName, RData, RecordType};
use tokio::sync::Semaphore;

use super::upstream::{self, UpstreamError};
use crate::addresses::{self, AddressRefusal, OperatorRanges};
use crate::config::{Limits, Settings};
use crate::control::types::RefusalKind;
use crate::counters::Refused;
use crate::names::Name;
use crate::rate::{Bucket, Distinct};
use crate::rules::Rules;

/// How long an answer counts, whatever its record says, s.
const TTL: std::ops::RangeInclusive<u32> = 5..=300;
/// How long a name counts as one that does not exist, s.
const NEGATIVE_TTL: u32 = 5;
/// Names that are kept.
const MAX_CACHED: usize = 256;
/// Addresses of a name that are kept.
const MAX_ADDRESSES: usize = 16;
/// Aliases from the name to its addresses at most.
const MAX_ALIASES: usize = 16;
/// Window of [`Limits::made_up_names`].
const WINDOW: Duration = Duration::from_mins(1);

/// What a name leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Never empty.
    pub(crate) addresses: Vec<Ipv4Addr>,
    pub(crate) ttl: u32,
}

/// Name servers, which the supervisor may change.
pub(crate) type Servers = Arc<RwLock<Vec<SocketAddr>>>;

pub(crate) struct Resolver {
    servers: Servers,
    ranges: OperatorRanges,
    limits: Limits,
    within: Duration,
    cache: Mutex<HashMap<Name, (Instant, Arc<Known>)>>,
    rate: Mutex<Bucket>,
    made_up: Mutex<Distinct<Name>>,
    open: Semaphore,
}

/// A cached answer: addresses as the name server told them, before any policy.
#[derive(Debug)]
struct Known {
    code: ResponseCode,
    addresses: Vec<Ipv4Addr>,
    ttl: u32,
}

impl Resolver {
    pub(crate) fn new(settings: &Settings, servers: Servers) -> Self {
        let now = Instant::now();
        Self {
            servers,
            ranges: settings.ranges.clone(),
            limits: settings.limits,
            within: settings.deadlines.question,
            cache: Mutex::default(),
            rate: Mutex::new(Bucket::new(settings.limits.questions, now)),
            made_up: Mutex::new(Distinct::new(settings.limits.made_up_names, WINDOW, now)),
            open: Semaphore::new(settings.limits.open_questions as usize),
        }
    }

    /// A question more; refused when there were too many.
    pub(crate) fn admit_question(&self) -> Result<(), Refused> {
        let there = self.rate.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if there { Ok(()) } else { Err(Refused::new(RefusalKind::TooFast, "too many DNS questions in a short time")) }
    }

    /// Addresses of an allowed name that may be connected to under `rules`.
    pub(crate) async fn resolve(&self, name: &Name, rules: &Rules) -> Result<Found, Refused> {
        self.admit_made_up(name, rules, Instant::now())?;
        let known = match self.cached(name, Instant::now()) {
            Some(known) => known,
            None => self.ask(name).await?,
        };
        judge(&known, name, |address| self.ranges.admit(address, rules.ranges(), addresses::is_host))
    }

    /// Passes a question of any type on as it is, in `allow-all`.
    pub(crate) async fn forward(&self, query: &Query) -> Result<Message, Refused> {
        let _open = self.open.try_acquire().map_err(|_| too_many_open())?;
        let servers = self.servers.read().unwrap_or_else(PoisonError::into_inner).clone();
        upstream::ask(&servers, query, self.within).await.map_err(|e| not_answered(&e))
    }

    /// Bounds what a guest can tell whoever serves a wildcard's suffix by the names that it makes up.
    fn admit_made_up(&self, name: &Name, rules: &Rules, now: Instant) -> Result<(), Refused> {
        let Some(made_up) = rules.made_up(name) else { return Ok(()) };
        let Limits { made_up_bytes, made_up_labels, made_up_names, .. } = self.limits;
        let refuse = |reason: String| Err(Refused::new(RefusalKind::TooManyNames, reason).of(name));
        if made_up.len() > made_up_bytes || made_up.split('.').count() > made_up_labels {
            return refuse(format!(
                "the name is longer below its wildcard than {made_up_bytes} bytes or {made_up_labels} labels"
            ));
        }
        if self.made_up.lock().unwrap_or_else(PoisonError::into_inner).take(name.clone(), now) {
            return Ok(());
        }
        refuse(format!("more than {made_up_names} different names below wildcards in a minute"))
    }

    fn cached(&self, name: &Name, now: Instant) -> Option<Arc<Known>> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.get(name).filter(|(until, _)| *until > now).map(|(_, known)| Arc::clone(known))
    }

    async fn ask(&self, name: &Name) -> Result<Arc<Known>, Refused> {
        let _open = self.open.try_acquire().map_err(|_| too_many_open().of(name))?;
        let malformed = |_| Refused::new(RefusalKind::NotResolved, "the name cannot be asked for").of(name);
        let fqdn = DnsName::from_ascii(format!("{name}.")).map_err(malformed)?;
        let servers = self.servers.read().unwrap_or_else(PoisonError::into_inner).clone();
        let query = Query::query(fqdn, RecordType::A);
        let message = upstream::ask(&servers, &query, self.within).await.map_err(|e| not_answered(&e).of(name))?;
        let known = Arc::new(read(&message, query.name()));
        let now = Instant::now();
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= MAX_CACHED {
            cache.retain(|_, (until, _)| *until > now);
        }
        if cache.len() >= MAX_CACHED {
            let soonest = cache.iter().min_by_key(|(_, (until, _))| *until).map(|(name, _)| name.clone());
            soonest.and_then(|name| cache.remove(&name));
        }
        cache.insert(name.clone(), (now + Duration::from_secs(known.ttl.into()), Arc::clone(&known)));
        Ok(known)
    }
}

fn too_many_open() -> Refused {
    Refused::new(RefusalKind::TooFast, "too many questions wait for a name server")
}

fn not_answered(error: &UpstreamError) -> Refused {
    Refused::new(RefusalKind::NotReachable, crate::chain(error))
}

/// The addresses of `name` in a message, through its aliases; those of other names do not count.
fn read(message: &Message, name: &DnsName) -> Known {
    let mut name = name;
    let mut ttl = *TTL.end();
    for _ in 0..MAX_ALIASES {
        let of_name = || message.answers.iter().filter(|r| r.name == *name);
        let mut addresses = Vec::new();
        for record in of_name() {
            if let RData::A(address) = &record.data {
                ttl = ttl.min(record.ttl);
                addresses.push(address.0);
            }
        }
        if !addresses.is_empty() {
            addresses.truncate(MAX_ADDRESSES);
            return Known { code: message.metadata.response_code, addresses, ttl: ttl.clamp(*TTL.start(), *TTL.end()) };
        }
        let alias = of_name().find_map(|r| if let RData::CNAME(to) = &r.data { Some((&to.0, r.ttl)) } else { None });
        let Some((to, alias_ttl)) = alias else { break };
        ttl = ttl.min(alias_ttl);
        name = to;
    }
    Known { code: message.metadata.response_code, addresses: Vec::new(), ttl: NEGATIVE_TTL }
}

/// Those addresses that may be connected to.
fn judge(known: &Known, name: &Name, admit: impl Fn(Ipv4Addr) -> Result<(), AddressRefusal>) -> Result<Found, Refused> {
    let mut refusal = None;
    let mut addresses = Vec::new();
    for address in &known.addresses {
        match admit(*address) {
            Ok(()) => addresses.push(*address),
            Err(why) => refusal = Some((*address, why)),
        }
    }
    match refusal {
        _ if !addresses.is_empty() => Ok(Found { addresses, ttl: known.ttl }),
        Some((address, why)) => {
            let reason = format!("{name} leads to {address}, which {why}");
            Err(Refused::new(RefusalKind::AddressNotPublic, reason).of(name).at(address))
        }
        None => {
            let reason = match known.code {
                ResponseCode::NoError => format!("{name} has no IPv4 address"),
                code => format!("the name server says of {name}: {code}"),
            };
            Err(Refused::new(RefusalKind::NotResolved, reason).of(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::{Mode, Policy};
    use crate::counters::Counters;
    use hickory_proto::op::OpCode;
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, CNAME};

    fn dns(text: &str) -> DnsName {
        DnsName::from_ascii(text).unwrap()
    }

    fn message(records: &[(&str, u32, RData)]) -> Message {
        let mut message = Message::response(1, OpCode::Query);
        for (name, ttl, data) in records {
            message.add_answer(Record::from_rdata(dns(name), *ttl, data.clone()));
        }
        message
    }

    fn a(last: u8) -> RData {
        RData::A(A(Ipv4Addr::new(9, 9, 9, last)))
    }

    #[test]
    fn addresses_are_found_through_aliases_and_others_are_not_taken() {
        let alias = |to: &str| RData::CNAME(CNAME(dns(to)));
        let known = read(
            &message(&[
                ("other.example.", 60, a(6)),
                ("A.example.", 100, alias("b.example.")),
                ("b.example.", 50, alias("c.example.")),
                ("c.example.", 200, a(1)),
                ("c.example.", 90, a(2)),
            ]),
            &dns("a.example."),
        );
        assert_eq!((known.addresses, known.ttl), (vec![Ipv4Addr::new(9, 9, 9, 1), Ipv4Addr::new(9, 9, 9, 2)], 50));
        let circle = message(&[("a.example.", 60, alias("b.example.")), ("b.example.", 60, alias("a.example."))]);
        assert!(read(&circle, &dns("a.example.")).addresses.is_empty());
    }

    #[test]
    fn times_to_live_are_bounded() {
        let ttl = |ttl| read(&message(&[("a.example.", ttl, a(1))]), &dns("a.example.")).ttl;
        assert_eq!((ttl(0), ttl(60), ttl(86_400), ttl(u32::MAX)), (5, 60, 300, 300));
    }

    #[test]
    fn addresses_that_are_not_public_are_left_out_and_named_when_there_is_no_other() {
        let name = Name::parse(b"rebind.example.com").unwrap();
        let admit = |address| OperatorRanges::default().admit(address, &[], |_| false);
        let known = |addresses: &[[u8; 4]]| Known {
            code: ResponseCode::NoError,
            addresses: addresses.iter().map(|a| Ipv4Addr::from(*a)).collect(),
            ttl: 60,
        };
        let both = judge(&known(&[[127, 0, 0, 1], [1, 1, 1, 1]]), &name, admit).unwrap();
        assert_eq!(both.addresses, [Ipv4Addr::new(1, 1, 1, 1)]);
        let private = judge(&known(&[[169, 254, 169, 254]]), &name, admit).unwrap_err();
        assert_eq!(private.kind, RefusalKind::AddressNotPublic);
        assert!(
            private.reason.contains("169.254.169.254") && private.reason.contains("metadata"),
            "{}",
            private.reason
        );
        assert_eq!(judge(&known(&[]), &name, admit).unwrap_err().kind, RefusalKind::NotResolved);
    }

    #[test]
    fn made_up_names_are_bounded_in_length_labels_and_number() {
        let mut settings = Settings::default();
        settings.limits.made_up_names = 3;
        let resolver = Resolver::new(&settings, Servers::default());
        let policy = Policy {
            mode: Mode::Custom,
            allow_domains: vec!["*.example.com".to_owned(), "fixed.example.com".to_owned()],
            allow_cidrs: Vec::new(),
            transforms: Vec::new(),
        };
        let rules = Rules::new(&policy, &Counters::default()).unwrap();
        let now = Instant::now();
        let admit =
            |name: &str, now| resolver.admit_made_up(&Name::parse(name.as_bytes()).unwrap(), &rules, now).is_ok();
        assert!(!admit(&format!("{}.{}.example.com", "a".repeat(60), "b".repeat(60)), now));
        assert!(!admit("a.b.c.d.e.f.example.com", now));
        for i in 0..6 {
            assert_eq!(admit(&format!("n{i}.example.com"), now), i < 3);
        }
        assert!(admit("n1.example.com", now) && admit("fixed.example.com", now), "neither is new");
        assert!(admit("n9.example.com", now + WINDOW));
    }
}
