//! Files of the guest. Paths are text; relative ones are relative to [`super::System::workdir`]. All operations run as root.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `POST /v1/files/ls` | [`Ls`] | [`Listing`] |
//! | `POST /v1/files/stat` | [`PathOnly`] | [`FileInfo`] |
//! | `POST /v1/files/mkdir` | [`Mkdir`] | 204 |
//! | `POST /v1/files/write?path=…&permissions=…` | the file | 204 |
//! | `POST /v1/files/write-many` | multipart: name = path, body = the file | 204 |
//! | `POST /v1/files/read` | [`Read`] | the bytes |
//! | `POST /v1/files/read-many` | [`ReadMany`] | multipart: name = path, body = the file |
//! | `POST /v1/files/delete` | [`Delete`] | 204 |
//! | `POST /v1/files/set-permissions` | [`SetPermissions`] | 204 |
//! | `POST /v1/files/glob` | [`Glob`] | [`Paths`] |
//! | `POST /v1/files/grep` | [`Grep`] | [`Matches`] |
//! | `POST /v1/files/edit` | [`EditFile`] | [`Edited`] |
//! | `POST /v1/files/edit-many` | [`EditFiles`] | [`EditResults`] |
//! | `POST /v1/files/move`, `/copy` | [`Transfer`] | 204 |
//! | `POST /v1/files/exists` | [`PathOnly`] | [`Exists`] |
//! | `POST /v1/files/tree` | [`Tree`] | [`TreeItems`] |
//!
//! The field names are those of the public API, which both sides pass on as they are. `truncated` in an answer: a limit of the agent
//! (entries, bytes or time) ended the search before it was through.

use serde::{Deserialize, Serialize};

/// A request about one path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathOnly {
    /// The path.
    pub path: String,
}

/// What is in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ls {
    /// The directory.
    pub path: String,
    /// With everything below it; symbolic links are not followed.
    #[serde(default)]
    pub recursive: bool,
    /// Glob patterns of names, or of paths relative to `path`, that are left out with what is below them.
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// One file, directory or other entry; a symbolic link is itself, not what it points to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct FileInfo {
    /// Last part of the path.
    pub name: String,
    /// The whole path.
    pub path: String,
    /// It is a directory.
    pub is_dir: bool,
    /// Bytes.
    pub size: u64,
    /// Permission bits in octal: `755`.
    pub mode: String,
    /// Last change of the content, seconds since the epoch.
    pub mtime: i64,
    /// Owner: a name, or a number that has none.
    pub owner: String,
    /// Group: a name, or a number that has none.
    pub group: String,
    /// It is a symbolic link.
    pub is_symlink: bool,
    /// Where the symbolic link points to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
}

/// Entries, sorted by path.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Listing {
    /// The entries.
    pub items: Vec<FileInfo>,
    /// A limit (entries, bytes or time) ended the search before it was through.
    #[serde(default, skip_serializing_if = "is_false")]
    pub truncated: bool,
}

/// Makes a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mkdir {
    /// The directory.
    pub path: String,
    /// Makes parents too, and takes one that is there for done.
    #[serde(default)]
    pub recursive: bool,
    /// Permission bits in octal; `755` when absent.
    #[serde(default)]
    pub permissions: Option<String>,
}

/// The query of a write: the file is the body.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    /// The file; missing parents are made.
    pub path: String,
    /// Permission bits in octal. When absent: those of the file that is replaced, else `644`.
    #[serde(default)]
    pub permissions: Option<String>,
}

/// Reads a part of a file. `head` and `tail` exclude each other, and count lines of the part that `offset` and `limit` say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Read {
    /// The file.
    pub path: String,
    /// Bytes left out at the start.
    #[serde(default)]
    pub offset: Option<u64>,
    /// Bytes at most.
    #[serde(default)]
    pub limit: Option<u64>,
    /// The first lines only.
    #[serde(default)]
    pub head: Option<u32>,
    /// The last lines only.
    #[serde(default)]
    pub tail: Option<u32>,
}

/// Reads files whole. One that cannot be read refuses the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadMany {
    /// The files.
    pub paths: Vec<String>,
}

/// Deletes a file, a symbolic link or a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delete {
    /// What goes.
    pub path: String,
    /// A directory goes with what is in it.
    #[serde(default)]
    pub recursive: bool,
}

