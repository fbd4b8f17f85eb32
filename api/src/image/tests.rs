//! Images through the unpacker: layers (`layers`), hostile archives, and file systems read back with the tools of ext4's own people.

use super::blob::Blob;
use super::unpacker::{Unpacker, unpack};
use super::*;
use crate::dev::layout::{Entry, EntryKind, Layout, Packing, archive, digest};
use serde_json::json;
use stasis_unpack::disk::{BLOCK, Content, Disk};
use stasis_unpack::layer::{Budget, apply};
use stasis_unpack::tree::{Kind, Meta, ROOT, Refused, Tree};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

mod layers;

/// Blocks of a disk for layers alone.
const BLOCKS: u64 = 16 << 10;

struct Bench {
    dir: tempfile::TempDir,
    limits: Limits,
    launcher: Arc<Launcher>,
    disk: fs::File,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let local = dir.path().join("images");
        fs::create_dir(&local).unwrap();
        let limits = Limits { local_dir: Some(local), disk_mib: 64, image_mib: 32, ..Limits::default() };
        let launcher = Arc::new(Launcher::unjailed(Path::new("/nowhere")));
        Self { dir, limits, launcher, disk: tempfile::tempfile().unwrap() }
    }

    fn local(&self, name: &str) -> PathBuf {
        self.dir.path().join("images").join(name)
    }

    /// Applies layers to a tree, as the unpacker does.
    fn merge(&self, layers: &[Vec<Entry>]) -> Result<(Tree, Disk), String> {
        self.disk.set_len(0).unwrap();
        self.disk.set_len(BLOCKS * BLOCK).unwrap();
        let mut tree = Tree::new(self.limits.image_entries);
        let mut disk = Disk::new(self.disk.try_clone().unwrap(), 0, BLOCKS);
        let mut budget = Budget { bytes: self.limits.image_mib << 20, entries: self.limits.image_entries };
        for (index, entries) in layers.iter().enumerate() {
            let packed = archive(entries);
            apply(&mut tree, &mut disk, &mut budget, index + 1, packed.as_slice(), &digest(&packed))
                .map_err(|fault| format!("{fault:?}"))?;
        }
        Ok((tree, disk))
    }

    fn content(&self, content: Option<Content>) -> Vec<u8> {
        content.map_or_else(Vec::new, |content| {
            let mut found = vec![0; content.len as usize];
            self.disk.read_exact_at(&mut found, content.block * BLOCK).unwrap();
            found
        })
    }

    /// What the unpacker says of layers.
    fn unpack(&self, layers: &[Vec<Entry>]) -> Result<(), String> {
        let archives: Vec<_> = layers.iter().map(|entries| archive(entries)).collect();
        let layers = archives.iter().map(|archive| (archive.clone(), Some(digest(archive)), digest(archive))).collect();
        self.unpack_blobs(layers)
    }

    /// The same of blobs with their digests and those of their archives.
    fn unpack_blobs(&self, layers: Vec<(Vec<u8>, Option<String>, String)>) -> Result<(), String> {
        let layers = layers.into_iter().map(|(bytes, digest, diff_id)| Layer { blob: blob(&bytes), digest, diff_id });
        let image = Image { digest: String::new(), process: Process::default(), layers: layers.collect() };
        let out = tempfile::tempdir_in(self.dir.path()).unwrap().keep().join("out.ext4");
        let done = unpack(&self.launcher, &image, "test", &self.limits, &out, &Progress::default());
        done.map_err(|e| crate::error::chain(&e))
    }

    async fn build(&self, uri: &str) -> Result<(Built, PathBuf), String> {
        let work = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let out = work.join("out.ext4");
        let reference = Reference::parse(uri).map_err(|e| e.to_string())?;
        let progress = Arc::new(Progress::default());
        let built = build(&self.launcher, &reference, None, &self.limits, &work, &out, &progress, 0).await;
        built.map(|built| (built, out)).map_err(|e| crate::error::chain(&e))
    }
}

fn blob(bytes: &[u8]) -> Blob {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Blob::whole(file).unwrap()
}

