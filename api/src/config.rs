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

mod gc;
mod invoke;
mod isolation;
mod network;
mod run_ahead;
mod seal;
mod telemetry;
mod templates;
mod tls;
mod warm;

pub use gc::Gc;
pub use invoke::{Invoke, Scheme};
pub use isolation::{Isolation, IsolationConfig};
pub use network::{Enabled, Network};
pub use run_ahead::RunAhead;
pub use seal::Seal;
pub use telemetry::Telemetry;
pub use templates::Templates;
pub use tls::Tls;
pub use warm::Warm;

use serde::Deserialize;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

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

/// The object store.
#[derive(Clone, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StoreConfig {
    /// A directory of this host.
    Directory {
        /// Its path; made when missing.
        path: PathBuf,
    },
    /// A bucket.
    S3 {
        /// `http://…` or `https://…`, without the bucket.
        endpoint: String,
        /// Bucket, which must exist.
        bucket: String,
        /// Region; any word for stores that have none.
        #[serde(default = "default_region")]
        region: String,
        /// Access key.
        access_key: String,
        /// Secret key.
        secret_key: String,
        /// Put the bucket in the path rather than in the host name.
        #[serde(default = "default_true")]
        path_style: bool,
    },
}

impl fmt::Debug for StoreConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory { path } => f.debug_struct("Directory").field("path", path).finish(),
            Self::S3 { endpoint, bucket, region, .. } => f
                .debug_struct("S3")
                .field("endpoint", endpoint)
                .field("bucket", bucket)
                .field("region", region)
                .finish_non_exhaustive(),
        }
    }
}

fn default_region() -> String {
    "us-east-1".to_owned()
}

fn default_true() -> bool {
    true
}

/// Bounds on what clients may ask for.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of a request body at most.
    pub body_bytes: usize,
    /// Sandboxes with a VM at once, of one tenant. Paused and stopped ones do not count.
    pub sandboxes: usize,
    /// The same of all tenants together.
    pub host_sandboxes: usize,
    /// Requests a minute of one tenant; 0 is no limit.
    pub requests_per_minute: u32,
    /// The same of all tenants together.
    pub host_requests_per_minute: u32,
    /// Bytes kept of each of stdout and stderr of a command.
    pub output_bytes: usize,
    /// Requests in flight of one capture or wake at most.
    pub connections: u16,
    /// Requests in flight of all captures and wakes together: shared evenly between them.
    pub host_connections: u16,
    /// Memory that a VMM uses for what is on its way in a capture at most, MiB. Less of it means fewer packs in flight.
    pub capture_memory_mib: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes: 10 << 20,
            sandboxes: 64,
            host_sandboxes: 256,
            requests_per_minute: 6000,
            host_requests_per_minute: 0,
            output_bytes: 4 << 20,
            connections: 32,
            host_connections: 64,
            capture_memory_mib: 64,
        }
    }
}

/// How long to wait for what, in milliseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// From the start of a VMM to a guest that is ready.
    pub boot_ms: u64,
    /// One request to a VMM that is not a capture or a restore.
    pub control_ms: u64,
    /// The upload of a capture.
    pub capture_ms: u64,
    /// A restore.
    pub restore_ms: u64,
    /// One request to the store that is not conditional.
    pub store_ms: u64,
    /// One conditional PUT.
    pub commit_ms: u64,
    /// Settling one commit; when it is over, the answer is "outcome unknown" and settling goes on without the client.
    pub settle_ms: u64,
    /// The agent's answer to a wake.
    pub wake_ms: u64,
    /// A request to an app waits this long for its sandbox to run.
    pub hold_ms: u64,
    /// And then for the app to take a connection.
    pub connect_ms: u64,
    /// A connection to an app on which nothing moves is ended after this time.
    pub idle_ms: u64,
    /// From an auto-pause that failed to the next try.
    pub pause_retry_ms: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            boot_ms: 180_000,
            control_ms: 20_000,
            capture_ms: 240_000,
            restore_ms: 240_000,
            store_ms: 30_000,
            commit_ms: 10_000,
            settle_ms: 40_000,
            wake_ms: 60_000,
            hold_ms: 300_000,
            connect_ms: 10_000,
            idle_ms: 300_000,
            pause_retry_ms: 15_000,
        }
    }
}

macro_rules! deadlines {
    ($($name:ident = $field:ident),*) => {
        impl Deadlines {
            $(
                #[doc = concat!("[`Deadlines::", stringify!($field), "`] as a duration.")]
                pub fn $name(&self) -> Duration {
                    Duration::from_millis(self.$field)
                }
            )*

            fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field)),*]
            }
        }
    };
}

