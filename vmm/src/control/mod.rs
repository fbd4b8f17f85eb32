//! The control API: its wire types, and the two ends of it.
pub mod types;
