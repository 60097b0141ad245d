//! Entropy device (virtio 1.2, 5.4): bytes of the host's `getrandom(2)`.

#[cfg(test)]
mod tests;

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::queue::{Chain, DeviceQueue, RING_FEATURES};
use super::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice};
use crate::memory::GuestMemory;

/// Most bytes given for one request. The driver asks again for more, so that one huge request does not
/// hold up the other devices.
const MAX_REQUEST: usize = 64 << 10;

/// Requests before other devices get their turn.
const BUDGET: usize = 16;

/// The device.
#[derive(Debug, Default)]
pub struct Rng {
    queue: Option<DeviceQueue>,
}

impl Rng {
    /// A device that is not activated.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &str {
        "rng0"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
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
            Some(queue) => queue.serve(BUDGET, fill),
            None => Ok(Turn::Done),
        }
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Rng(self.queue.as_ref().map(DeviceQueue::save))
    }

    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Rng(_) => Ok(()),
            _ => Err(RestoreError::Kind),
        }
    }
}

/// Fills the start of a chain with random bytes and returns how many.
fn fill(memory: &GuestMemory, chain: &Chain) -> Result<u32, DeviceError> {
    if chain.writable_len() == 0 {
        return Err(DeviceError::Protocol("entropy request without a writable buffer"));
    }
    let len = chain.writable_len().min(MAX_REQUEST);
    let mut vectors = chain.write_vectors(memory, 0, len)?;
    while let Some(vector) = vectors.as_slice().first() {
        // SAFETY: the vector lies in guest memory, which `memory` keeps mapped; no Rust reference to it
        // exists, and the kernel copes with a guest that writes there at the same time.
        let got = unsafe { libc::getrandom(vector.iov_base, vector.iov_len, 0) };
        match usize::try_from(got) {
            Ok(got) => vectors.advance(got),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(DeviceError::Backend(error));
                }
            }
        }
    }
    Ok(len as u32)
}
