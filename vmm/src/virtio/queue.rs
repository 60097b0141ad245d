//! The device's end of a split virtqueue (virtio 1.2, 2.7).
//!
//! Everything in a ring is written by the guest. [`DeviceQueue::pop`] reads each descriptor once, checks
//! the whole chain and copies it out; what the driver writes to the rings later has no effect on a chain
//! already popped, and a device works on ranges known to lie in guest memory.

mod chain;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

pub(crate) use chain::for_each_part;
pub use chain::{Chain, ChainError, IoVecs, MAX_SEGMENTS, Segment};
use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{DeviceError, Interrupt, Turn};
use crate::memory::GuestMemory;

/// Ring features every device with [`DeviceQueue`]s offers: `RING_EVENT_IDX` and `RING_INDIRECT_DESC`
/// (virtio 1.2, 6).
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A virtqueue in use by a device.
#[derive(Debug)]
pub struct DeviceQueue {
    queue: Queue,
    memory: Arc<GuestMemory>,
    interrupt: Arc<Interrupt>,
    indirect: bool,
    /// Chains popped and not yet returned.
    out: u16,
    /// Buffers were used since the last [`signal`](Self::signal).
    used_any: bool,
    /// Storage of the last chain that came back, for the next.
    spare: Vec<Segment>,
}

/// What a snapshot keeps of a [`DeviceQueue`]. Rings and descriptors are in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceQueueState {
    /// Largest size the device offered.
    pub max_size: u16,
    /// Size the driver chose.
    pub size: u16,
    /// Whether the driver enabled the queue.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Index of the next chain to pop.
    pub next_available: u16,
    /// Index of the next used element.
    pub next_used: u16,
}

impl DeviceQueue {
    /// Takes over a queue at activation; `features` are those negotiated.
    pub fn new(mut queue: Queue, memory: Arc<GuestMemory>, interrupt: Arc<Interrupt>, features: u64) -> Self {
        queue.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
        Self {
            queue,
            memory,
            interrupt,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            out: 0,
            used_any: false,
            spare: Vec::new(),
        }
    }

    /// Takes over all queues of an activation, in order.
    pub fn from_activation(activation: super::Activation) -> Vec<Self> {
        let memory = Arc::new(activation.memory);
        activation
            .queues
            .into_iter()
            .map(|queue| {
                Self::new(
                    queue,
                    memory.clone(),
                    activation.interrupt.clone(),
                    activation.features,
                )
            })
            .collect()
    }

    /// Guest memory the queue's chains lie in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Whether the driver enabled the queue.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Number of entries of the ring.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next chain the driver made available.
    ///
    /// `None` means that the ring is empty *and* that the driver will kick for its next buffer: driver
    /// notifications are re-armed and the ring is looked at once more before this returns `None`, so a
    /// device that pops until `None` loses no kick. Every chain must go back by
    /// [`add_used`](Self::add_used) or [`undo_pop`](Self::undo_pop).
    ///
    /// # Errors
    /// The queue is not ready or malformed; the device must stop using it.
    pub fn pop(&mut self) -> Result<Option<Chain>, DeviceError> {
        let head = match self.next_head()? {
            Some(head) => head,
            None => {
                let more = self
                    .queue
                    .enable_notification(&*self.memory)
                    .map_err(DeviceError::Queue)?;
                if !more {
                    return Ok(None);
                }
                match self.next_head()? {
                    Some(head) => head,
                    None => return Ok(None),
                }
            }
        };
        let table = chain::Table {
            address: self.queue.desc_table(),
            entries: u32::from(self.queue.size()),
        };
        let storage = std::mem::take(&mut self.spare);
        self.out += 1;
        let chain =
            Chain::parse(&self.memory, table, head, self.indirect, storage).map_err(DeviceError::Chain)?;
        Ok(Some(chain))
    }

    /// Puts the chain popped last back, to be popped again.
    pub fn undo_pop(&mut self, chain: Chain) {
        self.out = self.out.saturating_sub(1);
        self.queue.go_to_previous_position();
        self.spare = chain.into_storage();
    }

