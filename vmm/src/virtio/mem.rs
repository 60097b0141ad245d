//! Memory that comes and goes (virtio 1.2, 5.15).
//!
//! The device owns a range of guest-physical addresses above everything else. The host sets how much of it the guest
//! should use; the driver then plugs or unplugs blocks of its choice. What is unplugged goes back to the host at once.
//!
//! The whole range is mapped in this process from the start, without memory behind it, so that every device sees what
//! is plugged later. KVM gets only the usable part. A buffer in an unplugged block is taken like any other: reading
//! it gives zeroes, and what is written there is the guest's own loss. It can cost the host memory that the guest was
//! not given, at most the size of the range; the pod's cgroup bounds it as it bounds everything else of the VM.

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;

use super::balloon::discard;
use super::queue::{Chain, DeviceQueue, DeviceQueueState, RING_FEATURES};
use super::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};
use crate::memory::GuestMemory;

/// Bytes of a block, the unit of plugging: a huge page, so that giving one back never splits one.
pub const BLOCK_SIZE: u64 = 2 << 20;

/// Start and usable size are multiples of this many bytes: Linux adds memory in blocks of 128 MiB and leaves alone a
/// part of one.
pub const ALIGNMENT: u64 = 128 << 20;

/// The driver may not touch unplugged memory (virtio 1.2, 5.15.3).
const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a request and of its answer (virtio 1.2, 5.15.6).
const REQUEST_SIZE: usize = 24;
const RESPONSE_SIZE: usize = 10;

/// Requests (virtio 1.2, 5.15.6).
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Answers (virtio 1.2, 5.15.6).
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;

/// Answers to [`STATE`] (virtio 1.2, 5.15.6.5).
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// Requests carried out at a time: one may give many pages back to the host.
const BUDGET: usize = 4;

/// The device.
#[derive(Debug)]
pub struct Mem {
    start: u64,
    /// Of each block of the range: whether it is plugged.
    blocks: Vec<bool>,
    /// Bytes from the start in which the driver may plug blocks.
    usable: u64,
    /// Bytes the driver should have plugged.
    requested: u64,
    /// Bytes it has plugged.
    plugged: u64,
    changes: config::Changes,
    queue: Option<DeviceQueue>,
}

/// What a snapshot keeps of a [`Mem`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Guest-physical start of the range.
    pub start: u64,
    /// Bytes of the range, of its usable part, and those the driver should have plugged.
    pub size: u64,
    /// See `size`.
    pub usable: u64,
    /// See `size`.
    pub requested: u64,
    /// Plugged blocks: index of the first and number, in rising order.
    pub plugged: Vec<(u64, u64)>,
    /// The queue, if the device is active.
    pub queue: Option<DeviceQueueState>,
}

/// Blocks that a request names.
type Blocks = std::ops::Range<usize>;

impl Mem {
    /// A range of `size` bytes from guest-physical address `start`, of which nothing is usable. Both are rounded down
    /// to [`BLOCK_SIZE`].
    pub fn new(start: u64, size: u64) -> Self {
        Self {
            start: start / BLOCK_SIZE * BLOCK_SIZE,
            blocks: vec![false; (size / BLOCK_SIZE) as usize],
            usable: 0,
            requested: 0,
            plugged: 0,
            changes: config::Changes::default(),
            queue: None,
        }
    }

    /// Bytes of the whole range.
    pub fn size(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_SIZE
    }

    /// Bytes the driver has plugged.
    pub fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Bytes the driver should have plugged.
    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// Asks the driver to have `requested` bytes plugged, within the first `usable` bytes. Both are cut to the range,
    /// `requested` is rounded down to [`BLOCK_SIZE`], and the usable part never shrinks.
    ///
    /// # Errors
    /// The guest cannot be interrupted.
    pub fn request(&mut self, requested: u64, usable: u64) -> Result<(), DeviceError> {
        self.usable = self.usable.max(usable.min(self.size()));
        self.requested = requested.min(self.usable) / BLOCK_SIZE * BLOCK_SIZE;
        self.changes.announce().map_err(DeviceError::Interrupt)
    }

    /// State for a snapshot.
    pub fn save(&self) -> MemState {
        let mut plugged: Vec<(u64, u64)> = Vec::new();
        for (index, _) in (0u64..).zip(&self.blocks).filter(|(_, plugged)| **plugged) {
            match plugged.last_mut() {
                Some((first, count)) if *first + *count == index => *count += 1,
                _ => plugged.push((index, 1)),
            }
        }
        MemState {
            start: self.start,
            size: self.size(),
            usable: self.usable,
            requested: self.requested,
            plugged,
            queue: self.queue.as_ref().map(DeviceQueue::save),
        }
    }

    /// Carries a request out; the answer's type and, for [`STATE`], the state.
    fn perform(
        &mut self,
        memory: &GuestMemory,
        request: [u8; REQUEST_SIZE],
    ) -> Result<(u16, u16), DeviceError> {
        let [kind, _, _, _] = halves(&request, 0);
        let [count, _, _, _] = halves(&request, 16);
        let [a, b, c, d] = halves(&request, 8);
        let address = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
        let answer = match kind {
            PLUG => (self.plug(address, count), 0),
            UNPLUG => (self.unplug(memory, address, count)?, 0),
            UNPLUG_ALL => {
                let len = self.blocks.len();
                self.discard(memory, 0..len)?;
                self.changes.count();
                (ACK, 0)
            }
            STATE => match self.find(address, count, self.size()) {
                Some(blocks) => {
                    let plugged = self.blocks[blocks.clone()].iter().filter(|block| **block).count();
                    let state = match plugged {
                        0 => UNPLUGGED,
                        all if all == blocks.len() => PLUGGED,
                        _ => MIXED,
                    };
                    (ACK, state)
                }
                None => (ERROR, 0),
            },
            _ => (ERROR, 0),
        };
        Ok(answer)
    }

