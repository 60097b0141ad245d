//! A driver that keeps the rules as far as it is told to, and knows what a device may write then.

use std::ops::Range;
use std::sync::Arc;

use arbitrary::Arbitrary;
use bulkhead_vmm::virtio::mmio::MmioTransport;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{self, HIGH, LOW, Ram, SIZE};

/// Queues a device can have here.
pub const QUEUES: usize = 5;
/// Entries of a ring at most.
pub const ENTRIES: u16 = 256;

/// Guest memory of a queue's rings: descriptors, available ring, used ring, indirect tables.
const RINGS: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const INDIRECT: u64 = 0x3000;
const INDIRECT_SIZE: u64 = 0x1000;
/// Buffers of a tidy driver lie behind the rings.
const BUFFERS: u64 = QUEUES as u64 * RINGS;

// Registers (virtio 1.2, 4.2.2).
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SELECT: u64 = 0x024;
const QUEUE_SELECT: u64 = 0x030;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
const QUEUE_NOTIFY: u64 = 0x050;
const STATUS: u64 = 0x070;
const RING_REGISTERS: [u64; 3] = [0x080, 0x090, 0x0a0];
const NEEDS_RESET: u8 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

/// A buffer.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Buffer {
    /// Where.
    pub place: Place,
    /// Bytes, unless a multiple makes it longer.
    pub len: u16,
    /// The device may write.
    pub writable: bool,
}

/// Where a buffer lies.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// In the first range of RAM.
    Low(u16),
    /// In the second.
    High(u16),
    /// So many bytes before the end of a range.
    End(bool, u8),
    /// Wherever.
    Anywhere(u64),
}

impl Place {
    fn address(self) -> u64 {
        match self {
            Self::Low(at) => BUFFERS + u64::from(at) % (SIZE - BUFFERS),
            Self::High(at) => HIGH + u64::from(at),
            Self::End(high, before) => SIZE * if high { 3 } else { 1 } - u64::from(before),
            Self::Anywhere(at) => at,
        }
    }
}

/// What a driver does.
#[derive(Arbitrary, Debug)]
pub enum Action {
    /// Brings the device up from wherever it is.
    Start {
        /// Offered ones are taken.
        features: u64,
        /// Ring sizes by queue, as powers of two; above 8: the queue stays off.
        sizes: [u8; QUEUES],
    },
    /// Makes a chain available; the content goes into its readable buffers.
    Add {
        /// Which.
        queue: u8,
        /// Of the chain.
        buffers: Vec<Buffer>,
        /// In a table of its own.
        indirect: bool,
        /// Of the readable buffers.
        content: Vec<u8>,
    },
    /// Rings the doorbell, and the device's thread looks.
    Kick(u8),
    /// The device's own event.
    Event,
    /// Reads a register.
    Read(u16, u8),
    /// Writes a register.
    Write(u16, u32),
    /// Writes any number of bytes to the registers.
    WriteBytes(u16, [u8; 9], u8),
    /// Writes a descriptor, whatever it says.
    Descriptor {
        queue: u8,
        index: u8,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    /// Sets the available index.
    Available(u8, u16),
    /// Sets an entry of the available ring.
    Entry(u8, u8, u16),
    /// Writes anything anywhere.
    Poke(u16, bool, u64),
}

/// A chain the device has.
#[derive(Debug)]
struct Outstanding {
    head: u16,
    writable: Vec<Range<u64>>,
    len: u64,
}

#[derive(Debug, Default)]
struct Queue {
    size: u16,
    free: u16,
    available: u16,
    seen: u16,
    indirect: u64,
    outstanding: Vec<Outstanding>,
}

/// The driver.
pub struct Driver<'a> {
    ram: &'a Ram,
    /// The device.
    pub transport: MmioTransport,
    queues: [Queue; QUEUES],
    sizes: Vec<u16>,
    offered: u64,
    indirect: bool,
    /// No rule was broken since the start, so that what the device may do is known.
    tidy: bool,
    before: Vec<u8>,
    after: Vec<u8>,
    /// The device may zero pages of the guest: nothing is known of its memory.
    pub discards: bool,
}

impl<'a> Driver<'a> {
    /// A driver of a device with these queues and features, over RAM that is all zero.
    pub fn new(ram: &'a Ram, device: Arc<std::sync::Mutex<dyn bulkhead_vmm::virtio::VirtioDevice>>) -> Self {
        let (sizes, offered) = {
            let device = device.lock().expect("nobody panicked");
            (device.queue_sizes().to_vec(), device.features())
        };
        ram.clear();
        let transport =
            MmioTransport::new(device, Arc::new(ram.memory.clone())).expect("there are descriptors");
        Self {
            ram,
            transport,
            queues: Default::default(),
            sizes,
            offered,
            indirect: false,
            tidy: false,
            before: Vec::new(),
            after: Vec::new(),
            discards: false,
        }
    }

    fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    fn start(&mut self, features: u64, sizes: [u8; QUEUES]) {
        self.write(STATUS, 0);
        self.ram.clear();
        let features = features & self.offered | 1 << 32;
        for status in [1, 3] {
            self.write(STATUS, status);
        }
        for word in [0, 1] {
            self.write(DRIVER_FEATURES_SELECT, word);
            self.write(DRIVER_FEATURES, (features >> (32 * word)) as u32);
        }
        self.write(STATUS, 11);
        self.queues = Default::default();
        for (index, most) in self.sizes.iter().enumerate().take(QUEUES) {
            let Some(size) = 1u16.checked_shl(sizes[index].into()).filter(|size| size <= most) else {
                continue;
            };
            self.queues[index].size = size;
            self.write(QUEUE_SELECT, index as u32);
            self.write(QUEUE_SIZE, size.into());
            let rings = index as u64 * RINGS;
            for (register, at) in RING_REGISTERS.into_iter().zip([0, AVAILABLE, USED]) {
                self.write(register, (rings + at) as u32);
                self.write(register + 4, 0);
            }
            self.write(QUEUE_READY, 1);
        }
        self.write(STATUS, 15);
        self.indirect = features & 1 << 28 != 0;
        self.tidy = true;
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        // Where there is no memory nothing can be put.
        let _ = self.ram.memory.write_slice(bytes, GuestAddress(address));
    }

