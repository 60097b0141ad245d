//! The register file: feature negotiation, queue set-up and the device status state machine.
//!
//! A driver that leaves the order of virtio 1.2, 3.1.1 gets its write ignored, so that no register ever
//! changes under an active device.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};

use crate::memory::GuestMemory;
use crate::virtio::RestoreError;
use crate::virtio::queue::DeviceQueueState;

// Offsets (virtio 1.2, 4.2.2).
const MAGIC: u64 = 0x000;
const VERSION: u64 = 0x004;
pub const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SELECT: u64 = 0x014;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
pub const QUEUE_NOTIFY: u64 = 0x050;
pub const INTERRUPT_STATUS: u64 = 0x060;
pub const INTERRUPT_ACK: u64 = 0x064;
pub const STATUS: u64 = 0x070;
const QUEUE_DESCRIPTORS_LOW: u64 = 0x080;
const QUEUE_DESCRIPTORS_HIGH: u64 = 0x084;
const QUEUE_AVAILABLE_LOW: u64 = 0x090;
const QUEUE_AVAILABLE_HIGH: u64 = 0x094;
const QUEUE_USED_LOW: u64 = 0x0a0;
const QUEUE_USED_HIGH: u64 = 0x0a4;
/// Length and base of the selected shared memory region; all ones: there is none.
const SHARED_MEMORY: std::ops::RangeInclusive<u64> = 0x0b0..=0x0bc;
pub const CONFIG_GENERATION: u64 = 0x0fc;
pub const CONFIG: u64 = 0x100;

/// "virt"
const MAGIC_VALUE: u32 = 0x7472_6976;
const VERSION_VALUE: u32 = 2;
/// "BLKH"
const VENDOR: u32 = u32::from_le_bytes(*b"BLKH");

// Device status bits (virtio 1.2, 2.1).
pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
pub const FAILED: u32 = 128;

/// `VIRTIO_F_VERSION_1`: the device has no legacy interface, a driver must take it.
const VERSION_1: u64 = 1 << 32;

/// What a write to the status register asks the transport to do.
#[derive(Debug, PartialEq, Eq)]
pub enum StatusChange {
    None,
    Reset,
    Activate,
}

/// What a snapshot keeps of a transport; active queues belong to their device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Device status.
    pub status: u32,
    /// Feature word selectors.
    pub device_features_select: u32,
    /// See above.
    pub driver_features_select: u32,
    /// Features the driver took.
    pub driver_features: u64,
    /// Selected queue.
    pub queue_select: u32,
    /// Interrupt status register.
    pub interrupt_status: u32,
    /// Queues that the driver has set up so far; none once the device has them.
    pub queues: Vec<DeviceQueueState>,
}

#[derive(Debug)]
pub struct Registers {
    device_features: u64,
    queue_sizes: Vec<u16>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    /// Queues while the driver sets them up; empty once the device has them.
    queues: Vec<Queue>,
}

impl Registers {
    pub fn new(device_features: u64, queue_sizes: &[u16]) -> Result<Self, virtio_queue::Error> {
        Ok(Self {
            device_features: device_features | VERSION_1,
            queue_sizes: queue_sizes.to_vec(),
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: queues(queue_sizes)?,
        })
    }

    pub fn status(&self) -> u8 {
        self.status as u8
    }

    pub fn features(&self) -> u64 {
        self.driver_features
    }

    pub fn save(&self, interrupt_status: u32) -> TransportState {
        TransportState {
            status: self.status,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            interrupt_status,
            queues: self.queues.iter().map(DeviceQueueState::of).collect(),
        }
    }

