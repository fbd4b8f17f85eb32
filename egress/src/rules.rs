//! A policy, checked and made ready: which rule decides about a name or an address. Pure: no clock, no network.
//!
//! | mode | a name under a transform | an allowed name | another name | an address in `allow_cidrs` |
//! | --- | --- | --- | --- | --- |
//! | `custom` | changed | passes | refused | passes, whatever it is called |
//! | `allow-all` | changed | – | passes to the address that the guest chose | – |
//! | `deny-all` | refused | – | refused | – |
//!
//! Of the entries that cover a name an exact one counts before a wildcard, a longer wildcard before a shorter one, and a transform before
//! everything: a name that is to be changed never passes unchanged, also when its address is in an allowed range.

use std::net::Ipv4Addr;
use std::sync::Arc;

use http::{HeaderName, HeaderValue};

use crate::addresses::Range;
use crate::control::types::{MAX_CIDRS, MAX_DOMAINS, MAX_TRANSFORMS, Mode, Policy, Secret};
use crate::counters::{Counters, Tally};
use crate::names::{Name, Pattern};

/// What is neither taken out nor put in, also when a transform says so: it frames messages, or says where they go.
const UNTOUCHED: &[&str] = &["connection", "content-length", "host", "transfer-encoding", "upgrade"];

/// A policy makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RulesError {
    /// Too many entries.
    #[error("{field} has more than {most} entries")]
    TooMany {
        /// The list.
        field: &'static str,
        /// Its bound.
        most: usize,
    },
    /// An entry that is none. Values of headers are not shown.
    #[error("{field}[{index}] is not {what}")]
    Entry {
        /// The list.
        field: &'static str,
        /// Which.
        index: usize,
        /// What it should be.
        what: &'static str,
    },
}

/// Changes to requests.
pub(crate) struct Rewrite {
    pub(crate) strip: Vec<HeaderName>,
    /// The values are valid for headers.
    pub(crate) inject: Vec<(HeaderName, Secret)>,
}

/// A rule of a policy.
#[derive(Clone)]
pub(crate) struct Rule {
    /// As counters and refusals call it.
    pub(crate) label: Arc<str>,
    pub(crate) tally: Arc<Tally>,
}

/// What happens to a name.
#[derive(Clone)]
pub(crate) enum Verdict {
    /// TLS is ended here, and requests are changed.
    Change(Rule, Arc<Rewrite>),
    /// It passes; the proxy resolves the name.
    Pass(Rule),
    /// It passes to the address that the guest chose.
    PassAsAddressed(Rule),
    /// No.
    Refuse(Rule),
}

/// A policy that was checked.
pub(crate) struct Rules {
    mode: Mode,
    transforms: Vec<(Pattern, Rule, Arc<Rewrite>)>,
    domains: Vec<(Pattern, Rule)>,
    cidrs: Vec<(Range, Rule)>,
    ranges: Vec<Range>,
    default: Rule,
}

