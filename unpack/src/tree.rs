//! What the layers of an image make together: a tree of names over inodes, as a file system has, in memory. Pure: no path of it is ever one of
//! this host.
//!
//! Each name knows the layer that wrote it, since a whiteout hides what lower layers brought and nothing of its own layer, in whatever order a
//! layer says it. A name is followed through a symbolic link of a lower layer, as overlay file systems and container runtimes do, and never out
//! of the tree; through a link of its own layer it is refused, which no tool writes that means well.

use std::collections::{BTreeMap, VecDeque};

use crate::disk::Content;

/// Octets of a name, and of a path, as Linux has them.
const NAME: usize = 255;
const PATH: usize = 4095;
/// Directories one in another at most: the tree is walked recursively.
const DEPTH: usize = 512;
/// Symbolic links on one path at most, as Linux has it.
const LINKS: u32 = 40;
/// Octets of names, link targets and extended attributes in one tree at most: they are in memory.
const TEXT: usize = 256 << 20;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Index of an inode.
pub type Inode = usize;
/// The top of the tree.
pub const ROOT: Inode = 0;

/// Owner, permissions, time and extended attributes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permissions with set-id and sticky bits: 12 bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// Extended attributes by their names.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// What an inode is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory: its names.
    Directory(BTreeMap<Vec<u8>, Name>),
    /// Its content; `None` when it is empty.
    File(Option<Content>),
    /// A symbolic link: its target.
    Symlink(Vec<u8>),
    /// A named pipe.
    Fifo,
}

/// A directory's name for an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name {
    /// The inode.
    pub inode: Inode,
    layer: usize,
}

/// An inode.
#[derive(Clone, Debug)]
pub struct Node {
    /// Owner and the like.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
    /// Names it has.
    pub links: u32,
}

/// Why an entry is refused: the end of a sentence that names it.
#[expect(missing_docs, reason = "each says what it is")]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("its name is absolute")]
    Absolute,
    #[error("its name has a '..'")]
    Parent,
    #[error("its name cannot be one of a file: it is empty, too long, or has a NUL or a line feed")]
    Name,
    #[error("its path leads through a symbolic link of the same layer")]
    ThroughLink,
    #[error("its path leads out of the image")]
    Escape,
    #[error("its path leads through what is no directory")]
    NotADirectory,
    #[error("its path has too many directories or symbolic links")]
    TooDeep,
    #[error("it is a hard link to {0:?}, which is not there or is a directory")]
    NoTarget(String),
    #[error("the top of the image must be a directory")]
    Root,
    #[error("the image has more than {0} files and directories (templates.image_entries)")]
    TooMany(usize),
    #[error("the names, links and attributes of the image have more than {} MiB", TEXT >> 20)]
    TooMuchText,
}

/// See the module.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    most: usize,
    text: usize,
    /// Contents that no inode has any more.
    freed: Vec<Content>,
}

