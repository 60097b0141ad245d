//! virtio devices (virtio 1.2), independent of the transport that carries them.

mod device;
mod interrupt;
pub mod queue;
#[cfg(test)]
pub(crate) mod test_queue;

pub use device::{Activation, DeviceError, VirtioDevice};
pub use interrupt::Interrupt;
