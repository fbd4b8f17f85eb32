//! What is below a directory: sorted, symbolic links not followed, within bounds.

use std::fs::{self, DirEntry, FileType};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::FileError;

/// Entries looked at in one search.
const ENTRIES: usize = 500_000;
/// Results of one search.
const RESULTS: usize = 20_000;
/// Bytes of JSON that the results of one search may make up; the supervisor refuses answers of twice as much.
const ANSWER_BYTES: usize = 8 << 20;
/// How long a search may take.
const TIME: Duration = Duration::from_mins(1);

/// What is left of the bounds of one search.
pub(super) struct Bounds {
    entries: usize,
    results: usize,
    bytes: usize,
    deadline: Instant,
    /// One of them was reached.
    pub(super) reached: bool,
}

impl Bounds {
    pub(super) fn new() -> Self {
        Self {
            entries: ENTRIES,
            results: RESULTS,
            bytes: ANSWER_BYTES,
            deadline: Instant::now() + TIME,
            reached: false,
        }
    }

    #[cfg(test)]
    pub(super) fn of(entries: usize, results: usize, bytes: usize, time: Duration) -> Self {
        Self { entries, results, bytes, deadline: Instant::now() + time, reached: false }
    }

    /// Pays for looking at one entry.
    pub(super) fn look(&mut self) -> bool {
        let left = self.entries.checked_sub(1);
        self.pay(left.is_some() && Instant::now() < self.deadline, |bounds| bounds.entries = left.unwrap_or_default())
    }

    /// Pays for one result with these texts and `fixed` bytes beside them.
    pub(super) fn result(&mut self, texts: &[&str], fixed: usize) -> bool {
        let size = fixed + texts.iter().map(|text| json_length(text)).sum::<usize>();
        let left = self.bytes.checked_sub(size);
        self.pay(left.is_some() && self.results > 0, |bounds| {
            bounds.results -= 1;
            bounds.bytes = left.unwrap_or_default();
        })
    }

    fn pay(&mut self, affordable: bool, pay: impl FnOnce(&mut Self)) -> bool {
        if affordable && !self.reached {
            pay(self);
            return true;
        }
        self.reached = true;
        false
    }

    /// Whether the time is up.
    pub(super) fn out_of_time(&mut self) -> bool {
        self.reached |= Instant::now() >= self.deadline;
        self.reached
    }
}

/// Bytes of a text in JSON at most.
fn json_length(text: &str) -> usize {
    text.bytes()
        .map(|byte| match byte {
            0..0x20 => 6,
            b'"' | b'\\' => 2,
            _ => 1,
        })
        .sum()
}

/// Glob patterns: one without `/` is compared with names, another with paths relative to where the search began.
pub(super) struct Patterns(Vec<String>);

impl Patterns {
    pub(super) fn new(field: &str, patterns: &[String]) -> Result<Self, FileError> {
        /// What is matched against every name costs time: patterns of people are short.
        const LENGTH: usize = 1024;
        const COUNT: usize = 256;
        if patterns.len() > COUNT {
            return Err(FileError::invalid(field, format!("has more than {COUNT} patterns")));
        }
        for pattern in patterns {
            if pattern.is_empty() || pattern.len() > LENGTH {
                return Err(FileError::invalid(field, format!("has a pattern that is empty or longer than {LENGTH}")));
            }
            if let Err(error) = fast_glob::validate(pattern) {
                return Err(FileError::invalid(field, format!("{pattern:?} is no glob pattern: {error}")));
            }
        }
        // As in a .gitignore: `/build` and `build/` are `build`.
        Ok(Self(patterns.iter().map(|pattern| pattern.trim_end_matches('/').to_owned()).collect()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `relative`: the path without where the search began.
    pub(super) fn match_any(&self, relative: &Path) -> bool {
        let whole = relative.to_string_lossy();
        let name = relative.file_name().unwrap_or_default().to_string_lossy();
        self.0.iter().any(|pattern| {
            if pattern.contains('/') {
                fast_glob::glob_match(pattern.trim_start_matches('/'), whole.as_bytes())
            } else {
                fast_glob::glob_match(pattern, name.as_bytes())
            }
        })
    }
}

/// An entry that a walk came upon.
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) kind: FileType,
}

/// The entries of a directory, sorted by name, as far as the bounds go.
pub(super) fn entries(directory: &Path, bounds: &mut Bounds) -> io::Result<Vec<DirEntry>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        if !bounds.look() {
            break;
        }
        // What goes away while it is looked at is not there.
        found.extend(entry);
    }
    found.sort_by_key(DirEntry::file_name);
    Ok(found)
}

/// Tells `visit` of everything below `root`, each directory before what is in it, until `visit` or the bounds end it.
pub(super) fn walk(
    root: &Path,
    exclude: &Patterns,
    bounds: &mut Bounds,
    mut visit: impl FnMut(&mut Bounds, Found) -> bool,
) -> io::Result<()> {
    let mut open = vec![entries(root, bounds)?.into_iter()];
    while let Some(directory) = open.last_mut() {
        let Some(entry) = directory.next() else {
            open.pop();
            continue;
        };
        let path = entry.path();
        if bounds.out_of_time() {
            break;
        }
        let Ok(kind) = entry.file_type() else { continue };
        if exclude.match_any(path.strip_prefix(root).unwrap_or(&path)) {
            continue;
        }
        if kind.is_dir()
            && let Ok(below) = entries(&path, bounds)
        {
            open.push(below.into_iter());
        }
        if !visit(bounds, Found { path, kind }) {
            break;
        }
    }
    Ok(())
}
