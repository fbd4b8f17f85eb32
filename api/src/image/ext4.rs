//! The tree as an ext4 image, by e2fsprogs: `mke2fs` makes it empty and `debugfs` writes into it what a script says, by names in the image and
//! numbers on this host. Nothing is mounted, so no privilege is needed, and no file of the image ever has its owner, mode or attributes here.
//!
//! `mke2fs -d` was the other way. It copies a directory, whose owners only root could have made, with all the names of a stranger on this
//! host, in an order and with times that differ from build to build; from a tar archive it reads only since 1.47.1, and Debian bookworm has
//! 1.47.0. With `debugfs` the same tree makes the same octets, given the same version of e2fsprogs.
//!
//! `debugfs` says what went wrong on its standard error and ends with success; so anything there beside its banner is a failure, and `e2fsck`
//! has the last word.

use super::tree::{Inode, Kind, ROOT, Tree};
use super::{Contents, ImageError, local};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

/// One run of a program.
const DEADLINE: Duration = Duration::from_mins(20);
/// Octets of a line of the script at most: `debugfs` reads into a buffer of 8192.
const LINE: usize = 8000;
/// What of an error is kept.
const COMPLAINT: u64 = 2048;
/// All times that the image does not say: a constant, so that the same image makes the same octets.
const EPOCH: &str = "1";
/// UUID and hash seed, for the same reason. No guest sees two of these disks.
const UUID: &str = "6b1f0f4c-5f0e-4f6e-9d4e-73746173697a";
/// What mke2fs makes at the top by itself, and e2fsck wants to be a directory.
const LOST: &[u8] = b"lost+found";
/// Content of files that have none, beside the values of extended attributes.
const EMPTY: &str = "empty";
/// Where e2fsprogs are, whatever the path of the supervisor.
const PLACES: &str = "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin";

/// Writes the tree as `out`, a sparse file of `disk_mib` MiB.
pub(super) async fn write(
    tree: Tree,
    contents: &Contents,
    disk_mib: u64,
    work: &Path,
    out: &Path,
) -> Result<(), ImageError> {
    let (place, contents, values) = (work.join("script"), contents.clone(), work.join("xattr"));
    let script = place.clone();
    super::blocking(move || Script::write(&tree, &contents, &values, &script)).await?;
    let image = out.as_os_str();
    // As guest-images/linux/rootfs makes Debian's: no lazy initialization, a small journal.
    let features = format!("lazy_itable_init=0,lazy_journal_init=0,hash_seed={UUID}");
    let size = format!("{disk_mib}M");
    let mut made = vec![
        "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-J", "size=16", "-L", "root", "-U", UUID, "-E", &features,
    ];
    // Inodes as mke2fs deals them to a disk of 10 GiB, whatever its own configuration says.
    made.extend(["-i", "16384", "-I", "256"]);
    let mut arguments: Vec<&std::ffi::OsStr> = made.into_iter().map(std::ffi::OsStr::new).collect();
    arguments.extend([image, size.as_ref()]);
    let done = run("mke2fs", &arguments, work).await?;
    done.expect("mke2fs", |status, _| status.success())?;
    let done = run("debugfs", &["-w".as_ref(), "-f".as_ref(), place.as_os_str(), image], work).await?;
    done.expect("debugfs", |status, said| status.success() && said.is_empty())?;
    let done = run("e2fsck", &["-f".as_ref(), "-n".as_ref(), image], work).await?;
    done.expect("e2fsck", |status, _| status.success())?;
    let path = out.to_owned();
    super::blocking(move || {
        let sync = || File::open(&path)?.sync_all();
        sync().map_err(local("write the root file system".to_owned()))
    })
    .await
}

struct Done {
    status: ExitStatus,
    said: String,
}

impl Done {
    fn expect(self, program: &'static str, good: impl FnOnce(ExitStatus, &str) -> bool) -> Result<(), ImageError> {
        if good(self.status, &self.said) {
            return Ok(());
        }
        Err(ImageError::FileSystem { program, what: format!("{}: {}", self.status, self.said) })
    }
}

/// Runs one of e2fsprogs. What it writes goes into files: nobody says how much that is.
async fn run(program: &'static str, arguments: &[&std::ffi::OsStr], work: &Path) -> Result<Done, ImageError> {
    let complaints = work.join(format!("{program}.stderr"));
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => ImageError::Missing(program),
        _ => local(format!("run {program}"))(e),
    };
    let stderr = File::create(&complaints).map_err(local(format!("write {}", complaints.display())))?;
    #[expect(
        clippy::disallowed_methods,
        reason = "e2fsprogs write what a template boots from; they get no descriptor of ours"
    )]
    let command = std::process::Command::new(program);
    let mut command = tokio::process::Command::from(command);
    command.args(arguments).env_clear().envs([
        ("PATH", PLACES),
        ("LC_ALL", "C"),
        ("TZ", "UTC"),
        ("E2FSPROGS_FAKE_TIME", EPOCH),
    ]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).kill_on_drop(true);
    let mut child = command.spawn().map_err(failed)?;
    let status = match tokio::time::timeout(DEADLINE, child.wait()).await {
        Ok(status) => status.map_err(failed)?,
        Err(_) => return Err(ImageError::Deadline { what: program.to_owned(), ms: DEADLINE.as_millis() }),
    };
    let mut said = Vec::new();
    let read = File::open(&complaints).and_then(|file| file.take(COMPLAINT).read_to_end(&mut said));
    read.map_err(local(format!("read {}", complaints.display())))?;
    let said = String::from_utf8_lossy(&said);
    // The banner is one line: the name, the version, the date.
    let said: Vec<&str> = said.lines().filter(|line| !line.starts_with(&format!("{program} 1."))).collect();
    Ok(Done { status, said: said.join("\n") })
}

