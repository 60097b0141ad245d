//! What the device tells its owner.

use std::io;

use super::mux::CONNECT_TIME;

/// Something happened to a stream.
#[derive(Debug, PartialEq, Eq)]
pub enum VsockEvent {
    /// A guest connection took the registration of a host port.
    Connected {
        /// Host port.
        port: u32,
    },
    /// The first byte the guest sent on a host port has come; told once for each registration.
    FirstData {
        /// Host port.
        port: u32,
    },
    /// A stream is over in both directions; every byte the guest sent is written to the far end, or
    /// cannot be. The far end is closed. Follows [`Connected`](Self::Connected) or a successful
    /// [`ConnectResult`](Self::ConnectResult).
    Closed {
        /// Port given to [`listen`](super::Vsock::listen) or [`connect`](super::Vsock::connect).
        port: u32,
    },
    /// Answer to [`connect`](super::Vsock::connect).
    ConnectResult {
        /// The caller's token.
        token: u64,
        /// What the guest said.
        result: Result<(), ConnectError>,
    },
}

/// Why a connection to the guest did not come about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// Nobody listens on the port in the guest, or the listener's queue is full.
    #[error("Guest refused the connection")]
    Refused,
    /// The guest's driver reset the device or broke its rules, or was restored from a snapshot.
    #[error("Socket device was reset")]
    DeviceReset,
    /// The guest has not answered within [`CONNECT_TIME`].
    #[error("Guest did not answer within {} s", CONNECT_TIME.as_secs())]
    TimedOut,
    /// The far end cannot be used.
    #[error("Far end cannot be polled")]
    FarEnd,
}

/// Why a stream cannot be registered, opened or withdrawn.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// There is a registration or a stream on the port.
    #[error("Host port {0} is in use")]
    PortInUse(u32),
    /// The port is `VMADDR_PORT_ANY`.
    #[error("Port {0} is not a port")]
    BadPort(u32),
    /// There is neither a registration nor a stream.
    #[error("Host port {0} has no stream")]
    UnknownPort(u32),
    /// There are [`MAX_STREAMS`](super::MAX_STREAMS).
    #[error("Too many streams")]
    TooManyStreams,
    /// The far end is no socket, FIFO, pipe, terminal or regular file, or its mode cannot be changed.
    #[error("Far end cannot be used")]
    FarEnd(#[source] io::Error),
    /// The device's own descriptors could not be made.
    #[error("Cannot create the poller")]
    Poller(#[source] io::Error),
}
