//! A VM written down: two files from which others like it are made.
//!
//! The *state* file holds everything but memory:
//!
//! | bytes | |
//! |---|---|
//! | 0 to 7 | `BLKHSNAP` |
//! | 8 to 11 | version of what follows, [`VERSION`] |
//! | 12 to 15 | length of the payload |
//! | 16 to 19 | CRC-32 of the payload |
//! | 20 and up | payload: [`MachineState`] in postcard's format |
//!
//! Numbers are little-endian. It is checked in full before anything of a VM is made. The *memory* file holds guest
//! memory as it is, range by range, with holes where there are zeroes; it is mapped, not read.

pub mod memory;
pub(crate) mod pagemap;
mod processor;
#[cfg(test)]
mod tests;
pub mod written;

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use bulkhead_protocol::control::VmConfig;
use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use crate::arch::state::VcpuState;
use crate::virtio::RestoreError;
use crate::virtio::mmio::TransportState;

pub use crate::virtio::DeviceState;
pub use processor::{Processor, ProcessorError};

/// Version of the payload: raised with every change of [`MachineState`] or of anything in it.
pub const VERSION: u32 = 3;

const MAGIC: &[u8; 8] = b"BLKHSNAP";
const HEADER_SIZE: usize = 20;

/// Largest payload in bytes. Half a MiB is for 32 vCPUs, the rest for the files that the guest knows, some tens of bytes
/// each.
const MAX_PAYLOAD: u32 = 64 << 20;

