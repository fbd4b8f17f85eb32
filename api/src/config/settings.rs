//! What is said outside the file: environment variables and flags, and how their texts become values of fields.

use super::ConfigError;

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
pub(super) const NUMBERS: [&str; 19] = [
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

/// Puts a setting in the place of what the file says.
pub(super) fn overlay(table: &mut toml::Table, setting: &Setting) -> Result<(), ConfigError> {
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
