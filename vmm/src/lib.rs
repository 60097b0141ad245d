//! The virtual machine monitor of one pod.
//!
//! `bulkhead-vmm` (see `main.rs`) receives a [`bulkhead_protocol::control::VmConfig`] and every
//! descriptor over one inherited socket, boots one VM and runs it. It knows nothing of containers.
//!
//! [`machine`] builds the VM, in boot order; [`server`] answers the control socket; [`event_loop`]
//! serves the devices; [`vcpu`] runs the processors.

pub mod arch;
pub mod command_line;
pub mod config;
pub mod console;
pub mod event_loop;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod ports;
pub mod probe;
pub mod server;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;

/// An error and all its causes in one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
