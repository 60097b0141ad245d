//! Checked descriptor chains and access to the guest memory they name.

use std::marker::PhantomData;

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory as _, VolatileSlice};

use crate::memory::GuestMemory;
use crate::virtio::DeviceError;

/// Most descriptors in one chain: `IOV_MAX` of Linux, so that one vectored call covers any chain.
pub const MAX_SEGMENTS: usize = 1024;

/// Bytes of a descriptor: address, length, flags, next (virtio 1.2, 2.7.5).
const DESCRIPTOR_SIZE: u32 = 16;

/// What is wrong with a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A head or `next` field is beyond the table.
    #[error("Descriptor index {0} is outside the table")]
    Index(u32),
    /// More descriptors than the table has: there is a loop.
    #[error("Descriptor chain loops")]
    Loop,
    /// More than [`MAX_SEGMENTS`] descriptors.
    #[error("Descriptor chain has too many descriptors")]
    TooManySegments,
    /// All lengths together exceed 4 GiB (virtio 1.2, 2.7.5.2).
    #[error("Descriptor chain is longer than 4 GiB")]
    TooLong,
    /// The table itself is outside guest memory.
    #[error("Descriptor table at {0:#x} is outside guest memory")]
    Table(u64),
    /// A buffer is outside guest memory.
    #[error("Buffer at {0:#x} of {1:#x} bytes is outside guest memory")]
    Buffer(u64, u32),
    /// A buffer of no bytes.
    #[error("Descriptor has length zero")]
    ZeroLength,
    /// A device-readable descriptor behind a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("Readable descriptor follows a writable one")]
    Order,
    /// An indirect descriptor without the feature, inside an indirect table, or with `NEXT` set
    /// (virtio 1.2, 2.7.5.3.1).
    #[error("Indirect descriptor is not allowed here")]
    Indirect,
    /// An indirect table of no or half descriptors.
    #[error("Indirect table has a bad length of {0} bytes")]
    IndirectLength(u32),
}

/// One buffer of a chain, inside guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes, not zero.
    pub len: u32,
}

/// A chain of buffers, checked and copied out of the ring.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    segments: Vec<Segment>,
    /// The first this many segments are device-readable, the others device-writable.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

/// A descriptor table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) address: u64,
    pub(super) entries: u32,
}

impl Chain {
    /// Walks the chain that starts at `head`. `storage` is reused for the segments.
    pub(super) fn parse(
        memory: &GuestMemory,
        table: Table,
        head: u16,
        indirect: bool,
        mut storage: Vec<Segment>,
    ) -> Result<Self, ChainError> {
        storage.clear();
        let mut chain = Self {
            head,
            segments: storage,
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        };
        let mut table = table;
        let mut in_indirect = false;
        let mut index = u32::from(head);
        let mut left = table.entries;
        loop {
            if index >= table.entries {
                return Err(ChainError::Index(index));
            }
            left = left.checked_sub(1).ok_or(ChainError::Loop)?;
            let address = table
                .address
                .checked_add(u64::from(index * DESCRIPTOR_SIZE))
                .ok_or(ChainError::Table(table.address))?;
            let raw: [u8; DESCRIPTOR_SIZE as usize] = memory
                .read_obj(GuestAddress(address))
                .map_err(|_| ChainError::Table(address))?;
            let descriptor = Descriptor::decode(raw);
            let more = descriptor.has(VRING_DESC_F_NEXT);
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                if !indirect || in_indirect || more {
                    return Err(ChainError::Indirect);
                }
                let len = descriptor.len;
                let entries = len / DESCRIPTOR_SIZE;
                // `next` has 16 bits: a longer table has entries nobody can name.
                if len == 0 || !len.is_multiple_of(DESCRIPTOR_SIZE) || entries > u32::from(u16::MAX) {
                    return Err(ChainError::IndirectLength(len));
                }
                table = Table {
                    address: descriptor.address,
                    entries,
                };
                in_indirect = true;
                index = 0;
                left = entries;
                continue;
            }
            chain.push(memory, descriptor)?;
            if !more {
                return Ok(chain);
            }
            index = u32::from(descriptor.next);
        }
    }

    fn push(&mut self, memory: &GuestMemory, descriptor: Descriptor) -> Result<(), ChainError> {
        let Descriptor { address, len, .. } = descriptor;
        if len == 0 {
            return Err(ChainError::ZeroLength);
        }
        if self.segments.len() == MAX_SEGMENTS {
            return Err(ChainError::TooManySegments);
        }
        let inside = address.checked_add(u64::from(len)).is_some()
            && memory.check_range(GuestAddress(address), len as usize);
        if !inside {
            return Err(ChainError::Buffer(address, len));
        }
        self.readable_len
            .checked_add(self.writable_len)
            .and_then(|sum| sum.checked_add(len))
            .ok_or(ChainError::TooLong)?;
        if descriptor.has(VRING_DESC_F_WRITE) {
            self.writable_len += len;
        } else if self.writable_len > 0 {
            return Err(ChainError::Order);
        } else {
            self.readable_len += len;
            self.readable += 1;
        }
        self.segments.push(Segment { address, len });
        Ok(())
    }

    /// Index of the first descriptor, the name of the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers the device reads.
    pub fn readable(&self) -> &[Segment] {
        &self.segments[..self.readable]
    }

    /// Buffers the device writes.
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.readable..]
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable_len as usize
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable_len as usize
    }

    /// Fills `data` from the readable bytes that start at `offset`.
    ///
    /// # Errors
    /// The readable part ends before that.
    pub fn read_at(&self, memory: &GuestMemory, offset: usize, data: &mut [u8]) -> Result<(), DeviceError> {
        let mut rest = data;
        for_each_part(self.readable(), offset, rest.len(), |address, len| {
            let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            memory
                .read_slice(part, GuestAddress(address))
                .map_err(DeviceError::Memory)
        })
    }

    /// Reads an object from the readable bytes that start at `offset`. Its fields are as the driver wrote
    /// them: little-endian.
    ///
    /// # Errors
    /// The readable part ends before that.
    pub fn read_obj<T: ByteValued + Default>(
        &self,
        memory: &GuestMemory,
        offset: usize,
    ) -> Result<T, DeviceError> {
        let mut object = T::default();
        self.read_at(memory, offset, object.as_mut_slice())?;
        Ok(object)
    }

    /// Writes `data` to the writable bytes that start at `offset`.
    ///
    /// # Errors
    /// The writable part ends before that; nothing is written.
    pub fn write_at(&self, memory: &GuestMemory, offset: usize, data: &[u8]) -> Result<(), DeviceError> {
        let mut rest = data;
        for_each_part(self.writable(), offset, rest.len(), |address, len| {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            memory
                .write_slice(part, GuestAddress(address))
                .map_err(DeviceError::Memory)
        })
    }

    /// `len` readable bytes from `offset` on, for vectored writes to a file or socket.
    ///
    /// # Errors
    /// The readable part ends before that.
    pub fn read_vectors<'a>(
        &self,
        memory: &'a GuestMemory,
        offset: usize,
        len: usize,
    ) -> Result<IoVecs<'a>, DeviceError> {
        IoVecs::new(memory, self.readable(), offset, len)
    }

    /// `len` writable bytes from `offset` on, for vectored reads from a file or socket.
    ///
    /// # Errors
    /// The writable part ends before that.
    pub fn write_vectors<'a>(
        &self,
        memory: &'a GuestMemory,
        offset: usize,
        len: usize,
    ) -> Result<IoVecs<'a>, DeviceError> {
        IoVecs::new(memory, self.writable(), offset, len)
    }

    pub(super) fn into_storage(self) -> Vec<Segment> {
        self.segments
    }
}

