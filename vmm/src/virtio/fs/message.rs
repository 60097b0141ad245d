//! Hands FUSE messages to the library, which has its own types for guest memory and descriptor chains.
//!
//! The library reads descriptors and message headers from guest memory, where the driver can change them at
//! any time, and panics on some combinations no driver sends. So it gets a chain of our own making: a
//! table in private memory that repeats the checked chain, with a private copy of the message header in
//! front. Only payload is still in guest memory.

mod names;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::memory::GuestMemory;
use crate::virtio::DeviceError;
use crate::virtio::queue::{Chain, MAX_SEGMENTS, for_each_part};

/// Bytes of `struct fuse_in_header`: length, opcode, id, node, user, group, process, extensions.
const IN_HEADER_SIZE: usize = 40;

/// Bytes of `struct fuse_out_header`.
const OUT_HEADER_SIZE: usize = 16;

/// How much of a message is copied: the header and the longest fixed argument, that of `FUSE_SETATTR`.
const COPY_SIZE: usize = 128;

/// Opcodes that get no answer: `FUSE_FORGET`, `FUSE_INTERRUPT`, `FUSE_BATCH_FORGET`.
const UNANSWERED: [u32; 3] = [2, 36, 42];

/// `FUSE_GETXATTR` and `FUSE_LISTXATTR`, whose argument starts with a buffer size.
const XATTR: [u32; 2] = [22, 23];

/// `FUSE_OPEN`, `FUSE_OPENDIR`, `FUSE_CREATE`, whose argument starts with the flags of open(2).
const OPENING: [u32; 3] = [14, 27, 35];

/// Flags that the library opens no file with, by our configuration and because it appends write by write. It would take them
/// for those of the open file when that is opened again behind a snapshot.
const CLEARED: u32 = (libc::O_DIRECT | libc::O_APPEND) as u32;

/// Largest value or list of extended attributes in Linux (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: u32 = 64 << 10;

/// How much of a message with names is copied: more than header, arguments and two names of `PATH_MAX` bytes
/// can take, the longest Linux sends. The target of a symbolic link follows its name and may be longer.
const NAMED_COPY_SIZE: usize = 0x3000;

/// Where the private memory appears to the library: above all that is physical.
const PRIVATE: u64 = 1 << 60;
/// Entries of the private descriptor table: the copy, a full chain, and a first segment cut in two.
const TABLE_ENTRIES: u16 = (2 * MAX_SEGMENTS) as u16;
/// Available ring behind the table, with one entry: head 0.
const AVAILABLE: u64 = PRIVATE + 16 * TABLE_ENTRIES as u64;
/// The copy of the message's start.
const COPY: u64 = AVAILABLE + 0x2000;
/// Answers to messages of our own.
const ANSWER: u64 = COPY + NAMED_COPY_SIZE as u64;
const MAX_ANSWER: usize = 0x1000;
const PRIVATE_SIZE: usize = (ANSWER - PRIVATE) as usize + MAX_ANSWER;

/// The dirty bitmap type of the guest memory the library works on, which it does not name itself.
type Bitmap = <Reader<'static> as HasBitmap>::Bitmap;

trait HasBitmap {
    type Bitmap;
}

impl<B> HasBitmap for Reader<'_, B> {
    type Bitmap = B;
}

/// Guest memory and message chains in the library's terms.
pub(super) struct Messages {
    /// Guest memory and the private region.
    view: GuestMemoryMmap<Bitmap>,
    queue: Queue,
    /// Keeps what `view` points to mapped.
    memory: Arc<GuestMemory>,
    /// The start of the message at hand.
    copy: Box<[u8; NAMED_COPY_SIZE]>,
}

impl Messages {
    /// Prepares for messages in `memory`.
    ///
    /// # Errors
    /// The private memory cannot be mapped.
    pub(super) fn new(memory: Arc<GuestMemory>) -> io::Result<Self> {
        let view = view(&memory)?;
        let queue = private_queue(&view).map_err(io::Error::other)?;
        Ok(Self {
            view,
            queue,
            memory,
            copy: Box::new([0; NAMED_COPY_SIZE]),
        })
    }

    /// What the message in `chain` asks for, and its two sides.
    ///
    /// # Errors
    /// The message has no header, no room for an answer, or asks for more than any driver does.
    pub(super) fn open(&mut self, chain: &Chain) -> Result<(Header, Reader<'_>, Writer<'_>), DeviceError> {
        let mut copied = chain.readable_len().min(COPY_SIZE);
        if copied < IN_HEADER_SIZE {
            return Err(DeviceError::Protocol("FUSE message without a header"));
        }
        // What a short message leaves is not that of the one before. Of one with names only what is read is used.
        self.copy[..COPY_SIZE].fill(0);
        chain.read_at(&self.memory, 0, &mut self.copy[..copied])?;
        let header = check(&self.copy, chain.writable_len())?;
        if OPENING.contains(&header.opcode) {
            let flags = word(&self.copy, IN_HEADER_SIZE) & !CLEARED;
            self.copy[IN_HEADER_SIZE..IN_HEADER_SIZE + 4].copy_from_slice(&flags.to_le_bytes());
        }
        if let Some(names) = names::position(header.opcode) {
            // Nothing is read twice: the guest may have changed it.
            let whole = chain.readable_len().min(NAMED_COPY_SIZE);
            chain.read_at(&self.memory, copied, &mut self.copy[copied..whole])?;
            copied = whole;
            names::check(&self.copy[IN_HEADER_SIZE..copied], names)?;
        }
        let copy = &self.copy[..copied];
        let mut table = Table::default();
        table.push(COPY, copied, 0);
        let rest = chain.readable_len() - copied;
        for_each_part(chain.readable(), copied, rest, |address, len| {
            table.push(address, len, 0);
            Ok(())
        })?;
        for segment in chain.writable() {
            table.push(segment.address, segment.len as usize, VRING_DESC_F_WRITE);
        }
        self.view
            .write_slice(copy, GuestAddress(COPY))
            .map_err(DeviceError::Memory)?;
        let (reader, writer) = self.sides(table)?;
        Ok((header, reader, writer))
    }

