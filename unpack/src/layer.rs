//! One layer onto the tree. Plain, gzip or zstd, told by its first octets; its tar archive is read entry by entry and never held.
//!
//! Every size in the archive is the word of a stranger: what is unpacked is counted as it comes, and headers that would have to be held are
//! bounded before they are read. Extended attributes other than `security.capability` and `user.*` are left out: they mean something only
//! to the host they are from. Devices are refused, except in the image's /dev, which no guest sees: theirs are left out.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};
use tar::{Archive, EntryType, Header};

use crate::disk::Disk;
use crate::tree::{Kind, Meta, Refused, Tree};

/// Octets of an extended header at most.
const MAX_HEADER: u64 = 1 << 20;
/// Octets of one file's extended attributes at most, of each with so many more for what the file system says of it: all fit into a block.
const MAX_XATTRS: usize = 3 << 10;
const XATTR_HEAD: usize = 24;
const BUFFER: usize = 256 << 10;
const XATTR: &str = "SCHILY.xattr.";

/// What an image may still unpack.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Octets of its archives.
    pub bytes: u64,
    /// Entries of its archives.
    pub entries: usize,
}

/// What is wrong with a layer.
#[derive(Debug)]
pub struct Fault {
    /// The entry of its archive, when it is one entry's fault.
    pub entry: Option<String>,
    /// Why it is refused.
    pub what: String,
}

impl Fault {
    fn of_entry(name: &[u8], what: impl std::fmt::Display) -> Self {
        Self { entry: Some(String::from_utf8_lossy(name).into_owned()), what: what.to_string() }
    }

    fn of_layer(what: impl Into<String>) -> Self {
        Self { entry: None, what: what.into() }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::of_layer(crate::chain(&error))
    }
}

/// Applies the layer with this number, all of `packed`, and checks the digest of its archive. After a fault tree and disk are good for nothing.
pub fn apply(
    tree: &mut Tree,
    disk: &mut Disk,
    budget: &mut Budget,
    number: usize,
    packed: impl Read,
    diff_id: &str,
) -> Result<(), Fault> {
    let mut packed = BufReader::with_capacity(BUFFER, packed);
    {
        let magic = packed.fill_buf()?;
        let unpacked: Box<dyn Read + '_> = match magic {
            [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(&mut packed)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let mut decoder = zstd::Decoder::with_buffer(&mut packed)?;
                // 128 MiB: what zstd takes without being asked, and what a stranger may have us hold.
                decoder.window_log_max(27)?;
                Box::new(decoder)
            }
            _ => Box::new(&mut packed),
        };
        let bounded = Bounded { inner: unpacked, left: &mut budget.bytes, hasher: Sha256::new() };
        let mut archive = Archive::new(bounded);
        read(Reading { tree, disk, number }, &mut archive, &mut budget.entries)?;
        let mut rest = archive.into_inner();
        // Behind the archive's end, which belongs to the digest.
        io::copy(&mut rest, &mut io::sink())?;
        let found = rest.digest();
        if found != diff_id {
            return Err(Fault::of_layer(format!("its archive has the digest {found}, not {diff_id}")));
        }
    }
    // What follows what is packed is not looked at, but it has to be taken.
    io::copy(&mut packed, &mut io::sink())?;
    Ok(())
}

struct Reading<'a> {
    tree: &'a mut Tree,
    disk: &'a mut Disk,
    number: usize,
}

/// What extended headers say about the next entry.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    values: BTreeMap<String, Vec<u8>>,
}

fn read<R: Read>(mut state: Reading<'_>, archive: &mut Archive<R>, entries: &mut usize) -> Result<(), Fault> {
    let mut extended = Extended::default();
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        let header = entry.header().clone();
        let kind = header.entry_type();
        match kind {
            EntryType::XGlobalHeader | EntryType::XHeader | EntryType::GNULongName | EntryType::GNULongLink => {
                let size = header.entry_size()?;
                if size > MAX_HEADER {
                    return Err(Fault::of_layer(format!(
                        "an extended header has {size} bytes, at most {MAX_HEADER} are taken"
                    )));
                }
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                match kind {
                    EntryType::XHeader => extended.read(&bytes)?,
                    EntryType::GNULongName => extended.path = Some(until_nul(&bytes)),
                    EntryType::GNULongLink => extended.target = Some(until_nul(&bytes)),
                    // Global headers say where the archive is from.
                    _ => {}
                }
            }
            _ => {
                *entries = entries
                    .checked_sub(1)
                    .ok_or_else(|| Fault::of_layer("the image has too many entries (templates.image_entries)"))?;
                let said = std::mem::take(&mut extended);
                let name = said.path.clone().unwrap_or_else(|| header.path_bytes().into_owned());
                state.take(&header, &said, &name, &mut entry).map_err(|refusal| Fault::of_entry(&name, refusal))?;
                for freed in state.tree.take_freed() {
                    state.disk.forget(freed)?;
                }
            }
        }
    }
    Ok(())
}