    fn descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let raw =
            u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.put(at, &raw.to_le_bytes());
    }

    fn add(&mut self, index: u8, buffers: &[Buffer], indirect: bool, mut content: &[u8]) {
        let number = usize::from(index) % self.sizes.len().min(QUEUES);
        let rings = number as u64 * RINGS;
        let size = self.queues[number].size;
        let indirect = indirect && self.indirect;
        let entries = if indirect { 1 } else { buffers.len() };
        let used: usize = self.queues[number].outstanding.len();
        // A tidy driver has so many descriptors and no more.
        if size == 0 || buffers.is_empty() || entries > usize::from(size) || used >= usize::from(size) {
            return;
        }
        let mut readable = Vec::new();
        let mut writable = Vec::new();
        for buffer in buffers {
            let start = buffer.place.address();
            let range = start..start.saturating_add(buffer.len.into());
            self.tidy &= inside(&range) && range.start >= BUFFERS && !range.is_empty();
            // Readable ones come first.
            self.tidy &= buffer.writable || writable.is_empty();
            if buffer.writable {
                writable.push(range);
            } else {
                let part = content.len().min(buffer.len.into());
                self.put(start, &content[..part]);
                content = &content[part..];
                readable.push(range);
            }
        }
        let overlaps = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
        // The device may write and read the same byte in one request, but then nothing is known.
        self.tidy &= !writable
            .iter()
            .any(|range| readable.iter().any(|other| overlaps(range, other)));
        let queue = &mut self.queues[number];
        let head = queue.free % size;
        let (table, mut slot) = if indirect {
            let len = 16 * buffers.len() as u64;
            if queue.indirect + len > INDIRECT_SIZE {
                queue.indirect = 0;
            }
            let table = rings + INDIRECT + queue.indirect;
            queue.indirect += len;
            // Tables that are reused change under the device.
            self.tidy &= len <= INDIRECT_SIZE && queue.outstanding.is_empty();
            (table, 0)
        } else {
            (rings, head)
        };
        // Descriptors that are reused change under the device.
        let taken: usize = queue.outstanding.len() * 4 + buffers.len();
        self.tidy &= indirect || queue.outstanding.is_empty() || taken <= usize::from(size) / 2;
        if indirect {
            queue.free = queue.free.wrapping_add(1);
        } else {
            queue.free = queue.free.wrapping_add(buffers.len() as u16);
        }
        let len = writable.iter().map(|range| range.end - range.start).sum();
        queue.outstanding.push(Outstanding { head, writable, len });
        let available = queue.available;
        queue.available = available.wrapping_add(1);
        if indirect {
            let len = 16 * buffers.len() as u32;
            self.descriptor(rings + 16 * u64::from(head), table, len, INDIRECT_FLAG, 0);
        }
        for (position, buffer) in buffers.iter().enumerate() {
            let last = position + 1 == buffers.len();
            let next = if indirect { slot + 1 } else { (slot + 1) % size };
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let at = table + 16 * u64::from(slot);
            self.descriptor(at, buffer.place.address(), buffer.len.into(), flags, next);
            slot = next;
        }
        let entry = rings + AVAILABLE + 4 + 2 * u64::from(available % size);
        self.put(entry, &head.to_le_bytes());
        self.put(rings + AVAILABLE + 2, &available.wrapping_add(1).to_le_bytes());
    }

    /// Lets the device's thread do something and looks at what it did.
    pub fn watch(&mut self, work: impl FnOnce(&MmioTransport)) {
        if !self.tidy {
            return work(&self.transport);
        }
        self.ram.copy(&mut self.before);
        work(&self.transport);
        if self.transport.status() & NEEDS_RESET != 0 {
            self.tidy = false;
        }
        self.ram.copy(&mut self.after);
        if !self.discards {
            self.check_writes();
        }
        for number in 0..QUEUES {
            self.check_used(number);
        }
    }

    /// A device writes to used rings and to buffers it was given for that, and nowhere else.
    fn check_writes(&self) {
        if self.before == self.after {
            return;
        }
        let pages = self.before.chunks(4096).zip(self.after.chunks(4096)).enumerate();
        for (page, (before, after)) in pages.filter(|(_, (before, after))| before != after) {
            for (index, _) in before
                .iter()
                .zip(after)
                .enumerate()
                .filter(|(_, (old, new))| old != new)
            {
                let address = memory::address(page * 4096 + index);
                let number = (address / RINGS) as usize;
                let ring = address < BUFFERS
                    && (USED..INDIRECT).contains(&(address % RINGS))
                    && self.queues[number].size > 0;
                let given = || {
                    let chains = self.queues.iter().flat_map(|queue| &queue.outstanding);
                    chains
                        .flat_map(|chain| &chain.writable)
                        .any(|range| range.contains(&address))
                };
                assert!(ring || given(), "device wrote to {address:#x}");
            }
        }
    }

    /// Chains come back once, with no more bytes than they have room for.
    fn check_used(&mut self, number: usize) {
        let queue = &mut self.queues[number];
        if queue.size == 0 {
            return;
        }
        let used = number as u64 * RINGS + USED;
        let word = |at: u64, len: usize| {
            let at = at as usize;
            let mut raw = [0; 4];
            raw[..len].copy_from_slice(&self.after[at..at + len]);
            u32::from_le_bytes(raw)
        };
        let index = word(used + 2, 2) as u16;
        while queue.seen != index {
            let entry = used + 4 + 8 * u64::from(queue.seen % queue.size);
            let (head, len) = (word(entry, 4), word(entry + 4, 4));
            let position = queue
                .outstanding
                .iter()
                .position(|chain| u32::from(chain.head) == head)
                .expect("a chain that the device has");
            let chain = queue.outstanding.swap_remove(position);
            assert!(
                u64::from(len) <= chain.len,
                "{len} bytes in a chain of {}",
                chain.len
            );
            queue.seen = queue.seen.wrapping_add(1);
        }
    }

    /// Does it.
    pub fn act(&mut self, action: Action) {
        match action {
            Action::Start { features, sizes } => self.start(features, sizes),
            Action::Add {
                queue,
                buffers,
                indirect,
                content,
            } => self.add(queue, &buffers, indirect, &content),
            Action::Kick(queue) => {
                let queues = self.sizes.len().max(1);
                let queue = usize::from(queue) % queues;
                if self.transport.watched_queues().is_empty() {
                    // The device watches its doorbells itself.
                    let number = (queue as u32).to_le_bytes();
                    self.transport.write(QUEUE_NOTIFY, &number);
                    self.watch(MmioTransport::process_event);
                } else {
                    self.watch(|transport| transport.process_queue(queue));
                }
            }
            Action::Event => self.watch(MmioTransport::process_event),
            Action::Read(offset, len) => {
                let mut data = vec![0xff; usize::from(len % 9)];
                self.transport.read(u64::from(offset % 0x200), &mut data);
            }
            Action::Write(offset, value) => {
                self.tidy = false;
                // Registers are words.
                self.write(u64::from(offset % 0x200) & !3, value);
            }
            Action::WriteBytes(offset, data, len) => {
                self.tidy = false;
                self.transport
                    .write(offset.into(), &data[..usize::from(len) % data.len()]);
            }
            Action::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                self.tidy = false;
                let rings = u64::from(queue) % QUEUES as u64 * RINGS;
                self.descriptor(rings + 16 * u64::from(index), address, len, flags, next);
            }
            Action::Available(queue, index) => {
                self.tidy = false;
                let rings = u64::from(queue) % QUEUES as u64 * RINGS;
                self.put(rings + AVAILABLE + 2, &index.to_le_bytes());
            }
            Action::Entry(queue, entry, head) => {
                self.tidy = false;
                let rings = u64::from(queue) % QUEUES as u64 * RINGS;
                self.put(rings + AVAILABLE + 4 + 2 * u64::from(entry), &head.to_le_bytes());
            }
            Action::Poke(at, high, value) => {
                self.tidy = false;
                let start = if high { HIGH } else { LOW };
                self.put(start + u64::from(at), &value.to_le_bytes());
            }
        }
    }
}

fn inside(range: &Range<u64>) -> bool {
    [LOW, HIGH]
        .iter()
        .any(|start| range.start >= *start && range.end <= start + SIZE)
}