    /// The registers as they were saved, of a device that offers what this one does.
    ///
    /// # Errors
    /// [`RestoreError`]; nothing has changed then.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let unknown = state.driver_features & !self.device_features;
        if unknown != 0 {
            return Err(RestoreError::Features(unknown));
        }
        if !state.queues.is_empty() && state.queues.len() != self.queue_sizes.len() {
            return Err(RestoreError::Queues {
                queues: self.queue_sizes.len(),
                saved: state.queues.len(),
            });
        }
        let queues = state.queues.iter().map(DeviceQueueState::restore);
        self.queues = queues.collect::<Result<_, _>>().map_err(RestoreError::Queue)?;
        self.status = state.status;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        Ok(())
    }

    /// Whether a driver has taken the device and not given it up.
    pub fn driver_present(&self) -> bool {
        self.status & DRIVER != 0 && self.status & (FAILED | NEEDS_RESET) == 0
    }

    /// Whether the device has failed and was not reset since.
    pub fn needs_reset(&self) -> bool {
        self.status & NEEDS_RESET != 0
    }

    /// Sets the bit; whether a driver is there to be told.
    pub fn set_needs_reset(&mut self) -> bool {
        self.status |= NEEDS_RESET;
        self.status & DRIVER_OK != 0
    }

    /// Hands the queues over to the device.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => VERSION_VALUE,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => word(self.device_features, self.device_features_select),
            QUEUE_SIZE_MAX => self
                .queue_sizes
                .get(self.queue_select as usize)
                .copied()
                .unwrap_or(0)
                .into(),
            QUEUE_READY => self
                .queues
                .get(self.queue_select as usize)
                .is_some_and(QueueT::ready)
                .into(),
            STATUS => self.status,
            offset if SHARED_MEMORY.contains(&offset) => u32::MAX,
            _ => 0,
        }
    }

    pub fn write(&mut self, offset: u64, value: u32, memory: &GuestMemory) {
        match offset {
            DEVICE_FEATURES_SELECT => self.device_features_select = value,
            DRIVER_FEATURES_SELECT => self.driver_features_select = value,
            DRIVER_FEATURES if self.in_phase(DRIVER, FEATURES_OK) => match self.driver_features_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
                1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
                _ => {}
            },
            QUEUE_SELECT => self.queue_select = value,
            _ if self.in_phase(FEATURES_OK, DRIVER_OK) => self.write_queue(offset, value, memory),
            _ => {}
        }
    }

    /// Whether `reached` is set and nothing of `not_yet`, nor a failure.
    fn in_phase(&self, reached: u32, not_yet: u32) -> bool {
        self.status & reached != 0 && self.status & (not_yet | FAILED | NEEDS_RESET) == 0
    }

    fn write_queue(&mut self, offset: u64, value: u32, memory: &GuestMemory) {
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        if offset == QUEUE_READY {
            queue.set_ready(value == 1);
            // A queue whose rings are not in memory stays off.
            if queue.ready() && !queue.is_valid(memory) {
                queue.set_ready(false);
            }
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            // Sizes over 32768 are not even representable; the queue refuses all bad ones.
            QUEUE_SIZE => queue.set_size(u16::try_from(value).unwrap_or(0)),
            QUEUE_DESCRIPTORS_LOW => queue.set_desc_table_address(Some(value), None),
            QUEUE_DESCRIPTORS_HIGH => queue.set_desc_table_address(None, Some(value)),
            QUEUE_AVAILABLE_LOW => queue.set_avail_ring_address(Some(value), None),
            QUEUE_AVAILABLE_HIGH => queue.set_avail_ring_address(None, Some(value)),
            QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    pub fn write_status(&mut self, value: u32) -> StatusChange {
        if value == 0 {
            self.reset();
            return StatusChange::Reset;
        }
        // Bits are only ever added, and a device that needs a reset gets nothing else.
        if value & self.status & 0xff != self.status & !NEEDS_RESET & 0xff || self.status & NEEDS_RESET != 0 {
            return StatusChange::None;
        }
        let added = value & !self.status;
        let order_kept = match added {
            ACKNOWLEDGE => self.status == 0,
            DRIVER => self.status == ACKNOWLEDGE,
            FEATURES_OK => self.status == ACKNOWLEDGE | DRIVER,
            DRIVER_OK => self.status == ACKNOWLEDGE | DRIVER | FEATURES_OK,
            FAILED => true,
            _ => false,
        };
        if !order_kept {
            return StatusChange::None;
        }
        if added == FEATURES_OK
            && (self.driver_features & !self.device_features != 0 || self.driver_features & VERSION_1 == 0)
        {
            // The driver reads the register back and finds its features refused (3.1.1, step 6).
            return StatusChange::None;
        }
        self.status |= added;
        if added == DRIVER_OK {
            StatusChange::Activate
        } else {
            StatusChange::None
        }
    }

    fn reset(&mut self) {
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        // The sizes have made queues before, so they do again.
        self.queues = queues(&self.queue_sizes).unwrap_or_default();
    }
}

fn queues(sizes: &[u16]) -> Result<Vec<Queue>, virtio_queue::Error> {
    sizes.iter().map(|size| Queue::new(*size)).collect()
}

fn word(value: u64, index: u32) -> u32 {
    match index {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}