deadlines!(
    boot = boot_ms,
    control = control_ms,
    capture = capture_ms,
    restore = restore_ms,
    store = store_ms,
    commit = commit_ms,
    settle = settle_ms,
    wake = wake_ms,
    hold = hold_ms,
    connect = connect_ms,
    idle = idle_ms,
    pause_retry = pause_retry_ms
);

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

/// A setting from outside the file: its path and its text.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Dotted path of the field.
    pub field: &'static str,
    /// Where it comes from, for errors: a variable or a flag.
    pub origin: String,
    /// Its value as text.
    pub text: String,
}

/// Environment variables and the fields they set.
pub const VARIABLES: &[(&str, &str)] = &[
    ("STASIS_LISTEN", "listen"),
    ("STASIS_DATA_DIR", "data_dir"),
    ("STASIS_IMAGES_DIR", "images_dir"),
    ("STASIS_VMM", "vmm"),
    ("STASIS_STORE_KIND", "store.kind"),
    ("STASIS_STORE_PATH", "store.path"),
    ("STASIS_STORE_ENDPOINT", "store.endpoint"),
    ("STASIS_STORE_BUCKET", "store.bucket"),
    ("STASIS_STORE_REGION", "store.region"),
    ("STASIS_STORE_ACCESS_KEY", "store.access_key"),
    ("STASIS_STORE_SECRET_KEY", "store.secret_key"),
    ("STASIS_STORE_PATH_STYLE", "store.path_style"),
    ("STASIS_LIMITS_BODY_BYTES", "limits.body_bytes"),
    ("STASIS_LIMITS_SANDBOXES", "limits.sandboxes"),
    ("STASIS_LIMITS_HOST_SANDBOXES", "limits.host_sandboxes"),
    ("STASIS_LIMITS_REQUESTS_PER_MINUTE", "limits.requests_per_minute"),
    ("STASIS_LIMITS_HOST_REQUESTS_PER_MINUTE", "limits.host_requests_per_minute"),
    ("STASIS_LIMITS_OUTPUT_BYTES", "limits.output_bytes"),
    ("STASIS_LIMITS_CONNECTIONS", "limits.connections"),
    ("STASIS_LIMITS_HOST_CONNECTIONS", "limits.host_connections"),
    ("STASIS_LIMITS_CAPTURE_MEMORY_MIB", "limits.capture_memory_mib"),
    ("STASIS_KEEP_MEMORY_MIB", "warm.keep_memory_mib"),
    ("STASIS_VMM_POOL", "warm.vmm_pool"),
    ("STASIS_PACK_CACHE_MIB", "warm.pack_cache_mib"),
    ("STASIS_GOLDEN", "warm.golden"),
    ("STASIS_SWEEP_MIB_PER_SECOND", "warm.sweep_mib_per_second"),
    ("STASIS_HUGE_PAGES", "warm.huge_pages"),
    ("STASIS_RUN_AHEAD", "run_ahead.enabled"),
    ("STASIS_RUN_AHEAD_INTERVAL_MS", "run_ahead.interval_ms"),
    ("STASIS_RUN_AHEAD_IDLE_MS", "run_ahead.idle_ms"),
    ("STASIS_RUN_AHEAD_NEAR_MS", "run_ahead.near_ms"),
    ("STASIS_RUN_AHEAD_LEAST_KIB", "run_ahead.least_kib"),
    ("STASIS_RUN_AHEAD_MIB_PER_MINUTE", "run_ahead.mib_per_minute"),
    ("STASIS_RUN_AHEAD_CORE_PERCENT", "run_ahead.core_percent"),
    ("STASIS_RUN_AHEAD_CONNECTIONS", "run_ahead.connections"),
    ("STASIS_GC_EVERY_S", "gc.every_s"),
    ("STASIS_GC_GRACE_S", "gc.grace_s"),
    ("STASIS_DEADLINES_BOOT_MS", "deadlines.boot_ms"),
    ("STASIS_DEADLINES_CONTROL_MS", "deadlines.control_ms"),
    ("STASIS_DEADLINES_CAPTURE_MS", "deadlines.capture_ms"),
    ("STASIS_DEADLINES_RESTORE_MS", "deadlines.restore_ms"),
    ("STASIS_DEADLINES_STORE_MS", "deadlines.store_ms"),
    ("STASIS_DEADLINES_COMMIT_MS", "deadlines.commit_ms"),
    ("STASIS_DEADLINES_SETTLE_MS", "deadlines.settle_ms"),
    ("STASIS_DEADLINES_WAKE_MS", "deadlines.wake_ms"),
    ("STASIS_DEADLINES_HOLD_MS", "deadlines.hold_ms"),
    ("STASIS_DEADLINES_CONNECT_MS", "deadlines.connect_ms"),
    ("STASIS_DEADLINES_IDLE_MS", "deadlines.idle_ms"),
    ("STASIS_DOMAIN", "invoke.domain"),
    ("STASIS_DEFAULT_PORT", "invoke.default_port"),
    ("STASIS_TRUST_FORWARDED", "invoke.trust_forwarded"),
    ("STASIS_URL_SCHEME", "invoke.scheme"),
    ("STASIS_TLS_CERT", "tls.cert"),
    ("STASIS_TLS_KEY", "tls.key"),
    ("STASIS_TLS_PLAIN", "tls.plain"),
    ("STASIS_TELEMETRY_OTLP_ENDPOINT", "telemetry.otlp_endpoint"),
    ("STASIS_TEMPLATES_LOCAL_DIR", "templates.local_dir"),
    ("STASIS_TEMPLATES_REGISTRIES", "templates.registries"),
    ("STASIS_TEMPLATES_PLAIN_HTTP", "templates.plain_http"),
    ("STASIS_TEMPLATES_BOOT", "templates.boot"),
    ("STASIS_TEMPLATES_ECR_ENDPOINT", "templates.ecr_endpoint"),
    ("STASIS_TEMPLATES_DISK_MIB", "templates.disk_mib"),
    ("STASIS_TEMPLATES_IMAGE_MIB", "templates.image_mib"),
    ("STASIS_TEMPLATES_IMAGE_ENTRIES", "templates.image_entries"),
    ("STASIS_TEMPLATES_PER_TENANT", "templates.per_tenant"),
    ("STASIS_TEMPLATES_PER_HOST", "templates.per_host"),
    ("STASIS_TEMPLATES_BUILDS", "templates.builds"),
    ("STASIS_TEMPLATES_BUILD_MS", "templates.build_ms"),
    ("STASIS_DEADLINES_PAUSE_RETRY_MS", "deadlines.pause_retry_ms"),
    ("STASIS_SEAL_KEY_FILE", "seal.key_file"),
    ("STASIS_SEAL_OLD_KEY_FILES", "seal.old_key_files"),
    ("STASIS_SEAL_ENCRYPT", "seal.encrypt"),
    ("STASIS_SEAL_ACCEPT_UNSEALED", "seal.accept_unsealed"),
    ("STASIS_NETWORK", "network.enabled"),
    ("STASIS_NETWORK_READY", "network.ready"),
    ("STASIS_NETWORK_CONNECTIONS", "network.connections"),
    ("STASIS_NETWORK_NEW_PER_SECOND", "network.new_per_second"),
    ("STASIS_NETWORK_BURST", "network.burst"),
    ("STASIS_NETWORK_IN_BYTES_PER_SECOND", "network.in_bytes_per_second"),
    ("STASIS_NETWORK_IN_PACKETS_PER_SECOND", "network.in_packets_per_second"),
    ("STASIS_NETWORK_IN_BURST_BYTES", "network.in_burst_bytes"),
    ("STASIS_NETWORK_IN_BURST_PACKETS", "network.in_burst_packets"),
    ("STASIS_NETWORK_OUT_BYTES_PER_SECOND", "network.out_bytes_per_second"),
    ("STASIS_NETWORK_OUT_PACKETS_PER_SECOND", "network.out_packets_per_second"),
    ("STASIS_NETWORK_OUT_BURST_BYTES", "network.out_burst_bytes"),
    ("STASIS_NETWORK_OUT_BURST_PACKETS", "network.out_burst_packets"),
    ("STASIS_ISOLATION", "isolation.mode"),
    ("STASIS_WARDEN", "isolation.warden"),
];

