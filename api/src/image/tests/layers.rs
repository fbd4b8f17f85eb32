//! Layers against a model of what their specification says.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Directory(String),
    File(String, u8),
    Symlink(String),
}

#[derive(Clone, Debug)]
struct ModelLayer {
    whiteouts: Vec<String>,
    opaque: Vec<String>,
    ops: Vec<Op>,
}

/// What the specification says in its own words, over a map of paths.
#[derive(Default)]
struct Model(BTreeMap<String, String>);

impl Model {
    fn remove(&mut self, path: &str) {
        let below = format!("{path}/");
        self.0.retain(|other, _| other != path && !other.starts_with(&below));
    }

    fn above(&mut self, path: &str) -> Result<(), ()> {
        let mut at = String::new();
        let names: Vec<_> = path.trim_start_matches('/').split('/').collect();
        for name in &names[..names.len() - 1] {
            at = format!("{at}/{name}");
            match self.0.get(&at).map(String::as_str) {
                None => drop(self.0.insert(at.clone(), "directory".to_owned())),
                Some("directory") => {}
                Some(_) => return Err(()),
            }
        }
        Ok(())
    }

    fn apply(&mut self, layer: &ModelLayer) -> Result<(), ()> {
        for path in &layer.whiteouts {
            self.remove(path);
        }
        for path in &layer.opaque {
            let below = format!("{path}/");
            self.0.retain(|other, _| !other.starts_with(&below));
        }
        for op in &layer.ops {
            let (path, what) = match op {
                Op::Directory(path) => (path, "directory".to_owned()),
                Op::File(path, content) => (path, format!("file {}", "x".repeat(usize::from(*content)))),
                Op::Symlink(path) => (path, "link nowhere".to_owned()),
            };
            self.above(path)?;
            if what != "directory" || self.0.get(path).is_some_and(|there| there != "directory") {
                self.remove(path);
            }
            self.0.insert(path.clone(), what);
        }
        Ok(())
    }
}

/// Paths of few names, so that layers meet. Symbolic links have names of their own: what leads through one is a test of its own.
fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| format!("/{}", names.join("/")))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        path().prop_map(Op::Directory),
        (path(), 0_u8..4).prop_map(|(path, content)| Op::File(path, content)),
        path().prop_map(|path| Op::Symlink(format!("{path}-link"))),
    ]
}

fn model_layer() -> impl Strategy<Value = ModelLayer> {
    let few = || prop::collection::vec(path(), 0..3);
    (few(), few(), prop::collection::vec(op(), 0..8)).prop_map(|(whiteouts, opaque, ops)| ModelLayer {
        whiteouts,
        opaque,
        ops,
    })
}

fn entries(layer: &ModelLayer) -> Vec<Entry> {
    let whiteout = |path: &String| {
        let (above, name) = path[1..].rsplit_once('/').unwrap_or(("", &path[1..]));
        Entry::file(format!("{above}{}.wh.{name}", if above.is_empty() { "" } else { "/" }), "")
    };
    let opaque = |path: &String| Entry::file(format!("./{}/.wh..wh..opq", &path[1..]), "");
    let put = |op: &Op| match op {
        Op::Directory(path) => Entry::directory(format!("{}/", &path[1..])),
        Op::File(path, content) => Entry::file(format!("./{}", &path[1..]), "x".repeat(usize::from(*content))),
        Op::Symlink(path) => Entry::symlink(&path[1..], "nowhere"),
    };
    let hidden = layer.whiteouts.iter().map(whiteout).chain(layer.opaque.iter().map(opaque));
    hidden.chain(layer.ops.iter().map(put)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]
    #[test]
    fn layers_make_what_the_model_makes(layers in prop::collection::vec(model_layer(), 1..5)) {
        let bench = Bench::new();
        let mut model = Model::default();
        let expected = layers.iter().try_for_each(|layer| model.apply(layer));
        let merged = bench.merge(&layers.iter().map(entries).collect::<Vec<_>>());
        match expected {
            Ok(()) => {
                let (tree, disk) = merged.map_err(TestCaseError::fail)?;
                prop_assert_eq!(list(&bench, &tree), model.0);
                // Nothing is kept of what was replaced.
                let kept: u32 = disk.used().iter().map(|octet| octet.count_ones()).sum();
                let files = list(&bench, &tree).into_values().filter(|what| what.starts_with("file x")).count();
                prop_assert_eq!(kept as usize, files);
            }
            Err(()) => prop_assert!(merged.is_err()),
        }
    }
}

#[test]
fn a_whiteout_spares_its_own_layer_in_any_order() {
    let bench = Bench::new();
    let lower =
        vec![Entry::directory("d"), Entry::file("d/old", "1"), Entry::file("d/sub/old", "1"), Entry::file("f", "1")];
    let mut upper = vec![
        Entry::file("d/.wh..wh..opq", ""),
        Entry::directory("d").mode(0o700),
        Entry::file("d/new", "2"),
        Entry::file(".wh.f", ""),
        Entry::file("f", "2"),
        Entry::file(".wh.none", ""),
        Entry::file("none/.wh.none", ""),
    ];
    for _ in 0..2 {
        let (mut tree, _) = bench.merge(&[lower.clone(), upper.clone()]).unwrap();
        let wanted = [("/d", "directory"), ("/d/new", "file 2"), ("/f", "file 2")];
        assert_eq!(list(&bench, &tree), wanted.map(|(a, b)| (a.to_owned(), b.to_owned())).into());
        let d = tree.find(b"d").unwrap();
        assert_eq!(tree.node(d).meta.mode, 0o700);
        upper.reverse();
    }
}

#[test]
fn links_of_lower_layers_are_followed_within_the_image() {
    let bench = Bench::new();
    let lower =
        vec![Entry::directory("usr/lib"), Entry::symlink("lib", "usr/lib"), Entry::symlink("top", "/usr/../usr")];
    let upper = vec![Entry::file("lib/x", "1"), Entry::file("top/y", "2"), Entry::link("z", "lib/x")];
    let (tree, _) = bench.merge(&[lower, upper]).unwrap();
    let found = list(&bench, &tree);
    assert_eq!(
        (found["/usr/lib/x"].as_str(), found["/usr/y"].as_str(), found["/z"].as_str()),
        ("file 1", "file 2", "file 1")
    );
}
