//! Seals: the operator's keys, and what they are used for (`stasis_snapshot::seal`).

use super::ConfigError;
use serde::Deserialize;
use stasis_snapshot::seal::{OperatorKey, Seals};
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Longest key file, octets; one has fewer than a hundred.
const MAX_FILE: u64 = 1024;

/// Keys, and what they are used for. Without a key nothing is sealed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Seal {
    /// The operator's key that heads, manifests and data keys are sealed under (`stasis seal key` makes one).
    pub key_file: Option<PathBuf>,
    /// Keys that were used before: what is sealed under them can still be read.
    pub old_key_files: Vec<PathBuf>,
    /// Encrypt memory, disks and states, where there is a key.
    pub encrypt: bool,
    /// Accept heads and manifests that are not sealed, although there is a key: for a bucket that is older than its key.
    pub accept_unsealed: bool,
}

impl Default for Seal {
    fn default() -> Self {
        Self { key_file: None, old_key_files: Vec::new(), encrypt: true, accept_unsealed: false }
    }
}

impl Seal {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let missing = self.key_file.is_none() && (!self.old_key_files.is_empty() || self.accept_unsealed);
        if missing {
            let error = "is missing: the rest of [seal] means nothing without it".to_owned();
            return Err(ConfigError::Value { field: "seal.key_file".to_owned(), error });
        }
        Ok(())
    }

    /// Whether what captures write is encrypted.
    pub fn encrypts(&self) -> bool {
        self.key_file.is_some() && self.encrypt
    }

    /// Reads the key files.
    pub fn load(&self) -> Result<Arc<Seals>, ConfigError> {
        let wrong = |field: &str, path: &Path, error: String| ConfigError::Value {
            field: format!("seal.{field}"),
            error: format!("{}: {error}", path.display()),
        };
        let Some(current) = &self.key_file else { return Ok(Arc::new(Seals::none())) };
        let current = read(current).map_err(|error| wrong("key_file", current, error))?;
        let old = self.old_key_files.iter().map(|path| read(path).map_err(|e| wrong("old_key_files", path, e)));
        Ok(Arc::new(Seals::new(current, old.collect::<Result<_, _>>()?, self.accept_unsealed)))
    }
}

/// Reads a key that nobody else can read.
fn read(path: &Path) -> Result<OperatorKey, String> {
    let file = File::open(path).map_err(|e| format!("it cannot be opened: {e}"))?;
    let found = file.metadata().map_err(|e| format!("it cannot be looked at: {e}"))?;
    let me = rustix::process::geteuid().as_raw();
    if !found.is_file() {
        return Err("it is no file".to_owned());
    }
    if found.mode() & 0o077 != 0 {
        return Err(format!("others can read it (mode {:o}): chmod 600", found.mode() & 0o777));
    }
    if found.uid() != me && found.uid() != 0 {
        return Err(format!("it belongs to user {}, neither to this one ({me}) nor to root", found.uid()));
    }
    let mut text = Zeroizing::new(String::with_capacity(MAX_FILE as usize));
    file.take(MAX_FILE).read_to_string(&mut text).map_err(|e| format!("it cannot be read: {e}"))?;
    OperatorKey::parse(&text).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn file(dir: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn keys_are_read_and_others_may_not_read_them() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (OperatorKey::file_text(&[1; 32]), OperatorKey::file_text(&[2; 32]));
        let seal = |key_file: &Path, old: &[&Path]| Seal {
            key_file: Some(key_file.to_owned()),
            old_key_files: old.iter().map(|path| (*path).to_owned()).collect(),
            ..Seal::default()
        };
        let (current, old) = (file(dir.path(), "one", &one, 0o600), file(dir.path(), "two", &two, 0o400));
        let seals = seal(&current, &[&old, &current]).load().unwrap();
        let expected = [OperatorKey::new(&[1; 32]).id(), OperatorKey::new(&[2; 32]).id()];
        assert_eq!(seals.ids().collect::<Vec<_>>(), expected);
        assert!(!Seal::default().load().unwrap().is_on());

        for (path, why) in [
            (file(dir.path(), "open", &one, 0o640), "others can read it (mode 640)"),
            (file(dir.path(), "else", "hello", 0o600), "no operator's key"),
            (file(dir.path(), "short", &one[..one.len() - 2], 0o600), "no operator's key"),
            (dir.path().join("none"), "cannot be opened"),
            (dir.path().to_owned(), "no file"),
        ] {
            let error = seal(&path, &[]).load().unwrap_err().to_string();
            assert!(error.contains("seal.key_file") && error.contains(why), "{error}");
            assert!(!error.contains("0101"), "the key itself is in no message");
            let error = seal(&current, &[&path]).load().unwrap_err().to_string();
            assert!(error.contains("seal.old_key_files"), "{error}");
        }
        let alone = Seal { old_key_files: vec![old], ..Seal::default() };
        assert!(alone.check().unwrap_err().to_string().contains("seal.key_file"));
    }
}