impl Rules {
    /// Checks `policy`. Its rules count in `counters`.
    pub(crate) fn new(policy: &Policy, counters: &Counters) -> Result<Self, RulesError> {
        let bounds = [
            ("allow_domains", policy.allow_domains.len(), MAX_DOMAINS),
            ("allow_cidrs", policy.allow_cidrs.len(), MAX_CIDRS),
            ("transforms", policy.transforms.len(), MAX_TRANSFORMS),
        ];
        if let Some((field, _, most)) = bounds.into_iter().find(|(_, length, most)| length > most) {
            return Err(RulesError::TooMany { field, most });
        }
        let entry = |field, index, what| move || RulesError::Entry { field, index, what };
        let rule = |label: String| Rule { tally: counters.rule(&label), label: label.into() };
        let pattern = "a host name or *.suffix";
        let mut transforms = Vec::new();
        for (i, transform) in policy.transforms.iter().enumerate() {
            let domain = Pattern::parse(&transform.domain).ok().ok_or_else(entry("transforms", i, pattern))?;
            let header = |name: &String| HeaderName::from_bytes(name.as_bytes()).ok();
            let strip = transform.strip_headers.iter().map(header).collect::<Option<Vec<_>>>();
            let inject = transform.inject_headers.iter().map(|(name, value)| {
                HeaderValue::from_str(value.reveal()).ok()?;
                Some((header(name)?, value.clone()))
            });
            let both = strip.zip(inject.collect::<Option<Vec<_>>>());
            let what = "made of header names and values";
            let (mut strip, mut inject) = both.ok_or_else(entry("transforms", i, what))?;
            strip.retain(|name| !UNTOUCHED.contains(&name.as_str()));
            inject.retain(|(name, _)| !UNTOUCHED.contains(&name.as_str()));
            transforms.push((
                domain,
                rule(format!("transform {}", transform.domain)),
                Arc::new(Rewrite { strip, inject }),
            ));
        }
        let mut domains = Vec::new();
        for (i, domain) in policy.allow_domains.iter().enumerate() {
            let parsed = Pattern::parse(domain).ok().ok_or_else(entry("allow_domains", i, pattern))?;
            domains.push((parsed, rule(format!("domain {domain}"))));
        }
        let mut cidrs = Vec::new();
        for (i, cidr) in policy.allow_cidrs.iter().enumerate() {
            let range = Range::parse(cidr).ok_or_else(entry("allow_cidrs", i, "an IPv4 range such as 10.0.0.0/8"))?;
            cidrs.push((range, rule(format!("cidr {cidr}"))));
        }
        let ranges = cidrs.iter().map(|(range, _)| *range).collect();
        Ok(Self { mode: policy.mode, transforms, domains, cidrs, ranges, default: rule("default".to_owned()) })
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// The rule of what no entry covers.
    pub(crate) fn default_rule(&self) -> &Rule {
        &self.default
    }

    /// `allow_cidrs`.
    pub(crate) fn ranges(&self) -> &[Range] {
        &self.ranges
    }

    /// There are names whose requests are changed.
    pub(crate) fn has_transforms(&self) -> bool {
        !self.transforms.is_empty()
    }

    /// The range that lets everything to `address` pass.
    pub(crate) fn address(&self, address: Ipv4Addr) -> Option<&Rule> {
        if self.mode != Mode::Custom {
            return None;
        }
        self.cidrs.iter().find(|(range, _)| range.contains(address)).map(|(_, rule)| rule)
    }

    /// What happens to what is for `name`.
    pub(crate) fn name(&self, name: &Name) -> Verdict {
        if self.mode == Mode::DenyAll {
            return Verdict::Refuse(self.default.clone());
        }
        if let Some((_, rule, rewrite)) = closest(&self.transforms, name, |t| &t.0) {
            return Verdict::Change(rule.clone(), Arc::clone(rewrite));
        }
        if self.mode == Mode::AllowAll {
            return Verdict::PassAsAddressed(self.default.clone());
        }
        match closest(&self.domains, name, |d| &d.0) {
            Some((_, rule)) => Verdict::Pass(rule.clone()),
            None => Verdict::Refuse(self.default.clone()),
        }
    }

    /// `name` is allowed by a wildcard alone, so that a guest can make up such names; answers what it made up.
    pub(crate) fn made_up<'n>(&self, name: &'n Name) -> Option<&'n str> {
        let patterns = || self.transforms.iter().map(|t| &t.0).chain(self.domains.iter().map(|d| &d.0));
        if self.mode != Mode::Custom || patterns().any(|p| matches!(p, Pattern::Exact(exact) if exact == name)) {
            return None;
        }
        // The shortest suffix leaves the most to make up.
        patterns()
            .filter_map(|p| if let Pattern::Below(suffix) = p { name.below(suffix) } else { None })
            .max_by_key(|l| l.len())
    }
}

