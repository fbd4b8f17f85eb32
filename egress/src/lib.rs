//! The egress proxy and resolver of a host's sandboxes: it decides by name what a sandbox may reach, and changes requests on the way where
//! its policy says so. It runs as a process of its own, without privileges; its listening sockets come from the warden, which made them in
//! the network namespaces of the sandboxes.
//!
//! | module | what |
//! | --- | --- |
//! | [`control`] | what the supervisor says to it, and the supervisor's client |
//! | [`sandboxes`], `sandbox` | the sandboxes; one, with the policy in force and all that was let through under it |
//! | `rules` | a policy made ready: what happens to a name or an address |
//! | [`names`], [`addresses`] | names and patterns; which addresses are connected to |
//! | [`proxy`] | redirected TCP connections: tunnels, requests, TLS ended for transforms |
//! | [`dns`] | the resolver, for guests and for the proxy |
//! | [`tls`] | what is read and written of TLS from outside |
//! | [`authority`] | the certificate authority of a sandbox |
//! | `counters`, [`rate`] | what happened; limits over time |
//! | [`config`], [`confine`] | what the operator decides; what the process gives up |
//!
//! This crate knows no sandboxes' records, no store, no KVM: it is told policies and given sockets. What it does not defend: inside a tunnel to
//! an allowed name the server decides what it serves (domain fronting at a shared front end); what an upstream answers goes to the guest,
//! also when it repeats an injected header.

pub mod addresses;
pub mod authority;
pub mod config;
pub mod confine;
pub mod control;
mod counters;
pub mod dns;
pub mod names;
pub mod proxy;
pub mod rate;
mod rules;
mod sandbox;
pub mod sandboxes;
pub mod tls;

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |said, cause| format!("{said}: {cause}"))
}
