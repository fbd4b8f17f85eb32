use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::time::Duration;

use stasis_agent::protocol::files::{Edit, EditFiles, EntryKind, Grep, Read, SetPermissions};

use super::change::{copy_to, delete, mkdir, move_to, set_permissions};
use super::edit::{edit, edit_many};
use super::find::{glob, grep};
use super::list::{exists, ls, ls_within, stat, tree};
use super::part::{Part, part};
use super::path::resolve;
use super::replace::{Replacement, replace};
use super::walk::Bounds;
use super::*;

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

fn field(error: FileError) -> String {
    match error {
        FileError::Invalid { field, .. } => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn paths_are_taken_as_the_kernel_takes_them() {
    let base = Path::new("/root");
    for (text, expected) in [
        ("/a//b/./c/", "/a/b/c"),
        ("x", "/root/x"),
        ("./x", "/root/x"),
        ("../x", "/root/../x"),
        ("/", "/"),
        (".", "/root"),
    ] {
        assert_eq!(resolve("path", text, base).unwrap(), Path::new(expected), "{text}");
    }
    assert_eq!(field(resolve("path", "", base).unwrap_err()), "path");
    assert_eq!(field(resolve("src_path", "a\0b", base).unwrap_err()), "src_path");
    assert!(resolve("path", &"x/".repeat(2040), base).is_ok());
    assert_eq!(field(resolve("path", &"x/".repeat(3000), base).unwrap_err()), "path");
}

#[test]
fn modes_are_octal() {
    assert_eq!(
        (mode("m", "755").unwrap(), mode("m", "0644").unwrap(), mode("m", "07777").unwrap()),
        (0o755, 0o644, 0o7777)
    );
    for bad in ["", "8", "99", "10000", "+7", "0o755", "rwx", "-1", "000755"] {
        assert_eq!(field(mode("permissions", bad).unwrap_err()), "permissions", "{bad}");
    }
}

#[test]
fn an_entry_is_described_as_itself() {
    let place = Place::new();
    let file = place.file("a.txt", "hello");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o4751)).unwrap();
    symlink("/nowhere", place.at("link")).unwrap();
    let found = stat(&file).unwrap();
    assert_eq!((found.name.as_str(), found.size, found.mode.as_str(), found.is_dir), ("a.txt", 5, "4751", false));
    assert_eq!(found.mtime, fs::metadata(&file).unwrap().mtime());
    let link = stat(&place.at("link")).unwrap();
    assert_eq!((link.is_symlink, link.link_target.as_deref()), (true, Some("/nowhere")));
    assert!(
        exists(&place.at("link")).unwrap()
            && !exists(&place.at("a.txt/b")).unwrap()
            && !exists(&place.at("none")).unwrap()
    );
    assert!(matches!(stat(&place.at("none")), Err(FileError::NotFound(_))));
    assert_eq!(stat(Path::new("/")).unwrap().name, "/");
}

#[test]
fn directories_are_listed_sorted_and_without_what_is_excluded() {
    let place = Place::new();
    for name in ["b/x.rs", "b/node_modules/y.js", "a.txt", "c/.hidden"] {
        place.file(name, "");
    }
    symlink(place.at("b"), place.at("z")).unwrap();
    let names = |recursive, exclude: &[&str]| {
        let exclude: Vec<String> = exclude.iter().map(|&e| e.to_owned()).collect();
        let listing = ls(place.0.path(), recursive, &exclude).unwrap();
        assert!(!listing.truncated);
        let relative = |info: &stasis_agent::protocol::files::FileInfo| {
            Path::new(&info.path).strip_prefix(place.0.path()).unwrap().to_str().unwrap().to_owned()
        };
        listing.items.iter().map(relative).collect::<Vec<_>>()
    };
    assert_eq!(names(false, &[]), ["a.txt", "b", "c", "z"]);
    // A link to a directory is listed, not followed.
    assert_eq!(names(true, &["node_modules"]), ["a.txt", "b", "b/x.rs", "c", "c/.hidden", "z"]);
    assert_eq!(names(true, &["b/**", "*.txt", "c/"]), ["b", "z"]);
    assert_eq!(field(ls(&place.at("a.txt"), false, &[]).unwrap_err()), "path");
    assert_eq!(field(ls(place.0.path(), false, &["{".to_owned()]).unwrap_err()), "exclude");
    assert!(matches!(ls(&place.at("none"), false, &[]), Err(FileError::NotFound(_))));
}

