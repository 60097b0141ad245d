//! Network device (virtio 1.2, 5.1) on a tap.
//!
//! Frames go between the tap and guest memory in one vectored system call each, with the virtio header in
//! front: the kernel's tun driver speaks it too, so checksum and segmentation work is passed through
//! untouched. Address and link are fixed from outside.
//!
//! A VM that can have several vCPUs gets an interface with several pairs of queues, and a control queue by which the driver
//! tells how many of them are on. To each pair belongs a queue of the tap.
//!
//! An interface that comes with `/dev/vhost-net` has its rings served by the kernel, a worker for each pair, which does the same
//! without a way through this process; it is told where rings and guest memory are. The driver sees no difference.
//!
//! Interfaces come and go while the VM runs. The place of one that is not there holds device id 0, which
//! virtio defines as no device: the driver passes it by at boot for the price of three register reads, and
//! takes it when it is told to look again.

mod control;
mod device;
mod frames;
mod kernel;
mod pairs;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;
mod watch;

pub use device::{Net, NetError, NetState, SlotError};
pub use vhost::VhostError;