/// What is in a tree: directories, files with their content, links with their targets.
fn listing(bench: &Bench, tree: &Tree, at: usize, path: &str, out: &mut BTreeMap<String, String>) {
    for (name, inode) in tree.names(at) {
        let path = format!("{path}/{}", String::from_utf8_lossy(name));
        let what = match &tree.node(inode).kind {
            Kind::Directory(_) => "directory".to_owned(),
            Kind::File(content) => format!("file {}", String::from_utf8_lossy(&bench.content(*content))),
            Kind::Symlink(target) => format!("link {}", String::from_utf8_lossy(target)),
            Kind::Fifo => "fifo".to_owned(),
        };
        out.insert(path.clone(), what);
        listing(bench, tree, inode, &path, out);
    }
}

fn list(bench: &Bench, tree: &Tree) -> BTreeMap<String, String> {
    let mut out = BTreeMap::new();
    listing(bench, tree, ROOT, "", &mut out);
    out
}

#[test]
fn hostile_entries_are_refused_by_layer_and_name() {
    let bench = Bench::new();
    let base = || vec![Entry::directory("etc"), Entry::file("etc/passwd", "root"), Entry::symlink("out", "../../etc")];
    let deep = vec!["d"; 1000].join("/");
    let long = "n".repeat(300);
    let large = vec![7; 4000];
    for (entries, entry, what) in [
        (vec![Entry::file("../etc/passwd", "x")], "../etc/passwd", "'..'"),
        (vec![Entry::file("a/../../b", "x")], "a/../../b", "'..'"),
        (vec![Entry::file("/etc/passwd", "x")], "/etc/passwd", "absolute"),
        (
            vec![Entry::symlink("s", "/etc"), Entry::file("s/passwd", "x")],
            "s/passwd",
            "symbolic link of the same layer",
        ),
        (vec![Entry::file("out/passwd", "x")], "out/passwd", "out of the image"),
        (vec![Entry::link("l", "../../etc/shadow")], "l", "'..'"),
        (vec![Entry::link("l", "/etc/passwd")], "l", "absolute"),
        (vec![Entry::link("l", "none")], "l", "hard link to"),
        (vec![Entry::link("l", "etc")], "l", "hard link to"),
        (vec![Entry::new("sda", EntryKind::Device)], "sda", "a device"),
        (vec![Entry::new("dev/../sda", EntryKind::Device)], "dev/../sda", "a device"),
        (vec![Entry::file("etc/passwd/x", "x")], "etc/passwd/x", "no directory"),
        (vec![Entry::file(&deep, "x")], deep.as_str(), "too many directories"),
        (vec![Entry::file(&long, "x")], long.as_str(), "too long"),
        (vec![Entry::file("a\nb", "x")], "a\\nb", "line feed"),
        (vec![Entry::file(".", "x")], ".", "top of the image"),
        (vec![Entry::symlink("s", "a\nb")], "s", "target"),
        (vec![Entry::file("x", "x").xattr("user.large", &large)], "x", "attributes"),
    ] {
        let error = bench.unpack(&[base(), entries]).unwrap_err();
        assert!(error.starts_with("layer 2 of 2 (sha256:"), "{error}");
        assert!(error.contains(&format!("entry \"{entry}\"")) && error.contains(what), "{error}");
    }
    // What docker puts there for its own sake.
    let (tree, _) = bench.merge(&[vec![Entry::new("dev/console", EntryKind::Device), Entry::file("a", "x")]]).unwrap();
    assert_eq!(list(&bench, &tree).len(), 1);
}

#[test]
fn symbolic_links_that_go_round_end() {
    let bench = Bench::new();
    let lower = vec![Entry::symlink("a", "b"), Entry::symlink("b", "a")];
    assert!(bench.unpack(&[lower, vec![Entry::file("a/x", "")]]).unwrap_err().contains("too many"));
    let mut tree = Tree::new(3);
    let put = |tree: &mut Tree, path: &str| tree.put(path.as_bytes(), 1, Meta::default(), Kind::File(None));
    put(&mut tree, "x/y/z").unwrap();
    assert_eq!(put(&mut tree, "v"), Err(Refused::TooMany(3)));
}

