//! Rules of the repository that are easier kept by a test than by a reviewer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// ARCHITECTURE.md, "Dependencies": what each crate of ours may use of ours.
const ALLOWED: &[(&str, &[&str])] = &[
    ("devices", &[]),
    ("snapshot", &[]),
    ("guest-images/agent", &[]),
    ("vmm", &["stasis-devices", "stasis-snapshot", "stasis-warden"]),
    ("warden", &[]),
    ("egress", &[]),
    ("unpack", &[]),
    ("api", &["stasis-agent", "stasis-egress", "stasis-snapshot", "stasis-unpack", "stasis-vmm", "stasis-warden"]),
];

/// Crates that would betray a layer: KVM only in the VMM, HTTP servers and SQL only in the supervisor.
const FOREIGN: &[(&str, &[&str])] = &[
    ("devices", &["kvm-ioctls", "kvm-bindings", "hyper", "axum", "reqwest", "rust-s3"]),
    ("snapshot", &["kvm-ioctls", "kvm-bindings", "vm-memory", "axum", "rusqlite"]),
    ("vmm", &["rust-s3", "rusqlite", "axum"]),
    ("warden", &["hyper", "axum", "reqwest", "rusqlite", "kvm-ioctls"]),
    ("unpack", &["tokio", "hyper", "axum", "reqwest", "rusqlite", "clap", "tracing"]),
    ("egress", &["axum", "rusqlite", "rust-s3", "kvm-ioctls"]),
    ("api", &["kvm-ioctls", "kvm-bindings", "vm-memory", "virtio-queue"]),
];

#[expect(clippy::unwrap_used, reason = "a crate without a manifest is a failure of the test")]
fn dependencies(folder: &str) -> BTreeSet<String> {
    let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
    let (_, after) = manifest.split_once("\n[dependencies]\n").unwrap();
    let section = after.split("\n[").next().unwrap_or_default();
    section
        .lines()
        .filter_map(|l| l.split(['.', ' ', '=']).next())
        .filter(|n| !n.is_empty())
        .map(str::to_owned)
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    for (folder, allowed) in ALLOWED {
        let ours: Vec<_> = dependencies(folder).into_iter().filter(|d| d.starts_with("stasis-")).collect();
        assert!(ours.iter().all(|d| allowed.contains(&d.as_str())), "{folder} depends on {ours:?}");
    }
    for (folder, foreign) in FOREIGN {
        let used = dependencies(folder);
        let wrong: Vec<_> = foreign.iter().filter(|f| used.contains(**f)).collect();
        assert!(wrong.is_empty(), "{folder} must know nothing of {wrong:?}");
    }
}

#[test]
fn paths_that_the_documents_name_exist() {
    for document in ["ARCHITECTURE.md", "README.md", "THREATS.md"] {
        let text = std::fs::read_to_string(root().join(document)).unwrap();
        for word in text.split('`').skip(1).step_by(2) {
            let is_path = word.contains('/')
                && !word.contains([' ', '{', '<', '*', '$', '…', ':'])
                && !word.starts_with(['/', '.', '-']);
            let first = word.split('/').next().unwrap_or_default();
            let ours = [
                "api",
                "devices",
                "egress",
                "fuzz",
                "guest-images",
                "packaging",
                "snapshot",
                "tests",
                "unpack",
                "vmm",
                "warden",
            ];
            let ours = ours.contains(&first);
            assert!(!(is_path && ours) || root().join(word).exists(), "{document} names {word}");
        }
    }
}

#[test]
fn every_library_and_module_says_what_lives_there() {
    fn check(dir: &Path, silent: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() && !path.ends_with("target") {
                check(&path, silent);
            } else if path.extension().is_some_and(|e| e == "rs")
                && path.file_name().is_none_or(|n| n != "main.rs" && n != "tests.rs")
                && !std::fs::read_to_string(&path).unwrap_or_default().starts_with("//!")
            {
                silent.push(path);
            }
        }
    }
    let mut silent = Vec::new();
    for folder in [
        "api/src",
        "devices/src",
        "egress/src",
        "guest-images/agent/src",
        "snapshot/src",
        "tests/src",
        "tests/tests",
        "unpack/src",
        "vmm/src",
        "warden/src",
    ] {
        check(&root().join(folder), &mut silent);
    }
    assert!(silent.is_empty(), "no module documentation: {silent:?}");
}
