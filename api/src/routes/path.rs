//! Parameters in paths.

use crate::error::Error;
use axum::extract::{FromRequestParts, Path as AxumPath};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

/// The parameters of the path as text. What is no UTF-8 names nothing that there is.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let found = AxumPath::<T>::from_request_parts(parts, state).await;
        found.map(|AxumPath(values)| Self(values)).map_err(|_| Error::NoPath(parts.uri.path().to_owned()))
    }
}
