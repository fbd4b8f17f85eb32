//! From a request's text to a path. The kernel resolves `..` and symbolic links: the guest belongs to who asks, so nothing is off limits.

use std::path::{Component, Path, PathBuf};

use super::FileError;

/// `PATH_MAX` of Linux, with the zero byte that ends a path.
const LENGTH_LIMIT: usize = 4096;

/// The path that `text` names, `base` being where relative ones start.
pub(crate) fn resolve(field: &str, text: &str, base: &Path) -> Result<PathBuf, FileError> {
    if text.is_empty() {
        return Err(FileError::invalid(field, "must not be empty"));
    }
    if text.contains('\0') {
        return Err(FileError::invalid(field, "must not contain a zero byte"));
    }
    // Without `.`, repeated and trailing slashes, so that the paths in answers read well.
    let path: PathBuf = base.join(text).components().filter(|part| !matches!(part, Component::CurDir)).collect();
    if path.as_os_str().len() >= LENGTH_LIMIT {
        return Err(FileError::invalid(field, format!("is longer than {} bytes", LENGTH_LIMIT - 1)));
    }
    Ok(path)
}