#[test]
fn each_bound_ends_a_listing_and_says_so() {
    let place = Place::new();
    (0..20).for_each(|n| drop(place.file(&format!("d/{n}"), "")));
    let hour = Duration::from_hours(1);
    let count = |mut bounds: Bounds| {
        let listing = ls_within(place.0.path(), true, &[], &mut bounds).unwrap();
        (listing.items.len(), listing.truncated)
    };
    assert_eq!(count(Bounds::of(100, 100, 1 << 20, hour)), (21, false));
    assert_eq!(count(Bounds::of(100, 5, 1 << 20, hour)), (5, true));
    assert!(count(Bounds::of(100, 100, 2000, hour)).0 < 10);
    assert!(count(Bounds::of(10, 100, 1 << 20, hour)).0 < 12);
    assert_eq!(count(Bounds::of(100, 100, 1 << 20, Duration::ZERO)), (0, true));
}

#[test]
fn a_tree_has_kinds_and_a_depth() {
    let place = Place::new();
    place.file("a/b/c.txt", "");
    place.file("x", "");
    let whole = tree(place.0.path(), None, &[]).unwrap();
    assert_eq!(whole.items.len(), 2);
    assert_eq!((whole.items[0].kind, whole.items[1].kind), (EntryKind::Directory, EntryKind::File));
    assert!(whole.items[1].children.is_none() && !whole.truncated);
    let below = &whole.items[0].children.as_ref().unwrap()[0];
    assert_eq!((below.name.as_str(), below.children.as_ref().unwrap()[0].name.as_str()), ("b", "c.txt"));
    let shallow = tree(place.0.path(), Some(1), &[]).unwrap();
    assert!(shallow.items[0].children.is_none() && !shallow.truncated);
    assert!(tree(place.0.path(), Some(0), &[]).unwrap().items.is_empty());
    // Deeper than a reader of JSON would follow.
    fs::create_dir_all(place.at(&"d/".repeat(80))).unwrap();
    assert!(tree(place.0.path(), None, &[]).unwrap().truncated);
}

#[test]
fn files_are_found_by_name_at_any_depth_and_by_path() {
    let place = Place::new();
    for name in ["a.rs", "src/b.rs", "src/deep/c.rs", "src/d.ts", "target/e.rs"] {
        place.file(name, "");
    }
    let found = |pattern: Option<&str>, exclude: &[&str]| {
        let exclude: Vec<String> = exclude.iter().map(|&e| e.to_owned()).collect();
        let paths = glob(place.0.path(), pattern, &exclude).unwrap();
        let relative =
            |path: &String| Path::new(path).strip_prefix(place.0.path()).unwrap().to_str().unwrap().to_owned();
        paths.items.iter().map(relative).collect::<Vec<_>>()
    };
    assert_eq!(found(Some("*.rs"), &["target"]), ["a.rs", "src/b.rs", "src/deep/c.rs"]);
    assert_eq!(found(Some("src/*.{rs,ts}"), &[]), ["src/b.rs", "src/d.ts"]);
    assert_eq!(found(Some("**/*.rs"), &["target"]), ["a.rs", "src/b.rs", "src/deep/c.rs"]);
    assert_eq!(found(Some("src/**"), &[]), ["src/b.rs", "src/d.ts", "src/deep/c.rs"]);
    assert_eq!(found(None, &[]).len(), 5);
    assert_eq!(field(glob(place.0.path(), Some(""), &[]).unwrap_err()), "pattern");
}

#[test]
fn lines_are_found_by_text_not_by_expression() {
    let place = Place::new();
    place.file("a.txt", "one (two)\r\nthree\nfoo(bar\n");
    place.file("b.md", "one (two) again");
    place.file("binary", "one (two)\0");
    let long = place.file("long.txt", &format!("{}one (two)\n", "x".repeat(100_000)));
    let search = |path: &Path, pattern: &str, include: Option<&str>| {
        let request = Grep {
            path: String::new(),
            pattern: pattern.to_owned(),
            include: include.map(str::to_owned),
            exclude: vec!["long.txt".to_owned()],
        };
        grep(path, &request).map(|found| found.items.into_iter().map(|m| (m.line, m.content)).collect::<Vec<_>>())
    };
    let line = |line, text: &str| (line, text.to_owned());
    assert_eq!(search(place.0.path(), "(two)", None).unwrap(), [line(1, "one (two)"), line(1, "one (two) again")]);
    assert_eq!(search(place.0.path(), "(two)", Some("*.md")).unwrap(), [line(1, "one (two) again")]);
    assert_eq!(search(&place.at("a.txt"), "foo(", None).unwrap(), [line(3, "foo(bar")]);
    assert_eq!(search(&long, "(two)", None).unwrap()[0].1.len(), 4096);
    assert_eq!(search(place.0.path(), "none", None).unwrap(), []);
    assert_eq!(field(search(place.0.path(), "", None).unwrap_err()), "pattern");
    assert!(matches!(search(&place.at("none"), "x", None), Err(FileError::NotFound(_))));
}

