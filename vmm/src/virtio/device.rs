//! What every virtio device offers its transport and the event loop.

use std::fmt::Debug;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::Queue;

use super::{DeviceState, Interrupt, RestoreError};
use crate::memory::GuestMemory;

/// Everything a device needs to run, handed over when the driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues, in order, checked and ready; those the driver left disabled are not ready.
    pub queues: Vec<Queue>,
    /// Raises the device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// Features both sides agreed on.
    pub features: u64,
}

/// Why a device cannot go on. The device is marked `NEEDS_RESET`; the VM runs on without it.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A queue's rings are not consistent: index ran ahead, loop, address out of range.
    #[error("Virtqueue is malformed")]
    Queue(#[source] virtio_queue::Error),
    /// A descriptor chain is not one.
    #[error("Descriptor chain is malformed")]
    Chain(#[source] super::queue::ChainError),
    /// Guest memory named by the driver is not there.
    #[error("Guest memory is out of range")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// The interrupt could not be raised.
    #[error("Cannot raise the device interrupt")]
    Interrupt(#[source] std::io::Error),
    /// The host side of the device failed.
    #[error("Device backend failed")]
    Backend(#[source] std::io::Error),
    /// The kernel's server of the rings failed.
    #[error("Kernel does not serve the rings")]
    Vhost(#[source] super::net::VhostError),
    /// The driver broke the rules of the device type.
    #[error("Driver violates the device's protocol: {0}")]
    Protocol(&'static str),
}

/// How a turn of [`VirtioDevice::process_queue`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The queue is empty, or the device sees to the rest by itself.
    Done,
    /// The budget is used up: the queue is to be served again when others have had their turn.
    Again,
}

/// A virtio device.
///
/// A device is owned by one mutex. The transport calls the configuration methods from vCPU threads;
/// the event loop calls [`process_queue`](Self::process_queue) when the driver kicks a queue and
/// [`process_event`](Self::process_event) when [`event_fd`](Self::event_fd) is readable, both on the
/// device thread. A device that does not want it so for its queues takes their kick
/// eventfds by [`owns_queue_events`](Self::owns_queue_events).
///
/// What a snapshot must carry lives in a plain, serialisable state struct of each device, apart from
/// descriptors and threads. A device that is restored was made as a new one and given its descriptors before.
pub trait VirtioDevice: Debug + Send {
    /// Short name with the instance number, for example `blk2`.
    fn name(&self) -> &str;

    /// Device id (virtio 1.2, section 5); 0 while there is nothing for a driver here.
    fn device_type(&self) -> u32;

    /// Features the device offers, `VIRTIO_F_VERSION_1` included.
    fn features(&self) -> u64;

    /// Largest size of each queue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads from the configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes to the configuration space; what is not writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Raised by one whenever the device changes its configuration space (virtio 1.2, 4.2.2).
    fn config_generation(&self) -> u32 {
        0
    }

    /// Starts the device.
    ///
    /// # Errors
    /// Whatever keeps it from running; the transport then sets `NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// Brings the device back to its state before [`activate`](Self::activate); workers have stopped
    /// when it returns.
    fn reset(&mut self);

    /// The driver kicked queue `index`. Not called before `activate`.
    ///
    /// A driver can fill a queue as fast as it is emptied, so a call serves a bounded number of chains.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn process_queue(&mut self, index: usize) -> Result<Turn, DeviceError>;

    /// A descriptor the event loop watches for input in the whole life of the device (a nested epoll
    /// descriptor if there are several).
    fn event_fd(&self) -> Option<RawFd> {
        None
    }

    /// [`event_fd`](Self::event_fd) is readable. Also called before activation.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn process_event(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Whether the device serves its queues on its own thread, has the kernel serve them, or polls for kicks by
    /// [`event_fd`](Self::event_fd). The transport then hands it the queues'
    /// kick eventfds (borrowed for the life of the device) before `activate`, and the event loop leaves
    /// them alone.
    fn owns_queue_events(&self) -> bool {
        false
    }

    /// Receives the kick eventfds, in queue order; only called if
    /// [`owns_queue_events`](Self::owns_queue_events).
    fn set_queue_events(&mut self, _events: Vec<vmm_sys_util::eventfd::EventFd>) {}

    /// Stops work at a queue boundary until [`resume`](Self::resume), which follows also after an error. The
    /// event loop itself is stopped during a pause, so only devices with workers do anything here.
    ///
    /// # Errors
    /// A request hangs on the host.
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Goes on after [`pause`](Self::pause).
    fn resume(&mut self) {}

    /// State for a snapshot, in a pause.
    fn save_state(&mut self) -> DeviceState;

    /// Takes over what is not about queues from a state; a new device that is not active. If the saved one was,
    /// [`activate`](Self::activate) follows with its queues.
    ///
    /// # Errors
    /// See [`RestoreError`].
    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError>;
}
