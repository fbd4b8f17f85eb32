//! The unpacker: makes the file system of a template from the layers of a container image, in a process of its own.
//!
//! An image is written by strangers. Whatever of it has to be taken apart is taken apart here: decompression, archives, the tree that the layers
//! make together. The process gets three descriptors and no path (a socket to its supervisor, the layers as bytes, the disk) and
//! gives up everything else before it reads the first byte. The worst that an image can do to it is to become another file system, which its
//! own guests mount, or to end it.
//!
//! | module | what |
//! | --- | --- |
//! | [`protocol`] | what the supervisor asks for and what is answered |
//! | [`confine`] | what the process gives up |
//! | [`serve`] | the requests, one after the other |
//! | [`layer`], [`tree`] | one layer onto the tree; what the layers make together |
//! | [`furnish`] | what every guest needs and no image brings |
//! | [`disk`], [`ext4`] | content on the disk; the file system around it |
//!
//! File names of an image never become names on this host, and content is written once, to the place where the guest finds it. The same image
//! makes the same octets. No program is run for it: `mke2fs` and `debugfs` did this earlier, and take paths, a script, and the rights to open files.

pub mod confine;
pub mod disk;
pub mod ext4;
pub mod furnish;
pub mod layer;
pub mod protocol;
pub mod serve;
pub mod tree;

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |said, cause| format!("{said}: {cause}"))
}
