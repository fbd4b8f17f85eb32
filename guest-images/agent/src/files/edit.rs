//! Find and replace, with a diff.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use memchr::memmem;
use similar::TextDiff;
use stasis_agent::protocol::files::{Edit, EditFiles, EditResult, EditResults, Edited};

use super::path::resolve;
use super::replace::replace;
use super::{FileError, part};

/// Files are edited in memory.
const FILE_LIMIT: u64 = 16 << 20;
/// For the diff; a coarser one is shown when the time is up.
const DIFF_TIME: Duration = Duration::from_secs(2);
/// Bytes of a diff that are shown.
const DIFF_LIMIT: usize = 4 << 20;

/// Carries edits out on one file.
pub(crate) fn edit(path: &Path, edits: &[Edit]) -> Result<Edited, FileError> {
    if edits.is_empty() {
        return Err(FileError::invalid("edits", "must not be empty"));
    }
    let before = content(path)?;
    let (mut after, mut replacements) = (before.clone(), 0);
    for (index, edit) in edits.iter().enumerate() {
        let field = format!("edits[{index}].find");
        let (changed, count) = substitute(&field, &after, &edit.find, &edit.replace)?;
        if count == 0 {
            return Err(FileError::invalid(&field, format!("is not in {}", path.display())));
        }
        after = changed;
        replacements += count;
    }
    replace(path, &after)?;
    Ok(Edited { diff: diff(path, &before, &after), replacements })
}

/// Replaces one text in several files, each on its own.
pub(crate) fn edit_many(request: &EditFiles, base: &Path) -> Result<EditResults, FileError> {
    if request.files.is_empty() {
        return Err(FileError::invalid("files", "must not be empty"));
    }
    if request.find.is_empty() {
        return Err(FileError::invalid("find", "must not be empty"));
    }
    let edits = [Edit { find: request.find.clone(), replace: request.replace.clone() }];
    let one = |file: &String| {
        let outcome = resolve("files", file, base).and_then(|path| {
            let before = content(&path)?;
            let (after, count) = substitute("find", &before, &edits[0].find, &edits[0].replace)?;
            if count == 0 {
                return Err(FileError::invalid("find", format!("is not in {}", path.display())));
            }
            replace(&path, &after)
        });
        let error = outcome.err().map(|error| crate::chain(&error));
        EditResult { file: file.clone(), success: error.is_none(), error }
    };
    Ok(EditResults { items: request.files.iter().map(one).collect() })
}

fn content(path: &Path) -> Result<Vec<u8>, FileError> {
    let (file, found) = part::open(path)?;
    let too_large =
        || FileError::TooLarge(format!("{} is larger than the {FILE_LIMIT} bytes that can be edited", path.display()));
    if found.len() > FILE_LIMIT {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    file.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(super::failed("read", path))?;
    if bytes.len() as u64 > FILE_LIMIT { Err(too_large()) } else { Ok(bytes) }
}

/// `content` with every `find` replaced, and how many there were.
fn substitute(field: &str, content: &[u8], find: &str, replace: &str) -> Result<(Vec<u8>, u64), FileError> {
    if find.is_empty() {
        return Err(FileError::invalid(field, "must not be empty"));
    }
    let (mut out, mut copied, mut count) = (Vec::with_capacity(content.len()), 0, 0);
    for at in memmem::find_iter(content, find) {
        out.extend_from_slice(&content[copied..at]);
        out.extend_from_slice(replace.as_bytes());
        copied = at + find.len();
        count += 1;
        if out.len() as u64 > FILE_LIMIT {
            return Err(FileError::TooLarge(format!("the file would become larger than {FILE_LIMIT} bytes")));
        }
    }
    out.extend_from_slice(&content[copied..]);
    Ok((out, count))
}

fn diff(path: &Path, before: &[u8], after: &[u8]) -> String {
    let (before, after) = (String::from_utf8_lossy(before), String::from_utf8_lossy(after));
    let name = path.display();
    let diff = TextDiff::configure().timeout(DIFF_TIME).diff_lines(before.as_ref(), after.as_ref());
    let mut text = diff.unified_diff().header(&format!("a{name}"), &format!("b{name}")).to_string();
    if text.len() > DIFF_LIMIT {
        text.truncate(text.floor_char_boundary(DIFF_LIMIT));
        text.push_str("\n(cut)\n");
    }
    text
}