#[test]
fn bombs_go_off_in_bounds() {
    let mut bench = Bench::new();
    bench.limits.image_mib = 1;
    let zeros = archive(&[Entry::file("zeros", vec![0; 2 << 20])]);
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let layout = Layout::new(&json!({}), &[(packing, zeros.clone())]).unwrap();
        let (name, blob) = layout.blobs.iter().find(|(_, blob)| !blob.starts_with(b"{")).unwrap();
        let error = bench.unpack_blobs(vec![(blob.clone(), Some(name.clone()), digest(&zeros))]).unwrap_err();
        assert!(error.contains("image_mib"), "{packing:?}: {error}");
    }
    bench.limits.image_entries = 10;
    let many: Vec<_> = (0..11).map(|n| Entry::file(format!("{n}"), "")).collect();
    assert!(bench.merge(&[many[..10].to_vec()]).is_ok());
    assert!(bench.unpack(std::slice::from_ref(&many)).unwrap_err().contains("image_entries"));
    assert!(bench.unpack(&[many[..6].to_vec(), many[6..].to_vec()]).unwrap_err().contains("layer 2 of 2"));
    // An extended header that would have to be held.
    bench.limits = Bench::new().limits;
    let header = Entry::file("x", "").xattr("user.x", &vec![1; 2 << 20]);
    assert!(bench.unpack(&[vec![header]]).unwrap_err().contains("extended header"));
    // A size that is larger than everything.
    let mut huge = archive(&[Entry::file("huge", "x")]);
    huge[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    let sum: u32 =
        huge[..512].iter().enumerate().map(|(at, o)| if (148..156).contains(&at) { 32 } else { u32::from(*o) }).sum();
    huge[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let error = bench.unpack_blobs(vec![(huge.clone(), None, digest(&huge))]).unwrap_err();
    assert!(error.contains("entry \"huge\"") && error.contains("disk_mib"), "{error}");
}

#[test]
fn damaged_layers_are_refused() {
    let bench = Bench::new();
    let plain = archive(&[Entry::file("a", "hello"), Entry::file("b", vec![3; 100_000])]);
    let layout = Layout::new(&json!({}), &[(Packing::Gzip, plain.clone())]).unwrap();
    let gzip = layout.blobs.values().find(|blob| blob.starts_with(&[0x1f, 0x8b])).unwrap().clone();
    let merge = |bytes: &[u8], named: Option<String>, diff_id: String| {
        bench.unpack_blobs(vec![(bytes.to_vec(), named, diff_id)])
    };
    assert!(merge(&gzip, Some(digest(&gzip)), digest(&plain)).is_ok());
    let other = digest(b"other");
    assert!(merge(&gzip, Some(other.clone()), digest(&plain)).unwrap_err().contains(&format!("not {other}")));
    assert!(merge(&gzip, None, other.clone()).unwrap_err().contains("its archive has the digest"));
    let cut = &gzip[..gzip.len() / 2];
    assert!(merge(cut, Some(digest(cut)), digest(&plain)).is_err());
    let mut flipped = gzip.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 0x55;
    assert!(merge(&flipped, Some(digest(&flipped)), digest(&plain)).is_err());
    // An archive that ends early is another archive.
    assert!(merge(&plain[..512], None, digest(&plain)).is_err());
    assert!(merge(b"not an archive", None, digest(b"not an archive")).is_err());
    // What follows the archive belongs to the blob's digest.
    let trailed = [gzip.as_slice(), b"more"].concat();
    assert!(merge(&trailed, Some(digest(&gzip)), digest(&plain)).is_err());
}

/// What one of e2fsprogs says, and whether it is content.
#[expect(clippy::disallowed_methods, reason = "what was written is read with another program")]
fn ask(program: &str, arguments: &[&str], image: &Path) -> (bool, String) {
    let mut command = std::process::Command::new(program);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").env("TZ", "UTC").args(arguments).arg(image);
    let ran = command.output().unwrap();
    (ran.status.success(), String::from_utf8_lossy(&ran.stdout).into_owned())
}

fn debugfs(image: &Path, command: &str) -> String {
    ask("debugfs", &["-R", command], image).1
}

/// A process without a zombie of it.
fn lives(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn an_unpacker_that_dies_is_an_error_that_names_the_image() {
    let bench = Bench::new();
    let disk = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file
    };
    let (progress, packed) = (Progress::default(), archive(&[Entry::file("a", vec![1; 1 << 20])]));
    let layer = Layer { blob: blob(&packed), digest: None, diff_id: digest(&packed) };
    let start = |deadline| Unpacker::start(&bench.launcher, "oci:app:v1", disk(), &progress, deadline).unwrap();
    let long = Duration::from_mins(1);
    // At the beginning, and with half a layer inside.
    for begin in [false, true] {
        let mut unpacker = start(long);
        let pid = rustix::process::Pid::from_raw(unpacker.pid()).unwrap();
        if begin {
            unpacker.begin(&bench.limits).unwrap();
        }
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let failed = if begin { unpacker.layer(1, 1, &layer) } else { unpacker.begin(&bench.limits) };
        let error = failed.unwrap_err();
        assert!(matches!(&error, ImageError::Unpacker { image, .. } if image == "oci:app:v1"), "{error:?}");
        assert!(error.to_string().contains("killed"), "{error}");
        drop(unpacker);
        assert!(!lives(pid.as_raw_nonzero().get()));
    }
    // What it says of itself is said.
    let mut unpacker = start(long);
    unpacker.begin(&Limits { image_entries: usize::MAX, ..bench.limits.clone() }).unwrap();
    let again = unpacker.begin(&bench.limits).unwrap_err().to_string();
    assert!(again.contains("begun already"), "{again}");
    // One that stands still is waited for until the deadline, or as long as anybody waits.
    for stop in [false, true] {
        let mut unpacker = start(if stop { long } else { Duration::from_millis(300) });
        let pid = rustix::process::Pid::from_raw(unpacker.pid()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        if stop {
            progress.stop();
        }
        let began = Instant::now();
        let error = unpacker.begin(&bench.limits).unwrap_err();
        assert!(error.to_string().contains("oci:app:v1"), "{error}");
        assert_eq!(matches!(error, ImageError::Deadline { ms: 300, .. }), !stop, "{error}");
        drop(unpacker);
        assert!(!lives(pid.as_raw_nonzero().get()) && began.elapsed() < long / 2);
    }
}

fn rich() -> Vec<Vec<Entry>> {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let first = vec![
        Entry::directory("./").mode(0o711),
        Entry::directory("home/app").mode(0o2750).owner(1000, 70_000),
        Entry::file("bin/su", "elf").mode(0o4755),
        Entry::file("bin/ping", "elf").xattr("security.capability", &capability).xattr("user.note", b"a\0b\n"),
        Entry::file("bin/none", "elf").xattr("trusted.secret", b"x").xattr("security.selinux", b"x"),
        Entry::link("bin/ping2", "bin/ping"),
        Entry::symlink("short", "bin"),
        Entry::symlink("long", "x/".repeat(100)),
        Entry::file("empty", ""),
        Entry::file("secret", "s").mode(0o000).owner(100_000, 1),
        Entry::new("pipe", EntryKind::Fifo).mode(0o622),
        Entry::file("zeros", [vec![0; 300_000], b"end".to_vec()].concat()),
        Entry::directory("lost+found").mode(0o700),
        Entry::file("lost+found/kept", "k"),
        Entry::file("gone", "g"),
    ];
    let odd = ["<12>", "-x", "a b", "q\"uo'te", "back\\slash", "#c", "$x;|&*?", "tab\tbed", "ümlaut"];
    let mut second: Vec<_> = odd.iter().map(|name| Entry::file(format!("odd/{name}"), name)).collect();
    second.push(Entry::file(b"odd/\xff\xfe", "latin"));
    second.push(Entry::directory("odd/\"q\" d"));
    second.push(Entry::file("odd/\"q\" d/<2>", "inner"));
    second.push(Entry::file(".wh.gone", ""));
    vec![first, second]
}

fn layout_of(layers: &[Vec<Entry>], config: &serde_json::Value) -> Layout {
    let packings = [Packing::Gzip, Packing::Zstd, Packing::Plain].into_iter().cycle();
    let layers: Vec<_> = packings.zip(layers).map(|(packing, entries)| (packing, archive(entries))).collect();
    Layout::new(config, &layers).unwrap()
}

#[tokio::test]
async fn the_file_system_holds_what_the_layers_say() {
    let bench = Bench::new();
    let layout = layout_of(&rich(), &json!({"WorkingDir": "/srv/app", "Cmd": ["run"]}));
    layout.write(&bench.local("rich"), "v1").unwrap();
    let (built, image) = bench.build("oci:rich:v1").await.unwrap();
    assert_eq!((built.digest, built.process.command()), (layout.digest(), vec!["run".to_owned()]));
    let checked = ask("e2fsck", &["-f", "-n"], &image);
    assert!(checked.0, "{}", checked.1);
    for (path, wanted) in [
        ("/", vec!["Mode:  0711"]),
        ("/home/app", vec!["Mode:  02750", "User:  1000", "Group: 70000", "Type: directory"]),
        ("/bin/su", vec!["Mode:  04755", "User:     0", "Size: 3", "mtime: 0x5f5e1000"]),
        ("/bin/ping", vec!["Links: 2", "security.capability (20)", "user.note (4)"]),
        ("/short", vec!["Type: symlink", "Fast link dest: \"bin\""]),
        ("/long", vec!["Type: symlink", "Size: 200"]),
        ("/empty", vec!["Type: regular", "Size: 0"]),
        ("/secret", vec!["Mode:  0000", "User: 100000", "Group:     1"]),
        ("/pipe", vec!["Type: FIFO", "Mode:  0622"]),
        ("/lost+found", vec!["Mode:  0700"]),
        ("/srv/app", vec!["Type: directory", "Mode:  0755"]),
        ("/tmp", vec!["Mode:  01777"]),
    ] {
        let said = debugfs(&image, &format!("stat {path}"));
        wanted.iter().for_each(|wanted| assert!(said.contains(wanted), "{path}: no {wanted:?} in {said}"));
    }
    let (one, other) = (debugfs(&image, "stat /bin/ping"), debugfs(&image, "stat /bin/ping2"));
    assert_eq!(one, other);
    let plain = debugfs(&image, "stat /bin/none");
    assert!(!plain.contains("trusted") && !plain.contains("selinux"), "{plain}");
    assert!(debugfs(&image, "ea_get -x /bin/ping user.note").contains("61 00 62 0a"));
    assert_eq!(debugfs(&image, "cat /lost+found/kept"), "k");
    assert_eq!(debugfs(&image, "cat /etc/hostname"), "sandbox\n");
    assert!(!debugfs(&image, "ls -p /").contains("gone"));
    // All content, by another way than it was written.
    let dump = bench.dir.path().join("dump");
    fs::create_dir(&dump).unwrap();
    debugfs(&image, &format!("rdump /odd /zeros {}", dump.display()));
    assert_eq!(fs::read(dump.join("zeros")).unwrap(), [vec![0; 300_000], b"end".to_vec()].concat());
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dump.join("odd")).unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
        found.insert(entry.file_name(), fs::read(entry.path()).unwrap());
    }
    let latin = found.remove(std::ffi::OsStr::from_bytes(b"\xff\xfe")).unwrap();
    assert_eq!((latin.as_slice(), found.len()), (b"latin".as_slice(), 9));
    found.iter().for_each(|(name, content)| assert_eq!(name.as_bytes(), content));
    assert_eq!(fs::read(dump.join("odd/\"q\" d/<2>")).unwrap(), b"inner");
}