fn read(path: &Path, change: impl FnOnce(&mut Read)) -> Result<String, FileError> {
    let mut request = Read { path: String::new(), offset: None, limit: None, head: None, tail: None };
    change(&mut request);
    Ok(match part(path, &request)? {
        Part::Bytes(bytes) => String::from_utf8(bytes).unwrap(),
        Part::OfFile { from, to, .. } => {
            let whole = fs::read_to_string(path).unwrap();
            whole[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()].to_owned()
        }
    })
}

#[test]
fn a_part_of_a_file_is_bytes_or_lines() {
    let place = Place::new();
    let file = place.file("f", "1\n22\n333\n4444");
    assert_eq!(read(&file, |_| {}).unwrap(), "1\n22\n333\n4444");
    assert_eq!(read(&file, |r| (r.offset, r.limit) = (Some(2), Some(4))).unwrap(), "22\n3");
    assert_eq!(read(&file, |r| r.offset = Some(99)).unwrap(), "");
    assert_eq!(read(&file, |r| r.limit = Some(u64::MAX)).unwrap(), "1\n22\n333\n4444");
    for (lines, head, tail) in
        [(0, "", ""), (1, "1\n", "4444"), (2, "1\n22\n", "333\n4444"), (9, "1\n22\n333\n4444", "1\n22\n333\n4444")]
    {
        assert_eq!(read(&file, |r| r.head = Some(lines)).unwrap(), head);
        assert_eq!(read(&file, |r| r.tail = Some(lines)).unwrap(), tail);
    }
    let ended = place.file("g", "a\nb\n");
    assert_eq!(read(&ended, |r| r.tail = Some(1)).unwrap(), "b\n");
    assert_eq!(read(&ended, |r| (r.offset, r.tail) = (Some(1), Some(9))).unwrap(), "\nb\n");
    // Lines that begin and end in different blocks of the search.
    let blocks: String = (0..60_000).fold(String::new(), |text, n| text + &format!("{n}\n"));
    let large = place.file("h", &blocks);
    assert_eq!(read(&large, |r| r.tail = Some(30_000)).unwrap().lines().next(), Some("30000"));
    assert_eq!(read(&large, |r| r.head = Some(30_000)).unwrap().lines().last(), Some("29999"));
    assert_eq!(field(read(&file, |r| (r.head, r.tail) = (Some(1), Some(1))).unwrap_err()), "tail");
}

#[test]
fn only_regular_files_are_read_and_those_without_a_size_too() {
    let place = Place::new();
    assert!(read(Path::new("/proc/self/status"), |r| r.head = Some(1)).unwrap().starts_with("Name:"));
    assert_eq!(read(&place.file("empty", ""), |_| {}).unwrap(), "");
    let fifo = place.at("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    for path in [fifo.as_path(), Path::new("/dev/zero")] {
        let error = read(path, |_| {}).unwrap_err();
        assert!(error.to_string().contains("not a regular file"), "{error}");
    }
    assert!(read(place.0.path(), |_| {}).unwrap_err().to_string().contains("is a directory"));
    assert!(matches!(read(&place.at("none"), |_| {}), Err(FileError::NotFound(_))));
}

