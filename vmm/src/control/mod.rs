//! The control API: its wire types and the two ends of it, and the socket on which opened files arrive.
//!
//! The names below are those of files in a VMM's run directory, which belongs to whoever starts the VMM: the VMM knows no names, it
//! inherits opened descriptors ([`crate::inherited`]).

pub mod client;
pub mod fds;
pub mod refusal;
pub mod server;
pub mod types;

/// Name of the control socket in a VMM's run directory.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Name of the descriptor socket.
pub const FDS_SOCKET: &str = "fds.sock";
/// Name of the host end of the guest's vsock device.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// Name of the guest's console output.
pub const CONSOLE_LOG: &str = "console.log";
/// Name of what was in it before it was full and started over.
pub const OLDER_CONSOLE_LOG: &str = "console.log.1";
/// Name of the note that a VMM leaves when it ends ([`types::ExitNote`]).
pub const EXIT_NOTE: &str = "exit.json";
/// Header of a capture's answer that holds [`types::CaptureReport`] as JSON.
pub const REPORT_HEADER: &str = "stasis-report";
