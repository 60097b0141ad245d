//! The kernel's server of network rings: `/dev/vhost-net` (linux/vhost.h, linux/vhost_types.h).
//!
//! Each operation of the device is a [`Operation`]. The kernel takes and returns frames by worker threads that belong to this
//! process; it reads and writes guest memory at the addresses it is told, which are those of guest memory only.

#[cfg(test)]
pub mod fake;
#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::{io, ptr};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestMemory;
use crate::virtio::queue::RING_FEATURES;

/// Features that are about rings and headers, which the kernel has to know; the others are the tap's. All have been there
/// since Linux 4.0. An IOMMU is not among them: addresses in rings are those of guest memory.
pub const FEATURES: u64 = RING_FEATURES | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why the kernel cannot serve a network device.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// An operation.
    #[error("vhost-net cannot {what}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// Reason.
        #[source]
        source: io::Error,
    },
    /// It is not what virtio needs.
    #[error("vhost-net lacks the features {0:#x}")]
    Features(u64),
    /// No descriptor for news of broken rings.
    #[error("Cannot create an eventfd")]
    EventFd(#[source] io::Error),
    /// A ring, or all of memory, has no address in this process.
    #[error("Cannot find the host address of guest memory")]
    Address(#[source] GuestMemoryError),
}

/// `struct vhost_vring_state`: a number for a ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// Ring.
    pub index: u32,
    /// Number.
    pub number: u32,
}

/// `struct vhost_vring_file`: a descriptor for a ring, -1 for none.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingFile {
    /// Ring.
    pub index: u32,
    /// Descriptor.
    pub fd: RawFd,
}

/// `struct vhost_vring_addr`: where a ring is in this process.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddress {
    /// Ring.
    pub index: u32,
    /// None.
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Not used without a flag.
    pub log: u64,
}

/// `struct vhost_memory_region`: a part of guest memory, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical start.
    pub guest: u64,
    /// Length.
    pub size: u64,
    /// Start in this process.
    pub host: u64,
    /// None.
    pub flags: u64,
}

const _: () = assert!(size_of::<RingState>() == 8);
const _: () = assert!(size_of::<RingFile>() == 8);
const _: () = assert!(size_of::<RingAddress>() == 40);
const _: () = assert!(size_of::<Region>() == 32);

/// `VHOST_VIRTIO`, the type of all its ioctls.
const TYPE: u8 = 0xaf;

/// An operation of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Tells the features it has.
    GetFeatures,
    /// Makes it this process's, and starts its worker.
    SetOwner,
    /// Chooses features.
    SetFeatures(u64),
    /// Tells where guest memory is.
    SetMemory(Vec<Region>),
    /// Number of entries of a ring.
    SetSize(RingState),
    /// Addresses of a ring.
    SetAddress(RingAddress),
    /// Index of the next chain to take from a ring.
    SetBase(RingState),
    /// Asks for that index.
    GetBase(u32),
    /// Eventfd by which the driver tells of new chains.
    SetKick(RingFile),
    /// Eventfd that interrupts the driver.
    SetCall(RingFile),
    /// Eventfd that tells of a ring that is broken.
    SetError(RingFile),
    /// The tap for a ring, which runs from then on; none: it stands still.
    SetBackend(RingFile),
}

