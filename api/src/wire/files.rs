//! Requests about files of the guest. What the guest answers passes as it is: `stasis_agent::protocol::files`.

use super::text::{Account, FileMode, Filled, GuestPath, Text};
use crate::guest_requests::files::{EDITS, FILES, PATTERN, PATTERNS, SEARCHED};
use schemars::JsonSchema;

/// One path.
#[derive(JsonSchema)]
pub struct OnePath {
    /// The path.
    pub path: GuestPath,
}

/// What is in a directory.
#[derive(JsonSchema)]
pub struct ListDirectory {
    /// The directory.
    pub path: GuestPath,
    /// With everything below it; symbolic links are not followed.
    pub recursive: Option<bool>,
    /// Patterns of names, or of paths relative to `path`, that are left out with what is below them.
    pub exclude: Option<Patterns>,
}

/// A directory to be made.
#[derive(JsonSchema)]
pub struct MakeDirectory {
    /// The directory.
    pub path: GuestPath,
    /// Makes parents too, and takes one that is there for done.
    pub recursive: Option<bool>,
    /// Permission bits, octal; `755` when absent.
    pub permissions: Option<FileMode>,
}

/// Where the body is written to.
#[derive(JsonSchema)]
pub struct WriteFile {
    /// The file; missing parents are made.
    pub path: GuestPath,
    /// Permission bits, octal. When absent: those of the file that is replaced, else `644`.
    pub permissions: Option<FileMode>,
}

/// A part of a file. `head` and `tail` exclude each other, and count lines of the part that `offset` and `limit` say.
#[derive(JsonSchema)]
#[schemars(extend("not" = {
    "required": ["head", "tail"],
    "properties": { "head": { "type": "integer" }, "tail": { "type": "integer" } },
}))]
pub struct ReadFile {
    /// The file.
    pub path: GuestPath,
    /// Bytes left out at the start.
    #[schemars(range(min = 0, max = i64::MAX))]
    pub offset: Option<i64>,
    /// Bytes at most.
    #[schemars(range(min = 0, max = i64::MAX))]
    pub limit: Option<i64>,
    /// The first lines only.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub head: Option<u32>,
    /// The last lines only.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub tail: Option<u32>,
}

/// Files to be read whole.
#[derive(JsonSchema)]
pub struct ReadFiles {
    /// The files.
    #[schemars(length(min = 1, max = FILES))]
    pub paths: Vec<GuestPath>,
}

/// What is to be deleted.
#[derive(JsonSchema)]
pub struct DeletePath {
    /// A file, a symbolic link or a directory.
    pub path: GuestPath,
    /// A directory goes with what is in it.
    pub recursive: Option<bool>,
}

/// New mode, owner or group: at least one of them.
#[derive(JsonSchema)]
#[schemars(extend("anyOf" = [
    { "required": ["mode"], "properties": { "mode": { "type": "string", "minLength": 1 } } },
    { "required": ["owner"], "properties": { "owner": { "type": "string", "minLength": 1 } } },
    { "required": ["group"], "properties": { "group": { "type": "string", "minLength": 1 } } },
]))]
pub struct SetPermissions {
    /// The file or directory.
    pub path: GuestPath,
    /// Permission bits, octal.
    pub mode: Option<FileMode>,
    /// A name or a number.
    pub owner: Option<Account>,
    /// A name or a number.
    pub group: Option<Account>,
}

/// Files to be found by name.
#[derive(JsonSchema)]
pub struct FindFiles {
    /// Where to look.
    pub path: GuestPath,
    /// `*`, `?`, `[…]`, `{a,b}`, and `**` for any number of directories; everything when absent. One without `/` is compared with names,
    /// another with paths relative to `path`.
    pub pattern: Option<OptionalPattern>,
    /// As for a list.
    pub exclude: Option<Patterns>,
}

/// Lines to be found that contain a text.
#[derive(JsonSchema)]
pub struct FindLines {
    /// A directory or a file.
    pub path: GuestPath,
    /// The text, as it is: no regular expression.
    pub pattern: Searched,
    /// Pattern of the files to look at.
    pub include: Option<OptionalPattern>,
    /// As for a list.
    pub exclude: Option<Patterns>,
}

/// One replacement: every occurrence of `find`.
#[derive(JsonSchema)]
pub struct Replacement {
    /// The text that goes.
    pub find: Filled,
    /// The text that comes; nothing when absent.
    pub replace: Option<Text>,
}

/// Replacements in a file, one after the other. When a text is not there, nothing is changed.
#[derive(JsonSchema)]
pub struct EditFile {
    /// The file.
    pub path: GuestPath,
    /// The replacements.
    #[schemars(length(min = 1, max = EDITS))]
    pub edits: Vec<Replacement>,
}

/// One replacement in several files.
#[derive(JsonSchema)]
pub struct EditFiles {
    /// The files.
    #[schemars(length(min = 1, max = FILES))]
    pub files: Vec<GuestPath>,
    /// The text that goes.
    pub find: Filled,
    /// The text that comes; nothing when absent.
    pub replace: Option<Text>,
}

/// From where to where. The destination is the new path itself, never a directory to put it into.
#[derive(JsonSchema)]
pub struct MoveOrCopy {
    /// From.
    pub src_path: GuestPath,
    /// To.
    pub dst_path: GuestPath,
    /// Copies a directory with what is in it; a move always does.
    pub recursive: Option<bool>,
    /// Takes the place of what is there.
    pub overwrite: Option<bool>,
}

/// A directory as a tree.
#[derive(JsonSchema)]
pub struct ShowTree {
    /// The directory.
    pub path: GuestPath,
    /// 1: only what is in it; everything when absent.
    #[schemars(range(min = 0, max = u32::MAX))]
    pub max_depth: Option<u32>,
    /// As for a list.
    pub exclude: Option<Patterns>,
}

inline_schemas! {
    /// Patterns of file names.
    Patterns = {
        "type": "array",
        "maxItems": PATTERNS,
        "items": { "type": "string", "minLength": 1, "maxLength": PATTERN, "pattern": r"^[^\u0000]+$" },
    };
    /// A pattern of file names, or nothing.
    OptionalPattern = { "type": "string", "maxLength": PATTERN, "pattern": r"^[^\u0000]*$" };
    /// A text in a line.
    Searched = { "type": "string", "minLength": 1, "maxLength": SEARCHED, "pattern": r"^[^\u0000\n]+$" };
}
