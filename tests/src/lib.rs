//! Harness of the integration tests: a private containerd driven through `ctr`, images, terminals,
//! and a check that nothing is left on the host.
//!
//! Everything here is made for tests: a function that cannot do its job panics with the command,
//! its output and the logs, since there is nobody to hand an error to.

pub mod config;
pub mod containerd;
pub mod cri;
pub mod fixture;
pub mod host;
pub mod image;
pub mod leak;
pub mod log;
pub mod nri;
pub mod pattern;
pub mod pod;
pub mod session;
pub mod settings;
pub mod spec;
pub mod stream;
pub mod vm;

pub use config::{Config, config};
pub use fixture::{Fixture, Run};
pub use pod::{Container, Exec, Pod};
pub use session::{Finished, Session};
