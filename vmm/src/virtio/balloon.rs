//! Memory balloon with free page reporting (virtio 1.2, 5.5).
//!
//! Pages the guest puts into the balloon or reports as free go back to the host at once; the guest
//! gets zeroed pages when it touches them again. The device only ever discards pages the guest named
//! in its own memory, so a hostile driver can lose its own data and nothing else.

#[cfg(test)]
mod tests;

use std::io;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::queue::{Chain, DeviceQueue, DeviceQueueState, RING_FEATURES, Segment};
use super::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};
use crate::memory::GuestMemory;

/// The balloon gives way when the guest runs out of memory (virtio 1.2, 5.5.3).
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Free page reporting (virtio 1.2, 5.5.3).
const F_REPORTING: u64 = 1 << 5;

/// Bytes of a balloon page, whatever the page size of the guest (virtio 1.2, 5.5.6).
const PAGE_SIZE: u64 = 4096;

/// Pages in one MiB.
const PAGES_PER_MIB: u32 = (1 << 20) / PAGE_SIZE as u32;

/// Longest array of page numbers taken in one request, in bytes. Linux sends 1 KiB.
const MAX_PFN_BYTES: usize = 64 << 10;

/// Requests before other devices get their turn; the largest takes a system call for each of 16,384 pages.
const BUDGET: usize = 4;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Free page reporting is queue 4, behind those for statistics and hints (virtio 1.2, 5.5.2). Linux numbers
/// only the queues of features it negotiated, so it looks for reporting in queue 2. As there are neither
/// statistics nor hints, every queue from 2 on takes reports.
const QUEUE_SIZES: &[u16] = &[128, 128, 32, 32, 32];

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    /// Pages the guest should give up.
    target: u32,
    /// Pages the guest says it gave up.
    actual: u32,
    changes: config::Changes,
    /// Empty if the device is not active.
    queues: Vec<DeviceQueue>,
}

/// What a snapshot keeps of a [`Balloon`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonState {
    /// Pages of 4 KiB the guest should give up.
    pub target: u32,
    /// Pages of 4 KiB the guest says it gave up.
    pub actual: u32,
    /// Queues, if the device is active.
    pub queues: Vec<DeviceQueueState>,
}

impl Balloon {
    /// An empty balloon.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest to give up `mib` MiB in all.
    ///
    /// # Errors
    /// The guest cannot be interrupted.
    pub fn set_target_mib(&mut self, mib: u32) -> Result<(), DeviceError> {
        self.target = mib.saturating_mul(PAGES_PER_MIB);
        self.changes.announce().map_err(DeviceError::Interrupt)
    }

    /// MiB the guest says it gave up, rounded down.
    pub fn actual_mib(&self) -> u32 {
        self.actual / PAGES_PER_MIB
    }

    /// State for a snapshot.
    pub fn save(&self) -> BalloonState {
        BalloonState {
            target: self.target,
            actual: self.actual,
            queues: self.queues.iter().map(DeviceQueue::save).collect(),
        }
    }
}

impl VirtioDevice for Balloon {
    fn name(&self) -> &str {
        "balloon0"
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | RING_FEATURES | F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.target.to_le_bytes());
        space[4..].copy_from_slice(&self.actual.to_le_bytes());
        config::read(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only `actual` belongs to the driver: virtio 1.2, 5.5.4.
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.actual = u32::from_le_bytes(actual);
        }
    }

    fn config_generation(&self) -> u32 {
        self.changes.generation()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.changes.activate(&activation.interrupt);
        self.queues = DeviceQueue::from_activation(activation);
        Ok(())
    }

    fn reset(&mut self) {
        self.changes.reset();
        self.queues.clear();
        self.actual = 0;
    }

    fn process_queue(&mut self, index: usize) -> Result<Turn, DeviceError> {
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(Turn::Done);
        };
        queue.serve(BUDGET, |memory, chain| {
            match index {
                INFLATE => inflate(memory, chain)?,
                // The guest may use the pages again; the host gives them when they are touched.
                DEFLATE => {}
                _ => {
                    for segment in chain.writable() {
                        discard(memory, segment.address, segment.len.into())?;
                    }
                }
            }
            Ok(0)
        })
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Balloon(self.save())
    }

    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon(state) = state else {
            return Err(RestoreError::Kind);
        };
        (self.target, self.actual) = (state.target, state.actual);
        Ok(())
    }
}

/// Discards the pages whose numbers the chain holds, neighbours in one go.
fn inflate(memory: &GuestMemory, chain: &Chain) -> Result<(), DeviceError> {
    let len = chain.readable_len();
    if len > MAX_PFN_BYTES || !len.is_multiple_of(size_of::<u32>()) {
        return Err(DeviceError::Protocol("bad length of a balloon page array"));
    }
    let mut numbers = vec![0; len];
    chain.read_at(memory, 0, &mut numbers)?;
    let mut run: Option<Segment> = None;
    for number in numbers.as_chunks::<4>().0 {
        let address = u64::from(u32::from_le_bytes(*number)) * PAGE_SIZE;
        if !memory.check_range(GuestAddress(address), PAGE_SIZE as usize) {
            return Err(DeviceError::Protocol("balloon page outside guest memory"));
        }
        // Linux hands pages out from high to low as often as from low to high.
        match &mut run {
            Some(run) if run.address + u64::from(run.len) == address => run.len += PAGE_SIZE as u32,
            Some(run) if address + PAGE_SIZE == run.address => {
                run.address = address;
                run.len += PAGE_SIZE as u32;
            }
            _ => {
                let page = Segment {
                    address,
                    len: PAGE_SIZE as u32,
                };
                if let Some(full) = run.replace(page) {
                    discard(memory, full.address, full.len.into())?;
                }
            }
        }
    }
    run.map_or(Ok(()), |run| discard(memory, run.address, run.len.into()))
}

/// Gives the whole pages of a range in guest memory back to the host.
pub(super) fn discard(memory: &GuestMemory, address: u64, len: u64) -> Result<(), DeviceError> {
    let start = address.next_multiple_of(PAGE_SIZE);
    let end = (address + len) / PAGE_SIZE * PAGE_SIZE;
    let Some(len) = end.checked_sub(start).filter(|&len| len > 0) else {
        return Ok(());
    };
    for slice in memory.get_slices(GuestAddress(start), len as usize) {
        let slice = slice.map_err(DeviceError::Memory)?;
        let address = slice.ptr_guard_mut().as_ptr();
        // SAFETY: the range lies in guest memory, which stays mapped and of which no Rust reference exists;
        // its contents are the guest's to give up.
        let result = unsafe { libc::madvise(address.cast(), slice.len(), libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(DeviceError::Backend(io::Error::last_os_error()));
        }
    }
    Ok(())
}
