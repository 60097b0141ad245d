//! Messages and ttrpc service of the guest agent, generated from `proto/agent.proto`.

#[allow(
    clippy::all,
    clippy::unwrap_used,
    missing_debug_implementations,
    missing_docs,
    nonstandard_style,
    unused
)]
mod generated {
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

pub use generated::agent::*;
pub use generated::agent_ttrpc::*;

/// Version of the agent protocol. Raised whenever `agent.proto` changes its meaning.
pub const VERSION: u32 = 3;
