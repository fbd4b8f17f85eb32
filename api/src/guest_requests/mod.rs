//! Requests that the guest serves, from JSON to what the agent is sent. Checked here, before anything is woken for them; what only the guest
//! can know, it refuses itself. Pure, as [`crate::validate`] is.

pub mod files;
pub mod git;
pub mod terminals;

use crate::validate::{FieldError, FieldErrors, boolean, integer};
use serde_json::{Map, Value};

/// Characters of a path at most: Linux knows no longer ones; what is longer in octets, the guest refuses.
pub(crate) const GUEST_PATH: usize = 4095;
/// Characters of a name (a branch, a remote, a person) at most.
pub(crate) const NAME: usize = 1024;

/// Reads the fields of a request; what is wrong with them is collected.
struct Fields<'a> {
    body: &'a Map<String, Value>,
    errors: FieldErrors,
}

impl<'a> Fields<'a> {
    fn of(body: &'a Map<String, Value>) -> Self {
        Self { body, errors: FieldErrors::default() }
    }

    /// The value, if nothing was wrong.
    fn or<T>(self, value: T) -> Result<T, Vec<FieldError>> {
        self.errors.or(value)
    }

    /// A text that may be absent or null, of at most `limit` characters.
    fn optional(&mut self, name: &str, limit: usize) -> Option<String> {
        let wrong = match self.body.get(name) {
            None | Some(Value::Null) => return None,
            Some(Value::String(text)) if text.chars().count() > limit => {
                format!("must not be longer than {limit} characters")
            }
            Some(Value::String(text)) if text.contains('\0') => "must not contain a NUL".to_owned(),
            Some(Value::String(text)) => return Some(text.clone()),
            Some(_) => "must be a string".to_owned(),
        };
        self.errors.add(name, wrong);
        None
    }

    /// A text that must be there; it may be empty.
    fn required(&mut self, name: &str, limit: usize) -> String {
        if matches!(self.body.get(name), None | Some(Value::Null)) {
            self.errors.add(name, "is required");
        }
        self.optional(name, limit).unwrap_or_default()
    }

    /// A text that must be there and not be empty.
    fn filled(&mut self, name: &str, limit: usize) -> String {
        let text = self.required(name, limit);
        if self.body.get(name).is_some_and(|value| value == "") {
            self.errors.add(name, "must not be empty");
        }
        text
    }

    fn path(&mut self, name: &str) -> String {
        self.filled(name, GUEST_PATH)
    }

    /// An optional text that is nothing when it is empty.
    fn optional_filled(&mut self, name: &str, limit: usize) -> Option<String> {
        self.optional(name, limit).filter(|text| !text.is_empty())
    }

    fn flag(&mut self, name: &str) -> bool {
        boolean(self.body, name, &mut self.errors).unwrap_or(false)
    }

    /// A whole number from `least` to `most`.
    fn number(&mut self, name: &str, least: i64, most: i64) -> Option<u64> {
        integer(self.body, &[name], least..=most, &mut self.errors).and_then(|n| u64::try_from(n).ok())
    }

    /// A list of non-empty texts.
    fn texts(&mut self, name: &str, count: std::ops::RangeInclusive<usize>, limit: usize) -> Vec<String> {
        let items = match self.body.get(name) {
            None | Some(Value::Null) if *count.start() == 0 => return Vec::new(),
            None | Some(Value::Null) => {
                self.errors.add(name, "is required");
                return Vec::new();
            }
            Some(Value::Array(items)) => items,
            Some(_) => {
                self.errors.add(name, "must be a list of strings");
                return Vec::new();
            }
        };
        if !count.contains(&items.len()) {
            self.errors.add(name, format!("must have {} to {} entries", count.start(), count.end()));
            return Vec::new();
        }
        let mut texts = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match item.as_str() {
                Some(text) if !text.is_empty() && text.chars().count() <= limit && !text.contains('\0') => {
                    texts.push(text.to_owned());
                }
                _ => self.errors.add(
                    &format!("{name}[{index}]"),
                    format!("must be a string of 1 to {limit} characters without a NUL"),
                ),
            }
        }
        texts
    }
}

#[cfg(test)]
mod tests;
