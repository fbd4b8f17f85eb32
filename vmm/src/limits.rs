//! What one guest may ask of the host beside its machine. An operator's to choose, so it is no part of a machine and in no snapshot.
//!
//! Exits and notifications have no limit of their own here: they cost time of the guest's vCPU threads and of the device thread, whose devices
//! do a bounded amount of work each turn, and a control group bounds the time of them all.

/// The limits, with what they are unless the command line says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct Limits {
    /// Bytes a second that the guest's console output may fill its log with; faster output is lost.
    #[arg(long, default_value_t = Limits::default().console_bytes_per_second, value_name = "BYTES")]
    pub console_bytes_per_second: u64,
    /// Connections a second that the guest may ask of the host over vsock; more are refused.
    #[arg(long, default_value_t = Limits::default().vsock_connects_per_second, value_name = "N")]
    pub vsock_connects_per_second: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { console_bytes_per_second: 256 << 10, vsock_connects_per_second: 500 }
    }
}
