//! `[store]`: where sandboxes sleep.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;

use super::ConfigError;

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

impl StoreConfig {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let wrong = |field: &str, error: String| Err(ConfigError::Value { field: field.to_owned(), error });
        if let StoreConfig::S3 { endpoint, bucket, access_key, secret_key, .. } = self {
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
        Ok(())
    }
}
