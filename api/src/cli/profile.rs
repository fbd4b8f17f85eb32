//! The client's configuration: where the supervisor is and the key for it. Written by `stasis dev`, so that the next command needs nothing.

use super::Failure;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Where a supervisor is when nothing says.
const DEFAULT_URL: &str = "http://127.0.0.1:7878";

/// What is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Profile {
    /// URL of the supervisor.
    pub(super) url: String,
    /// API key.
    pub(super) api_key: String,
}

/// `$STASIS_PROFILE`, else `stasis/client.toml` in the user's configuration directory.
pub(super) fn path() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("STASIS_PROFILE") {
        return Some(path.into());
    }
    let config = std::env::var_os("XDG_CONFIG_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = std::env::var_os("HOME").filter(|v| !v.is_empty()).map(|home| PathBuf::from(home).join(".config"));
    Some(config.or(home)?.join("stasis/client.toml"))
}

/// `$XDG_DATA_HOME/stasis` or `~/.local/share/stasis`: where `stasis dev` keeps everything.
pub(super) fn data_dir() -> Option<PathBuf> {
    let data = std::env::var_os("XDG_DATA_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = std::env::var_os("HOME").filter(|v| !v.is_empty()).map(|home| PathBuf::from(home).join(".local/share"));
    Some(data.or(home)?.join("stasis"))
}

impl Profile {
    /// Reads one; `None` when there is none.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, Failure> {
        match fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text)
                .map(Some)
                .map_err(|e| Failure::other(format!("{} is no client configuration: {e}", path.display()))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Failure::other(format!("cannot read {}: {e}", path.display()))),
        }
    }

    /// Writes it, readable by its owner alone.
    pub(super) fn write(&self, path: &Path) -> Result<(), Failure> {
        let failed = |e: &dyn std::fmt::Display| Failure::other(format!("cannot write {}: {e}", path.display()));
        let text = toml::to_string(self).map_err(|e| failed(&e))?;
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| failed(&e))?;
        }
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| failed(&e))?;
        io::Write::write_all(&mut file, text.as_bytes()).map_err(|e| failed(&e))
    }

    /// What to use: what is given wins over what is kept.
    pub(super) fn choose(url: Option<String>, api_key: Option<String>, kept: Option<Self>) -> Result<Self, Failure> {
        let (kept_url, kept_key) = kept.map(|k| (k.url, k.api_key)).unzip();
        let no_key = || {
            Failure::new(
                super::ExitStatus::Usage,
                "no API key: start `stasis dev`, or make one with `stasis key create` and set STASIS_API_KEY"
                    .to_owned(),
            )
        };
        Ok(Self {
            url: url.or(kept_url).unwrap_or_else(|| DEFAULT_URL.to_owned()).trim_end_matches('/').to_owned(),
            api_key: api_key.or(kept_key).filter(|key| !key.is_empty()).ok_or_else(no_key)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_reads_back_and_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/client.toml");
        let profile = Profile { url: "http://x".to_owned(), api_key: "k".to_owned() };
        assert_eq!(Profile::read(&path).unwrap(), None);
        profile.write(&path).unwrap();
        assert_eq!(Profile::read(&path).unwrap(), Some(profile));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_is_given_wins() {
        let kept = Profile { url: "http://kept".to_owned(), api_key: "kept".to_owned() };
        let got = Profile::choose(Some("http://given/".to_owned()), None, Some(kept)).unwrap();
        assert_eq!((got.url.as_str(), got.api_key.as_str()), ("http://given", "kept"));
        assert!(Profile::choose(None, None, None).is_err());
    }
}