/// The entry that describes `name` best; the first of equals.
fn closest<'e, T>(entries: &'e [T], name: &Name, pattern: impl Fn(&T) -> &Pattern) -> Option<&'e T> {
    let mut best: Option<(usize, &T)> = None;
    for entry in entries {
        if let Some(closeness) = pattern(entry).closeness(name)
            && best.is_none_or(|(other, _)| closeness > other)
        {
            best = Some((closeness, entry));
        }
    }
    best.map(|(_, entry)| entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::Transform;

    fn policy(mode: Mode, domains: &[&str], cidrs: &[&str], transforms: &[&str]) -> Policy {
        let owned = |texts: &[&str]| texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let transform = |domain: &&str| Transform {
            domain: (*domain).to_owned(),
            inject_headers: [("x-key".to_owned(), Secret::new("s3cret".to_owned()))].into(),
            strip_headers: vec!["cookie".to_owned()],
        };
        Policy {
            mode,
            allow_domains: owned(domains),
            allow_cidrs: owned(cidrs),
            transforms: transforms.iter().map(transform).collect(),
        }
    }

    fn verdict(policy: &Policy, name: &str) -> String {
        let rules = Rules::new(policy, &Counters::default()).unwrap();
        match rules.name(&Name::parse(name.as_bytes()).unwrap()) {
            Verdict::Change(rule, _) => format!("change by {}", rule.label),
            Verdict::Pass(rule) => format!("pass by {}", rule.label),
            Verdict::PassAsAddressed(rule) => format!("as addressed by {}", rule.label),
            Verdict::Refuse(rule) => format!("refuse by {}", rule.label),
        }
    }

    #[test]
    fn the_closest_rule_decides() {
        let custom = policy(
            Mode::Custom,
            &["*.example.com", "a.example.com", "*.b.example.com"],
            &[],
            &["*.api.example.com", "x.api.example.com"],
        );
        for (name, expected) in [
            ("a.example.com", "pass by domain a.example.com"),
            ("c.example.com", "pass by domain *.example.com"),
            ("c.b.example.com", "pass by domain *.b.example.com"),
            ("x.api.example.com", "change by transform x.api.example.com"),
            ("y.api.example.com", "change by transform *.api.example.com"),
            ("api.example.com", "pass by domain *.example.com"),
            ("example.com", "refuse by default"),
            ("example.org", "refuse by default"),
        ] {
            assert_eq!(verdict(&custom, name), expected);
        }
        assert_eq!(verdict(&policy(Mode::AllowAll, &[], &[], &["a.b"]), "a.b"), "change by transform a.b");
        assert_eq!(verdict(&policy(Mode::AllowAll, &[], &[], &["a.b"]), "b.b"), "as addressed by default");
        assert_eq!(verdict(&policy(Mode::DenyAll, &["a.b"], &[], &["a.b"]), "a.b"), "refuse by default");
    }

    #[test]
    fn ranges_count_in_custom_alone() {
        let counters = Counters::default();
        let rules = |mode| Rules::new(&policy(mode, &[], &["10.0.0.0/8"], &[]), &counters).unwrap();
        let label = |mode| rules(mode).address(Ipv4Addr::new(10, 1, 1, 1)).map(|rule| rule.label.to_string());
        assert_eq!(label(Mode::Custom).as_deref(), Some("cidr 10.0.0.0/8"));
        assert_eq!((label(Mode::AllowAll), label(Mode::DenyAll)), (None, None));
        assert!(rules(Mode::Custom).address(Ipv4Addr::new(11, 1, 1, 1)).is_none());
    }

    #[test]
    fn what_a_guest_made_up_is_known() {
        let policy =
            policy(Mode::Custom, &["*.example.com", "a.example.com", "*.b.example.com"], &[], &["*.org.example"]);
        let rules = Rules::new(&policy, &Counters::default()).unwrap();
        let made_up = |text: &str| rules.made_up(&Name::parse(text.as_bytes()).unwrap()).map(str::to_owned);
        assert_eq!(made_up("a.example.com"), None);
        assert_eq!(made_up("c.d.b.example.com").as_deref(), Some("c.d.b"));
        assert_eq!(made_up("x.org.example").as_deref(), Some("x"));
    }

    #[test]
    fn a_policy_that_makes_no_sense_is_refused_without_its_values() {
        let counters = Counters::default();
        let wrong = |policy: &Policy| Rules::new(policy, &counters).err().map(|e| e.to_string()).unwrap();
        assert_eq!(wrong(&policy(Mode::Custom, &["a.b"; 51], &[], &[])), "allow_domains has more than 50 entries");
        assert_eq!(
            wrong(&policy(Mode::Custom, &["a.b", "1.2.3.4"], &[], &[])),
            "allow_domains[1] is not a host name or *.suffix"
        );
        assert!(wrong(&policy(Mode::Custom, &[], &["1.2.3.4"], &[])).starts_with("allow_cidrs[0]"));
        let mut host = policy(Mode::Custom, &[], &[], &["a.b"]);
        host.transforms[0].inject_headers = [("x".to_owned(), Secret::new("s3cret\r\nHost: x".to_owned()))].into();
        let said = wrong(&host);
        assert!(said.starts_with("transforms[0]") && !said.contains("s3cret"), "{said}");
    }

    #[test]
    fn what_frames_a_message_is_left_as_it_is() {
        let mut framing = policy(Mode::Custom, &[], &[], &["a.b"]);
        let value = || Secret::new("v".to_owned());
        framing.transforms[0].inject_headers =
            [("Host".to_owned(), value()), ("x".to_owned(), value()), ("transfer-encoding".to_owned(), value())].into();
        framing.transforms[0].strip_headers = vec!["HOST".to_owned(), "cookie".to_owned()];
        let rules = Rules::new(&framing, &Counters::default()).unwrap();
        let Verdict::Change(_, rewrite) = rules.name(&Name::parse(b"a.b").unwrap()) else { panic!("not changed") };
        assert_eq!(rewrite.strip, ["cookie"]);
        assert_eq!(rewrite.inject.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["x"]);
    }

    #[test]
    fn injected_values_are_not_shown() {
        let rules = Rules::new(&policy(Mode::Custom, &[], &[], &["a.b"]), &Counters::default()).unwrap();
        let Verdict::Change(_, rewrite) = rules.name(&Name::parse(b"a.b").unwrap()) else { panic!("not changed") };
        assert!(!format!("{:?}", rewrite.inject).contains("s3cret"));
        assert_eq!(rewrite.inject[0].1.reveal(), "s3cret");
    }
}
