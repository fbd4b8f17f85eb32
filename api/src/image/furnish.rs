//! What every guest needs and no image brings: the places of the kernel's file systems, the image's working directory, and the three files in
//! /etc that a container engine puts over the image's own.

use super::tree::{Kind, Meta, Refused, Tree};
use super::wire::Process;
use super::{Contents, ImageError, local};
use std::collections::BTreeMap;
use std::fs;

/// Directories that must be there, with their permissions.
const DIRECTORIES: [(&str, u32); 7] =
    [("proc", 0o555), ("sys", 0o555), ("dev", 0o755), ("run", 0o755), ("tmp", 0o1777), ("root", 0o700), ("etc", 0o755)];
/// Files of the engine, as in Debian's template.
const FILES: [(&str, &str); 3] = [
    ("etc/hostname", "sandbox\n"),
    ("etc/hosts", "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("etc/resolv.conf", "nameserver 1.1.1.1\nnameserver 8.8.8.8\n"),
];
/// Above all layers of an image.
const LAYER: usize = usize::MAX - 1;

/// Adds it to the tree. What the image has something else in the place of stays as it is.
pub(super) fn furnish(tree: &mut Tree, process: &Process, contents: &Contents) -> Result<(), ImageError> {
    let full = |refused: Refused| match refused {
        Refused::TooMany(_) | Refused::TooMuchText => {
            Err(ImageError::Document { part: "layers".to_owned(), what: refused.to_string() })
        }
        // A file or a link where a directory would be: the image means it so.
        _ => Ok(()),
    };
    let mut put = |path: &str, mode: u32, kind: Kind| {
        tree.put(path.as_bytes(), LAYER, Meta { mode, ..Meta::default() }, kind).or_else(full)
    };
    for (number, (path, text)) in FILES.into_iter().enumerate() {
        let content = u64::MAX - number as u64;
        fs::write(contents.path(content), text).map_err(local("keep a file of the guest".to_owned()))?;
        put(path, 0o644, Kind::File(Some(content)))?;
    }
    let workdir = process.working_dir.as_deref().map(|dir| dir.trim_matches('/'));
    let directories = DIRECTORIES.into_iter().chain(workdir.map(|dir| (dir, 0o755)));
    for (path, mode) in directories.filter(|(path, _)| !path.is_empty()) {
        if tree.find(path.as_bytes()).is_none() {
            tree.put(path.as_bytes(), LAYER, Meta { mode, ..Meta::default() }, Kind::Directory(BTreeMap::new()))
                .or_else(full)?;
        }
    }
    contents.forget(tree.take_freed());
    Ok(())
}
