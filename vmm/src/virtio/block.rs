//! Block device (virtio 1.2, 5.2): a slot whose disk comes and goes while the guest runs.
//!
//! A slot without a disk has capacity 0 and fails every transfer. `VIRTIO_BLK_F_RO` is not offered, as
//! features cannot change with the disk: a write to a read-only disk fails, and who mounts it says so.

mod disk;
mod request;
#[cfg(test)]
mod tests;

pub use disk::{DiskError, DiskImage, SECTOR_SIZE};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::queue::{DeviceQueue, DeviceQueueState, RING_FEATURES};
use super::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};

const QUEUE_SIZES: &[u16] = &[128];

/// Data segments in one request: the queue holds them with a header and a status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;

/// Longest data segment in bytes; with [`SEG_MAX`] it bounds a request, and so the time others wait for it.
const SIZE_MAX: u32 = 512 << 10;

/// Longest range of one discard or write-zeroes segment, in sectors: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;

/// Most ranges in one discard or write-zeroes request.
const MAX_RANGES: u32 = 16;

/// Requests before other devices get their turn.
const BUDGET: usize = 16;

/// Length of the configuration space up to the last field of the features offered (virtio 1.2, 5.2.4).
const CONFIG_SIZE: usize = 60;

/// Why a disk cannot be put into a slot or taken out.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is a disk already.
    #[error("Disk slot {0} is in use")]
    Occupied(u32),
    /// There is no disk.
    #[error("Disk slot {0} is empty")]
    Empty(u32),
    /// The guest cannot be told.
    #[error("Cannot tell the guest of the new disk size")]
    Notify(#[source] std::io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Block {
    name: String,
    slot: u32,
    disk: Option<DiskImage>,
    changes: config::Changes,
    queue: Option<DeviceQueue>,
}

/// What a snapshot keeps of a [`Block`]; the disk's files are given again at restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Slot number.
    pub slot: u32,
    /// Capacity in sectors, 0 for an empty slot.
    pub sectors: u64,
    /// Whether the disk refuses writes.
    pub read_only: bool,
    /// The queue, if the device is active.
    pub queue: Option<DeviceQueueState>,
}

impl Block {
    /// Slot number `slot` with the disk that is there from the start, if any. The guest finds the slot by
    /// its serial number, `slot<N>`.
    pub fn new(slot: u32, disk: Option<DiskImage>) -> Self {
        Self {
            name: format!("blk{slot}"),
            slot,
            disk,
            changes: config::Changes::default(),
            queue: None,
        }
    }

    /// Puts a disk into the slot; the guest sees its capacity.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn attach(&mut self, disk: DiskImage) -> Result<(), SlotError> {
        if self.disk.is_some() {
            return Err(SlotError::Occupied(self.slot));
        }
        self.disk = Some(disk);
        self.capacity_changed()
    }

    /// Empties the slot and closes the disk's files.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn detach(&mut self) -> Result<(), SlotError> {
        if self.disk.take().is_none() {
            return Err(SlotError::Empty(self.slot));
        }
        self.capacity_changed()
    }

    /// State for a snapshot.
    pub fn save(&self) -> BlockState {
        BlockState {
            slot: self.slot,
            sectors: self.sectors(),
            read_only: self.disk.as_ref().is_some_and(DiskImage::read_only),
            queue: self.queue.as_ref().map(DeviceQueue::save),
        }
    }

    fn sectors(&self) -> u64 {
        self.disk.as_ref().map_or(0, DiskImage::sectors)
    }

    fn capacity_changed(&mut self) -> Result<(), SlotError> {
        self.changes.announce().map_err(SlotError::Notify)
    }
}

impl VirtioDevice for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let block = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        block
            .iter()
            .fold(1 << VIRTIO_F_VERSION_1 | RING_FEATURES, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors().to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR_SIZE as u32).to_le_bytes());
        // Topology: 2^3 logical blocks make a physical one, so that file systems align to 4 KiB.
        put(24, &[3]);
        put(36, &MAX_RANGE_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        // Discards are worth it in units of 4 KiB.
        put(44, &8u32.to_le_bytes());
        put(48, &MAX_RANGE_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        // Write-zeroes may deallocate.
        put(56, &[1]);
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

    fn reset(&mut self) {
        self.changes.reset();
        self.queue = None;
    }

    fn process_queue(&mut self, _index: usize) -> Result<Turn, DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(Turn::Done);
        };
        queue.serve(BUDGET, |memory, chain| {
            request::serve(memory, chain, self.disk.as_ref(), self.slot)
        })
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Block(self.save())
    }

    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(state) = state else {
            return Err(RestoreError::Kind);
        };
        let now = self.save();
        RestoreError::check("slot", &state.slot, &now.slot)?;
        // The guest's file systems know the size.
        RestoreError::check("capacity in sectors", &state.sectors, &now.sectors)?;
        RestoreError::check("read-only", &state.read_only, &now.read_only)
    }
}
