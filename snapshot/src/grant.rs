//! What a VMM may touch: one object a grant, by presigned URL or by an opened file. Made by the supervisor, used by the VMM.

use serde::{Deserialize, Serialize};

/// One object under its store key, and the way to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantedObject {
    /// The store key, as manifests name it.
    pub key: String,
    /// How to reach it.
    pub access: Access,
    /// A descriptor sent beforehand under this token: of a file on this host that holds, or is to hold, the same bytes. Only ever a hint:
    /// what is read from it is checked by the frames' digests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<u64>,
}

/// How a granted object is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Access {
    /// A presigned URL: PUT for a writable grant, GET (ranged) for a readable one.
    Url(String),
    /// A descriptor sent beforehand under this token.
    Fd(u64),
}
