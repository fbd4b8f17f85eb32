//! One route: where it is, who answers, and what the API's document says of it. All three come together or not at all.

use crate::openapi::Operation;
use crate::supervisor::Core;
use axum::handler::Handler;
use axum::http::Method;
use axum::routing::{MethodFilter, MethodRouter, on};
use std::sync::Arc;

/// One method of one path.
pub(super) struct Route {
    pub(super) path: String,
    pub(super) method: Method,
    pub(super) operation: Operation,
    pub(super) handler: MethodRouter<Arc<Core>>,
}

macro_rules! methods {
    ($($name:ident $method:ident),+) => {
        impl Route {
            $(pub(super) fn $name<H, T>(path: impl Into<String>, handler: H, operation: Operation) -> Self
            where
                H: Handler<T, Arc<Core>>,
                T: 'static,
            {
                let handler = on(MethodFilter::$method, handler);
                Self { path: path.into(), method: Method::$method, operation, handler }
            })+
        }
    };
}

methods!(get GET, post POST, delete DELETE);
