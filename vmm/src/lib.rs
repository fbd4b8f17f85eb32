//! The virtual machine monitor: KVM, vCPUs, memory, boot, and the control server with its client.
pub mod control;