/// What `debugfs` is told to do.
struct Script<'a> {
    tree: &'a Tree,
    contents: &'a Contents,
    values: &'a Path,
    out: BufWriter<File>,
    /// Where an inode with several names was first written.
    written: HashMap<Inode, Vec<u8>>,
    attributes: u64,
    path: Vec<u8>,
}

impl<'a> Script<'a> {
    fn write(tree: &'a Tree, contents: &'a Contents, values: &'a Path, place: &Path) -> Result<(), ImageError> {
        let script = || -> io::Result<()> {
            fs::create_dir_all(values)?;
            File::create(values.join(EMPTY))?;
            let out = BufWriter::new(File::create(place)?);
            let mut script =
                Self { tree, contents, values, out, written: HashMap::new(), attributes: 0, path: Vec::new() };
            script.directory(ROOT)?;
            script.line(&[b"cd", b"/"])?;
            script.meta(ROOT, b".")?;
            script.out.flush()
        };
        script().map_err(|source| match source.kind() {
            io::ErrorKind::InvalidInput => ImageError::FileSystem { program: "debugfs", what: source.to_string() },
            _ => local("write what goes into the root file system".to_owned())(source),
        })
    }

    /// Everything below a directory, which `debugfs` is in.
    fn directory(&mut self, directory: Inode) -> io::Result<()> {
        let tree = self.tree;
        for (name, inode) in tree.names(directory) {
            let (node, here) = (tree.node(inode), beside(name));
            let above = self.path.len();
            self.path.push(b'/');
            self.path.extend_from_slice(name);
            if let Some(first) = self.written.get(&inode).cloned() {
                self.line(&[b"ln", &first, &here])?;
                self.path.truncate(above);
                continue;
            }
            match &node.kind {
                Kind::Directory(_) => {
                    if directory != ROOT || name != LOST {
                        self.line(&[b"mkdir", &here])?;
                    }
                    self.line(&[b"cd", &here])?;
                    self.directory(inode)?;
                    self.line(&[b"cd", b".."])?;
                }
                _ if directory == ROOT && name == LOST => return Err(unwritable("its lost+found is no directory")),
                Kind::File(content) => {
                    let content = match content {
                        Some(content) => self.contents.path(*content),
                        None => self.values.join(EMPTY),
                    };
                    self.line(&[b"write", content.as_os_str().as_bytes(), name])?;
                }
                Kind::Symlink(target) => self.line(&[b"symlink", &here, target])?,
                // As `write` does, it takes the name as it is, whatever that begins with.
                Kind::Fifo => self.line(&[b"mknod", name, b"p"])?,
            }
            self.meta(inode, &here)?;
            if node.links > 1 && !matches!(node.kind, Kind::Directory(_)) {
                self.written.insert(inode, self.path.clone());
                self.line(&[b"set_inode_field", &here, b"links_count", node.links.to_string().as_bytes()])?;
            }
            self.path.truncate(above);
        }
        Ok(())
    }

    fn meta(&mut self, inode: Inode, here: &[u8]) -> io::Result<()> {
        let node = self.tree.node(inode);
        let (kind, mode) = match node.kind {
            Kind::Directory(_) => (0o040_000, node.meta.mode),
            Kind::File(_) => (0o100_000, node.meta.mode),
            Kind::Symlink(_) => (0o120_000, 0o777),
            Kind::Fifo => (0o010_000, node.meta.mode),
        };
        let mut set = |field: &[u8], value: String| self.line(&[b"set_inode_field", here, field, value.as_bytes()]);
        set(b"mode", format!("0{:o}", kind | mode))?;
        for (field, id) in [(b"uid", node.meta.uid), (b"gid", node.meta.gid)] {
            if id != 0 {
                set(field, id.to_string())?;
            }
        }
        set(b"mtime", format!("@{}", node.meta.mtime))?;
        for (name, value) in &node.meta.xattrs {
            let file = self.values.join(self.attributes.to_string());
            self.attributes += 1;
            fs::write(&file, value)?;
            self.line(&[b"ea_set", b"-f", file.as_os_str().as_bytes(), here, name])?;
        }
        Ok(())
    }

    /// A command. Each word is quoted, a quote in it doubled.
    fn line(&mut self, words: &[&[u8]]) -> io::Result<()> {
        let mut line = Vec::new();
        for (index, word) in words.iter().enumerate() {
            if index == 0 {
                line.extend_from_slice(word);
                continue;
            }
            line.extend_from_slice(b" \"");
            for byte in *word {
                line.extend(std::iter::repeat_n(*byte, 1 + usize::from(*byte == b'"')));
            }
            line.push(b'"');
        }
        line.push(b'\n');
        if line.len() > LINE {
            return Err(unwritable(&format!(
                "the path or target of {:?} is too long",
                String::from_utf8_lossy(&self.path)
            )));
        }
        self.out.write_all(&line)
    }
}

/// A name as `debugfs` takes it for what it is: `<12>` alone would be inode 12, and `-x` an option.
fn beside(name: &[u8]) -> Vec<u8> {
    [b"./", name].concat()
}

fn unwritable(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}
