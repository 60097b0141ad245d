//! Socket device (virtio 1.2, 5.10).
//!
//! The device is its own host side: it joins streams of the guest to descriptors that it was handed. It
//! opens nothing, and there is no context id but the guest's own. [`Vsock::listen`] lets one guest
//! connection to a host port reach a descriptor, [`Vsock::connect`] opens a stream to a guest port.
//!
//! A stream moves through three places, each bounded:
//!
//! * guest → host: straight from guest memory to the far end; what the far end does not take waits in a
//!   buffer of [`BUFFER_SIZE`] bytes, which is also the credit the guest gets;
//! * host → guest: read from the far end straight into the guest's receive buffers, never more than
//!   the guest's credit; nothing is kept in between;
//! * control packets are flags of the connection until a receive buffer is there; only resets of
//!   connections that are gone are queued, and a full queue of them stops the guest's transmit queue.

mod connection;
mod device;
mod event;
mod far_end;
mod mux;
#[cfg(not(fuzzing))]
mod packet;
#[cfg(fuzzing)]
pub mod packet;
mod ring;
#[cfg(test)]
mod tests;

pub use connection::BUFFER_SIZE;
pub use device::{Vsock, VsockState};
pub use event::{ConnectError, VsockError, VsockEvent};
pub use mux::{CONNECT_TIME, MAX_STREAMS};
