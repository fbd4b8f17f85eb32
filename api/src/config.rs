//! Configuration of the supervisor: a TOML file, then environment variables, then flags; the last one that says something wins.
//! Everything is checked before anything starts, and an error names the field.
//!
//! ```toml
//! listen = "127.0.0.1:7878"
//! data_dir = "/var/lib/stasis"
//! images_dir = "/usr/share/stasis/images"
//!
//! [store]
//! kind = "s3"                        # or "directory"
//! bucket = "sandboxes"
//! endpoint = "https://s3.eu-central-1.amazonaws.com"
//! region = "eu-central-1"
//! # access_key, secret_key: better in STASIS_STORE_ACCESS_KEY and STASIS_STORE_SECRET_KEY
//! ```

mod deadlines;
mod gc;
mod invoke;
mod isolation;
mod limits;
mod network;
mod run_ahead;
mod seal;
mod settings;
mod store;
mod telemetry;
mod templates;
mod tls;
mod warm;

pub use deadlines::Deadlines;
pub use gc::Gc;
pub use invoke::{Invoke, Scheme};
pub use isolation::{Isolation, IsolationConfig};
pub use limits::Limits;
pub use network::{Enabled, Network};
pub use run_ahead::RunAhead;
pub use seal::Seal;
pub use settings::{Setting, VARIABLES, from_environment};
pub use store::StoreConfig;
pub use telemetry::Telemetry;
pub use templates::Templates;
pub use tls::Tls;
pub use warm::Warm;

use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Longest data directory, octets: `sun_path` holds 107 and a NUL, and the sockets of a sandbox lie below it.
const MAX_DATA_DIR: usize = 107 - "/run/".len() - "sbx-01234567890123456789".len() - "/control.sock".len();

/// The whole configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Address of the REST API.
    pub listen: SocketAddr,
    /// Journal, run directories, scratch.
    pub data_dir: PathBuf,
    /// Holds `templates/*/template.json`.
    pub images_dir: PathBuf,
    /// The VMM's program; beside our own when absent.
    #[serde(default)]
    pub vmm: Option<PathBuf>,
    /// Where sandboxes sleep.
    pub store: StoreConfig,
    /// Bounds.
    #[serde(default)]
    pub limits: Limits,
    /// Deadlines.
    #[serde(default)]
    pub deadlines: Deadlines,
    /// What is kept ready for wakes.
    #[serde(default)]
    pub warm: Warm,
    /// What is sent ahead of a pause.
    #[serde(default)]
    pub run_ahead: RunAhead,
    /// What is deleted from the bucket, and when.
    #[serde(default)]
    pub gc: Gc,
    /// How apps in sandboxes are reached.
    #[serde(default)]
    pub invoke: Invoke,
    /// TLS.
    #[serde(default)]
    pub tls: Tls,
    /// Templates from container images.
    #[serde(default)]
    pub templates: Templates,
    /// Keys that snapshots are sealed with.
    #[serde(default)]
    pub seal: Seal,
    /// Networks of sandboxes.
    #[serde(default)]
    pub network: Network,
    /// Walls around VMMs.
    #[serde(default)]
    pub isolation: IsolationConfig,
    /// Traces for a collector.
    #[serde(default)]
    pub telemetry: Telemetry,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}", path = path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file, an environment variable or a flag says something that is no configuration.
    #[error("the configuration is wrong: {0}")]
    Syntax(String),
    /// A value is out of range.
    #[error("the configuration is wrong: {field} {error}")]
    Value {
        /// Path of the field.
        field: String,
        /// What is wrong with it.
        error: String,
    },
}

impl Config {
    /// The configuration of `file` overlaid with `settings`, the later ones winning, checked.
    pub fn load(file: Option<&Path>, settings: &[Setting]) -> Result<Self, ConfigError> {
        let text = match file {
            None => String::new(),
            Some(path) => {
                std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?
            }
        };
        let origin = file.map_or_else(|| "(no file)".to_owned(), |p| p.display().to_string());
        let mut table: toml::Table = text.parse().map_err(|e| ConfigError::Syntax(format!("{origin}: {e}")))?;
        for setting in settings {
            settings::overlay(&mut table, setting)?;
        }
        let config: Self = table.try_into().map_err(|e: toml::de::Error| {
            ConfigError::Syntax(format!("{origin} and settings: {}", e.to_string().trim().replace('\n', " ")))
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let data_dir = std::path::absolute(&self.data_dir).unwrap_or_else(|_| self.data_dir.clone());
        if data_dir.as_os_str().len() > MAX_DATA_DIR {
            let error = format!(
                "{} is too long: unix sockets below it would have more than 107 octets; at most {MAX_DATA_DIR}",
                data_dir.display()
            );
            return Err(ConfigError::Value { field: "data_dir".to_owned(), error });
        }
        self.store.check()?;
        self.limits.check()?;
        self.deadlines.check()?;
        self.warm.check()?;
        self.invoke.check()?;
        self.tls.check()?;
        self.templates.check()?;
        self.seal.check()?;
        self.network.check()?;
        self.telemetry.check()?;
        self.gc.check()?;
        self.run_ahead.check()
    }
}

#[cfg(test)]
pub(crate) mod tests_support {
    use super::Setting;

    /// The least that a configuration must say.
    pub(crate) fn directory() -> Vec<Setting> {
        [
            ("listen", "127.0.0.1:1"),
            ("data_dir", "/tmp/d"),
            ("images_dir", "/tmp/i"),
            ("store.kind", "directory"),
            ("store.path", "/tmp/s"),
        ]
        .map(|(field, text)| Setting { field, origin: "test".to_owned(), text: text.to_owned() })
        .to_vec()
    }
}

#[cfg(test)]
mod tests;
