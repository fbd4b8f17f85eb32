//! Make, delete, move, copy, permissions.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use stasis_agent::protocol::files::SetPermissions;

use super::{FileError, failed, mode, part};
use crate::accounts::Accounts;

const NEW_DIRECTORY_MODE: u32 = 0o755;
/// Depth of a directory that is copied.
const COPY_DEPTH: usize = 200;

/// Makes a directory.
pub(crate) fn mkdir(path: &Path, recursive: bool, permissions: Option<&str>) -> Result<(), FileError> {
    let permissions = permissions.map(|text| mode("permissions", text)).transpose()?;
    let existed = fs::metadata(path).is_ok_and(|found| found.is_dir());
    fs::DirBuilder::new().recursive(recursive).mode(NEW_DIRECTORY_MODE).create(path).map_err(failed("make", path))?;
    match permissions {
        // Set rather than given to mkdir(2): the agent's umask does not count.
        Some(permissions) if !existed => {
            fs::set_permissions(path, Permissions::from_mode(permissions)).map_err(failed("make", path))
        }
        _ => Ok(()),
    }
}

/// Deletes an entry.
pub(crate) fn delete(path: &Path, recursive: bool) -> Result<(), FileError> {
    let found = fs::symlink_metadata(path).map_err(failed("delete", path))?;
    if !found.is_dir() {
        return fs::remove_file(path).map_err(failed("delete", path));
    }
    be_no_root(path)?;
    if recursive {
        return fs::remove_dir_all(path).map_err(failed("delete", path));
    }
    fs::remove_dir(path).map_err(|error| match error.kind() {
        io::ErrorKind::DirectoryNotEmpty => FileError::invalid(
            "recursive",
            format!("must be true: {} is a directory that is not empty", path.display()),
        ),
        _ => failed("delete", path)(error),
    })
}

/// The root directory of the guest is not taken away, whatever it is called.
fn be_no_root(path: &Path) -> Result<(), FileError> {
    if fs::canonicalize(path).is_ok_and(|real| real == Path::new("/")) {
        return Err(FileError::invalid("path", "is the root directory"));
    }
    Ok(())
}

/// Changes mode, owner and group of what `path` leads to.
pub(crate) fn set_permissions(path: &Path, request: &SetPermissions) -> Result<(), FileError> {
    let bits = request.mode.as_deref().map(|text| mode("mode", text)).transpose()?;
    let accounts = Accounts::read(Path::new("/"));
    let known = |field: &str, wanted: &Option<String>, find: &dyn Fn(&str) -> Option<u32>| {
        let Some(wanted) = wanted else { return Ok(None) };
        find(wanted)
            .map(Some)
            .ok_or_else(|| FileError::invalid(field, format!("{wanted:?} does not exist in the guest")))
    };
    let owner = known("owner", &request.owner, &|name| accounts.uid(name))?;
    let group = known("group", &request.group, &|name| accounts.gid(name))?;
    if bits.is_none() && owner.is_none() && group.is_none() {
        return Err(FileError::invalid("mode", "is required unless owner or group is given"));
    }
    fs::metadata(path).map_err(failed("look at", path))?;
    // The owner first: a change of owner takes set-user-id bits away.
    if owner.is_some() || group.is_some() {
        chown(path, owner, group).map_err(failed("change the owner of", path))?;
    }
    match bits {
        Some(bits) => {
            fs::set_permissions(path, Permissions::from_mode(bits)).map_err(failed("change the mode of", path))
        }
        None => Ok(()),
    }
}

/// Moves an entry. `overwrite` takes away what is there, a directory with what is in it.
pub(crate) fn move_to(from: &Path, to: &Path, overwrite: bool) -> Result<(), FileError> {
    let found = fs::symlink_metadata(from).map_err(failed("move", from))?;
    if found.is_dir() {
        be_no_root(from)?;
        be_outside(from, to)?;
    }
    if overwrite {
        make_room(from, to)?;
    }
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // Another file system.
        Err(Errno::XDEV) => {
            copy_to(from, to, true, false)?;
            delete(from, true)
        }
        Err(error) => Err(transfer_failed("move", from, to)(error.into())),
    }
}

/// Copies a file, or with `recursive` a directory. Links in it stay links; owners become root. With `overwrite`, files that are there are
/// replaced, and directories that are there are filled.
pub(crate) fn copy_to(from: &Path, to: &Path, recursive: bool, overwrite: bool) -> Result<(), FileError> {
    let found =
        if recursive { fs::symlink_metadata(from) } else { fs::metadata(from) }.map_err(failed("copy", from))?;
    if found.is_dir() {
        if !recursive {
            return Err(FileError::invalid("recursive", format!("must be true: {} is a directory", from.display())));
        }
        be_outside(from, to)?;
    }
    if !overwrite && fs::symlink_metadata(to).is_ok() {
        return Err(FileError::Exists(to.display().to_string()));
    }
    copy_entry(from, to, !recursive, 0)
}

