//! One entry, directories, trees.

use std::fs::{self, Metadata};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use stasis_agent::protocol::files::{EntryKind, FileInfo, Listing, TreeEntry, TreeItems};

use super::walk::{Bounds, Found, Patterns, entries, walk};
use super::{FileError, failed};
use crate::accounts::Accounts;

/// Depth of a tree: the reader of a JSON text that is nested deeper may refuse it.
const TREE_DEPTH: usize = 50;
/// Bytes of JSON of an entry beside its texts.
const INFO_BYTES: usize = 180;
const NODE_BYTES: usize = 40;

/// What is known of one entry.
pub(crate) fn stat(path: &Path) -> Result<FileInfo, FileError> {
    let found = fs::symlink_metadata(path).map_err(failed("look at", path))?;
    Ok(info(path, &found, &Accounts::read(Path::new("/"))))
}

/// Whether there is an entry.
pub(crate) fn exists(path: &Path) -> Result<bool, FileError> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => Ok(false),
        Err(error) => Err(failed("look at", path)(error)),
    }
}

fn info(path: &Path, found: &Metadata, accounts: &Accounts) -> FileInfo {
    let is_symlink = found.is_symlink();
    FileInfo {
        name: path.file_name().map_or_else(|| "/".to_owned(), |name| name.to_string_lossy().into_owned()),
        path: path.to_string_lossy().into_owned(),
        is_dir: found.is_dir(),
        size: found.len(),
        mode: format!("{:o}", found.permissions().mode() & 0o7777),
        mtime: found.mtime(),
        owner: accounts.user_name(found.uid()),
        group: accounts.group_name(found.gid()),
        is_symlink,
        link_target: is_symlink.then(|| fs::read_link(path).unwrap_or_default().to_string_lossy().into_owned()),
    }
}

/// What is in a directory.
pub(crate) fn ls(path: &Path, recursive: bool, exclude: &[String]) -> Result<Listing, FileError> {
    ls_within(path, recursive, exclude, &mut Bounds::new())
}

pub(super) fn ls_within(
    path: &Path,
    recursive: bool,
    exclude: &[String],
    bounds: &mut Bounds,
) -> Result<Listing, FileError> {
    let exclude = Patterns::new("exclude", exclude)?;
    be_directory(path)?;
    let accounts = Accounts::read(Path::new("/"));
    let mut items = Vec::new();
    let mut take = |bounds: &mut Bounds, path: &Path| {
        let Ok(found) = fs::symlink_metadata(path) else { return true };
        let info = info(path, &found, &accounts);
        let target = info.link_target.as_deref().unwrap_or_default();
        let room = bounds.result(&[&info.name, &info.path, &info.owner, &info.group, target], INFO_BYTES);
        if room {
            items.push(info);
        }
        room
    };
    if recursive {
        walk(path, &exclude, bounds, |bounds, Found { path, .. }| take(bounds, &path)).map_err(failed("list", path))?;
    } else {
        for entry in entries(path, bounds).map_err(failed("list", path))? {
            if !exclude.match_any(Path::new(&entry.file_name())) && !take(bounds, &entry.path()) {
                break;
            }
        }
    }
    Ok(Listing { items, truncated: bounds.reached })
}

/// A directory as a tree.
pub(crate) fn tree(path: &Path, max_depth: Option<u32>, exclude: &[String]) -> Result<TreeItems, FileError> {
    let exclude = Patterns::new("exclude", exclude)?;
    be_directory(path)?;
    let mut bounds = Bounds::new();
    let depth = max_depth.map_or(TREE_DEPTH, |depth| TREE_DEPTH.min(depth as usize));
    let items = branch(path, Path::new(""), depth, max_depth.is_none(), &exclude, &mut bounds)
        .map_err(failed("list", path))?
        .unwrap_or_default();
    Ok(TreeItems { items, truncated: bounds.reached })
}

/// What is in `root`/`below`; `None` when it is too deep to be looked into.
fn branch(
    root: &Path,
    below: &Path,
    depth: usize,
    complete: bool,
    exclude: &Patterns,
    bounds: &mut Bounds,
) -> std::io::Result<Option<Vec<TreeEntry>>> {
    if depth == 0 {
        // Who set no depth of their own is told that something is missing.
        bounds.reached |= complete;
        return Ok(None);
    }
    let mut items = Vec::new();
    for entry in entries(&root.join(below), bounds)? {
        let relative = below.join(entry.file_name());
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(kind) = entry.file_type() else { continue };
        if exclude.match_any(&relative) {
            continue;
        }
        if !bounds.result(&[&name], NODE_BYTES) {
            break;
        }
        let (kind, children) = if kind.is_dir() {
            let children = branch(root, &relative, depth - 1, complete, exclude, bounds).unwrap_or_default();
            (EntryKind::Directory, children)
        } else {
            (EntryKind::File, None)
        };
        items.push(TreeEntry { name, kind, children });
    }
    Ok(Some(items))
}

/// Refuses what is no directory.
pub(super) fn be_directory(path: &Path) -> Result<(), FileError> {
    let found = fs::metadata(path).map_err(failed("look at", path))?;
    if found.is_dir() {
        Ok(())
    } else {
        Err(FileError::invalid("path", format!("{} is not a directory", path.display())))
    }
}