/// Why a state file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Reading failed.
    #[error("Cannot read the state file")]
    Read(#[source] io::Error),
    /// It is some other file.
    #[error("State file does not begin as one")]
    Magic,
    /// It was written by another version.
    #[error("State file has version {0}, this VMM reads {VERSION}")]
    Version(u32),
    /// Its end is missing, or there is something behind it.
    #[error("State file has {found} bytes after its header and should have {told}")]
    Length {
        /// As the header says.
        told: u32,
        /// As there are.
        found: u64,
    },
    /// Its content was altered.
    #[error("State file is damaged: its checksum is {found:#010x} and should be {told:#010x}")]
    Checksum {
        /// As the header says.
        told: u32,
        /// As computed.
        found: u32,
    },
    /// The content is not what the version says.
    #[error("State file does not hold the state of a VM")]
    Payload(#[source] postcard::Error),
    /// The configuration differs.
    #[error("Snapshot is of another kind of VM")]
    Shape(#[source] RestoreError),
    /// The processor differs.
    #[error("Snapshot is of a VM on another kind of processor")]
    Processor(#[source] ProcessorError),
}

/// Why a VM could not be written down.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The payload cannot be encoded.
    #[error("Cannot encode the state")]
    Encode(#[source] postcard::Error),
    /// The payload is too long.
    #[error("State takes {0} bytes, more than a state file can hold")]
    TooLong(usize),
    /// Writing failed.
    #[error("Cannot write the state file")]
    Write(#[source] io::Error),
}

/// All of a VM but its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// What a VM made from it has to have in common.
    pub shape: Shape,
    /// The processor as the guest sees it.
    pub processor: Processor,
    /// Frequency of the time-stamp counter in kHz.
    pub tsc_khz: u32,
    /// The guest's clock.
    pub clock: kvm_clock_data,
    /// Interrupt controllers: the two of a PC, then the IOAPIC.
    pub interrupt_controllers: [kvm_irqchip; 3],
    /// vCPUs that exist, by number.
    pub vcpus: Vec<VcpuState>,
    /// Serial console, if there is one.
    pub console: Option<crate::console::ConsoleState>,
    /// Devices by place.
    pub devices: Vec<SavedDevice>,
    /// Bytes of added memory that the guest may use; they follow the rest in the memory file.
    pub added_memory: u64,
}

/// A device and its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    /// For example `blk2`.
    pub name: String,
    /// Registers.
    pub transport: TransportState,
    /// The device.
    pub device: DeviceState,
}

/// What the guest took for granted when it booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u32,
    hotplug_mib: u32,
    /// Bytes of the root image.
    root_length: u64,
    console: bool,
    disk_slots: u32,
    net_slots: u32,
    share: Option<String>,
    balloon: bool,
}

impl Shape {
    /// Of a configuration, whose root image has `root_length` bytes. `vcpus` exist.
    pub fn new(config: &VmConfig, root_length: u64, vcpus: u8) -> Self {
        Self {
            vcpus,
            max_vcpus: config.max_vcpus,
            memory_mib: config.memory_mib,
            hotplug_mib: config.hotplug_mib,
            root_length,
            console: config.console,
            disk_slots: config.disk_slots,
            net_slots: config.net_slots,
            share: config.share.as_ref().map(|share| share.tag.clone()),
            balloon: config.balloon,
        }
    }

    /// Whether a VM of shape `now` can be made from a snapshot of this one.
    ///
    /// # Errors
    /// [`LoadError::Shape`] names the first field that differs, as the configuration calls it.
    pub fn check(&self, now: &Self) -> Result<(), LoadError> {
        let check = || {
            RestoreError::check("vcpus", &self.vcpus, &now.vcpus)?;
            RestoreError::check("max_vcpus", &self.max_vcpus, &now.max_vcpus)?;
            RestoreError::check("memory_mib", &self.memory_mib, &now.memory_mib)?;
            RestoreError::check("hotplug_mib", &self.hotplug_mib, &now.hotplug_mib)?;
            RestoreError::check("length of root", &self.root_length, &now.root_length)?;
            RestoreError::check("console", &self.console, &now.console)?;
            RestoreError::check("disk_slots", &self.disk_slots, &now.disk_slots)?;
            RestoreError::check("net_slots", &self.net_slots, &now.net_slots)?;
            RestoreError::check("share", &self.share, &now.share)?;
            RestoreError::check("balloon", &self.balloon, &now.balloon)
        };
        check().map_err(LoadError::Shape)
    }
}

impl MachineState {
    /// Writes the state to `file`, which is empty.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn write(&self, file: &mut File) -> Result<(), SaveError> {
        let payload = postcard::to_stdvec(self).map_err(SaveError::Encode)?;
        let length = u32::try_from(payload.len())
            .ok()
            .filter(|length| *length <= MAX_PAYLOAD)
            .ok_or(SaveError::TooLong(payload.len()))?;
        let mut bytes = Vec::with_capacity(HEADER_SIZE + payload.len());
        bytes.extend_from_slice(MAGIC);
        for number in [VERSION, length, crc32fast::hash(&payload)] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&payload);
        file.write_all(&bytes).map_err(SaveError::Write)
    }

    /// Reads a state from the start of `file`.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn read(file: &mut File) -> Result<Self, LoadError> {
        let mut bytes = Vec::new();
        file.rewind().map_err(LoadError::Read)?;
        file.take(u64::from(MAX_PAYLOAD) + HEADER_SIZE as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(LoadError::Read)?;
        Self::decode(&bytes)
    }

    /// Takes the bytes of a state file apart.
    ///
    /// # Errors
    /// [`LoadError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, LoadError> {
        if !bytes.starts_with(MAGIC) {
            return Err(LoadError::Magic);
        }
        let number = |index: usize| {
            let start = MAGIC.len() + 4 * index;
            let bytes = bytes
                .get(start..start + 4)
                .and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_le_bytes).ok_or(LoadError::Magic)
        };
        let version = number(0)?;
        if version != VERSION {
            return Err(LoadError::Version(version));
        }
        let (told, checksum) = (number(1)?, number(2)?);
        let payload = &bytes[HEADER_SIZE..];
        if payload.len() as u64 != u64::from(told) {
            return Err(LoadError::Length {
                told,
                found: payload.len() as u64,
            });
        }
        let found = crc32fast::hash(payload);
        if found != checksum {
            return Err(LoadError::Checksum {
                told: checksum,
                found,
            });
        }
        let (state, rest) = postcard::take_from_bytes(payload).map_err(LoadError::Payload)?;
        if !rest.is_empty() {
            return Err(LoadError::Payload(postcard::Error::DeserializeBadEncoding));
        }
        Ok(state)
    }
}
