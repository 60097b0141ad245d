//! Proof that KVM runs guests: a guest of a few hundred bytes that executes what ordinary kernels execute.
//!
//! A `/dev/kvm` that opens, has the right version and creates VMs says little: software implementations of
//! KVM do all that and then fail on the first instruction their emulator does not know. [`run`] builds a
//! VM with one vCPU and executes the program in `guest.s` in 64-bit mode, step by step. The time it may take
//! is bounded, whatever the device does.

mod capabilities;
mod guest;
mod machine;
mod runner;

pub use capabilities::{API_VERSION, Capabilities, Capability, capabilities};
pub use guest::Step;
pub use machine::SetupError;
pub use runner::{Failure, Outcome, Report, run};

#[cfg(test)]
mod tests;
