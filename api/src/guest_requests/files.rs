//! `filesystem/*`.

use super::Fields;
use crate::validate::FieldError;
use serde_json::{Map, Value};
use stasis_agent::protocol::files::{
    Delete, Edit, EditFile, EditFiles, Glob, Grep, Ls, Mkdir, PathOnly, Read, ReadMany, SetPermissions, Transfer, Tree,
    Write,
};

type Body = Map<String, Value>;
type Checked<T> = Result<T, Vec<FieldError>>;

pub(crate) const PATTERN: usize = 1024;
pub(crate) const PATTERNS: usize = 256;
const TEXT: usize = 10 << 20;
pub(crate) const SEARCHED: usize = 64 << 10;
pub(crate) const FILES: usize = 1000;
pub(crate) const EDITS: usize = 1000;

fn exclude(fields: &mut Fields<'_>) -> Vec<String> {
    fields.texts("exclude", 0..=PATTERNS, PATTERN)
}

fn mode(fields: &mut Fields<'_>, name: &str) -> Option<String> {
    let mode = fields.optional_filled(name, 16)?;
    if let Some(error) = bad_mode(&mode) {
        fields.errors.add(name, error);
    }
    Some(mode)
}

fn bad_mode(mode: &str) -> Option<&'static str> {
    let octal = (3..=5).contains(&mode.len()) && mode.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let fits = u32::from_str_radix(mode, 8).is_ok_and(|bits| bits <= 0o7777);
    (!(octal && fits)).then_some("must be an octal mode such as 755")
}

/// `ls`.
pub fn ls(body: &Body) -> Checked<Ls> {
    let mut fields = Fields::of(body);
    let out = Ls { path: fields.path("path"), recursive: fields.flag("recursive"), exclude: exclude(&mut fields) };
    fields.or(out)
}

/// `stat` and `exists`.
pub fn path(body: &Body) -> Checked<PathOnly> {
    let mut fields = Fields::of(body);
    let out = PathOnly { path: fields.path("path") };
    fields.or(out)
}

/// `mkdir`.
pub fn mkdir(body: &Body) -> Checked<Mkdir> {
    let mut fields = Fields::of(body);
    let out = Mkdir {
        path: fields.path("path"),
        recursive: fields.flag("recursive"),
        permissions: mode(&mut fields, "permissions"),
    };
    fields.or(out)
}

/// The query of `write-file`.
pub fn write(query: &[(String, String)]) -> Checked<Write> {
    let body = query.iter().map(|(name, value)| (name.clone(), Value::String(value.clone()))).collect();
    let mut fields = Fields::of(&body);
    let out = Write { path: fields.path("path"), permissions: mode(&mut fields, "permissions") };
    fields.or(out)
}

/// `read-file`.
pub fn read(body: &Body) -> Checked<Read> {
    let mut fields = Fields::of(body);
    let lines = |n: Option<u64>| n.and_then(|n| u32::try_from(n).ok());
    let out = Read {
        path: fields.path("path"),
        offset: fields.number("offset", 0, i64::MAX),
        limit: fields.number("limit", 0, i64::MAX),
        head: lines(fields.number("head", 0, i64::from(u32::MAX))),
        tail: lines(fields.number("tail", 0, i64::from(u32::MAX))),
    };
    if out.head.is_some() && out.tail.is_some() {
        fields.errors.add("tail", "excludes head");
    }
    fields.or(out)
}

/// `read-files`.
pub fn read_many(body: &Body) -> Checked<ReadMany> {
    let mut fields = Fields::of(body);
    let out = ReadMany { paths: fields.texts("paths", 1..=FILES, super::GUEST_PATH) };
    fields.or(out)
}

/// `delete`.
pub fn delete(body: &Body) -> Checked<Delete> {
    let mut fields = Fields::of(body);
    let out = Delete { path: fields.path("path"), recursive: fields.flag("recursive") };
    fields.or(out)
}

/// `set-permissions`.
pub fn set_permissions(body: &Body) -> Checked<SetPermissions> {
    let mut fields = Fields::of(body);
    let out = SetPermissions {
        path: fields.path("path"),
        mode: mode(&mut fields, "mode"),
        owner: fields.optional_filled("owner", 64),
        group: fields.optional_filled("group", 64),
    };
    if fields.errors.is_empty() && out.mode.is_none() && out.owner.is_none() && out.group.is_none() {
        fields.errors.add("mode", "is required unless owner or group is given");
    }
    fields.or(out)
}

/// `glob`.
pub fn glob(body: &Body) -> Checked<Glob> {
    let mut fields = Fields::of(body);
    let out = Glob {
        path: fields.path("path"),
        pattern: fields.optional_filled("pattern", PATTERN),
        exclude: exclude(&mut fields),
    };
    fields.or(out)
}

/// `grep`. The contract lets the text be null, which finds nothing to look for.
pub fn grep(body: &Body) -> Checked<Grep> {
    let mut fields = Fields::of(body);
    let out = Grep {
        path: fields.path("path"),
        pattern: fields.filled("pattern", SEARCHED),
        include: fields.optional_filled("include", PATTERN),
        exclude: exclude(&mut fields),
    };
    if out.pattern.contains('\n') {
        fields.errors.add("pattern", "must be one line");
    }
    fields.or(out)
}

/// `edit-file`.
pub fn edit(body: &Body) -> Checked<EditFile> {
    let mut fields = Fields::of(body);
    let path = fields.path("path");
    let mut edits = Vec::new();
    match body.get("edits") {
        Some(Value::Array(items)) if (1..=EDITS).contains(&items.len()) => {
            for (index, item) in items.iter().enumerate() {
                let empty = Map::new();
                let mut edit = Fields::of(item.as_object().unwrap_or(&empty));
                let out = Edit {
                    find: edit.filled("find", TEXT),
                    replace: edit.optional("replace", TEXT).unwrap_or_default(),
                };
                match edit.or(out) {
                    Ok(edit) => edits.push(edit),
                    Err(wrong) => {
                        for FieldError { field, error } in wrong {
                            fields.errors.add(&format!("edits[{index}].{field}"), error);
                        }
                    }
                }
            }
        }
        Some(Value::Array(_)) => fields.errors.add("edits", format!("must have 1 to {EDITS} entries")),
        None | Some(Value::Null) => fields.errors.add("edits", "is required"),
        Some(_) => fields.errors.add("edits", "must be a list of objects"),
    }
    fields.or(EditFile { path, edits })
}

/// `edit-files`.
pub fn edit_many(body: &Body) -> Checked<EditFiles> {
    let mut fields = Fields::of(body);
    let out = EditFiles {
        files: fields.texts("files", 1..=FILES, super::GUEST_PATH),
        find: fields.filled("find", TEXT),
        replace: fields.optional("replace", TEXT).unwrap_or_default(),
    };
    fields.or(out)
}

/// `move` and `copy`.
pub fn transfer(body: &Body) -> Checked<Transfer> {
    let mut fields = Fields::of(body);
    let out = Transfer {
        src_path: fields.path("src_path"),
        dst_path: fields.path("dst_path"),
        recursive: fields.flag("recursive"),
        overwrite: fields.flag("overwrite"),
    };
    fields.or(out)
}

/// `tree`.
pub fn tree(body: &Body) -> Checked<Tree> {
    let mut fields = Fields::of(body);
    let depth = fields.number("max_depth", 0, i64::from(u32::MAX));
    let out = Tree {
        path: fields.path("path"),
        max_depth: depth.and_then(|depth| u32::try_from(depth).ok()),
        exclude: exclude(&mut fields),
    };
    fields.or(out)
}
