//! What the end-to-end tests share: real parts, started and driven as an operator or client would.
//!
//! | module | what |
//! | --- | --- |
//! | [`host`] | what this machine can run, and where the built parts are |
//! | [`vmm`] | one `stasis-vmm` process without a supervisor, its pulse guest, and captures into a store |
//! | [`service`] | the whole service: S3 server, fault proxy, supervisor, client |
//! | [`site`] | servers, name server and host in network namespaces, and a service whose guests have networks |
//! | [`ports`] | ports that stay one's own |
//! | [`invariants`] | what must hold of a service whatever was done to it |
//! | [`invoke`] | a played guest and an app in it |
//! | [`model`] | what random requests, crashes and faults may make of sandboxes |
//! | [`guest`] | a supervisor whose sandbox's guest is an agent of this machine |
//! | [`bench`] | the benchmark |
//! | [`browser`] | a browser, driven as a person would |
//! | [`suite`] | a test binary whose tests may need what the machine lacks, and then say so |

pub mod bench;
pub mod browser;
pub mod guest;
pub mod host;
pub mod invariants;
pub mod invoke;
pub mod model;
pub mod ports;
pub mod service;
pub mod site;
pub mod suite;
pub mod vmm;
