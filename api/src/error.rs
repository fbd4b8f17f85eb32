//! What can go wrong with a request, in the words of the domain. [`Error::status`] and [`Error::code`] are the only place where an error
//! becomes an HTTP status: exhaustive, so that a new variant must be placed.

use crate::admission::{NoPlace, Scope};
use crate::ids::SandboxId;
use crate::image::ImageError;
use crate::invoke::InvokeError;
use crate::journal::JournalError;
use crate::rate::TooMany;
use crate::record::PortableError;
use crate::states::State;
use crate::telemetry::TelemetryError;
use crate::template::TemplateError;
use crate::validate::FieldError;
use http::StatusCode;
use stasis_snapshot::commit::HeadError;
use stasis_snapshot::layout::BadName;
use stasis_snapshot::manifest::ManifestError;
use stasis_snapshot::seal::SealError;
use stasis_snapshot::store::{ErrorKind, StoreError};
use stasis_vmm::control::client::ClientError;
use std::io;
use std::sync::Arc;

/// A failed request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No key, or one that is not accepted.
    #[error("a valid API key is required, in the authorization or leap0-authorization header")]
    Unauthorized,
    /// A browser's session counts only for what our own page sends.
    #[error(
        "a session of the page counts only for requests from that page: this one comes from elsewhere, or a proxy changes Host"
    )]
    CrossOrigin,
    /// Unknown, of another tenant, or not an id at all.
    #[error("there is no sandbox {0:?}")]
    NotFound(String),
    /// A part of the path is no text.
    #[error("there is no {0}")]
    NoPath(String),
    /// The body is no JSON object.
    #[error("the body must be a JSON object: {0}")]
    BadJson(String),
    /// The body is larger than allowed.
    #[error("the body is larger than {limit} bytes")]
    TooLarge {
        /// Bytes allowed.
        limit: usize,
    },
    /// Fields are wrong.
    #[error("the request is not valid: {}", .0.iter().map(|e| format!("{} {}", e.field, e.error)).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<FieldError>),
    /// The state forbids it.
    #[error("sandbox {id} is {state}: cannot {verb} it now")]
    State {
        /// Which.
        id: SandboxId,
        /// Its state.
        state: State,
        /// What was asked.
        verb: &'static str,
    },
    /// A sandbox has as many presigned URLs as it may have.
    #[error("sandbox {id} has as many presigned URLs as it may have: delete one or let one expire first")]
    TooManyUrls {
        /// Which.
        id: SandboxId,
    },
    /// The sandbox has no presigned URL of that id.
    #[error("there is no presigned URL {0:?}")]
    NoPresignedUrl(String),
    /// The tenant has as many as it may have, or the host has.
    #[error(transparent)]
    Limit(#[from] NoPlace),
    /// The tenant asks too often, or all do.
    #[error(transparent)]
    Rate(#[from] TooMany),
    /// The tenant has no snapshot of that name or id.
    #[error("there is no snapshot {0:?}")]
    NoSnapshot(String),
    /// The tenant has a snapshot of that name, or is making one.
    #[error("there is a snapshot {0:?} already")]
    SnapshotExists(String),
    /// A sandbox was restored from the snapshot and runs.
    #[error("snapshot {snapshot:?} is in use by sandbox {sandbox}: delete, pause or stop that first")]
    SnapshotInUse {
        /// Its id.
        snapshot: String,
        /// By which.
        sandbox: SandboxId,
    },
    /// The guest of this sandbox has no agent.
    #[error("sandbox {id}: template {template:?} has no agent, so it runs no commands")]
    NoAgent {
        /// Which.
        id: SandboxId,
        /// Its template.
        template: String,
    },
    /// A template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tenant has no template of that id.
    #[error("there is no template {0:?}")]
    NoTemplate(String),
    /// The tenant may use a template of that name already, or is making one.
    #[error("there is a template {0:?} already")]
    TemplateExists(String),
    /// There are as many templates as there may be, of the tenant or on this host.
    #[error("there are {most} templates{} already, which is the limit: {}", match .scope {
        Scope::Tenant => "",
        Scope::Host => " on this host",
    }, match .scope {
        Scope::Tenant => "delete one first",
        Scope::Host => "try again later",
    })]
    TooManyTemplates {
        /// How many there may be.
        most: usize,
        /// Whose limit.
        scope: Scope,
    },
    /// A template that the tenant may not change, or not now.
    #[error("template {id}: cannot {verb} it: {why}")]
    TemplateFixed {
        /// Which.
        id: String,
        /// What was asked.
        verb: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// A sandbox or a named snapshot needs the template's disk.
    #[error("template {id} is in use by {by}: delete that first")]
    TemplateInUse {
        /// Which.
        id: String,
        /// By what.
        by: String,
    },
    /// A container image does not become a template.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// This host cannot run the guest.
    #[error("{0}")]
    Host(String),
    /// The store failed.
    #[error("cannot {action}")]
    Store {
        /// What was tried.
        action: &'static str,
        /// The store's answer.
        #[source]
        source: StoreError,
    },
    /// An object is not what was written.
    #[error("{object} is damaged; the sandbox stays as it is")]
    Damaged {
        /// Its key.
        object: String,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An object's seal is not accepted.
    #[error("{object} is not accepted; the sandbox stays as it is")]
    Seal {
        /// Its key.
        object: String,
        /// Why not.
        #[source]
        source: SealError,
    },
    /// The head in the store is older than one that this supervisor has seen.
    #[error(
        "the head of {id} in the store is of commit {found}, and commit {known} was seen here: an older head was put in its place; the sandbox stays as it is"
    )]
    RolledBack {
        /// Which sandbox.
        id: SandboxId,
        /// Sequence number in the store.
        found: u64,
        /// The highest that was seen.
        known: u64,
    },
    /// The outcome of a commit is not known yet.
    #[error(
        "the store did not say whether the {action} of {id} was committed; the guest stays stopped until it is known. Ask for its state"
    )]
    Unknown {
        /// Which sandbox.
        id: SandboxId,
        /// Which operation.
        action: &'static str,
        /// The last thing the store said.
        #[source]
        source: StoreError,
    },
    /// Another supervisor owns it.
    #[error("sandbox {id} belongs to supervisor {owner} (epoch {epoch})")]
    Fenced {
        /// Which.
        id: SandboxId,
        /// Whose.
        owner: String,
        /// Since which epoch.
        epoch: u64,
    },
    /// The VMM refused, or cannot be reached.
    #[error("sandbox {id}: cannot {action}")]
    Vmm {
        /// Which.
        id: SandboxId,
        /// What was tried.
        action: &'static str,
        /// What the store did to the VMM, when that is why.
        store: Option<ErrorKind>,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// The VMM ended.
    #[error("sandbox {id}: its VMM ended: {reason}")]
    VmmEnded {
        /// Which.
        id: SandboxId,
        /// Why.
        reason: String,
    },
    /// Something took too long.
    #[error("sandbox {id}: {what} took longer than {ms} ms")]
    Deadline {
        /// Which.
        id: SandboxId,
        /// What.
        what: &'static str,
        /// The deadline.
        ms: u128,
    },
    /// The VMM's draft of a manifest is not what a well-behaved VMM sends.
    #[error("sandbox {id}: the VMM's draft was refused: {what}")]
    Draft {
        /// Which.
        id: SandboxId,
        /// What is wrong.
        what: String,
        /// Why.
        #[source]
        source: Option<Box<ManifestError>>,
    },
    /// The agent failed.
    #[error("sandbox {id}: its agent cannot {action}: {what}")]
    Agent {
        /// Which.
        id: SandboxId,
        /// What was tried.
        action: &'static str,
        /// Why not.
        what: String,
    },
    /// Something of a sandbox's network cannot be made or changed.
    #[error("sandbox {id}: cannot {action}")]
    Network {
        /// Which.
        id: SandboxId,
        /// What was tried.
        action: &'static str,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An app in a sandbox did not answer.
    #[error(transparent)]
    Invoke(#[from] InvokeError),
    /// The guest refused, in its own words.
    #[error("{message}")]
    Guest {
        /// 400, 403, 404, 409, 413 or 507.
        status: StatusCode,
        /// Why.
        message: String,
    },
    /// A part of the API that this server does not have.
    #[error("this server has no {0} yet")]
    LeftOut(&'static str),
    /// The request must become a WebSocket.
    #[error("this is a WebSocket: the request must ask for an upgrade to one ({0})")]
    NoWebSocket(String),
    /// Nothing can be exported to the collector of traces.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    /// A file or a process of this host failed.
    #[error("cannot {action}")]
    Local {
        /// What was tried.
        action: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// A head could not be built or read.
    #[error("the head of {id} cannot be used")]
    Head {
        /// Which.
        id: SandboxId,
        /// Why.
        #[source]
        source: HeadError,
    },
    /// A record in the bucket cannot be used.
    #[error("the record of {id} in the bucket cannot be used")]
    Portable {
        /// Which.
        id: SandboxId,
        /// Why.
        #[source]
        source: PortableError,
    },
    /// A tenant or id that cannot be part of a key.
    #[error(transparent)]
    Name(#[from] BadName),
    /// The operation that this request waited for failed.
    #[error("{}", .0.chain())]
    Shared(Arc<Error>),
    /// A bug.
    #[error("internal error: {0}; please report it")]
    Bug(&'static str),
}

impl Error {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::CrossOrigin => StatusCode::FORBIDDEN,
            Self::NotFound(_)
            | Self::NoPath(_)
            | Self::NoSnapshot(_)
            | Self::NoPresignedUrl(_)
            | Self::NoTemplate(_) => StatusCode::NOT_FOUND,
            Self::BadJson(_) | Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::Guest { status, .. } => *status,
            Self::LeftOut(_) => StatusCode::NOT_IMPLEMENTED,
            Self::NoWebSocket(_) => StatusCode::UPGRADE_REQUIRED,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::State { .. }
            | Self::TooManyUrls { .. }
            | Self::Fenced { .. }
            | Self::SnapshotExists(_)
            | Self::SnapshotInUse { .. }
            | Self::TemplateExists(_)
            | Self::TooManyTemplates { scope: Scope::Tenant, .. }
            | Self::TemplateFixed { .. }
            | Self::TemplateInUse { .. }
            | Self::NoAgent { .. } => StatusCode::CONFLICT,
            Self::Limit(refused) => refused.status(),
            Self::Rate(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Template(e) => match e {
                TemplateError::Unknown { .. } => StatusCode::BAD_REQUEST,
                TemplateError::File { .. }
                | TemplateError::Description { .. }
                | TemplateError::Malformed { .. }
                | TemplateError::Journal(_) => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Image(e) => image_status(e),
            Self::Host(_) | Self::Network { .. } | Self::TooManyTemplates { scope: Scope::Host, .. } => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Store { source, .. } => store_status(source.kind),
            Self::Vmm { store: Some(kind), .. } => store_status(*kind),
            Self::Damaged { .. } | Self::Seal { .. } | Self::RolledBack { .. } | Self::Agent { .. } => {
                StatusCode::BAD_GATEWAY
            }
            Self::Unknown { .. }
            | Self::Deadline { .. }
            | Self::Vmm { source: ClientError::Deadline { .. } | ClientError::Refused { status: 504, .. }, .. } => {
                StatusCode::GATEWAY_TIMEOUT
            }
            Self::Vmm { store: None, .. }
            | Self::VmmEnded { .. }
            | Self::Draft { .. }
            | Self::Local { .. }
            | Self::Telemetry(_)
            | Self::Journal(_)
            | Self::Head { .. }
            | Self::Portable { .. }
            | Self::Name(_)
            | Self::Bug(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Invoke(e) => e.status(),
            Self::Shared(e) => e.status(),
        }
    }

    /// The fields that are wrong, for a 400.
    pub fn fields(&self) -> Vec<FieldError> {
        match self {
            Self::Invalid(fields) => fields.clone(),
            Self::BadJson(why) => {
                vec![FieldError { field: "body".to_owned(), error: format!("must be a JSON object: {why}") }]
            }
            Self::Template(error @ TemplateError::Unknown { .. }) => {
                vec![FieldError { field: "template_name".to_owned(), error: error.to_string() }]
            }
            Self::Shared(error) => error.fields(),
            _ => Vec::new(),
        }
    }

    /// A stable word for machines, in the `stasis-error` header.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::CrossOrigin => "cross-origin",
            Self::NotFound(_)
            | Self::NoPath(_)
            | Self::NoSnapshot(_)
            | Self::NoPresignedUrl(_)
            | Self::NoTemplate(_) => "not-found",
            Self::SnapshotExists(_) | Self::TemplateExists(_) => "exists",
            Self::BadJson(_) => "bad-json",
            Self::TooLarge { .. } => "too-large",
            Self::Invalid(_) => "invalid",
            Self::State { .. } => "wrong-state",
            Self::SnapshotInUse { .. } | Self::TemplateInUse { .. } => "in-use",
            Self::TemplateFixed { .. } => "fixed",
            Self::Image(_) => "image",
            Self::TooManyUrls { .. }
            | Self::TooManyTemplates { scope: Scope::Tenant, .. }
            | Self::Limit(NoPlace { scope: Scope::Tenant, .. }) => "limit",
            Self::TooManyTemplates { scope: Scope::Host, .. } | Self::Limit(NoPlace { scope: Scope::Host, .. }) => {
                "capacity"
            }
            Self::Rate(_) => "rate",
            Self::NoAgent { .. } => "no-agent",
            Self::Template(_) => "template",
            Self::Host(_) => "host",
            Self::Store { .. } | Self::Vmm { store: Some(_), .. } => "store",
            Self::Damaged { .. } => "damaged",
            Self::Seal { .. } => "seal",
            Self::RolledBack { .. } => "rolled-back",
            Self::Unknown { .. } => OUTCOME_UNKNOWN,
            Self::Fenced { .. } => "fenced",
            Self::Vmm { store: None, .. } => "vmm",
            Self::VmmEnded { .. } => "vmm-ended",
            Self::Deadline { .. } => "deadline",
            Self::Draft { .. } => "draft",
            Self::Agent { .. } => "agent",
            Self::Network { .. } => "network",
            Self::Guest { .. } => "guest",
            Self::LeftOut(_) => "left-out",
            Self::NoWebSocket(_) => "no-websocket",
            Self::Local { .. }
            | Self::Telemetry(_)
            | Self::Journal(_)
            | Self::Head { .. }
            | Self::Portable { .. }
            | Self::Name(_)
            | Self::Bug(_) => "internal",
            Self::Invoke(e) => e.code(),
            Self::Shared(e) => e.code(),
        }
    }

    /// When a client that was refused for want of room may ask again, seconds. Nobody knows when somebody deletes something.
    pub fn retry_after_s(&self) -> Option<u32> {
        match self {
            Self::Limit(refused) => Some(refused.retry_after_s),
            Self::Rate(refused) => Some(refused.retry_after_s),
            Self::TooManyTemplates { .. } | Self::TooManyUrls { .. } => Some(RETRY_UNKNOWN_S),
            Self::Shared(error) => error.retry_after_s(),
            _ => None,
        }
    }

    /// The whole chain of causes on one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

fn image_status(error: &ImageError) -> StatusCode {
    match error {
        ImageError::Place(_)
        | ImageError::Document { .. }
        | ImageError::Platform(_)
        | ImageError::Layer { .. }
        | ImageError::FileSystem(_)
        | ImageError::Registry { unreachable: false, .. } => StatusCode::BAD_REQUEST,
        ImageError::Registry { unreachable: true, .. } => StatusCode::BAD_GATEWAY,
        ImageError::Local { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            StatusCode::INSUFFICIENT_STORAGE
        }
        ImageError::Local { .. } | ImageError::Unpacker { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        ImageError::Deadline { .. } => StatusCode::GATEWAY_TIMEOUT,
    }
}

fn store_status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Unavailable | ErrorKind::Conflict => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Full => StatusCode::INSUFFICIENT_STORAGE,
        ErrorKind::NotFound
        | ErrorKind::PreconditionFailed
        | ErrorKind::Unauthorized
        | ErrorKind::Forbidden
        | ErrorKind::NoSuchBucket
        | ErrorKind::Corrupt
        | ErrorKind::Other => StatusCode::BAD_GATEWAY,
    }
}

/// When to ask again where nothing says when there will be room, seconds.
const RETRY_UNKNOWN_S: u32 = 60;

/// The [`Error::code`] of an operation whose outcome is not known.
pub const OUTCOME_UNKNOWN: &str = "outcome-unknown";

/// An error and its causes on one line, outermost first; a cause that its parent already quotes is left out.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// Adds what was tried to a store error.
pub trait StoreContext<T> {
    /// `action` completes "cannot …".
    fn doing(self, action: &'static str) -> Result<T, Error>;
}

impl<T> StoreContext<T> for Result<T, StoreError> {
    fn doing(self, action: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Store { action, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_snapshot::store::Operation;

    #[test]
    fn store_errors_keep_their_meaning() {
        let status =
            |kind| Error::Store { action: "x", source: StoreError::new(kind, Operation::Put, "k") }.status().as_u16();
        assert_eq!(status(ErrorKind::Unavailable), 503);
        assert_eq!(status(ErrorKind::Full), 507);
        assert_eq!(status(ErrorKind::Forbidden), 502);
    }

    #[test]
    fn a_chain_names_every_cause_once() {
        let cause = StoreError::new(ErrorKind::Forbidden, Operation::Put, "v1/a").because("signature does not match");
        let text = Error::Store { action: "store the manifest", source: cause }.chain();
        assert_eq!(
            text,
            "cannot store the manifest: put \"v1/a\": the store forbids it (403): signature does not match"
        );
    }
}