impl Operation {
    /// What it does, after "cannot".
    fn what(&self) -> &'static str {
        match self {
            Self::GetFeatures => "tell its features",
            Self::SetOwner => "start its worker",
            Self::SetFeatures(_) => "take the driver's features",
            Self::SetMemory(_) => "take the guest's memory",
            Self::SetSize(_) => "take a ring's size",
            Self::SetAddress(_) => "take a ring's addresses",
            Self::SetBase(_) => "take a ring's position",
            Self::GetBase(_) => "tell a ring's position",
            Self::SetKick(_) => "listen to the driver",
            Self::SetCall(_) => "interrupt the driver",
            Self::SetError(_) => "tell of broken rings",
            Self::SetBackend(RingFile { fd: -1, .. }) => "let go of the tap",
            Self::SetBackend(_) => "serve the tap",
        }
    }

    /// Number of the ioctl.
    fn number(&self) -> libc::c_ulong {
        match self {
            Self::GetFeatures => nix::request_code_read!(TYPE, 0x00, size_of::<u64>()),
            Self::SetFeatures(_) => nix::request_code_write!(TYPE, 0x00, size_of::<u64>()),
            Self::SetOwner => nix::request_code_none!(TYPE, 0x01),
            // It counts the head of the table only.
            Self::SetMemory(_) => nix::request_code_write!(TYPE, 0x03, size_of::<u64>()),
            Self::SetSize(_) => nix::request_code_write!(TYPE, 0x10, size_of::<RingState>()),
            Self::SetAddress(_) => nix::request_code_write!(TYPE, 0x11, size_of::<RingAddress>()),
            Self::SetBase(_) => nix::request_code_write!(TYPE, 0x12, size_of::<RingState>()),
            Self::GetBase(_) => nix::request_code_readwrite!(TYPE, 0x12, size_of::<RingState>()),
            Self::SetKick(_) => nix::request_code_write!(TYPE, 0x20, size_of::<RingFile>()),
            Self::SetCall(_) => nix::request_code_write!(TYPE, 0x21, size_of::<RingFile>()),
            Self::SetError(_) => nix::request_code_write!(TYPE, 0x22, size_of::<RingFile>()),
            Self::SetBackend(_) => nix::request_code_write!(TYPE, 0x30, size_of::<RingFile>()),
        }
    }

    /// Carries it out; what it answers, or 0.
    fn perform(&self, fd: RawFd) -> io::Result<u64> {
        let mut features = 0;
        let mut position = RingState { index: 0, number: 0 };
        let table;
        let argument: *const libc::c_void = match self {
            Self::SetOwner => ptr::null(),
            Self::GetFeatures => (&raw mut features).cast_const().cast(),
            Self::GetBase(index) => {
                position.index = *index;
                (&raw mut position).cast_const().cast()
            }
            Self::SetFeatures(features) => ptr::from_ref(features).cast(),
            Self::SetMemory(regions) => {
                table = memory_table(regions);
                table.as_ptr().cast()
            }
            Self::SetAddress(address) => ptr::from_ref(address).cast(),
            Self::SetSize(state) | Self::SetBase(state) => ptr::from_ref(state).cast(),
            Self::SetKick(file) | Self::SetCall(file) | Self::SetError(file) | Self::SetBackend(file) => {
                ptr::from_ref(file).cast()
            }
        };
        // SAFETY: the argument is the one structure that the number stands for, which outlives the call; the kernel writes
        // to the two that are mutable only. It takes references of its own to descriptors. What it reads and writes later
        // lies in guest memory, of which there are no Rust references and which stays mapped as long as the process lives.
        if unsafe { libc::ioctl(fd, self.number(), argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(match self {
            Self::GetFeatures => features,
            Self::GetBase(_) => position.number.into(),
            _ => 0,
        })
    }
}

/// `struct vhost_memory`: number of regions and padding, 32 bits each, then the regions of four words.
fn memory_table(regions: &[Region]) -> Vec<u64> {
    let head = regions.len() as u64;
    let words = regions
        .iter()
        .flat_map(|region| [region.guest, region.size, region.host, region.flags]);
    std::iter::once(head).chain(words).collect()
}

/// An open device. It serves one pair of rings, by a worker of its own.
#[derive(Debug)]
pub struct Vhost {
    file: OwnedFd,
    errors: EventFd,
    /// It is this process's.
    taken: bool,
    #[cfg(test)]
    fake: Option<fake::Fake>,
}

impl Vhost {
    /// A device that nobody owns yet.
    ///
    /// # Errors
    /// [`VhostError::EventFd`].
    pub fn new(file: OwnedFd) -> Result<Self, VhostError> {
        Ok(Self {
            file,
            errors: EventFd::new(EFD_NONBLOCK).map_err(VhostError::EventFd)?,
            taken: false,
            #[cfg(test)]
            fake: None,
        })
    }

    /// Takes the device, unless it is taken. The kernel starts a worker for it, which is confined as the calling thread is,
    /// and keeps some memory.
    ///
    /// # Errors
    /// [`VhostError`]; also what is no such device.
    pub fn take(&mut self) -> Result<(), VhostError> {
        if self.taken {
            return Ok(());
        }
        // An owner comes before everything else.
        self.perform(&Operation::SetOwner)?;
        match FEATURES & !self.perform(&Operation::GetFeatures)? {
            0 => self.taken = true,
            // The kernel does not give it a second time.
            lacking => return Err(VhostError::Features(lacking)),
        }
        Ok(())
    }

    /// Readable when a ring was found broken.
    pub fn errors(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.errors.as_raw_fd()) }
    }

    /// Forgets what [`errors`](Self::errors) told.
    pub fn forget_errors(&self) {
        // Readable or not.
        let _ = self.errors.read();
    }

    /// Tells what all rings have in common: the driver's features, and where memory is.
    ///
    /// # Errors
    /// [`VhostError`].
    pub fn prepare(&self, features: u64, memory: &GuestMemory) -> Result<(), VhostError> {
        self.perform(&Operation::SetFeatures(features & FEATURES))?;
        let regions = memory.iter().map(|region| {
            let host = region.get_host_address(MemoryRegionAddress(0));
            Ok(Region {
                guest: region.start_addr().0,
                size: region.len(),
                host: host.map_err(VhostError::Address)? as u64,
                flags: 0,
            })
        });
        let regions = regions.collect::<Result<_, VhostError>>()?;
        self.perform(&Operation::SetMemory(regions)).map(drop)
    }

    /// Tells of a ring that stands still. All of it has to be in one region of `memory`.
    ///
    /// # Errors
    /// [`VhostError`].
    pub fn set_ring(
        &self,
        index: u32,
        queue: &Queue,
        memory: &GuestMemory,
        kick: &EventFd,
        call: &EventFd,
    ) -> Result<(), VhostError> {
        let state = |number: u16| RingState {
            index,
            number: number.into(),
        };
        let file = |event: &EventFd| RingFile {
            index,
            fd: event.as_raw_fd(),
        };
        // Bytes of the rings: virtio 1.2, 2.7; the index that announces notifications is in the last two of a ring.
        let entries = usize::from(queue.size());
        let address = |start: u64, length: usize| {
            let slice = memory.get_slice(GuestAddress(start), length);
            slice.map(|slice| slice.ptr_guard_mut().as_ptr() as u64)
        };
        let address = RingAddress {
            index,
            flags: 0,
            descriptors: address(queue.desc_table(), 16 * entries).map_err(VhostError::Address)?,
            used: address(queue.used_ring(), 6 + 8 * entries).map_err(VhostError::Address)?,
            available: address(queue.avail_ring(), 6 + 2 * entries).map_err(VhostError::Address)?,
            log: 0,
        };
        for operation in [
            Operation::SetSize(state(queue.size())),
            Operation::SetBase(state(queue.next_avail())),
            Operation::SetAddress(address),
            Operation::SetCall(file(call)),
            Operation::SetError(file(&self.errors)),
            Operation::SetKick(file(kick)),
        ] {
            self.perform(&operation)?;
        }
        Ok(())
    }

    /// Lets a ring run on the tap `fd`.
    ///
    /// # Errors
    /// [`VhostError`].
    pub fn run(&self, index: u32, tap: RawFd) -> Result<(), VhostError> {
        self.perform(&Operation::SetBackend(RingFile { index, fd: tap }))
            .map(drop)
    }

    /// Has a ring stand still: when this returns the kernel has used every chain that it took, and touches no memory.
    ///
    /// # Errors
    /// [`VhostError`].
    pub fn halt(&self, index: u32) -> Result<(), VhostError> {
        self.perform(&Operation::SetBackend(RingFile { index, fd: -1 }))
            .map(drop)
    }

    /// Index of the next chain of a ring that stands still.
    ///
    /// # Errors
    /// [`VhostError`].
    pub fn base(&self, index: u32) -> Result<u16, VhostError> {
        // A split ring's index has 16 bits.
        Ok(self.perform(&Operation::GetBase(index))? as u16)
    }

    fn perform(&self, operation: &Operation) -> Result<u64, VhostError> {
        #[cfg(test)]
        if let Some(fake) = &self.fake {
            return fake.perform(operation);
        }
        operation
            .perform(self.file.as_raw_fd())
            .map_err(|source| VhostError::Refused {
                what: operation.what(),
                source,
            })
    }
}
