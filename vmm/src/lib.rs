//! The virtual machine monitor of one sandbox: mechanism, no policy. It knows no heads, no commits, no tenants, and holds no store
//! credentials.
//!
//! | module | what |
//! | --- | --- |
//! | [`control`] | the control API: wire types, server, client, descriptor passing |
//! | [`machine`] | a machine: booted or restored, paused, captured |
//! | [`vcpu`] | vCPU threads, their state and the orders in which it is saved and restored |
//! | `vm_state` | interrupt controllers, timer, clock |
//! | `boot`, `acpi`, `layout` | what the guest finds when it starts |
//! | `memory`, `pages` | guest memory: one file, mapped for the guest and for ourselves |
//! | `presence`, `dirty` | which of it is there, which of it was written (`uffd`, `pagemap`: the kernel's side) |
//! | `paging` | memory that arrives after a restore, and the working set |
//! | `bus`, `io_thread`, `turns`, `console` | devices as vCPUs reach them; the thread that works for them; whose turn it is |
//! | [`limits`] | what one guest may ask of the host |
//! | [`kvm`], `mirror` | KVM calls that kvm-ioctls lacks; our own persisted twins of kernel structs |
//!
//! Threads: one for each vCPU, one for all devices, one that receives descriptors, two workers of the control server's runtime and its
//! blocking pool, and after a restore those that serve faults. Unsafe code is in `kvm`, `vcpu`, `vm_state`, `dirty`, `memory`, `uffd`,
//! `pagemap`, `paging::faults`, each block with its argument.

mod acpi;
mod boot;
mod bus;
pub mod confine;
mod console;
pub mod control;
pub mod dialled;
mod dirty;
pub mod heap;
pub mod inherited;
mod io_thread;
pub mod kvm;
mod layout;
pub mod limits;
pub mod machine;
mod memory;
mod mirror;
mod pagemap;
mod pages;
mod paging;
mod presence;
pub mod seccomp;
mod turns;
mod uffd;
pub mod vcpu;
mod vm_state;
