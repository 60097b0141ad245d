//! The virtio device around the streams.

use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::event::{VsockError, VsockEvent};
use super::mux::Mux;
use crate::virtio::queue::{DeviceQueue, DeviceQueueState, RING_FEATURES};
use crate::virtio::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};

/// Device id (virtio 1.2, 5).
const DEVICE_TYPE: u32 = 19;
/// Stream sockets are supported (virtio 1.2, 5.10.3).
const F_STREAM: u64 = 1;
/// Receive, transmit and event queue (virtio 1.2, 5.10.2). Linux gives every receive buffer a page
/// when the device starts, and has eight event buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Packets in both directions before other devices get their turn.
const BUDGET: usize = 256;

/// The socket device of a VM.
///
/// Whoever owns it calls [`take_events`](Self::take_events) after every `process_queue`, `process_event`
/// and [`unlisten`](Self::unlisten). The process must ignore `SIGPIPE`.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u32,
    mux: Mux,
    queues: Option<Queues>,
    reset: TransportReset,
}

#[derive(Debug)]
struct Queues {
    rx: DeviceQueue,
    tx: DeviceQueue,
    event: DeviceQueue,
    /// The transmit queue may have packets.
    tx_filled: bool,
}

/// Progress of telling the guest that its connections are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TransportReset {
    /// The guest knows.
    Done,
    /// No event buffer was there yet.
    Unsent,
    /// The driver has the event. It drops its connections when it handles it, and whatever it gets before
    /// would be dropped with them; it is through when it makes the buffer available again, so that there
    /// are more than the `left` that there were.
    Unhandled { left: usize },
}

/// What a snapshot keeps. Streams do not outlive one: their far ends are descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// Context id of the guest.
    pub guest_cid: u32,
    /// Next port for a stream opened by the host.
    pub next_local_port: u32,
    /// The queues, empty if the device is not active.
    pub queues: Vec<DeviceQueueState>,
}

impl Vsock {
    /// A device for the guest with this context id.
    ///
    /// # Errors
    /// The poller cannot be created.
    pub fn new(guest_cid: u32) -> Result<Self, VsockError> {
        Ok(Self {
            guest_cid,
            mux: Mux::new(guest_cid)?,
            queues: None,
            reset: TransportReset::Done,
        })
    }

    /// State for a snapshot, taken while the device thread is stopped.
    pub fn save(&self) -> VsockState {
        VsockState {
            guest_cid: self.guest_cid,
            next_local_port: self.mux.next_local_port(),
            queues: self.queues.as_ref().map_or_else(Vec::new, |queues| {
                [&queues.rx, &queues.tx, &queues.event]
                    .map(DeviceQueue::save)
                    .to_vec()
            }),
        }
    }

    /// Joins the next guest connection to host port `port` to `far_end`: a socket, FIFO, pipe, terminal or
    /// regular file, which becomes non-blocking. The registration is then used up.
    ///
    /// # Errors
    /// The port is in use, there are too many streams, or the far end is of another kind.
    pub fn listen(&mut self, port: u32, far_end: OwnedFd) -> Result<(), VsockError> {
        self.mux.listen(port, far_end)
    }

    /// Withdraws a registration. If a guest connection has taken it, the stream is cut off, what is
    /// buffered is lost, and [`VsockEvent::Closed`] follows.
    ///
    /// # Errors
    /// There is neither.
    pub fn unlisten(&mut self, port: u32) -> Result<(), VsockError> {
        self.mux.unlisten(port)
    }

    /// Opens a stream to guest port `port`; [`VsockEvent::ConnectResult`] with `token` tells when the guest
    /// has answered, or that it did not in time.
    ///
    /// # Errors
    /// There are too many streams, or the far end is of a kind that [`listen`](Self::listen) refuses.
    pub fn connect(&mut self, port: u32, far_end: OwnedFd, token: u64) -> Result<(), VsockError> {
        self.mux.connect(port, far_end, token)
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<VsockEvent> {
        self.mux.take_events()
    }

    /// Whether bytes of the guest wait for a far end to take them.
    pub fn has_undelivered(&self) -> bool {
        self.mux.has_undelivered()
    }

    /// Ends connections to the guest that it has not answered by `now`.
    #[cfg(any(test, fuzzing))]
    pub fn expire(&mut self, now: std::time::Instant) {
        self.mux.expire(now);
    }

    /// Bytes of the guest that wait for far ends.
    #[cfg(any(test, fuzzing))]
    pub fn buffered(&self) -> usize {
        self.mux.buffered()
    }

    /// Control packets that wait for a receive buffer.
    #[cfg(any(test, fuzzing))]
    pub fn queued_packets(&self) -> usize {
        self.mux.queued_packets()
    }

    /// Moves packets until nothing can move or the budget is used up.
    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = &mut self.queues else {
            return Ok(());
        };
        let mut budget = BUDGET;
        loop {
            let received = queues.receive(&mut self.mux, &mut budget)?;
            let sent = match self.reset {
                TransportReset::Done => queues.send(&mut self.mux, &mut budget)?,
                TransportReset::Unsent | TransportReset::Unhandled { .. } => false,
            };
            if budget == 0 {
                self.mux.wake();
                break;
            }
            if !received && !sent {
                break;
            }
        }
        queues.tx.signal()?;
        queues.rx.signal()
    }