fn copy_entry(from: &Path, to: &Path, follow: bool, depth: usize) -> Result<(), FileError> {
    let found = if follow { fs::metadata(from) } else { fs::symlink_metadata(from) }.map_err(failed("copy", from))?;
    if found.is_dir() {
        if depth == COPY_DEPTH {
            return Err(FileError::TooLarge(format!("{} is too deep to be copied", from.display())));
        }
        match fs::create_dir(to) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && to.is_dir() => {}
            Err(error) => return Err(transfer_failed("copy", from, to)(error)),
        }
        for entry in fs::read_dir(from).map_err(failed("copy", from))? {
            let entry = entry.map_err(failed("copy", from))?;
            copy_entry(&entry.path(), &to.join(entry.file_name()), false, depth + 1)?;
        }
        // Last, since it may forbid to write into it.
        fs::set_permissions(to, found.permissions()).map_err(failed("copy to", to))
    } else if found.is_symlink() {
        let points_to = fs::read_link(from).map_err(failed("copy", from))?;
        clear(to)?;
        symlink(points_to, to).map_err(transfer_failed("copy", from, to))
    } else if found.is_file() {
        if let Ok(there) = fs::metadata(to) {
            if there.is_dir() {
                return Err(FileError::invalid("dst_path", format!("{} is a directory", to.display())));
            }
            if (there.dev(), there.ino()) == (found.dev(), found.ino()) {
                return Err(FileError::invalid("dst_path", format!("{} is the source itself", to.display())));
            }
        }
        let (mut source, _) = part::open(from)?;
        clear(to)?;
        let bits = found.mode() & 0o7777;
        let mut target: File = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(bits)
            .open(to)
            .map_err(transfer_failed("copy", from, to))?;
        io::copy(&mut source, &mut target).map_err(failed("copy to", to))?;
        target.set_permissions(Permissions::from_mode(bits)).map_err(failed("copy to", to))
    } else {
        Err(FileError::invalid("src_path", format!("{} is not a regular file", from.display())))
    }
}

/// Takes away a file or link that a copy replaces.
fn clear(to: &Path) -> Result<(), FileError> {
    match fs::symlink_metadata(to) {
        Ok(found) if found.is_dir() => Err(FileError::invalid("dst_path", format!("{} is a directory", to.display()))),
        Ok(_) => fs::remove_file(to).map_err(failed("replace", to)),
        Err(_) => Ok(()),
    }
}

/// Takes away what a move replaces.
fn make_room(from: &Path, to: &Path) -> Result<(), FileError> {
    let Ok(there) = fs::symlink_metadata(to) else { return Ok(()) };
    if !there.is_dir() {
        let here = fs::symlink_metadata(from).map_err(failed("move", from))?;
        if (there.dev(), there.ino()) == (here.dev(), here.ino()) {
            return Err(FileError::invalid("dst_path", format!("{} is the source itself", to.display())));
        }
        return fs::remove_file(to).map_err(failed("replace", to));
    }
    be_no_root(to)?;
    // What holds the source cannot go before it.
    if contains(to, from) {
        return Err(FileError::invalid("dst_path", format!("{} contains the source", to.display())));
    }
    fs::remove_dir_all(to).map_err(failed("replace", to))
}

fn be_outside(from: &Path, to: &Path) -> Result<(), FileError> {
    if contains(from, to) {
        return Err(FileError::invalid("dst_path", format!("{} is inside the source", to.display())));
    }
    Ok(())
}

/// Whether `inner`, or where it would be made, lies in `outer` or is it.
fn contains(outer: &Path, inner: &Path) -> bool {
    let Ok(outer) = fs::canonicalize(outer) else { return false };
    inner.ancestors().find_map(|part| fs::canonicalize(part).ok()).is_some_and(|inner| inner.starts_with(&outer))
}

/// The error of an operation with two paths: which of them is not there has to be looked at.
fn transfer_failed(operation: &'static str, from: &Path, to: &Path) -> impl FnOnce(io::Error) -> FileError {
    let (from, to) = (from.to_owned(), to.to_owned());
    move |error| {
        if error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(&from).is_ok() {
            return FileError::NotFound(format!("the directory of {}", to.display()));
        }
        match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => {
                FileError::Exists(to.display().to_string())
            }
            _ => failed(operation, &to)(error),
        }
    }
}