impl Tree {
    /// An empty tree that takes `most` inodes.
    pub fn new(most: usize) -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        let root = Node { meta, kind: Kind::Directory(BTreeMap::new()), links: 1 };
        Self { nodes: vec![root], most, text: 0, freed: Vec::new() }
    }

    /// An inode of it.
    pub fn node(&self, inode: Inode) -> &Node {
        &self.nodes[inode]
    }

    /// The names of a directory; none of anything else.
    pub fn names(&self, inode: Inode) -> impl Iterator<Item = (&[u8], Inode)> {
        let names = match &self.nodes[inode].kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        };
        names.into_iter().flatten().map(|(name, at)| (name.as_slice(), at.inode))
    }

    /// Contents that no inode has any more, once.
    pub fn take_freed(&mut self) -> Vec<Content> {
        std::mem::take(&mut self.freed)
    }

    /// What is at that path, whose last name is not followed.
    pub fn find(&mut self, path: &[u8]) -> Option<Inode> {
        let names = components(path).ok()?;
        let Some((last, above)) = names.split_last() else { return Some(ROOT) };
        let directory = self.directory(above, usize::MAX, None).ok()?;
        self.child(directory, last).map(|name| name.inode)
    }

    /// Applies an entry of `layer` that is no hard link. A whiteout's own `kind` and `meta` mean nothing.
    pub fn put(&mut self, path: &[u8], layer: usize, meta: Meta, kind: Kind) -> Result<(), Refused> {
        let names = components(path)?;
        let Some((last, above)) = names.split_last() else {
            if !matches!(kind, Kind::Directory(_)) {
                return Err(Refused::Root);
            }
            self.spend(&meta)?;
            self.nodes[ROOT].meta = meta;
            return Ok(());
        };
        if last.starts_with(WHITEOUT) {
            return self.whiteout(above, last, layer);
        }
        let directory = self.directory(above, layer, Some(meta.mtime))?;
        self.spend(&meta)?;
        if let Some(there) = self.child(directory, last) {
            let both = matches!((&self.nodes[there.inode].kind, &kind), (Kind::Directory(_), Kind::Directory(_)));
            if both {
                self.nodes[there.inode].meta = meta;
                self.set(directory, last, Name { inode: there.inode, layer });
                return Ok(());
            }
        }
        let inode = self.add(meta, kind)?;
        self.replace(directory, last, Name { inode, layer })
    }

    /// Applies a hard link of `layer` to what is at `target`.
    pub fn link(&mut self, path: &[u8], layer: usize, target: &[u8]) -> Result<(), Refused> {
        let missing = || Refused::NoTarget(String::from_utf8_lossy(target).into_owned());
        let (names, wanted) = (components(path)?, components(target)?);
        let (Some((last, above)), Some((its_last, its_above))) = (names.split_last(), wanted.split_last()) else {
            return Err(missing());
        };
        if last.starts_with(WHITEOUT) {
            return Err(Refused::Name);
        }
        let from = match self.directory(its_above, layer, None) {
            Err(Refused::NotADirectory) => return Err(missing()),
            other => other?,
        };
        let there = self.child(from, its_last).ok_or_else(missing)?;
        if matches!(self.nodes[there.inode].kind, Kind::Directory(_)) {
            return Err(missing());
        }
        let directory = self.directory(above, layer, Some(self.nodes[there.inode].meta.mtime))?;
        if self.child(directory, last).is_some_and(|name| name.inode == there.inode) {
            self.set(directory, last, Name { inode: there.inode, layer });
            return Ok(());
        }
        // Held while the old name goes, which may be the last other one.
        self.nodes[there.inode].links += 1;
        self.replace(directory, last, Name { inode: there.inode, layer })
    }

    /// `.wh..wh..opq` hides what lower layers have in the directory, `.wh.NAME` that name.
    fn whiteout(&mut self, above: &[&[u8]], last: &[u8], layer: usize) -> Result<(), Refused> {
        let directory = match self.directory(above, layer, None) {
            // Nothing is there to be hidden.
            Err(Refused::NotADirectory) => return Ok(()),
            other => other?,
        };
        if last == OPAQUE {
            self.hide_below(directory, layer);
            return Ok(());
        }
        let name = &last[WHITEOUT.len()..];
        // Other names with this beginning are for tools of their own.
        if name.is_empty() || name.starts_with(WHITEOUT) {
            return Ok(());
        }
        if let Some(there) = self.child(directory, name) {
            self.hide(directory, name, there, layer);
        }
        Ok(())
    }

    /// Hides a name of lower layers; a directory in which this layer has something stays for that.
    fn hide(&mut self, directory: Inode, name: &[u8], there: Name, layer: usize) {
        if matches!(self.nodes[there.inode].kind, Kind::Directory(_)) {
            self.hide_below(there.inode, layer);
        }
        let empty = self.names(there.inode).next().is_none();
        if there.layer < layer && empty {
            self.remove(directory, name);
        }
    }

    fn hide_below(&mut self, directory: Inode, layer: usize) {
        let names: Vec<(Vec<u8>, Name)> = match &self.nodes[directory].kind {
            Kind::Directory(names) => names.iter().map(|(name, at)| (name.clone(), *at)).collect(),
            _ => return,
        };
        for (name, there) in names {
            self.hide(directory, &name, there, layer);
        }
    }

    fn child(&self, directory: Inode, name: &[u8]) -> Option<Name> {
        match &self.nodes[directory].kind {
            Kind::Directory(names) => names.get(name).copied(),
            _ => None,
        }
    }

    fn set(&mut self, directory: Inode, name: &[u8], at: Name) {
        if let Kind::Directory(names) = &mut self.nodes[directory].kind {
            names.insert(name.to_vec(), at);
        }
    }

    fn replace(&mut self, directory: Inode, name: &[u8], at: Name) -> Result<(), Refused> {
        self.spend_text(name.len())?;
        self.remove(directory, name);
        self.set(directory, name, at);
        Ok(())
    }

    /// Takes a name away, and everything below it.
    fn remove(&mut self, directory: Inode, name: &[u8]) {
        let gone = match &mut self.nodes[directory].kind {
            Kind::Directory(names) => names.remove(name),
            _ => None,
        };
        if let Some(gone) = gone {
            self.drop_link(gone.inode);
        }
    }

    fn drop_link(&mut self, inode: Inode) {
        let node = &mut self.nodes[inode];
        node.links -= 1;
        if node.links > 0 {
            return;
        }
        match std::mem::replace(&mut node.kind, Kind::Fifo) {
            Kind::Directory(names) => names.into_values().for_each(|name| self.drop_link(name.inode)),
            Kind::File(Some(content)) => self.freed.push(content),
            Kind::File(None) | Kind::Symlink(_) | Kind::Fifo => {}
        }
    }

    fn add(&mut self, meta: Meta, kind: Kind) -> Result<Inode, Refused> {
        if self.nodes.len() > self.most {
            return Err(Refused::TooMany(self.most));
        }
        if let Kind::Symlink(target) = &kind {
            self.spend_text(target.len())?;
        }
        self.nodes.push(Node { meta, kind, links: 1 });
        Ok(self.nodes.len() - 1)
    }

    fn spend(&mut self, meta: &Meta) -> Result<(), Refused> {
        self.spend_text(meta.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum())
    }

    fn spend_text(&mut self, octets: usize) -> Result<(), Refused> {
        self.text += octets;
        if self.text > TEXT { Err(Refused::TooMuchText) } else { Ok(()) }
    }

    /// The directory of that path, for an entry of `layer`. One that is missing is made when there is a time for it; otherwise the answer is
    /// [`Refused::NotADirectory`].
    fn directory(&mut self, path: &[&[u8]], layer: usize, make: Option<i64>) -> Result<Inode, Refused> {
        let mut left: VecDeque<Vec<u8>> = path.iter().map(|name| name.to_vec()).collect();
        let mut at = vec![ROOT];
        let mut links = 0;
        while let Some(name) = left.pop_front() {
            let here = at.last().copied().unwrap_or(ROOT);
            if name == b".." {
                // Only from the target of a link: an entry's own name has none.
                if at.len() == 1 {
                    return Err(Refused::Escape);
                }
                at.pop();
                continue;
            }
            let Some(there) = self.child(here, &name) else {
                let Some(mtime) = make else { return Err(Refused::NotADirectory) };
                if name.starts_with(WHITEOUT) || at.len() > DEPTH {
                    return Err(if at.len() > DEPTH { Refused::TooDeep } else { Refused::Name });
                }
                let meta = Meta { mode: 0o755, mtime, ..Meta::default() };
                let inode = self.add(meta, Kind::Directory(BTreeMap::new()))?;
                self.replace(here, &name, Name { inode, layer })?;
                at.push(inode);
                continue;
            };
            match &self.nodes[there.inode].kind {
                Kind::Directory(_) if at.len() > DEPTH => return Err(Refused::TooDeep),
                Kind::Directory(_) => at.push(there.inode),
                Kind::Symlink(_) if there.layer == layer => return Err(Refused::ThroughLink),
                Kind::Symlink(target) => {
                    links += 1;
                    if links > LINKS {
                        return Err(Refused::TooDeep);
                    }
                    if target.starts_with(b"/") {
                        at.truncate(1);
                    }
                    let names = target.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".");
                    names.rev().for_each(|name| left.push_front(name.to_vec()));
                }
                Kind::File(_) | Kind::Fifo => return Err(Refused::NotADirectory),
            }
        }
        Ok(at.last().copied().unwrap_or(ROOT))
    }
}

/// The names of a path of an archive, none for its top.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, Refused> {
    if path.starts_with(b"/") {
        return Err(Refused::Absolute);
    }
    if path.is_empty() || path.len() > PATH {
        return Err(Refused::Name);
    }
    let names: Vec<&[u8]> = path.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".").collect();
    if names.contains(&b"..".as_slice()) {
        return Err(Refused::Parent);
    }
    if names.iter().any(|name| name.len() > NAME || name.contains(&0) || name.contains(&b'\n')) {
        return Err(Refused::Name);
    }
    Ok(names)
}
