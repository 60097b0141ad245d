//! Host side of one pod: its virtual machine, agent connection, storage, network, cgroup and journal.
//!
//! The crate knows nothing of containerd. A caller makes a [`Sandbox`], which boots the VM at once, and
//! then creates, starts and removes containers in it; what happens is told through one ordered
//! [`EventSink`].
//!
//! Nothing polls: the end of the VM, exits, out-of-memory kills and the end of streams are events.
//! Every wait has a deadline and a named phase (see [`error::Error`]).

pub mod agent;
pub mod cgroup;
pub mod config;
pub mod console;
pub mod error;
pub mod fault;
pub mod jail;
pub mod journal;
pub mod limits;
pub mod mount;
pub mod network;
pub mod private;
pub mod process;
pub mod resources;
mod sandbox;
pub mod snapshot;
pub mod spawn;
pub mod spec;
pub mod storage;
pub mod streams;
pub mod template;
pub mod timeline;
pub mod vm;

pub use bulkhead_protocol::agent::{ContainerStatsResponse as ContainerStats, IoStat};
pub use error::{Error, Kind};
pub use process::{Exit, Status};
pub use sandbox::{
    ContainerRequest, EventSink, ExecRequest, PidNamespace, ProcessInfo, ProcessState, Sandbox, SandboxEvent,
    SandboxOptions,
};
pub use spec::Role;
pub use streams::{Stdio, Stream};