    /// The blocks of a request; they have to be aligned and within the first `limit` bytes.
    fn find(&self, address: u64, count: u16, limit: u64) -> Option<Blocks> {
        let offset = address.checked_sub(self.start)?;
        let end = offset.checked_add(u64::from(count) * BLOCK_SIZE)?;
        if count == 0 || !offset.is_multiple_of(BLOCK_SIZE) || end > limit.min(self.size()) {
            return None;
        }
        Some((offset / BLOCK_SIZE) as usize..(end / BLOCK_SIZE) as usize)
    }

    fn plug(&mut self, address: u64, count: u16) -> u16 {
        let Some(blocks) = self.find(address, count, self.usable) else {
            return ERROR;
        };
        if self.blocks[blocks.clone()].contains(&true) {
            return ERROR;
        }
        let size = blocks.len() as u64 * BLOCK_SIZE;
        if self.plugged + size > self.requested {
            return NACK;
        }
        self.blocks[blocks].fill(true);
        self.plugged += size;
        ACK
    }

    fn unplug(&mut self, memory: &GuestMemory, address: u64, count: u16) -> Result<u16, DeviceError> {
        match self.find(address, count, self.usable) {
            Some(blocks) if !self.blocks[blocks.clone()].contains(&false) => {
                self.discard(memory, blocks)?;
                Ok(ACK)
            }
            _ => Ok(ERROR),
        }
    }

    /// Gives the plugged ones of `blocks` back to the host and marks them as unplugged.
    fn discard(&mut self, memory: &GuestMemory, blocks: Blocks) -> Result<(), DeviceError> {
        let mut next = blocks.start;
        while next < blocks.end {
            let rest = &self.blocks[next..blocks.end];
            let plugged = rest[0];
            let run = rest.iter().take_while(|block| **block == plugged).count();
            if plugged {
                let size = run as u64 * BLOCK_SIZE;
                discard(memory, self.start + next as u64 * BLOCK_SIZE, size)?;
                self.blocks[next..next + run].fill(false);
                self.plugged -= size;
            }
            next += run;
        }
        Ok(())
    }
}

/// Four little-endian 16-bit numbers at `offset`.
fn halves(bytes: &[u8; REQUEST_SIZE], offset: usize) -> [u16; 4] {
    std::array::from_fn(|index| {
        let at = offset + 2 * index;
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    })
}

fn read_request(memory: &GuestMemory, chain: &Chain) -> Result<[u8; REQUEST_SIZE], DeviceError> {
    if chain.readable_len() < REQUEST_SIZE {
        return Err(DeviceError::Protocol("memory request is too short"));
    }
    if chain.writable_len() < RESPONSE_SIZE {
        return Err(DeviceError::Protocol(
            "no room for the answer to a memory request",
        ));
    }
    let mut request = [0; REQUEST_SIZE];
    chain.read_at(memory, 0, &mut request)?;
    Ok(request)
}

impl VirtioDevice for Mem {
    fn name(&self) -> &str {
        "mem0"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | RING_FEATURES | F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // Block size, node (which there is none of), then the sizes (virtio 1.2, 5.15.4).
        let fields = [
            BLOCK_SIZE,
            0,
            self.start,
            self.size(),
            self.usable,
            self.plugged,
            self.requested,
        ];
        let mut space = [0; 56];
        for (place, field) in space.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        config::read(&space, offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.changes.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.changes.activate(&activation.interrupt);
        self.queue = DeviceQueue::from_activation(activation).pop();
        Ok(())
    }

    /// Blocks stay plugged: virtio 1.2, 5.15.5.1.
    fn reset(&mut self) {
        self.changes.reset();
        self.queue = None;
    }

    fn process_queue(&mut self, _index: usize) -> Result<Turn, DeviceError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(Turn::Done);
        };
        let result = queue.serve(BUDGET, |memory, chain| {
            let request = read_request(memory, chain)?;
            let (kind, state) = self.perform(memory, request)?;
            let mut response = [0; RESPONSE_SIZE];
            response[..2].copy_from_slice(&kind.to_le_bytes());
            response[8..].copy_from_slice(&state.to_le_bytes());
            chain.write_at(memory, 0, &response)?;
            Ok(RESPONSE_SIZE as u32)
        });
        self.queue = Some(queue);
        result
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Mem(self.save())
    }

    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Mem(state) = state else {
            return Err(RestoreError::Kind);
        };
        RestoreError::check("start of added memory", &state.start, &self.start)?;
        RestoreError::check("size of added memory", &state.size, &self.size())?;
        let mut blocks = vec![false; self.blocks.len()];
        for (first, count) in &state.plugged {
            let run = usize::try_from(*first)
                .ok()
                .zip(first.checked_add(*count).and_then(|end| end.try_into().ok()))
                .and_then(|(first, end): (usize, usize)| blocks.get_mut(first..end));
            run.ok_or_else(|| RestoreError::Differs {
                what: "end of plugged blocks",
                saved: format!("{first} + {count}"),
                now: self.blocks.len().to_string(),
            })?
            .fill(true);
        }
        self.plugged = blocks.iter().filter(|plugged| **plugged).count() as u64 * BLOCK_SIZE;
        self.blocks = blocks;
        self.usable = state.usable.min(self.size());
        self.requested = state.requested.min(self.usable);
        Ok(())
    }
}
