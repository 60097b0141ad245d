//! virtio devices (virtio 1.2), independent of the transport that carries them.

pub mod balloon;
pub mod block;
pub mod config;
mod device;
pub mod fs;
mod interrupt;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
mod state;
#[cfg(any(test, fuzzing))]
pub mod test_queue;
pub mod vsock;
pub mod worker;

pub use device::{Activation, DeviceError, Turn, VirtioDevice};
pub use interrupt::Interrupt;
pub use state::{DeviceState, RestoreError};
