//! Templates from container images.

use super::text::Moment;
use schemars::JsonSchema;
use serde::Serialize;
use std::collections::BTreeMap;
use std::num::NonZeroU16;

/// What sandboxes are made from.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Template {
    /// Its id.
    #[schemars(example = "tpl-8h2j4k6l0p9o7i5u3y1t")]
    pub id: String,
    /// Its name, by which sandboxes are made from it.
    pub name: String,
    /// Whether sandboxes can be made from it.
    pub state: TemplateState,
    /// Digest of its image. Empty while it is being made.
    pub digest: String,
    /// What its image says about the processes in it.
    pub image_config: ImageConfig,
    /// It is the operator's.
    pub is_system: bool,
    /// When it was asked for.
    #[schemars(with = "Moment")]
    pub created_at: String,
    /// Where its image was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// Port of its app.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// Disk of its sandboxes, MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<u64>,
    /// `disk` by its other name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u64>,
    /// What is being done, while it is being made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// Bytes of the phase that are through.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Bytes of the phase in all; 0 when nobody knows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Why it could not be made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether sandboxes can be made from a template.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
#[expect(missing_docs, reason = "the names say it; a description of each would be no enum in the document")]
pub enum TemplateState {
    Building,
    Ready,
    Failed,
}

/// What an image says about the processes in it.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct ImageConfig {
    /// Program that it is made for, with its first arguments.
    pub entrypoint: Option<Vec<String>>,
    /// Its other arguments.
    pub cmd: Option<Vec<String>>,
    /// Working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// User.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
}

/// One page of templates.
#[derive(Debug, Serialize, JsonSchema)]
pub struct TemplateList {
    /// The page.
    pub items: Vec<Template>,
    /// How many there are on all pages.
    pub total_items: usize,
}

inline_schemas! {
    /// A name without white space that is not the operator's.
    TemplateName = { "type": "string", "minLength": 1, "maxLength": 64, "pattern": r"^[^\s\u0000-\u001f\u007f-\u009f]+$", "not": { "pattern": "^system/" } };
    /// An image reference.
    ImageReference = { "type": "string", "minLength": 1, "maxLength": 500, "examples": ["docker.io/library/python:3.12"] };
}

/// A template to be made.
#[derive(JsonSchema)]
pub struct UploadTemplate {
    /// Its name.
    pub name: TemplateName,
    /// Where the image is: in a registry, or on the supervisor's host as `oci:PATH[:NAME]`, `oci-archive:…` or `docker-archive:…`.
    pub uri: ImageReference,
    /// What the registry is told.
    pub credentials: Option<RegistryCredentials>,
}

/// What a registry is told. Which fields are required follows from the type.
#[derive(JsonSchema)]
pub struct RegistryCredentials {
    /// How the registry knows its clients.
    pub r#type: RegistryKind,
    /// For `basic`: who.
    pub username: Option<String>,
    /// For `basic`: a password or a token.
    pub password: Option<String>,
    /// For `aws`: the id of a key.
    pub aws_access_key_id: Option<String>,
    /// For `aws`: the key's secret.
    pub aws_secret_access_key: Option<String>,
    /// For `aws`: where the registry is, if its name does not say it.
    pub aws_region: Option<String>,
    /// For `gcp`: a service account's key file, as text.
    pub gcp_service_account_json: Option<String>,
    /// For `azure`: the id of a service principal.
    pub azure_client_id: Option<String>,
    /// For `azure`: the principal's secret.
    pub azure_client_secret: Option<String>,
    /// For `azure`: the directory that the principal is in.
    pub azure_tenant_id: Option<String>,
}

/// How a registry knows its clients.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case", inline)]
#[expect(missing_docs, reason = "the names say it; a description of each would be no enum in the document")]
pub enum RegistryKind {
    Basic,
    Aws,
    Gcp,
    Azure,
}

/// Another name for a template.
#[derive(JsonSchema)]
pub struct RenameTemplate {
    /// The name.
    pub name: TemplateName,
}

/// Which templates are listed.
#[derive(JsonSchema)]
pub struct ListTemplates {
    /// Only those with this in their name.
    #[schemars(length(max = 64))]
    pub query: Option<String>,
    /// Which page; 1 when absent.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub page: Option<u32>,
    /// Templates on a page; 20 when absent.
    #[schemars(rename = "page-size", range(min = 1, max = 100))]
    pub page_size: Option<u32>,
}
