//! Names of hosts and the patterns of policies.
//!
//! A name is compared as it was sent: lower-cased, without a trailing dot, international names in their ASCII form (`xn--…`), as DNS, SNI and
//! Host carry them. What looks like an address is no name: browsers and libraries read `1.2.3.4`, `0x7f.1` or `127.1` as addresses, and
//! so does what ends in a number here (WHATWG URL, "ends in a number checker").

use std::fmt;
use std::net::Ipv6Addr;

/// Bytes of a name at most.
const MAX_NAME: usize = 253;
/// Bytes of a label at most.
const MAX_LABEL: usize = 63;

/// Why something is no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// An address in some form.
    #[error("is an address, not a name")]
    Address,
    /// Something else.
    #[error("is not a host name")]
    Malformed,
}

/// A name: lower-case, no trailing dot, at most 253 bytes of labels of letters, digits, `-` and `_`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// Reads a name as it is in SNI, in Host without its port, or in a DNS question.
    pub fn parse(text: &[u8]) -> Result<Self, NameError> {
        let text = std::str::from_utf8(text).map_err(|_| NameError::Malformed)?;
        let text = text.strip_suffix('.').unwrap_or(text);
        let unbracketed = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
        if unbracketed.parse::<Ipv6Addr>().is_ok() {
            return Err(NameError::Address);
        }
        let label = |l: &str| {
            (1..=MAX_LABEL).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !l.starts_with('-')
                && !l.ends_with('-')
        };
        if text.len() > MAX_NAME || !text.split('.').all(label) {
            return Err(NameError::Malformed);
        }
        if text.rsplit('.').next().is_some_and(is_number) {
            return Err(NameError::Address);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands before `.suffix`; none when this is not below it.
    pub fn below(&self, suffix: &Self) -> Option<&str> {
        self.0.strip_suffix(suffix.as_str())?.strip_suffix('.').filter(|l| !l.is_empty())
    }
}

/// A label that address parsers read as a number: decimal, octal or hexadecimal.
fn is_number(label: &str) -> bool {
    let digits = label.bytes().all(|b| b.is_ascii_digit());
    digits
        || label
            .strip_prefix("0x")
            .or_else(|| label.strip_prefix("0X"))
            .is_some_and(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a policy says of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// This name.
    Exact(Name),
    /// Every name below this one, at any depth; not the name itself.
    Below(Name),
}

impl Pattern {
    /// Reads `name` or `*.name`; the name has at least two labels.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let (suffix, wildcard) = text.strip_prefix("*.").map_or((text, false), |suffix| (suffix, true));
        let name = Name::parse(suffix.as_bytes())?;
        if !name.as_str().contains('.') {
            return Err(NameError::Malformed);
        }
        Ok(if wildcard { Self::Below(name) } else { Self::Exact(name) })
    }

    /// How closely it describes `name`, to choose among several; none when it does not cover it.
    pub fn closeness(&self, name: &Name) -> Option<usize> {
        match self {
            Self::Exact(exact) => (exact == name).then_some(usize::MAX),
            Self::Below(suffix) => name.below(suffix).map(|_| suffix.as_str().len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn case_and_the_trailing_dot_make_no_difference() {
        assert_eq!(name("API.Example.COM."), name("api.example.com"));
        assert_eq!(name("xn--bcher-kva.example").as_str(), "xn--bcher-kva.example");
        assert_eq!(name("_dmarc.example.com").as_str(), "_dmarc.example.com");
    }

    #[test]
    fn addresses_are_no_names_in_any_notation() {
        for text in
            ["1.2.3.4", "127.1", "2130706433", "0x7f000001", "0x7f.1", "1.2.3.0x4", "017.1", "::1", "[::1]", "a.0x"]
        {
            assert_eq!(Name::parse(text.as_bytes()), Err(NameError::Address), "{text}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = ["a"; 128].join(".");
        let label = "a".repeat(64);
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a b",
            "a/b",
            "a@b",
            "a:b",
            "-a.b",
            "a-.b",
            "bücher.example",
            "a\0b",
            &long,
            &label,
        ] {
            assert_eq!(Name::parse(text.as_bytes()), Err(NameError::Malformed), "{text:?}");
        }
        assert_eq!(Name::parse(&[0xff, b'.', b'a']), Err(NameError::Malformed));
    }

    #[test]
    fn a_wildcard_covers_what_is_below_it_and_not_itself() {
        let below = Pattern::parse("*.Example.com").unwrap();
        assert!(
            below.closeness(&name("a.example.com")).is_some() && below.closeness(&name("a.b.example.com")).is_some()
        );
        for other in ["example.com", "badexample.com", "example.com.evil.org", "com"] {
            assert_eq!(below.closeness(&name(other)), None, "{other}");
        }
        let exact = Pattern::parse("a.example.com").unwrap();
        assert!(exact.closeness(&name("A.example.com.")) > below.closeness(&name("a.example.com")));
        assert_eq!(exact.closeness(&name("b.a.example.com")), None);
        for text in ["*", "*.", "*.com", "com", "a.*.com", "**.a.b", "*.1.2.3.4"] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_name_reads_back_as_itself(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            if let Ok(name) = Name::parse(&bytes) {
                prop_assert_eq!(Name::parse(name.as_str().as_bytes()), Ok(name.clone()));
                prop_assert_eq!(Name::parse(format!("{}.", name.as_str().to_uppercase()).as_bytes()), Ok(name));
            }
        }
    }
}