#[test]
fn new_content_comes_at_once_and_keeps_what_the_file_was() {
    let place = Place::new();
    let file = place.file("f", "old");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o751)).unwrap();
    symlink(&file, place.at("link")).unwrap();
    let mut replacement = Replacement::begin(&place.at("link"), None).unwrap();
    replacement.write(b"half").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"old");
    drop(replacement);
    assert_eq!(fs::read_dir(place.0.path()).unwrap().count(), 2, "nothing is left of what broke off");
    replace(&place.at("link"), b"new").unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"new");
    assert!(fs::symlink_metadata(place.at("link")).unwrap().is_symlink());
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o751);

    let other_name = place.at("hard");
    fs::hard_link(&file, &other_name).unwrap();
    replace(&file, b"both").unwrap();
    assert_eq!(fs::read(&other_name).unwrap(), b"both");

    symlink(place.at("later"), place.at("dangling")).unwrap();
    replace(&place.at("dangling"), b"x").unwrap();
    assert_eq!(fs::read(place.at("later")).unwrap(), b"x");

    let made = place.at("new/dir/f");
    let mut replacement = Replacement::begin(&made, Some(0o600)).unwrap();
    replacement.write(b"y").unwrap();
    replacement.finish().unwrap();
    assert_eq!((fs::read(&made).unwrap(), fs::metadata(&made).unwrap().mode() & 0o7777), (b"y".to_vec(), 0o600));
    assert_eq!(field(replace(place.0.path(), b"").unwrap_err()), "path");
    assert_eq!(field(replace(Path::new("/dev/null"), b"").unwrap_err()), "path");
    assert_eq!(field(replace(&file.join("below"), b"").unwrap_err()), "path");
}

fn replacing(find: &str, replace: &str) -> Edit {
    Edit { find: find.to_owned(), replace: replace.to_owned() }
}

#[test]
fn edits_replace_every_occurrence_and_show_the_difference() {
    let place = Place::new();
    let file = place.file("f", "a b\nc\na d\n");
    let edited = edit(&file, &[replacing("a", "x"), replacing("x d", "e")]).unwrap();
    assert_eq!(edited.replacements, 3);
    assert_eq!(fs::read_to_string(&file).unwrap(), "x b\nc\ne\n");
    assert!(edited.diff.contains("-a b\n+x b\n") && edited.diff.contains("@@ -1,3 +1,3 @@"), "{}", edited.diff);
    // All or nothing.
    assert_eq!(field(edit(&file, &[replacing("x", "y"), replacing("none", "")]).unwrap_err()), "edits[1].find");
    assert_eq!(fs::read_to_string(&file).unwrap(), "x b\nc\ne\n");
    assert_eq!(field(edit(&file, &[replacing("", "y")]).unwrap_err()), "edits[0].find");
    assert_eq!(field(edit(&file, &[]).unwrap_err()), "edits");
    // What is no text is edited as bytes.
    fs::write(&file, b"\xff a \xfe").unwrap();
    edit(&file, &[replacing("a", "b")]).unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"\xff b \xfe");
    fs::write(&file, "x".repeat(1 << 20)).unwrap();
    assert!(matches!(edit(&file, &[replacing("x", &"y".repeat(64))]), Err(FileError::TooLarge(_))));
    fs::File::create(&file).unwrap().set_len(17 << 20).unwrap();
    assert!(matches!(edit(&file, &[replacing("x", "y")]), Err(FileError::TooLarge(_))));
}

#[test]
fn edits_of_several_files_succeed_one_by_one() {
    let place = Place::new();
    place.file("a", "old");
    place.file("b", "other");
    let request = EditFiles {
        files: ["a", "b", "none"].map(str::to_owned).to_vec(),
        find: "old".to_owned(),
        replace: "new".to_owned(),
    };
    let results = edit_many(&request, place.0.path()).unwrap().items;
    assert_eq!(results.iter().map(|r| r.success).collect::<Vec<_>>(), [true, false, false]);
    assert_eq!(results[0].error, None);
    assert!(results[2].error.as_ref().unwrap().contains("does not exist"));
    assert_eq!(fs::read_to_string(place.at("a")).unwrap(), "new");
}

#[test]
fn directories_are_made_and_deleted() {
    let place = Place::new();
    mkdir(&place.at("a"), false, Some("1777")).unwrap();
    assert_eq!(fs::metadata(place.at("a")).unwrap().mode() & 0o7777, 0o1777);
    assert!(matches!(mkdir(&place.at("a"), false, None), Err(FileError::Exists(_))));
    mkdir(&place.at("a"), true, Some("700")).unwrap();
    assert_eq!(fs::metadata(place.at("a")).unwrap().mode() & 0o7777, 0o1777, "it was there");
    assert!(matches!(mkdir(&place.at("x/y"), false, None), Err(FileError::NotFound(_))));
    mkdir(&place.at("x/y"), true, None).unwrap();
    place.file("x/y/f", "");
    assert_eq!(field(delete(&place.at("x"), false).unwrap_err()), "recursive");
    symlink(place.at("x"), place.at("link")).unwrap();
    delete(&place.at("link"), true).unwrap();
    assert!(place.at("x/y/f").exists(), "the link went, not what it points to");
    delete(&place.at("x"), true).unwrap();
    delete(&place.at("a"), false).unwrap();
    assert!(matches!(delete(&place.at("a"), true), Err(FileError::NotFound(_))));
    for root in ["/", "/tmp/..", "/proc/self/root/."] {
        assert!(delete(Path::new(root), true).is_err(), "{root}");
    }
}