impl Reading<'_> {
    fn take(&mut self, header: &Header, said: &Extended, name: &[u8], body: &mut impl Read) -> Result<(), Refusal> {
        let target = || said.target.clone().or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let size = header.entry_size()?;
        if said.values.keys().any(|key| key.starts_with("GNU.sparse.")) {
            return Err(Refusal::Kind("a sparse file"));
        }
        if let Some(other) = said.number::<u64>("size")?
            && other != size
        {
            return Err(Refusal::Kind("of two sizes"));
        }
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Kind::Directory(BTreeMap::new()),
            EntryType::Regular | EntryType::Continuous => {
                Kind::File(if is_whiteout(name) { None } else { self.disk.keep(body, size)? })
            }
            EntryType::Directory => Kind::Directory(BTreeMap::new()),
            EntryType::Symlink => match target() {
                Some(target) if !target.is_empty() && target.len() < 4096 && !target.contains(&b'\n') => {
                    Kind::Symlink(target)
                }
                _ => return Err(Refusal::Kind("a symbolic link whose target cannot be one")),
            },
            EntryType::Fifo => Kind::Fifo,
            EntryType::Link => {
                let target = target().ok_or(Refusal::Kind("a hard link without a target"))?;
                return Ok(self.tree.link(name, self.number, &target)?);
            }
            EntryType::Char | EntryType::Block if is_in_dev(name) => return Ok(()),
            EntryType::Char | EntryType::Block => return Err(Refusal::Kind("a device")),
            EntryType::GNUSparse => return Err(Refusal::Kind("a sparse file")),
            _ => return Err(Refusal::Kind("of a kind that is not known")),
        };
        let meta = said.meta(header)?;
        Ok(self.tree.put(name, self.number, meta, kind)?)
    }
}

/// Why an entry is refused: the end of a sentence that names it.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("it is {0}")]
    Kind(&'static str),
    #[error(transparent)]
    Tree(#[from] Refused),
    #[error("its {0} is no number that a file system has")]
    Number(&'static str),
    #[error("its extended attributes have more than {MAX_XATTRS} bytes, or a name that cannot be one")]
    Attributes,
    #[error("{0}")]
    Read(#[from] io::Error),
}

fn is_whiteout(name: &[u8]) -> bool {
    name.rsplit(|b| *b == b'/').next().is_some_and(|last| last.starts_with(b".wh."))
}

fn is_in_dev(name: &[u8]) -> bool {
    let mut names = name.split(|b| *b == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.next() == Some(b"dev") && !names.any(|name| name == b"..")
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().take_while(|byte| *byte != 0).collect()
}

/// The first record of an extended header, `LENGTH KEY=VALUE\n`, and what is behind it. Its end is where its length says: the value of a
/// file capability has any octets, line ends among them, which is why the tar crate's reader of lines does not do.
fn pax_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let (record, rest) = bytes.split_at_checked(length)?;
    let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some((&record[..equals], &record[equals + 1..], rest))
}

impl Extended {
    fn read(&mut self, mut bytes: &[u8]) -> Result<(), Fault> {
        while !bytes.is_empty() {
            let Some((key, value, rest)) = pax_record(bytes) else {
                return Err(Fault::of_layer("an extended header is no list of records"));
            };
            bytes = rest;
            let value = value.to_vec();
            match key {
                b"path" => self.path = Some(value),
                b"linkpath" => self.target = Some(value),
                key => {
                    self.values.insert(String::from_utf8_lossy(key).into_owned(), value);
                }
            }
        }
        Ok(())
    }

    /// A number; of a decimal fraction the whole part.
    fn number<T: std::str::FromStr>(&self, key: &'static str) -> Result<Option<T>, Refusal> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        let text = std::str::from_utf8(value).map_err(|_| Refusal::Number(key))?;
        let whole = text.split('.').next().unwrap_or_default();
        whole.parse().map(Some).map_err(|_| Refusal::Number(key))
    }

    fn meta(&self, header: &Header) -> Result<Meta, Refusal> {
        let id = |key: &'static str, said: io::Result<u64>| match self.number::<u32>(key)? {
            Some(id) => Ok(id),
            None => said.ok().and_then(|id| u32::try_from(id).ok()).ok_or(Refusal::Number(key)),
        };
        let mtime = match self.number::<i64>("mtime")? {
            Some(mtime) => mtime,
            None => i64::try_from(header.mtime()?).map_err(|_| Refusal::Number("mtime"))?,
        };
        let mut xattrs = BTreeMap::new();
        for (key, value) in &self.values {
            let Some(name) = key.strip_prefix(XATTR) else { continue };
            if name == "security.capability" || name.strip_prefix("user.").is_some_and(|rest| !rest.is_empty()) {
                xattrs.insert(name.as_bytes().to_vec(), value.clone());
            }
        }
        let octets: usize = xattrs.iter().map(|(name, value)| XATTR_HEAD + name.len() + value.len()).sum();
        if octets > MAX_XATTRS
            || xattrs.keys().any(|name| name.len() > 255 || name.contains(&0) || name.contains(&b'\n'))
        {
            return Err(Refusal::Attributes);
        }
        Ok(Meta {
            mode: header.mode()? & 0o7777,
            uid: id("uid", header.uid())?,
            gid: id("gid", header.gid())?,
            mtime: mtime.clamp(0, ext4_time()),
            xattrs,
        })
    }
}

/// The last second that ext4 has, in 2446: 32 signed bits, and 2 more that count how often those went round.
fn ext4_time() -> i64 {
    (3 << 32) + i64::from(i32::MAX)
}

/// Hashes what is read, and fails when more comes than is left.
struct Bounded<'a, R> {
    inner: R,
    left: &'a mut u64,
    hasher: Sha256,
}

impl<R: Read> Bounded<'_, R> {
    /// `sha256:…` of what was read.
    fn digest(self) -> String {
        self.hasher.finalize().iter().fold("sha256:".to_owned(), |mut text, octet| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{octet:02x}");
            text
        })
    }
}

impl<R: Read> Read for Bounded<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        *self.left = self
            .left
            .checked_sub(n as u64)
            .ok_or_else(|| io::Error::other("the image unpacks to more than it may (templates.image_mib)"))?;
        self.hasher.update(&buf[..n]);
        Ok(n)
    }
}
