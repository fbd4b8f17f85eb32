//! Files by name and by content.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;

use memchr::memmem::Finder;
use stasis_agent::protocol::files::{Grep, Match, Matches, Paths};

use super::walk::{Bounds, Found, Patterns, walk};
use super::{FileError, failed, list, part};

/// Bytes of a line that are shown.
const SHOWN: usize = 4096;
/// Bytes of a line that are searched; the rest of a longer one is passed over.
const LINE: u64 = 8 << 20;
/// A zero byte among the first bytes of a file makes it binary.
const LOOKED_AT: usize = 8192;
/// Files larger than this are passed over when a directory is searched.
const FILE: u64 = 256 << 20;
/// Bytes of JSON of a match beside its texts.
const MATCH_BYTES: usize = 60;
const TEXT_LIMIT: usize = 64 << 10;

/// Files below `path` whose name fits.
pub(crate) fn glob(path: &Path, pattern: Option<&str>, exclude: &[String]) -> Result<Paths, FileError> {
    let exclude = Patterns::new("exclude", exclude)?;
    let wanted = Patterns::new("pattern", &pattern.map(str::to_owned).into_iter().collect::<Vec<_>>())?;
    list::be_directory(path)?;
    let mut bounds = Bounds::new();
    let mut items = Vec::new();
    walk(path, &exclude, &mut bounds, |bounds, Found { path: found, kind, .. }| {
        if kind.is_dir() || !(wanted.is_empty() || wanted.match_any(found.strip_prefix(path).unwrap_or(&found))) {
            return true;
        }
        let text = found.to_string_lossy().into_owned();
        let room = bounds.result(&[&text], 3);
        if room {
            items.push(text);
        }
        room
    })
    .map_err(failed("search", path))?;
    Ok(Paths { items, truncated: bounds.reached })
}

/// Lines below `path` that contain a text.
pub(crate) fn grep(path: &Path, request: &Grep) -> Result<Matches, FileError> {
    let exclude = Patterns::new("exclude", &request.exclude)?;
    let include = Patterns::new("include", &request.include.clone().into_iter().collect::<Vec<_>>())?;
    if request.pattern.is_empty() || request.pattern.len() > TEXT_LIMIT || request.pattern.contains('\n') {
        return Err(FileError::invalid("pattern", format!("must be one line of 1 to {TEXT_LIMIT} bytes")));
    }
    let finder = Finder::new(&request.pattern);
    let mut bounds = Bounds::new();
    let mut items = Vec::new();
    if fs::metadata(path).map_err(failed("look at", path))?.is_dir() {
        walk(path, &exclude, &mut bounds, |bounds, Found { path: found, kind, .. }| {
            let relative = found.strip_prefix(path).unwrap_or(&found);
            let wanted = kind.is_file() && (include.is_empty() || include.match_any(relative));
            // Files that cannot be read, or not any more, have no lines.
            if wanted
                && fs::metadata(&found).is_ok_and(|found| found.len() <= FILE)
                && let Ok((file, _)) = part::open(&found)
            {
                search(file, &found, &finder, bounds, &mut items);
            }
            !bounds.out_of_time()
        })
        .map_err(failed("search", path))?;
    } else {
        let (file, _) = part::open(path)?;
        search(file, path, &finder, &mut bounds, &mut items);
    }
    Ok(Matches { items, truncated: bounds.reached })
}

fn search(file: File, path: &Path, finder: &Finder<'_>, bounds: &mut Bounds, items: &mut Vec<Match>) {
    let mut reader = BufReader::with_capacity(64 << 10, file);
    let head = reader.fill_buf().unwrap_or_default();
    if head[..head.len().min(LOOKED_AT)].contains(&0) {
        return;
    }
    let name = path.to_string_lossy();
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        let read = std::io::Read::take(&mut reader, LINE).read_until(b'\n', &mut line);
        if !read.is_ok_and(|len| len > 0) || bounds.out_of_time() {
            return;
        }
        number += 1;
        let whole = line.ends_with(b"\n");
        if !whole && line.len() as u64 == LINE && reader.skip_until(b'\n').is_err() {
            return;
        }
        let text = line.strip_suffix(b"\n").map_or(&line[..], |text| text.strip_suffix(b"\r").unwrap_or(text));
        if finder.find(text).is_none() {
            continue;
        }
        let content = String::from_utf8_lossy(&text[..text.len().min(SHOWN)]).into_owned();
        if !bounds.result(&[&name, &content], MATCH_BYTES) {
            return;
        }
        items.push(Match { path: name.clone().into_owned(), line: number, content });
    }
}
