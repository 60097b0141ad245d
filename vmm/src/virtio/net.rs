//! Network device (virtio 1.2, 5.1) on a tap.
//!
//! Frames go between the tap and guest memory in one vectored system call each, with the virtio header in
//! front: the kernel's tun driver speaks it too, so checksum and segmentation work is passed through
//! untouched. There is no control queue: address, MTU and link are fixed from outside.

mod device;
mod tap;
#[cfg(test)]
mod tests;

pub use device::{Net, NetError, NetState};
