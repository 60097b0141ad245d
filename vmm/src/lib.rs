//! The virtual machine monitor of one pod.
//!
//! `bulkhead-vmm` (see `main.rs`) receives a [`bulkhead_protocol::control::VmConfig`] and every
//! descriptor over one inherited socket, boots one VM and runs it. It knows nothing of containers.

pub mod jail;
pub mod memory;
pub mod probe;
pub mod virtio;
