//! What the API takes and answers, as JSON, in the words of the contract.
//!
//! Answers are made of these types. Requests are read field by field ([`crate::validate`], [`crate::guest_requests`]), so that all that is wrong
//! with one is said at once: for them the types here are the description in the API's document, with the same limits. The tests hold the two
//! together from both sides: what the document allows is taken, what it forbids is refused (`tests/schemathesis`).
//!
//! A field of a request that may be absent may be null, too, and then is as if it were absent.

/// Types that are a schema and nothing else.
macro_rules! inline_schemas {
    ($($(#[$doc:meta])* $name:ident = $schema:tt;)+) => {$(
        $(#[$doc])*
        pub struct $name;

        impl schemars::JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!($schema)
            }
        }
    )+};
}

pub mod errors;
pub mod files;
pub mod git;
pub mod host;
pub mod live;
pub mod network;
pub mod presigned;
pub mod process;
pub mod sandboxes;
pub mod snapshots;
pub mod templates;
pub mod terminals;
pub mod text;