    /// Returns a chain to the driver with the number of bytes written into it.
    ///
    /// # Errors
    /// The used ring is not in guest memory.
    pub fn add_used(&mut self, chain: Chain, written: u32) -> Result<(), DeviceError> {
        self.queue
            .add_used(&*self.memory, chain.head(), written)
            .map_err(DeviceError::Queue)?;
        self.out = self.out.saturating_sub(1);
        self.used_any = true;
        self.spare = chain.into_storage();
        Ok(())
    }

    /// Interrupts the driver if it wants to hear of the chains returned since the last call. Called once
    /// after a batch of [`add_used`](Self::add_used).
    ///
    /// # Errors
    /// The available ring is not in guest memory, or the interrupt cannot be raised.
    pub fn signal(&mut self) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.used_any) {
            return Ok(());
        }
        if self.driver_wants_interrupt()? {
            self.interrupt.used_buffer().map_err(DeviceError::Interrupt)?;
        }
        Ok(())
    }

    /// Has `answer` carry out up to `budget` chains, each told by the number of bytes written to it, and
    /// interrupts the driver.
    ///
    /// # Errors
    /// The queue is malformed, or what `answer` says.
    pub fn serve(
        &mut self,
        budget: usize,
        mut answer: impl FnMut(&GuestMemory, &Chain) -> Result<u32, DeviceError>,
    ) -> Result<Turn, DeviceError> {
        let memory = self.memory.clone();
        let mut turn = Turn::Again;
        for _ in 0..budget {
            let Some(chain) = self.pop()? else {
                turn = Turn::Done;
                break;
            };
            let written = answer(&memory, &chain)?;
            self.add_used(chain, written)?;
        }
        self.signal()?;
        Ok(turn)
    }

    /// State for a snapshot; no chain may be out.
    pub fn save(&self) -> DeviceQueueState {
        DeviceQueueState::of(&self.queue)
    }

    fn driver_wants_interrupt(&mut self) -> Result<bool, DeviceError> {
        if self.queue.event_idx_enabled() {
            return self
                .queue
                .needs_notification(&*self.memory)
                .map_err(DeviceError::Queue);
        }
        // The used index must be visible before the driver's flag is read: virtio 1.2, 2.7.7.2.
        fence(Ordering::SeqCst);
        let flags = GuestAddress(self.queue.avail_ring());
        let flags: u16 = self
            .memory
            .load(flags, Ordering::Relaxed)
            .map_err(DeviceError::Memory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    fn next_head(&mut self) -> Result<Option<u16>, DeviceError> {
        if !self.queue.ready() {
            return Err(DeviceError::Queue(Error::QueueNotReady));
        }
        let next = self.queue.next_avail();
        let index = self
            .queue
            .avail_idx(&*self.memory, Ordering::Acquire)
            .map_err(DeviceError::Queue)?;
        match index.0.wrapping_sub(next) {
            0 => return Ok(None),
            // No more can be outstanding than the queue has entries, those the device holds included: a
            // driver that adds while the device pops does not keep it popping.
            pending if pending > self.queue.size().saturating_sub(self.out) => {
                return Err(DeviceError::Queue(Error::InvalidAvailRingIndex));
            }
            _ => {}
        }
        // Available ring: flags and index, two bytes each, then the heads (virtio 1.2, 2.7.6).
        let offset = 4 + 2 * u64::from(next % self.queue.size());
        let entry = self.queue.avail_ring().checked_add(offset);
        let entry = GuestAddress(entry.ok_or(DeviceError::Queue(Error::AddressOverflow))?);
        let head: u16 = self
            .memory
            .load(entry, Ordering::Relaxed)
            .map_err(DeviceError::Memory)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(Some(u16::from_le(head)))
    }
}

impl DeviceQueueState {
    /// State of a queue.
    pub fn of(queue: &Queue) -> Self {
        Self {
            max_size: queue.max_size(),
            size: queue.size(),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }

    /// The queue as the transport hands it to a device that is activated again.
    ///
    /// # Errors
    /// Sizes or addresses are not those of a queue.
    pub fn restore(&self) -> Result<Queue, Error> {
        let mut queue = Queue::new(self.max_size)?;
        queue.try_set_size(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(self.available))?;
        queue.try_set_used_ring_address(GuestAddress(self.used))?;
        queue.set_next_avail(self.next_available);
        queue.set_next_used(self.next_used);
        queue.set_ready(self.ready);
        Ok(queue)
    }
}