#[tokio::test]
async fn one_image_makes_the_same_octets_whatever_it_is_packed_in() {
    let bench = Bench::new();
    let layout = layout_of(&rich(), &json!({}));
    layout.write(&bench.local("rich"), "v1").unwrap();
    fs::write(bench.local("oci.tar"), layout.oci_archive("v1")).unwrap();
    fs::write(bench.local("saved.tar"), layout.docker_archive("app:v1")).unwrap();
    let absolute = format!("oci-archive:{}:v1", bench.local("oci.tar").display());
    let mut sums = Vec::new();
    for uri in ["oci:rich", "oci:rich:v1", &absolute, "docker-archive:saved.tar", "docker-archive:./saved.tar:app:v1"] {
        let (built, image) = bench.build(uri).await.unwrap();
        assert!(built.digest.starts_with("sha256:"));
        sums.push(digest(&fs::read(image).unwrap()));
    }
    assert!(sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
}

#[tokio::test]
async fn only_what_the_operator_offers_is_read() {
    let mut bench = Bench::new();
    let layout = layout_of(&rich(), &json!({}));
    let outside = bench.dir.path().join("outside");
    layout.write(&outside, "v1").unwrap();
    fs::write(bench.dir.path().join("secret"), "hush").unwrap();
    std::os::unix::fs::symlink(&outside, bench.local("link")).unwrap();
    fs::create_dir(bench.local("layout")).unwrap();
    std::os::unix::fs::symlink(bench.dir.path().join("secret"), bench.local("layout/index.json")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, bench.local("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let far = format!("oci:{}", outside.display());
    for uri in
        [far.as_str(), "oci:link", "oci:layout", "oci:none", "docker-archive:pipe", "oci-archive:layout", "oci:/etc"]
    {
        let error = bench.build(uri).await.unwrap_err();
        assert!(!error.contains("hush"), "{uri}: {error}");
        assert!(
            error.contains("cannot open") || error.contains("not below") || error.contains("index.json"),
            "{uri}: {error}"
        );
    }
    bench.limits.local_dir = None;
    assert!(bench.build("oci:link").await.unwrap_err().contains("templates.local_dir"));
}

#[tokio::test]
async fn documents_that_lie_are_refused() {
    let bench = Bench::new();
    let layer = archive(&[Entry::file("a", "x")]);
    let mut layout = Layout::new(&json!({}), &[(Packing::Gzip, layer.clone())]).unwrap();
    layout.write(&bench.local("good"), "v1").unwrap();
    assert!(bench.build("oci:good:v2").await.unwrap_err().contains("\"v1\""));
    let config = layout.blobs.iter_mut().find(|(_, blob)| blob.starts_with(b"{")).unwrap();
    config.1.push(b' ');
    layout.write(&bench.local("config"), "v1").unwrap();
    assert!(bench.build("oci:config").await.unwrap_err().contains("configuration"));
    let arm = json!({"architecture": "arm64", "os": "linux", "rootfs": {"diff_ids": [digest(&layer)]}});
    let arm = Layout::with_configuration(&arm, &[(Packing::Plain, layer.clone())]).unwrap();
    arm.write(&bench.local("arm"), "v1").unwrap();
    assert!(bench.build("oci:arm").await.unwrap_err().contains("linux/arm64"));
    let few = json!({"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": []}});
    Layout::with_configuration(&few, &[(Packing::Plain, layer)]).unwrap().write(&bench.local("few"), "v1").unwrap();
    assert!(bench.build("oci:few").await.unwrap_err().contains("0 layers"));
    fs::write(bench.local("none.tar"), archive(&[Entry::file("x", "")])).unwrap();
    assert!(bench.build("docker-archive:none.tar").await.unwrap_err().contains("manifest.json"));
}

#[tokio::test]
async fn an_image_that_does_not_fit_its_disk_says_so() {
    let mut bench = Bench::new();
    bench.limits.image_mib = 128;
    let noise: Vec<u8> = (0..70_u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
    layout_of(&[vec![Entry::file("noise", noise)]], &json!({})).write(&bench.local("large"), "v1").unwrap();
    let error = bench.build("oci:large").await.unwrap_err();
    assert!(error.contains("entry \"noise\"") && error.contains("templates.disk_mib"), "{error}");
}
