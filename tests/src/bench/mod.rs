//! The benchmark: `make bench`. It drives the product as a client does (a `stasis serve` process over REST), with guests made for the
//! parameters, and measures from outside: replies, the guest's console, the store's traffic, `/proc`.
//!
//! | module | what |
//! | --- | --- |
//! | [`options`] | the command line |
//! | [`case`] | what one measurement is about: guest, sizes, store, link |
//! | [`matrix`] | the cases that are run without a command line: what issue and design ask for |
//! | [`stasis`], [`many`], [`debian`] | drive the service with one pulse sandbox, many at once, a Linux guest |
//! | [`network`] | networks of sandboxes, and what passes through a guest's device |
//! | [`scan`] | the capture's scan alone |
//! | [`peer`] | drive other VMMs on the same guest |
//! | [`bare`] | the same bytes moved by nothing but parallel PUTs and GETs |
//! | [`profile`] | where the time of a pause and a wake goes |
//! | [`console`], [`process`] | when the guest printed what; CPU time and memory of processes |
//! | [`record`] | a run as a file, for a report of several |
//! | [`samples`], [`goals`], [`floors`] | percentiles and rows; measured figures beside the goals; what they cannot fall below here |
//! | [`markdown`], [`plot`] | the report; its pictures |
//!
//! Everything but the console watch, which is a thread of its own, runs in one tokio runtime, the S3 server included.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::format_push_string,
    reason = "figures to be printed: a few digits of them count"
)]

pub mod bare;
pub mod case;
pub mod console;
pub mod debian;
pub mod floors;
pub mod goals;
pub mod many;
pub mod markdown;
pub mod matrix;
pub mod network;
pub mod options;
pub mod peer;
pub mod plot;
pub mod process;
pub mod profile;
pub mod record;
pub mod run;
pub mod samples;
pub mod scan;
pub mod stasis;
