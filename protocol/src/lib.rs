//! The two protocols of a pod.
//!
//! * [`control`]: messages between the sandbox and its VMM process over one inherited socket.
//! * `agent` (feature `agent`): the ttrpc service of the guest agent, generated from
//!   `proto/agent.proto`.
//!
//! Both ends are always built from the same tree, so neither protocol negotiates; each carries a
//! version only to refuse a mismatched peer with a clear error.

pub mod control;
pub mod ports;

#[cfg(feature = "agent")]
pub mod agent;
