//! Why the VMM did not do what it was asked, and how that is said on the wire.

use std::sync::Arc;

use hyper::StatusCode;
use stasis_snapshot::store::{ErrorKind, StoreError};

use super::types::VmState;

/// Why a request was not done. The name of the variant in snake case is [`ErrorBody::code`].
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The request makes no sense.
    #[error("{0}")]
    BadRequest(String),
    /// No such route.
    #[error("no such request: {0}")]
    NotFound(String),
    /// The machine's state forbids it.
    #[error("the machine is {state:?}, which forbids {what}")]
    WrongState {
        /// Its state.
        state: VmState,
        /// The request.
        what: &'static str,
    },
    /// The capture was cancelled; the machine is paused.
    #[error("the capture was cancelled")]
    Cancelled,
    /// The capture's deadline passed; the machine is paused.
    #[error("the capture was too slow: its deadline passed")]
    TooSlow,
    /// It was tried and failed.
    #[error("{message}")]
    Failed {
        /// The error and its causes.
        message: String,
        /// What the store said, if it is among the causes.
        store: Option<ErrorKind>,
    },
}

impl Refusal {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) => StatusCode::BAD_REQUEST,
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::WrongState { .. } | Self::Cancelled => StatusCode::CONFLICT,
            Self::TooSlow => StatusCode::GATEWAY_TIMEOUT,
            Self::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    pub(super) fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad_request",
            Self::NotFound(_) => "not_found",
            Self::WrongState { .. } => "wrong_state",
            Self::Cancelled => "cancelled",
            Self::TooSlow => "too_slow",
            Self::Failed { .. } => "failed",
        }
    }

    pub(super) fn store(&self) -> Option<ErrorKind> {
        if let Self::Failed { store, .. } = self { *store } else { None }
    }
}

/// An error and its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // A transparent variant repeats its source.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// What was tried and failed.
pub(super) fn failed(error: impl std::error::Error + 'static) -> Refusal {
    Refusal::Failed { message: chain(&error), store: store_error(&error).map(|error| error.kind) }
}

/// The store error among an error and its causes.
fn store_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a StoreError> {
    std::iter::successors(Some(error), |error| error.source()).find_map(|error| {
        // A cause that several waited for is shared.
        error.downcast_ref::<StoreError>().or_else(|| error.downcast_ref::<Arc<StoreError>>().map(AsRef::as_ref))
    })
}
