//! What a snapshot keeps of devices, and how they come back.

use serde::{Deserialize, Serialize};

use super::balloon::BalloonState;
use super::block::BlockState;
use super::mem::MemState;
use super::net::NetState;
use super::queue::DeviceQueueState;
use super::vsock::VsockState;
use super::worker::WorkState;

/// State of a device, apart from descriptors, threads and its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Persistent memory: its queue, if the device is active.
    Pmem(Option<DeviceQueueState>),
    /// Entropy: as above.
    Rng(Option<DeviceQueueState>),
    /// File system: that of its server, without queues if the device is not active.
    Fs(WorkState),
    /// Balloon.
    Balloon(BalloonState),
    /// Disk.
    Block(BlockState),
    /// Memory that comes and goes.
    Mem(MemState),
    /// Network.
    Net(NetState),
    /// Sockets.
    Vsock(VsockState),
}

/// Why a device cannot be brought to a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is another kind of device's.
    #[error("State is that of another kind of device")]
    Kind,
    /// Something that has to be as it was is not.
    #[error("{what} was {saved} and is {now}")]
    Differs {
        /// What.
        what: &'static str,
        /// Value in the snapshot.
        saved: String,
        /// Value now.
        now: String,
    },
    /// The driver took features that this device does not offer.
    #[error("Driver uses features {0:#x}, which the device does not offer")]
    Features(u64),
    /// A queue is not one.
    #[error("Queue cannot be one")]
    Queue(#[source] virtio_queue::Error),
    /// The device cannot go on from its state.
    #[error("Device cannot go on from its state")]
    Activate(#[source] super::DeviceError),
    /// The number of queues is not the device's.
    #[error("Device has {queues} queues, the state {saved}")]
    Queues {
        /// The device's.
        queues: usize,
        /// The state's.
        saved: usize,
    },
}

impl RestoreError {
    /// An error if `saved` and `now` differ.
    ///
    /// # Errors
    /// [`RestoreError::Differs`].
    pub fn check<T: PartialEq + std::fmt::Debug>(
        what: &'static str,
        saved: &T,
        now: &T,
    ) -> Result<(), RestoreError> {
        if saved == now {
            return Ok(());
        }
        Err(Self::Differs {
            what,
            saved: format!("{saved:?}"),
            now: format!("{now:?}"),
        })
    }
}

impl DeviceState {
    /// Queues of an active device, in order; of one that is not active none.
    pub fn queues(&self) -> &[DeviceQueueState] {
        match self {
            Self::Pmem(queue) | Self::Rng(queue) => queue.as_slice(),
            Self::Fs(state) => &state.queues,
            Self::Balloon(state) => &state.queues,
            Self::Block(state) => state.queue.as_slice(),
            Self::Mem(state) => state.queue.as_slice(),
            Self::Net(state) => &state.queues,
            Self::Vsock(state) => &state.queues,
        }
    }
}