#[test]
fn a_move_replaces_only_when_told_and_never_into_itself() {
    let place = Place::new();
    let (a, b) = (place.file("a", "a"), place.file("b", "b"));
    assert!(matches!(move_to(&a, &b, false), Err(FileError::Exists(_))));
    move_to(&a, &b, true).unwrap();
    assert_eq!((fs::read_to_string(&b).unwrap().as_str(), a.exists()), ("a", false));
    assert!(matches!(move_to(&a, &b, true), Err(FileError::NotFound(_))));
    assert!(matches!(move_to(&b, &place.at("none/c"), false), Err(FileError::NotFound(_))));
    place.file("d/e/f", "");
    assert_eq!(field(move_to(&place.at("d"), &place.at("d/e/g"), false).unwrap_err()), "dst_path");
    assert_eq!(field(move_to(&place.at("d/e"), &place.at("d"), true).unwrap_err()), "dst_path");
    assert_eq!(field(move_to(&b, &b, true).unwrap_err()), "dst_path");
    place.file("full/x", "");
    move_to(&place.at("d"), &place.at("full"), true).unwrap();
    assert!(place.at("full/e/f").exists() && !place.at("full/x").exists());
    // To another file system, where there is one.
    let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return };
    move_to(&place.at("full"), &elsewhere.path().join("moved"), false).unwrap();
    assert!(elsewhere.path().join("moved/e/f").exists() && !place.at("full").exists());
}

#[test]
fn a_copy_keeps_modes_and_links() {
    let place = Place::new();
    let script = place.file("d/run.sh", "#!/bin/sh");
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    symlink("run.sh", place.at("d/link")).unwrap();
    assert_eq!(field(copy_to(&place.at("d"), &place.at("e"), false, false).unwrap_err()), "recursive");
    copy_to(&place.at("d"), &place.at("e"), true, false).unwrap();
    assert_eq!(fs::metadata(place.at("e/run.sh")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::read_link(place.at("e/link")).unwrap(), Path::new("run.sh"));
    assert!(matches!(copy_to(&place.at("d"), &place.at("e"), true, false), Err(FileError::Exists(_))));
    place.file("e/own", "");
    copy_to(&place.at("d"), &place.at("e"), true, true).unwrap();
    assert!(place.at("e/own").exists());
    assert_eq!(field(copy_to(&place.at("d"), &place.at("d/below"), true, false).unwrap_err()), "dst_path");
    assert_eq!(field(copy_to(&script, &script, false, true).unwrap_err()), "dst_path");
    assert_eq!(field(copy_to(&script, &place.at("e"), false, true).unwrap_err()), "dst_path");
    assert_eq!(fs::read_to_string(&script).unwrap(), "#!/bin/sh");
    copy_to(&place.at("d/link"), &place.at("copied"), false, false).unwrap();
    assert!(fs::symlink_metadata(place.at("copied")).unwrap().is_file(), "a link alone is followed");
    assert!(matches!(copy_to(&script, &place.at("none/x"), false, false), Err(FileError::NotFound(_))));
}

#[test]
fn permissions_and_owners_are_set_by_name_or_number() {
    let place = Place::new();
    let file = place.file("f", "");
    let request = |mode: Option<&str>, owner: Option<&str>, group: Option<&str>| SetPermissions {
        path: String::new(),
        mode: mode.map(str::to_owned),
        owner: owner.map(str::to_owned),
        group: group.map(str::to_owned),
    };
    set_permissions(&file, &request(Some("640"), None, None)).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
    assert_eq!(field(set_permissions(&file, &request(None, None, None)).unwrap_err()), "mode");
    assert_eq!(field(set_permissions(&file, &request(None, Some("no-such-user"), None)).unwrap_err()), "owner");
    assert_eq!(field(set_permissions(&file, &request(Some("rw"), None, None)).unwrap_err()), "mode");
    assert!(matches!(
        set_permissions(&place.at("none"), &request(Some("640"), None, None)),
        Err(FileError::NotFound(_))
    ));
    if rustix::process::geteuid().is_root() {
        set_permissions(&file, &request(Some("4755"), Some("1234"), Some("5678"))).unwrap();
        let found = fs::metadata(&file).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (1234, 5678, 0o4755));
    }
}