/// Host addresses of guest buffers, as the kernel's vectored IO wants them.
///
/// The guest may change the bytes at any time, so they are only ever passed to system calls, never
/// borrowed as slices.
#[derive(Debug)]
pub struct IoVecs<'a> {
    vectors: Vec<libc::iovec>,
    len: usize,
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> IoVecs<'a> {
    fn new(
        memory: &'a GuestMemory,
        segments: &[Segment],
        offset: usize,
        len: usize,
    ) -> Result<Self, DeviceError> {
        let mut vectors = Vec::with_capacity(segments.len());
        for_each_part(segments, offset, len, |address, len| {
            for slice in memory.get_slices(GuestAddress(address), len) {
                let slice: VolatileSlice<'a> = slice.map_err(DeviceError::Memory)?;
                vectors.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            Ok(())
        })?;
        Ok(Self {
            vectors,
            len,
            memory: PhantomData,
        })
    }

    /// The vectors; valid as long as the guest memory they were made from is borrowed. More than
    /// [`MAX_SEGMENTS`] only if buffers span memory regions.
    pub fn as_slice(&self) -> &[libc::iovec] {
        &self.vectors
    }

    /// Bytes in all vectors.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the first `count` bytes off, or all there are.
    #[must_use]
    pub fn split_to(&mut self, count: usize) -> IoVecs<'a> {
        let count = count.min(self.len);
        let mut left = count;
        let mut vectors = Vec::new();
        for vector in &self.vectors {
            let iov_len = vector.iov_len.min(left);
            if iov_len == 0 {
                break;
            }
            left -= iov_len;
            vectors.push(libc::iovec {
                iov_base: vector.iov_base,
                iov_len,
            });
        }
        self.advance(count);
        IoVecs {
            vectors,
            len: count,
            memory: PhantomData,
        }
    }

    /// Zeroes every byte.
    pub fn zero(&self) {
        for vector in &self.vectors {
            // SAFETY: the vector lies in guest memory, mapped for `'a`, and no Rust reference to it exists. A
            // guest that writes there at the same time finds either value, as on hardware.
            unsafe { std::ptr::write_bytes(vector.iov_base.cast::<u8>(), 0, vector.iov_len) };
        }
    }

    /// Drops the first `count` bytes, after a short read or write.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.len);
        self.len -= left;
        let mut whole = 0;
        for vector in &mut self.vectors {
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left);
                vector.iov_len -= left;
                break;
            }
            left -= vector.iov_len;
            whole += 1;
        }
        self.vectors.drain(..whole);
    }
}

/// Calls `each` with the address and length of every part of the `len` bytes that start at `offset`.
/// Nothing is called if the segments end before that.
pub fn for_each_part(
    segments: &[Segment],
    offset: usize,
    len: usize,
    mut each: impl FnMut(u64, usize) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let total: usize = segments.iter().map(|segment| segment.len as usize).sum();
    if offset.checked_add(len).is_none_or(|end| end > total) {
        return Err(DeviceError::Protocol("request is shorter than it must be"));
    }
    let (mut skip, mut left) = (offset, len);
    for segment in segments {
        let available = segment.len as usize;
        if skip >= available {
            skip -= available;
            continue;
        }
        if left == 0 {
            break;
        }
        let part = left.min(available - skip);
        each(segment.address + skip as u64, part)?;
        left -= part;
        skip = 0;
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn decode(raw: [u8; DESCRIPTOR_SIZE as usize]) -> Self {
        let raw = u128::from_le_bytes(raw);
        Self {
            address: raw as u64,
            len: (raw >> 64) as u32,
            flags: (raw >> 96) as u16,
            next: (raw >> 112) as u16,
        }
    }

    fn has(self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}
