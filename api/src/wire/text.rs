//! Kinds of text and maps in requests.

use crate::guest_requests::{GUEST_PATH, NAME};
use crate::validate::MAX_ENV_VARS;

/// Text without a NUL, which neither a path nor an argument can hold.
const NO_NUL: &str = r"^[^\u0000]*$";

inline_schemas! {
    /// Any text without a NUL.
    Text = { "type": "string", "pattern": NO_NUL };
    /// Some text without a NUL.
    Filled = { "type": "string", "minLength": 1, "pattern": NO_NUL };
    /// Some text without a NUL that is not only spaces.
    Command = { "type": "string", "minLength": 1, "pattern": r"^[^\u0000]*[^\s\u0000][^\u0000]*$" };
    /// A path in the guest.
    GuestPath = { "type": "string", "minLength": 1, "maxLength": GUEST_PATH, "pattern": NO_NUL };
    /// The same, or nothing.
    OptionalPath = { "type": "string", "maxLength": GUEST_PATH, "pattern": NO_NUL };
    /// Permission bits of a file, in octal, or nothing.
    FileMode = { "type": "string", "pattern": "^(0?[0-7]{3,4}|)$", "examples": ["755", "0644"] };
    /// A user or a group of the guest, by name or number, or nothing.
    Account = { "type": "string", "maxLength": 64, "pattern": NO_NUL };
    /// A branch, a commit, a tag or a remote: nothing that git could take for an option.
    GitName = { "type": "string", "minLength": 1, "maxLength": NAME, "pattern": r"^[^\u0000-\u001f\u007f-\u009f-][^\u0000-\u001f\u007f-\u009f]*$" };
    /// The same, or nothing.
    OptionalGitName = { "type": "string", "maxLength": NAME, "pattern": r"^([^\u0000-\u001f\u007f-\u009f-][^\u0000-\u001f\u007f-\u009f]*)?$" };
    /// A name of 1 to 64 characters, not counting spaces around it.
    Label = { "type": "string", "minLength": 1, "maxLength": 64, "pattern": r"\S" };
    /// Environment variables.
    Environment = {
        "type": "object",
        "maxProperties": MAX_ENV_VARS,
        "propertyNames": { "minLength": 1, "pattern": r"^[^=\u0000]+$" },
        "additionalProperties": { "type": "string", "pattern": NO_NUL },
        "examples": [{ "TERM": "xterm-256color" }],
    };
    /// A moment, RFC 3339 in UTC.
    Moment = { "type": "string", "format": "date-time" };
    /// Octets.
    Octets = { "type": "string", "format": "binary" };
    /// A part for each file: its name is the path, its body the file.
    FileParts = { "type": "object", "additionalProperties": { "type": "string", "format": "binary" } };
    /// Nothing: a list that must be empty.
    NoEntries = { "type": "array", "maxItems": 0 };
}