    /// The start of the message that was opened last, with zeroes behind what is shorter.
    pub(super) fn start(&self) -> &[u8] {
        &self.copy[..COPY_SIZE]
    }

    /// The two sides of a message of our own with room for an answer of `answer` bytes.
    ///
    /// # Errors
    /// Message or answer is too long.
    pub(super) fn open_own(
        &mut self,
        message: &[u8],
        answer: usize,
    ) -> Result<(Reader<'_>, Writer<'_>), DeviceError> {
        if message.len() > COPY_SIZE || answer > MAX_ANSWER {
            return Err(DeviceError::Protocol("own FUSE message is too long"));
        }
        let mut table = Table::default();
        table.push(COPY, message.len(), 0);
        table.push(ANSWER, answer, VRING_DESC_F_WRITE);
        self.view
            .write_slice(message, GuestAddress(COPY))
            .map_err(DeviceError::Memory)?;
        self.sides(table)
    }

    /// Reads the answer to the last message of [`open_own`](Self::open_own).
    ///
    /// # Errors
    /// The buffer is longer than the private memory.
    pub(super) fn read_own(&self, answer: &mut [u8]) -> Result<(), DeviceError> {
        self.view
            .read_slice(answer, GuestAddress(ANSWER))
            .map_err(DeviceError::Memory)
    }

    /// Publishes a chain in private memory and opens it.
    fn sides(&mut self, table: Table) -> Result<(Reader<'_>, Writer<'_>), DeviceError> {
        self.view
            .write_slice(&table.finish(), GuestAddress(PRIVATE))
            .map_err(DeviceError::Memory)?;
        self.queue.set_next_avail(0);
        let mut chains = self.queue.iter(&self.view).map_err(DeviceError::Queue)?;
        let chain = chains
            .next()
            .ok_or(DeviceError::Protocol("private queue is empty"))?;
        let library = |error| DeviceError::Backend(io::Error::other(error));
        let reader = Reader::new(&self.view, chain.clone()).map_err(library)?;
        let writer = Writer::new(&self.view, chain).map_err(library)?;
        Ok((reader, writer))
    }
}

/// What a message asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Operation, `FUSE_…`.
    pub(super) opcode: u32,
    /// The file it is about.
    pub(super) node: u64,
}

fn word(copy: &[u8; NAMED_COPY_SIZE], at: usize) -> u32 {
    u32::from_le_bytes([copy[at], copy[at + 1], copy[at + 2], copy[at + 3]])
}

/// Refuses messages the library would panic or run out of memory on.
fn check(copy: &[u8; NAMED_COPY_SIZE], writable: usize) -> Result<Header, DeviceError> {
    let opcode = word(copy, 4);
    if writable < OUT_HEADER_SIZE && !UNANSWERED.contains(&opcode) {
        return Err(DeviceError::Protocol("FUSE message without room for an answer"));
    }
    if XATTR.contains(&opcode) && word(copy, IN_HEADER_SIZE) > MAX_XATTR {
        return Err(DeviceError::Protocol(
            "FUSE request for too long an extended attribute",
        ));
    }
    let node = u64::from(word(copy, 16)) | u64::from(word(copy, 20)) << 32;
    Ok(Header { opcode, node })
}

/// A descriptor table (virtio 1.2, 2.7.5) in which every descriptor is followed by the next.
#[derive(Default)]
struct Table {
    descriptors: Vec<[u8; 16]>,
}

impl Table {
    fn push(&mut self, address: u64, len: usize, flags: u32) {
        let next = self.descriptors.len() as u128 + 1;
        let flags = u128::from(flags | VRING_DESC_F_NEXT);
        let descriptor = u128::from(address) | (len as u128) << 64 | flags << 96 | next << 112;
        self.descriptors.push(descriptor.to_le_bytes());
    }

    fn finish(mut self) -> Vec<u8> {
        if let Some(last) = self.descriptors.last_mut() {
            last[12] &= !(VRING_DESC_F_NEXT as u8);
        }
        self.descriptors.into_flattened()
    }
}

/// The same guest memory with the library's bitmap type, and the private region.
fn view(memory: &GuestMemory) -> io::Result<GuestMemoryMmap<Bitmap>> {
    let mut regions = Vec::new();
    for region in memory.iter() {
        // SAFETY: the mapping exists and stays as long as `Messages` holds its owner; the new region does not
        // unmap it.
        let mapping = unsafe {
            MmapRegion::<Bitmap>::build_raw(region.as_ptr(), region.size(), region.prot(), region.flags())
        };
        let mapping = mapping.map_err(io::Error::other)?;
        regions.extend(GuestRegionMmap::new(mapping, region.start_addr()));
    }
    let private = MmapRegion::new(PRIVATE_SIZE).map_err(io::Error::other)?;
    regions.extend(GuestRegionMmap::new(private, GuestAddress(PRIVATE)));
    GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
}

/// A queue with one chain, that of the private table.
fn private_queue(view: &GuestMemoryMmap<Bitmap>) -> Result<Queue, Box<dyn std::error::Error + Send + Sync>> {
    let mut queue = Queue::new(TABLE_ENTRIES)?;
    queue.try_set_desc_table_address(GuestAddress(PRIVATE))?;
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE))?;
    queue.set_ready(true);
    view.write_obj(1u16, GuestAddress(AVAILABLE + 2))?;
    Ok(queue)
}
