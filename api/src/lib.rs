//! The supervisor: REST API, state machine, journal, grants and commits; the command line.
//!
//! | module | what |
//! | --- | --- |
//! | [`config`] | file, environment, flags; checked before anything starts |
//! | [`states`] | the state machine of a sandbox, as a table |
//! | [`record`], [`ids`], [`network_policy`] | what a sandbox is |
//! | [`validate`], [`snapshot_request`], [`guest_requests`] | requests from JSON to checked values |
//! | [`journal`] | SQLite: keys, records, operations, transitions |
//! | [`registry`] | the sandboxes of this supervisor; the one place that moves a state |
//! | [`supervisor`] | the operations, restart, recovery, timers |
//! | [`store`] | the object store, heads and grants as the supervisor uses them |
//! | [`template`], [`block_indexes`], [`host`] | what sandboxes boot from, and its blocks by content; what this host can run |
//! | [`image`] | container images: from a reference to a root file system |
//! | [`template_request`] | requests about templates from JSON to checked values |
//! | [`launcher`] | how VMMs are started, and behind which walls |
//! | [`vmm_process`], [`vmm_pool`], [`agent_client`] | VMM processes; those started ahead; the agent in a guest |
//! | [`vsock`] | the host end of a guest's vsock |
//! | [`network_activity`], [`egress_process`] | what a sandbox reached and was refused; the process that decides by names |
//! | [`kept_memory`], [`memory_pressure`] | memory kept from the last pause, and when it must go |
//! | [`run_ahead`] | whether pages are sent ahead of a pause |
//! | [`known_packs`] | packs that are in the store for certain |
//! | [`admission`], [`rate`] | how many sandboxes may run and how many requests may come, of a tenant and on a host |
//! | [`fair_share`] | how captures and wakes share the connections of a host |
//! | [`front`] | the listener: TLS, HTTP/1.1 and HTTP/2, and who answers |
//! | [`routes`] | the REST API |
//! | [`ui`] | the page for people, and its sessions |
//! | [`wire`], [`openapi`] | what it takes and answers, as types; its description, made of them and of the table of routes |
//! | [`invoke`] | requests to apps in sandboxes |
//! | [`error`] | every failure, and the one conversion to HTTP |
//! | [`fail_points`] | the steps at which tests kill it |
//! | [`metrics`], [`telemetry`] | what is counted, for Prometheus; traces for an OpenTelemetry collector |
//! | [`timing`], [`costs`], [`sources`] | what an operation cost; the last ones of a sandbox; clock, entropy |
//! | [`dev`] | the embedded S3 server, and a proxy that injects faults |
//! | [`cli`] | the program `stasis` |
//!
//! A test drives it with [`supervisor::Supervisor::start`], or as the program `stasis serve`.
//!
//! This crate knows no KVM and no devices: it talks to `stasis-vmm` over its control socket, and to a guest over its agent's protocol.
pub mod admission;
pub mod agent_client;
pub mod block_indexes;
pub mod cli;
pub mod config;
pub mod costs;
pub mod dev;
pub mod egress_process;
pub mod error;
pub mod fail_points;
pub mod fair_share;
pub mod front;
pub mod guest_requests;
pub mod host;
pub mod ids;
pub mod image;
pub mod invoke;
pub mod journal;
pub mod kept_memory;
pub mod known_packs;
pub mod launcher;
pub mod memory_pressure;
pub mod metrics;
pub mod network_activity;
pub mod network_policy;
pub mod openapi;
pub mod rate;
pub mod record;
pub mod registry;
pub mod routes;
pub mod run_ahead;
pub mod snapshot_request;
pub mod sources;
mod sparse_file;
pub mod states;
pub mod store;
pub mod supervisor;
pub mod telemetry;
pub mod template;
mod template_digest;
pub mod template_request;
pub mod timing;
pub mod ui;
pub mod validate;
pub mod vmm_pool;
pub mod vmm_process;
pub mod vsock;
pub mod wire;
