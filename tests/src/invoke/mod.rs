//! What tests of the invoke route share: a guest that is played by processes of this machine, and an app in it.

pub mod app;
pub mod guest;
