//! File systems read by `e2fsck`, whose people wrote what the kernel does.

use super::*;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use tempfile::NamedTempFile;

struct Bench {
    image: NamedTempFile,
    tree: Tree,
    disk: Disk,
    geometry: Geometry,
}

impl Bench {
    fn new(mib: u64) -> Self {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(mib << 20).unwrap();
        let geometry = Geometry::of(mib << 20).unwrap();
        let disk = Disk::new(image.reopen().unwrap(), geometry.first, geometry.blocks);
        Self { image, tree: Tree::new(1 << 20), disk, geometry }
    }

    fn put(&mut self, path: &str, kind: Kind) {
        let meta = Meta { mode: 0o755, uid: 70_000, mtime: (3 << 32) + 5, ..Meta::default() };
        self.tree.put(path.as_bytes(), 1, meta, kind).unwrap();
    }

    fn file(&mut self, path: &str, len: u64) {
        let content = self.disk.keep(&mut io::repeat(0), len).unwrap();
        self.put(path, Kind::File(content));
    }

    /// What is wrong with it; nothing at best.
    #[expect(clippy::disallowed_methods, reason = "what was written is read with another program")]
    fn check(mut self) -> String {
        if let Err(error) = write(&mut self.tree, &mut self.disk, &self.geometry) {
            return crate::chain(&error);
        }
        let mut command = std::process::Command::new("e2fsck");
        command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(["-f", "-n"]).arg(self.image.path());
        let ran = command.output().unwrap();
        if ran.status.success() { String::new() } else { String::from_utf8_lossy(&ran.stdout).into_owned() }
    }
}

fn directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

#[test]
fn disks_of_all_sizes_are_whole() {
    for mib in [20, 64, 128, 129, 300, 4100] {
        let mut bench = Bench::new(mib);
        bench.file("a", 10_000);
        bench.put("lost+found/kept", Kind::File(None));
        bench.put("pipe", Kind::Fifo);
        assert_eq!(bench.check(), "", "{mib} MiB");
    }
}

#[test]
fn files_of_many_extents_are_whole() {
    // Four fit into an inode, 340 into a block.
    for mib in [511, 512, 513, 43_600] {
        let mut bench = Bench::new(mib + 2000);
        bench.file("small", 1);
        let blocks = (mib << 20) / BLOCK;
        let content = crate::disk::Content { block: bench.disk.deal(blocks).unwrap(), len: (mib << 20) - 1 };
        bench.put("large", Kind::File(Some(content)));
        bench.file("after", 5000);
        assert_eq!(bench.check(), "", "{mib} MiB");
    }
}

#[test]
fn wide_directories_and_many_names_are_whole() {
    let mut bench = Bench::new(2000);
    for number in 0..65_010 {
        bench.put(&format!("wide/{number}"), directory());
    }
    bench.file("names/first", 3);
    for number in 0..300 {
        let name = format!("names/{}{number}", "n".repeat(number % 250));
        bench.tree.link(name.as_bytes(), 1, b"names/first").unwrap();
    }
    bench.put("short", Kind::Symlink(vec![b'x'; 59]));
    bench.put("long", Kind::Symlink(vec![b'x'; 60]));
    bench.put("longest", Kind::Symlink(vec![b'x'; 4095]));
    assert_eq!(bench.check(), "");
    let mut bench = Bench::new(100);
    bench.file("a", 1);
    for number in 0..LINKS {
        bench.tree.link(number.to_string().as_bytes(), 1, b"a").unwrap();
    }
    assert!(bench.check().contains("names"));
}

#[test]
fn attributes_are_whole() {
    let mut bench = Bench::new(64);
    for (file, names) in [("few", 1), ("many", 70)] {
        let xattrs =
            (0..names).map(|n| (format!("user.{n}").into_bytes(), vec![0xfe; n % 9])).collect::<BTreeMap<_, _>>();
        let capability = (b"security.capability".to_vec(), vec![1; 20]);
        let meta = Meta { xattrs: xattrs.into_iter().chain([capability]).collect(), ..Meta::default() };
        bench.tree.put(file.as_bytes(), 1, meta, Kind::File(None)).unwrap();
    }
    assert_eq!(bench.check(), "");
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut bench = Bench::new(20);
    for number in 0..2000 {
        bench.put(&number.to_string(), Kind::File(None));
    }
    assert!(bench.check().contains("templates.disk_mib"));
    let mut bench = Bench::new(20);
    bench.put("lost+found", Kind::File(None));
    assert!(bench.check().contains("lost+found"));
    let mut bench = Bench::new(20);
    assert!(bench.disk.keep(&mut io::repeat(1), 20 << 20).is_err());
}

#[test]
fn the_same_tree_makes_the_same_octets() {
    let octets = || {
        let mut bench = Bench::new(20);
        bench.file("b/c", 5000);
        bench.put("a", Kind::Symlink(b"b".to_vec()));
        write(&mut bench.tree, &mut bench.disk, &bench.geometry).unwrap();
        let (mut found, mut label) = (Vec::new(), [0; 4]);
        bench.image.reopen().unwrap().read_to_end(&mut found).unwrap();
        bench.image.as_file().read_exact_at(&mut label, 1024 + 0x78).unwrap();
        assert_eq!(&label, b"root");
        found
    };
    assert!(octets() == octets());
}
