//! The snapshot format, its stores, the commit register, capture and restore.
pub mod grant;
