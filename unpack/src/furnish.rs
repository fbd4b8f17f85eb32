//! What every guest needs and no image brings: the places of the kernel's file systems, the image's working directory, and the three files in
//! /etc that a container engine puts over the image's own.

use std::collections::BTreeMap;
use std::io;

use crate::disk::Disk;
use crate::tree::{Kind, Meta, Refused, Tree};

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
pub fn furnish(tree: &mut Tree, disk: &mut Disk, working_dir: Option<&str>) -> io::Result<()> {
    for (path, text) in FILES {
        let content = disk.keep(&mut text.as_bytes(), text.len() as u64)?;
        if !put(tree, path, 0o644, Kind::File(content))?
            && let Some(content) = content
        {
            disk.forget(content)?;
        }
    }
    let working_dir = working_dir.map(|dir| (dir.trim_matches('/'), 0o755));
    for (path, mode) in DIRECTORIES.into_iter().chain(working_dir).filter(|(path, _)| !path.is_empty()) {
        if tree.find(path.as_bytes()).is_none() {
            put(tree, path, mode, Kind::Directory(BTreeMap::new()))?;
        }
    }
    tree.take_freed().into_iter().try_for_each(|freed| disk.forget(freed))
}

/// Whether it is in the tree now: the image may mean a file or a link to be where a directory would.
fn put(tree: &mut Tree, path: &str, mode: u32, kind: Kind) -> io::Result<bool> {
    match tree.put(path.as_bytes(), LAYER, Meta { mode, ..Meta::default() }, kind) {
        Ok(()) => Ok(true),
        Err(full @ (Refused::TooMany(_) | Refused::TooMuchText)) => Err(io::Error::other(full)),
        Err(_) => Ok(false),
    }
}
