//! Templates from container images: where images may come from, and how large they may be.

use super::ConfigError;
use crate::validate::DEFAULT_TEMPLATE;
use serde::Deserialize;
use std::path::PathBuf;

/// `[templates]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Templates {
    /// Directory of this host below which clients may name OCI layouts and archives. Without it they may name none.
    pub local_dir: Option<PathBuf>,
    /// Registries that may be asked: names, with a port where it is not 443; `*.suffix`; or `*` for whatever this host can reach.
    pub registries: Vec<String>,
    /// Registries, with their ports, that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// URL of the API that gives passwords for keys of Amazon's; that of the key's region when absent.
    pub ecr_endpoint: Option<String>,
    /// Template whose kernel and initramfs boot the images.
    pub boot: String,
    /// Size of the disk of sandboxes made from images, MiB.
    pub disk_mib: u64,
    /// What an image may unpack, and what it may have packed, MiB.
    pub image_mib: u64,
    /// Entries in the layers of an image.
    pub image_entries: usize,
    /// Templates of one tenant.
    pub per_tenant: usize,
    /// Templates of all tenants together.
    pub per_host: usize,
    /// Images that are made into templates at once, of all tenants.
    pub builds: usize,
    /// From the beginning of a build to its end, ms.
    pub build_ms: u64,
}

impl Default for Templates {
    fn default() -> Self {
        Self {
            local_dir: None,
            registries: ["docker.io", "ghcr.io", "quay.io"].map(str::to_owned).to_vec(),
            plain_http: Vec::new(),
            ecr_endpoint: None,
            boot: DEFAULT_TEMPLATE.to_owned(),
            disk_mib: 10_240,
            image_mib: 8192,
            image_entries: 500_000,
            per_tenant: 25,
            per_host: 1000,
            builds: 2,
            build_ms: 1_800_000,
        }
    }
}

impl Templates {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field: &str, error: String| Err(ConfigError::Value { field: format!("templates.{field}"), error });
        let number = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        for (field, value, low, high) in [
            ("disk_mib", self.disk_mib, 64, 1 << 20),
            // What is beside the content, and room for the guest, must fit, too.
            ("image_mib", self.image_mib, 1, self.disk_mib / 10 * 9),
            ("image_entries", number(self.image_entries), 1, 4_000_000),
            ("per_tenant", number(self.per_tenant), 1, 10_000),
            ("per_host", number(self.per_host), 1, 100_000),
            ("builds", number(self.builds), 1, 64),
            ("build_ms", self.build_ms, 1000, 24 * 3_600_000),
        ] {
            if !(low..=high).contains(&value) {
                return wrong(field, format!("must be between {low} and {high}, not {value}"));
            }
        }
        if let Some(url) =
            self.ecr_endpoint.as_deref().filter(|url| !url.starts_with("https://") && !url.starts_with("http://"))
        {
            return wrong("ecr_endpoint", format!("{url:?} must start with http:// or https://"));
        }
        match &self.local_dir {
            Some(dir) if !dir.is_absolute() => wrong("local_dir", format!("{} must be absolute", dir.display())),
            _ => Ok(()),
        }
    }
}
