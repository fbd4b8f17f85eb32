//! The snapshot format, its stores, the commit register, capture and restore.
//!
//! | module | what |
//! | --- | --- |
//! | [`page`], [`image`] | 4 KiB pages; where the bytes of each page of a memory or disk image are |
//! | [`pack`] | frames and packs: the objects that hold page bytes |
//! | [`manifest`] | the object that describes one snapshot whole; the only type of this crate that is persisted beside the head |
//! | [`seal`] | keys: MACs of manifests and heads, encryption of frames and states |
//! | [`layout`] | the names of objects in a bucket |
//! | [`store`] | object stores behind one trait: a directory, S3; the start-up probe |
//! | [`grant`], [`granted`] | what a VMM may touch, and packs read and written over it |
//! | [`commit`] | the head register: compare-and-swap, settled by content |
//! | [`capture`], [`restore`], [`verify`] | pages to packs, packs to pages, every digest checked |
//! | [`pager`] | packs to pages lazily; the pack cache on local disk |
//! | [`gc`], [`repair`], [`compact`] | what no head needs is deleted; heads are set right; old packs are written anew |
//!
//! This crate knows no KVM, no devices and no HTTP server. Random ids come in from outside.
pub mod capture;
pub mod commit;
pub mod compact;
pub mod gc;
pub mod grant;
pub mod granted;
pub mod ids;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod pack;
pub mod page;
pub mod pager;
pub mod repair;
pub mod restore;
pub mod seal;
pub mod store;
pub mod verify;