/// Changes mode, owner or group of what a path leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetPermissions {
    /// The file or directory.
    pub path: String,
    /// Permission bits in octal.
    #[serde(default)]
    pub mode: Option<String>,
    /// A name or a number.
    #[serde(default)]
    pub owner: Option<String>,
    /// A name or a number.
    #[serde(default)]
    pub group: Option<String>,
}

/// Finds files by name. A pattern without `/` is compared with names, another with paths relative to `path`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Glob {
    /// Where to look.
    pub path: String,
    /// `*`, `?`, `[…]`, `{a,b}`, and `**` for any number of directories; everything when absent.
    #[serde(default)]
    pub pattern: Option<String>,
    /// As in [`Ls`].
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// Paths of files, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Paths {
    /// The paths.
    pub items: Vec<String>,
    /// A limit (entries, bytes or time) ended the search before it was through.
    #[serde(default, skip_serializing_if = "is_false")]
    pub truncated: bool,
}

/// Finds lines that contain a text, as it is: no regular expression. Binary files are passed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grep {
    /// A directory or a file.
    pub path: String,
    /// The text.
    pub pattern: String,
    /// Pattern of the files to look at, as in [`Glob`].
    #[serde(default)]
    pub include: Option<String>,
    /// As in [`Ls`].
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// A line that contains the text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Match {
    /// The file.
    pub path: String,
    /// Its line, from 1.
    pub line: u64,
    /// The line without its end; long ones are cut.
    pub content: String,
}

/// Lines, in order of path and number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Matches {
    /// The lines.
    pub items: Vec<Match>,
    /// A limit (entries, bytes or time) ended the search before it was through.
    #[serde(default, skip_serializing_if = "is_false")]
    pub truncated: bool,
}

/// One replacement: every occurrence of `find`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Edit {
    /// The text that goes; not empty.
    pub find: String,
    /// The text that comes.
    #[serde(default)]
    pub replace: String,
}

/// Replaces texts in a file, one after the other. When one of them is not there, nothing is changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EditFile {
    /// The file.
    pub path: String,
    /// The replacements.
    pub edits: Vec<Edit>,
}

/// What an edit did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Edited {
    /// Unified diff from before to after.
    pub diff: String,
    /// Occurrences replaced.
    pub replacements: u64,
}

/// Replaces one text in several files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EditFiles {
    /// The files.
    pub files: Vec<String>,
    /// The text that goes; not empty.
    pub find: String,
    /// The text that comes.
    #[serde(default)]
    pub replace: String,
}

/// How it went with one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EditResult {
    /// The file as the request named it.
    pub file: String,
    /// It was changed.
    pub success: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// One result for each file, in the order of the request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EditResults {
    /// The results.
    pub items: Vec<EditResult>,
}

/// Moves or copies. The destination is the new path itself, never a directory to put it into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// From.
    pub src_path: String,
    /// To.
    pub dst_path: String,
    /// Copies a directory with what is in it; a move always does.
    #[serde(default)]
    pub recursive: bool,
    /// Takes the place of what is there.
    #[serde(default)]
    pub overwrite: bool,
}

/// Whether a path leads to something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Exists {
    /// It does; a symbolic link counts wherever it points to.
    pub exists: bool,
}

/// A directory as a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// The directory.
    pub path: String,
    /// 1: only what is in it.
    #[serde(default)]
    pub max_depth: Option<u32>,
    /// As in [`Ls`].
    #[serde(default)]
    pub exclude: Vec<String>,
}

/// What a tree is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum EntryKind {
    /// Everything but a directory.
    File,
    /// A directory.
    Directory,
}

/// A node of a tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TreeEntry {
    /// Its name.
    pub name: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: EntryKind,
    /// What is in a directory, sorted by name; absent when it was not looked into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub children: Option<Vec<TreeEntry>>,
}

/// What is in the root of a tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TreeItems {
    /// The entries.
    pub items: Vec<TreeEntry>,
    /// A limit (entries, bytes or time) ended the search before it was through.
    #[serde(default, skip_serializing_if = "is_false")]
    pub truncated: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_false(flag: &bool) -> bool {
    !flag
}