    /// Moves the transport reset on; called when the event queue may have buffers.
    fn announce_reset(&mut self) -> Result<(), DeviceError> {
        let Some(queues) = self
            .queues
            .as_mut()
            .filter(|_| self.reset != TransportReset::Done)
        else {
            return Ok(());
        };
        let queue = &mut queues.event;
        // Taking all buffers arms the kick for the next one, not for those that lie there already.
        let mut chains = Vec::new();
        while let Some(chain) = queue.pop()? {
            chains.push(chain);
        }
        let available = chains.len();
        while chains.len() > 1 {
            chains.pop().into_iter().for_each(|chain| queue.undo_pop(chain));
        }
        let Some(chain) = chains.pop() else {
            return Ok(());
        };
        match self.reset {
            TransportReset::Unsent => {
                let event = EVENT_TRANSPORT_RESET.to_le_bytes();
                chain.write_at(queue.memory(), 0, &event)?;
                queue.add_used(chain, event.len() as u32)?;
                queue.signal()?;
                self.reset = TransportReset::Unhandled { left: available - 1 };
            }
            TransportReset::Unhandled { left } => {
                queue.undo_pop(chain);
                if available > left {
                    self.reset = TransportReset::Done;
                }
            }
            TransportReset::Done => {}
        }
        Ok(())
    }

    /// Runs `work`. If it fails the queues are not touched again, and the streams end: a sandbox that waits
    /// for one of them must not wait for ever.
    fn guarded(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let result = work(self);
        if result.is_err() {
            self.queues = None;
            self.mux.abandon_all();
        }
        result
    }
}

impl Queues {
    /// Takes packets of the guest. Whether there were any.
    fn receive(&mut self, mux: &mut Mux, budget: &mut usize) -> Result<bool, DeviceError> {
        let mut any = false;
        while self.tx_filled && *budget > 0 && !mux.congested() {
            let Some(chain) = self.tx.pop()? else {
                self.tx_filled = false;
                break;
            };
            mux.receive(&chain, self.tx.memory())?;
            self.tx.add_used(chain, 0)?;
            *budget -= 1;
            any = true;
        }
        Ok(any)
    }

    /// Gives packets to the guest. Whether there were any.
    fn send(&mut self, mux: &mut Mux, budget: &mut usize) -> Result<bool, DeviceError> {
        let mut any = false;
        while mux.has_output() && *budget > 0 {
            // Without a buffer all stays as it is until the driver kicks.
            let Some(chain) = self.rx.pop()? else { break };
            let Some(len) = mux.send(&chain, self.rx.memory())? else {
                self.rx.undo_pop(chain);
                break;
            };
            self.rx.add_used(chain, len as u32)?;
            *budget -= 1;
            any = true;
        }
        Ok(any)
    }
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &str {
        "vsock0"
    }

    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | RING_FEATURES | F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `guest_cid`, 64 bits (virtio 1.2, 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&u64::from(self.guest_cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queues = DeviceQueue::from_activation(activation);
        let Ok([rx, tx, event]) = <[DeviceQueue; 3]>::try_from(queues) else {
            return Err(DeviceError::Protocol("socket device needs three queues"));
        };
        self.queues = Some(Queues {
            rx,
            tx,
            event,
            tx_filled: true,
        });
        // This is a vCPU thread: packets are for the device thread.
        self.mux.wake();
        self.guarded(Self::announce_reset)
    }

    fn reset(&mut self) {
        // A driver that starts afresh has no connections to be told of.
        self.reset = TransportReset::Done;
        if self.queues.take().is_some() {
            self.mux.abandon_all();
            // For the events there are now.
            self.mux.wake();
        }
    }

    fn process_queue(&mut self, index: usize) -> Result<Turn, DeviceError> {
        self.guarded(|vsock| {
            match (index, &mut vsock.queues) {
                (TX, Some(queues)) => queues.tx_filled = true,
                (EVENT, Some(_)) => vsock.announce_reset()?,
                (RX, Some(_)) => {}
                _ => return Ok(()),
            }
            vsock.serve()
        })?;
        // It wakes itself when there is more.
        Ok(Turn::Done)
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.mux.event_fd())
    }

    fn process_event(&mut self) -> Result<(), DeviceError> {
        self.guarded(|vsock| {
            vsock.mux.poll().map_err(DeviceError::Backend)?;
            vsock.serve()
        })
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Vsock(self.save())
    }

    /// The guest is told to drop the connections it had, and to read its context id anew, as soon as the device is
    /// activated.
    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else {
            return Err(RestoreError::Kind);
        };
        self.mux.set_next_local_port(state.next_local_port);
        self.reset = TransportReset::Unsent;
        Ok(())
    }
}
