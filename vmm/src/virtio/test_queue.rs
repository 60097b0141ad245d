//! The driver's end of a split virtqueue, for unit tests of devices.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::{DeviceQueue, RING_FEATURES};
use super::{Activation, Interrupt};
use crate::memory::GuestMemory;

/// Bytes of guest memory below [`GAP`] of [`memory`].
pub const LOW: u64 = 0x10_0000;
/// Where the hole in [`memory`] starts; it is one megabyte long and followed by one of memory.
pub const GAP: u64 = LOW;
/// Where buffers may go: below are the rings of up to four queues.
pub const BUFFERS: u64 = 0x4_0000;

/// Two megabytes of guest memory with a hole in between.
pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[
        (GuestAddress(0), LOW as usize),
        (GuestAddress(2 * LOW), LOW as usize),
    ])
    .unwrap()
}

/// An interrupt nobody listens to but the test.
pub fn interrupt() -> Arc<Interrupt> {
    Arc::new(Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap()))
}

/// A driver's view of one queue. The rings of queue `n` lie at `n * 0x1_0000`.
#[derive(Debug)]
pub struct TestQueue {
    memory: GuestMemory,
    size: u16,
    base: u64,
    free: u16,
    available: u16,
    seen: u16,
}

impl TestQueue {
    /// Queue number `index` with `size` entries, its rings zeroed.
    pub fn new(memory: &GuestMemory, index: u64, size: u16) -> Self {
        let base = index * 0x1_0000;
        memory.write_slice(&[0; 0x1_0000], GuestAddress(base)).unwrap();
        Self {
            memory: memory.clone(),
            size,
            base,
            free: 0,
            available: 0,
            seen: 0,
        }
    }

    /// Guest address of the descriptor table.
    pub fn descriptors(&self) -> u64 {
        self.base
    }

    /// Guest address of the available ring.
    pub fn available(&self) -> u64 {
        self.base + 0x8000
    }

    /// Guest address of the used ring.
    pub fn used(&self) -> u64 {
        self.base + 0xa000
    }

    /// The queue as the transport hands it to the device.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_size(self.size);
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors()))
            .unwrap();
        queue
            .try_set_avail_ring_address(GuestAddress(self.available()))
            .unwrap();
        queue
            .try_set_used_ring_address(GuestAddress(self.used()))
            .unwrap();
        queue.set_ready(true);
        queue
    }

    /// The device's end of this queue with all ring features.
    pub fn device_queue(&self) -> DeviceQueue {
        DeviceQueue::new(
            self.queue(),
            Arc::new(self.memory.clone()),
            interrupt(),
            RING_FEATURES,
        )
    }

    /// Writes one descriptor, whatever it says.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u32, next: u16) {
        write_descriptor(&self.memory, self.descriptors(), index, address, len, flags, next);
    }

    /// Makes the chain that starts at `head` available.
    pub fn publish(&mut self, head: u16) {
        let entry = self.available() + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// The available index.
    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// Sets the available index, whatever it says.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory
            .write_obj(index.to_le(), GuestAddress(self.available() + 2))
            .unwrap();
    }

    /// Asks for an interrupt when the device has used the buffer with this number (`EVENT_IDX`).
    pub fn set_used_event(&self, index: u16) {
        let address = self.available() + 4 + 2 * u64::from(self.size);
        self.memory
            .write_obj(index.to_le(), GuestAddress(address))
            .unwrap();
    }

    /// The available index at which the device wants a kick (`EVENT_IDX`).
    pub fn available_event(&self) -> u16 {
        let address = self.used() + 4 + 8 * u64::from(self.size);
        u16::from_le(self.memory.read_obj(GuestAddress(address)).unwrap())
    }

    /// Makes a chain of `(address, length, device-writable)` buffers available; returns its head.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.free % self.size;
        for (position, &(address, len, writable)) in buffers.iter().enumerate() {
            let index = self.free % self.size;
            self.free = self.free.wrapping_add(1);
            let mut flags = if writable { VRING_DESC_F_WRITE } else { 0 };
            if position + 1 < buffers.len() {
                flags |= VRING_DESC_F_NEXT;
            }
            self.set_descriptor(index, address, len, flags, self.free % self.size);
        }
        self.publish(head);
        head
    }

    /// Fills the ring with `head` and keeps it full from another thread while `work` runs, as a guest with
    /// several processors can, up to 64 times over.
    pub fn while_full<T>(&mut self, head: u16, work: impl FnOnce() -> T) -> T {
        for index in 0..self.size {
            let entry = self.available() + 4 + 2 * u64::from(index);
            self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        }
        let (memory, size) = (&self.memory, self.size);
        let (used, available) = (GuestAddress(self.used() + 2), GuestAddress(self.available() + 2));
        let start = u16::from_le(memory.load(used, Ordering::Acquire).unwrap());
        let fill = || {
            let used = u16::from_le(memory.load(used, Ordering::Acquire).unwrap());
            if used.wrapping_sub(start) >= 64 * size {
                return;
            }
            let index = used.wrapping_add(size).to_le();
            memory.store(index, available, Ordering::Release).unwrap();
        };
        fill();
        meanwhile(fill, work)
    }

    /// `(head, bytes written)` of the chains the device has used since the last call.
    pub fn take_used(&mut self) -> Vec<(u32, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        let mut used = Vec::new();
        while self.seen != u16::from_le(index) {
            let entry = self.used() + 4 + 8 * u64::from(self.seen % self.size);
            let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(entry)).unwrap();
            used.push((u32::from_le(head), u32::from_le(len)));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }
}

/// Repeats `aside` in another thread while `work` runs.
pub fn meanwhile<T>(mut aside: impl FnMut() + Send, work: impl FnOnce() -> T) -> T {
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also when `work` panics.
        let _stop = Stop(done);
        scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                aside();
            }
        });
        work()
    })
}

/// Writes descriptor `index` of the table at `table`.
pub fn write_descriptor(
    memory: &GuestMemory,
    table: u64,
    index: u16,
    address: u64,
    len: u32,
    flags: u32,
    next: u16,
) {
    let raw = u128::from(address)
        | u128::from(len) << 64
        | u128::from(flags as u16) << 96
        | u128::from(next) << 112;
    let at = GuestAddress(table + 16 * u64::from(index));
    memory.write_slice(&raw.to_le_bytes(), at).unwrap();
}

/// An activation of a device with these queues.
pub fn activation(memory: &GuestMemory, queues: &[&TestQueue], features: u64) -> Activation {
    Activation {
        memory: memory.clone(),
        queues: queues.iter().map(|queue| queue.queue()).collect(),
        interrupt: interrupt(),
        features,
    }
}