/// The settings that environment variables make.
pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Vec<Setting> {
    VARIABLES
        .iter()
        .filter_map(|(name, field)| get(name).map(|text| Setting { field, origin: (*name).to_owned(), text }))
        .collect()
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
            overlay(&mut table, setting)?;
        }
        let config: Self = table.try_into().map_err(|e: toml::de::Error| {
            ConfigError::Syntax(format!("{origin} and settings: {}", e.to_string().trim().replace('\n', " ")))
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field: &str, error: String| Err(ConfigError::Value { field: field.to_owned(), error });
        let data_dir = std::path::absolute(&self.data_dir).unwrap_or_else(|_| self.data_dir.clone());
        if data_dir.as_os_str().len() > MAX_DATA_DIR {
            return wrong(
                "data_dir",
                format!(
                    "{} is too long: unix sockets below it would have more than 107 octets; at most {MAX_DATA_DIR}",
                    data_dir.display()
                ),
            );
        }
        if let StoreConfig::S3 { endpoint, bucket, access_key, secret_key, .. } = &self.store {
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                return wrong("store.endpoint", format!("{endpoint:?} must start with http:// or https://"));
            }
            for (field, value) in
                [("store.bucket", bucket), ("store.access_key", access_key), ("store.secret_key", secret_key)]
            {
                if value.is_empty() {
                    return wrong(field, "must not be empty".to_owned());
                }
            }
        }
        for (field, value, low, high) in [
            ("limits.body_bytes", self.limits.body_bytes, 1024, 1 << 30),
            ("limits.sandboxes", self.limits.sandboxes, 1, 100_000),
            ("limits.host_sandboxes", self.limits.host_sandboxes, 1, 100_000),
            ("limits.output_bytes", self.limits.output_bytes, 1024, 64 << 20),
            ("limits.connections", usize::from(self.limits.connections), 1, 256),
            ("limits.host_connections", usize::from(self.limits.host_connections), 2, 4096),
            (
                "limits.capture_memory_mib",
                usize::try_from(self.limits.capture_memory_mib).unwrap_or(usize::MAX),
                16,
                4096,
            ),
        ] {
            if !(low..=high).contains(&value) {
                return wrong(field, format!("must be between {low} and {high}, not {value}"));
            }
        }
        for (field, value) in self.deadlines.all() {
            if !(10..=3_600_000).contains(&value) {
                return wrong(&format!("deadlines.{field}"), format!("must be between 10 and 3600000 ms, not {value}"));
            }
        }
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

/// Fields that are true or false.
const SWITCHES: [&str; 8] = [
    "store.path_style",
    "warm.golden",
    "warm.huge_pages",
    "run_ahead.enabled",
    "invoke.trust_forwarded",
    "tls.plain",
    "seal.encrypt",
    "seal.accept_unsealed",
];
/// Fields that are lists; in a variable, words between commas.
const LISTS: [&str; 2] = ["templates.registries", "templates.plain_http"];
/// Fields that are lists of paths; in a variable, with a colon between two.
const PATHS: [&str; 1] = ["seal.old_key_files"];
/// What the other fields that are no text begin with.
const NUMBERS: [&str; 19] = [
    "gc.",
    "limits.",
    "deadlines.",
    "warm.",
    "run_ahead.",
    "invoke.default_port",
    "templates.disk_mib",
    "templates.image_mib",
    "templates.image_entries",
    "templates.per_tenant",
    "templates.per_host",
    "templates.builds",
    "templates.build_ms",
    "network.ready",
    "network.connections",
    "network.new_per_second",
    "network.burst",
    "network.in_",
    "network.out_",
];

fn overlay(table: &mut toml::Table, setting: &Setting) -> Result<(), ConfigError> {
    let (section, name) = match setting.field.split_once('.') {
        Some((section, name)) => {
            let entry = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            match entry.as_table_mut() {
                Some(inner) => (inner, name),
                None => return Err(ConfigError::Syntax(format!("{section} must be a section, [{section}]"))),
            }
        }
        None => (table, setting.field),
    };
    let wrong = |kind: &str| {
        ConfigError::Syntax(format!("{} ({}): {:?} is not {kind}", setting.field, setting.origin, setting.text))
    };
    let value = if SWITCHES.contains(&setting.field) {
        toml::Value::Boolean(switch(&setting.text).ok_or_else(|| wrong("true or false"))?)
    } else if LISTS.contains(&setting.field) {
        let words = setting.text.split(',').map(str::trim).filter(|word| !word.is_empty());
        toml::Value::Array(words.map(toml::Value::from).collect())
    } else if NUMBERS.iter().any(|part| setting.field.starts_with(part)) {
        toml::Value::Integer(setting.text.parse().map_err(|_| wrong("a whole number"))?)
    } else if PATHS.contains(&setting.field) {
        let parts = setting.text.split(':').filter(|part| !part.is_empty());
        toml::Value::Array(parts.map(|part| toml::Value::String(part.to_owned())).collect())
    } else {
        toml::Value::String(setting.text.clone())
    };
    section.insert(name.to_owned(), value);
    Ok(())
}

fn switch(text: &str) -> Option<bool> {
    match text {
        "true" | "on" | "1" => Some(true),
        "false" | "off" | "0" => Some(false),
        _ => None,
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
mod tests {
    use super::*;

    const DIRECTORY: &str = "listen = '127.0.0.1:1'\ndata_dir = '/tmp/d'\nimages_dir = '/tmp/i'\n[store]\nkind = 'directory'\npath = '/tmp/s'\n";

    fn load(text: &str, settings: &[(&'static str, &str)]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stasis.toml");
        std::fs::write(&path, text).unwrap();
        let settings = settings
            .iter()
            .map(|(field, text)| Setting { field, origin: "test".to_owned(), text: (*text).to_owned() })
            .collect::<Vec<_>>();
        Config::load(Some(&path), &settings).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_loads_and_settings_win() {
        let config = load(DIRECTORY, &[("limits.sandboxes", "3"), ("listen", "127.0.0.1:9")]).unwrap();
        assert_eq!((config.limits.sandboxes, config.listen.port()), (3, 9));
        assert_eq!(config.deadlines.commit(), Duration::from_secs(10));
    }

    #[test]
    fn every_error_names_its_field() {
        let long = format!("/{}", "x".repeat(200));
        for (settings, field) in [
            (vec![("listen", "nowhere")], "listen"),
            (vec![("limits.sandboxes", "0")], "limits.sandboxes"),
            (vec![("limits.sandboxes", "many")], "limits.sandboxes"),
            (vec![("limits.host_sandboxes", "0")], "limits.host_sandboxes"),
            (vec![("limits.requests_per_minute", "-1")], "requests_per_minute"),
            (vec![("deadlines.commit_ms", "1")], "deadlines.commit_ms"),
            (vec![("store.kind", "tape")], "kind"),
            (vec![("warm.golden", "perhaps")], "warm.golden"),
            (vec![("warm.vmm_pool", "1000")], "warm.vmm_pool"),
            (vec![("run_ahead.core_percent", "0")], "run_ahead.core_percent"),
            (vec![("templates.image_mib", "10240")], "templates.image_mib"),
            (vec![("templates.local_dir", "here")], "templates.local_dir"),
            (vec![("seal.encrypt", "perhaps")], "seal.encrypt"),
            (vec![("seal.old_key_files", "/a:/b")], "seal.key_file"),
            (vec![("templates.per_host", "0")], "templates.per_host"),
            (vec![("templates.ecr_endpoint", "api.ecr")], "templates.ecr_endpoint"),
            (vec![("telemetry.otlp_endpoint", "collector:4318")], "telemetry.otlp_endpoint"),
            (vec![("telemetry.otlp_endpoint", "http://a b")], "telemetry.otlp_endpoint"),
            (vec![("data_dir", long.as_str())], "data_dir"),
        ] {
            let error = load(DIRECTORY, &settings).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
        for (wrong, field) in
            [("[limits]\nsandboxes = 'x'", "sandboxes"), ("[tls]\ncert = 1", "cert"), ("[warm]\ncold = 1", "cold")]
        {
            let error = load(&format!("{DIRECTORY}{wrong}"), &[]).unwrap_err();
            assert!(error.contains(field), "{error}");
        }
        assert!(load("", &[]).unwrap_err().contains("listen"));
        assert!(load(&format!("colour = 'red'\n{DIRECTORY}"), &[]).unwrap_err().contains("colour"));
        assert!(load("listen = [", &[]).unwrap_err().contains("stasis.toml"));
        let s3 = DIRECTORY.replace(
            "'directory'\npath = '/tmp/s'",
            "'s3'\nendpoint='ftp://x'\nbucket='b'\naccess_key='a'\nsecret_key='hush'",
        );
        assert!(load(&s3, &[]).unwrap_err().contains("store.endpoint"));
        assert!(
            load(&s3, &[("store.endpoint", "http://x"), ("store.bucket", "")]).unwrap_err().contains("store.bucket")
        );
        let config = load(&s3, &[("store.endpoint", "http://x")]).unwrap();
        assert!(!format!("{config:?}").contains("hush"));
    }

    #[test]
    fn each_variable_sets_its_field() {
        let settings = from_environment(|name| (name == "STASIS_LISTEN").then(|| "1.2.3.4:5".to_owned()));
        assert_eq!((settings.len(), settings[0].field), (1, "listen"));
        let listed = load(DIRECTORY, &[("templates.registries", "ghcr.io, *.example.com")]).unwrap();
        assert_eq!(listed.templates.registries, ["ghcr.io", "*.example.com"]);
        // What a value may be is the field's own affair: that there is such a field is what counts here.
        for (name, field) in VARIABLES {
            let text = if NUMBERS.iter().any(|part| field.starts_with(part)) { "1" } else { "on" };
            let base = if field.starts_with("store.") { "" } else { DIRECTORY };
            let error = load(base, &[(field, text)]).err().unwrap_or_default();
            assert!(!error.contains("unknown field"), "{name}: {error}");
        }
    }
}
