//! Persistent memory device (virtio 1.2, 5.19) over a read-only image.
//!
//! The device only tells the driver where the image lies; mapping the file and giving it to KVM is the
//! memory layout's part. The memory slot is read-only, so there is never anything to flush.

#[cfg(test)]
mod tests;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;

use super::queue::{Chain, DeviceQueue, RING_FEATURES};
use super::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};
use crate::memory::GuestMemory;

/// The only request type (virtio 1.2, 5.19.6).
const TYPE_FLUSH: u32 = 0;
/// Answer to a request that was carried out.
const RESULT_OK: u32 = 0;
/// Answer to any other: the value of `-1` (virtio 1.2, 5.19.7.2).
const RESULT_ERROR: u32 = u32::MAX;

/// Requests before other devices get their turn.
const BUDGET: usize = 32;

/// The device.
#[derive(Debug)]
pub struct Pmem {
    name: String,
    config: [u8; 16],
    queue: Option<DeviceQueue>,
}

impl Pmem {
    /// Device number `index` whose image is at guest physical address `start`, `size` bytes long. Linux
    /// wants both to be multiples of 2 MiB to map the image with DAX.
    pub fn new(index: u32, start: u64, size: u64) -> Self {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&start.to_le_bytes());
        config[8..].copy_from_slice(&size.to_le_bytes());
        Self {
            name: format!("pmem{index}"),
            config,
            queue: None,
        }
    }
}

impl VirtioDevice for Pmem {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.queue = DeviceQueue::from_activation(activation).pop();
        Ok(())
    }

    fn reset(&mut self) {
        self.queue = None;
    }

    fn process_queue(&mut self, _index: usize) -> Result<Turn, DeviceError> {
        match &mut self.queue {
            Some(queue) => queue.serve(BUDGET, answer),
            None => Ok(Turn::Done),
        }
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Pmem(self.queue.as_ref().map(DeviceQueue::save))
    }

    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Pmem(_) => Ok(()),
            _ => Err(RestoreError::Kind),
        }
    }
}

/// Answers a request and returns the number of bytes written.
fn answer(memory: &GuestMemory, chain: &Chain) -> Result<u32, DeviceError> {
    let kind = u32::from_le(chain.read_obj(memory, 0)?);
    let result = if kind == TYPE_FLUSH {
        RESULT_OK
    } else {
        RESULT_ERROR
    };
    chain.write_at(memory, 0, &result.to_le_bytes())?;
    Ok(size_of::<u32>() as u32)
}
