//! Frames between the tap and the queues of an active device.

use std::collections::VecDeque;

use super::tap::{Frame, Tap};
use crate::virtio::DeviceError;
use crate::virtio::queue::{Chain, DeviceQueue};

/// Bytes of `virtio_net_hdr_v1` (virtio 1.2, 5.1.6) and the offset of its `num_buffers`.
pub(super) const HEADER_SIZE: usize = 12;
const NUM_BUFFERS: usize = 10;
/// Bytes of an Ethernet header, and of one with a VLAN tag.
const ETHERNET_HEADER: usize = 14;
const ETHERNET_VLAN_HEADER: usize = 18;
/// Largest packet of a segmentation offload.
pub(super) const MAX_SEGMENT: usize = 65_535;

/// Frames in each direction before other devices get their turn.
const BUDGET: usize = 256;

/// What there is of a pair of queues between activation and reset.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) rx: DeviceQueue,
    pub(super) tx: DeviceQueue,
    /// Receive buffers taken from the ring for the next frames, oldest first, and their size in bytes.
    /// Kept from frame to frame: a large segment needs many, a usual frame one.
    buffers: VecDeque<Chain>,
    room: usize,
    /// Room the largest frame the tap may hand over needs, header included.
    largest: usize,
    mergeable: bool,
    /// The tap may have a frame, or room for one; edge-triggered, so that it is not polled in vain while
    /// the guest has no buffers.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The transmit queue may have frames.
    pub(super) tx_filled: bool,
}

impl Active {
    /// Between these queues; `payload` is the largest of a frame that the tap may hand over, in bytes.
    pub(super) fn new(rx: DeviceQueue, tx: DeviceQueue, payload: usize, mergeable: bool) -> Self {
        Self {
            rx,
            tx,
            buffers: VecDeque::new(),
            room: 0,
            largest: HEADER_SIZE + ETHERNET_VLAN_HEADER + payload,
            mergeable,
            readable: true,
            writable: true,
            tx_filled: true,
        }
    }

    /// Whether the driver has enabled both queues.
    pub(super) fn ready(&self) -> bool {
        self.rx.ready() && self.tx.ready()
    }

    /// Looks for frames in both directions, whatever was known of them.
    pub(super) fn begin(&mut self) {
        (self.readable, self.writable, self.tx_filled) = (true, true, true);
    }

    /// Moves frames in both directions; whether there is more to do at once.
    pub(super) fn serve(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        self.transmit(tap)?;
        let done = self.receive(tap)?;
        Ok(!done || (self.tx_filled && self.writable))
    }

    /// Sends the guest's frames; `false` if the budget ran out first.
    fn transmit(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let memory = self.tx.memory().clone();
        let mut budget = BUDGET;
        while self.tx_filled && self.writable && budget > 0 {
            budget -= 1;
            let Some(chain) = self.tx.pop()? else {
                self.tx_filled = false;
                break;
            };
            if chain.writable_len() != 0 {
                return Err(DeviceError::Protocol("transmit buffer is device-writable"));
            }
            let len = chain.readable_len();
            if len < HEADER_SIZE {
                return Err(DeviceError::Protocol("frame is shorter than its header"));
            }
            // Any program in the guest with a raw socket can make a frame of a bad size.
            let sizes = HEADER_SIZE + ETHERNET_HEADER..=HEADER_SIZE + ETHERNET_VLAN_HEADER + MAX_SEGMENT;
            if sizes.contains(&len) {
                let vectors = chain.read_vectors(&memory, 0, len)?;
                if let Frame::Blocked = tap.write(vectors.as_slice()).map_err(DeviceError::Backend)? {
                    self.writable = false;
                    self.tx.undo_pop(chain);
                    break;
                }
            }
            self.tx.add_used(chain, 0)?;
        }
        self.tx.signal()?;
        Ok(budget > 0)
    }

    /// Receives frames from the tap; `false` if the budget ran out first.
    fn receive(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let mut budget = BUDGET;
        // Without room all stays as it is until the driver kicks.
        while self.readable && budget > 0 && self.make_room()? {
            budget -= 1;
            if !self.receive_frame(tap)? {
                self.readable = false;
            }
        }
        self.rx.signal()?;
        Ok(budget > 0)
    }

    /// Takes buffers from the ring until the largest frame fits; `false` if it does not.
    fn make_room(&mut self) -> Result<bool, DeviceError> {
        while self.room < self.largest && (self.mergeable || self.buffers.is_empty()) {
            let Some(chain) = self.rx.pop()? else {
                if self.buffers.len() == usize::from(self.rx.size()) {
                    return Err(DeviceError::Protocol("receive ring cannot hold a frame"));
                }
                return Ok(false);
            };
            if chain.readable_len() != 0 {
                return Err(DeviceError::Protocol("receive buffer is device-readable"));
            }
            let least = if self.mergeable { HEADER_SIZE } else { self.largest };
            if chain.writable_len() < least {
                return Err(DeviceError::Protocol("receive buffer is too small"));
            }
            self.room += chain.writable_len();
            self.buffers.push_back(chain);
        }
        Ok(true)
    }

    /// Reads one frame into the buffers; `false` if there is none.
    fn receive_frame(&mut self, tap: &Tap) -> Result<bool, DeviceError> {
        let memory = self.rx.memory().clone();
        let mut vectors = Vec::new();
        for chain in &self.buffers {
            vectors.extend_from_slice(chain.write_vectors(&memory, 0, chain.writable_len())?.as_slice());
        }
        let len = match tap.read(&vectors).map_err(DeviceError::Backend)? {
            Frame::Bytes(len) => len,
            Frame::Blocked => return Ok(false),
            Frame::Dropped => return Ok(true),
        };
        if len < HEADER_SIZE {
            return Ok(true);
        }
        let mut left = len;
        let mut used: u16 = 0;
        for chain in &self.buffers {
            used += 1;
            left = left.saturating_sub(chain.writable_len());
            if left == 0 {
                break;
            }
        }
        if let Some(first) = self.buffers.front() {
            first.write_at(&memory, NUM_BUFFERS, &used.to_le_bytes())?;
        }
        let mut left = len;
        for chain in self.buffers.drain(..usize::from(used)) {
            let size = chain.writable_len();
            self.room -= size;
            let part = left.min(size);
            left -= part;
            self.rx.add_used(chain, part as u32)?;
        }
        Ok(true)
    }

    /// Puts the held receive buffers back, newest first.
    pub(super) fn release(&mut self) {
        while let Some(chain) = self.buffers.pop_back() {
            self.rx.undo_pop(chain);
        }
        self.room = 0;
    }
}
