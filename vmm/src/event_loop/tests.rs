#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::os::fd::OwnedFd;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::GuestMemory;
use crate::virtio::test_queue::{self, BUFFERS, TestQueue};

const CID: u32 = 3;
const PORT: u32 = 1024;
const STATUS: u64 = 0x70;
const TX: usize = 1;

/// `virtio_vsock_hdr` (virtio 1.2, 5.10.6) of a packet from the guest's port 5000.
fn header(len: usize, op: u16) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(u64::from(CID).to_le_bytes());
    header.extend(2u64.to_le_bytes());
    for word in [5000, PORT, len as u32] {
        header.extend(word.to_le_bytes());
    }
    header.extend(1u16.to_le_bytes());
    header.extend(op.to_le_bytes());
    for word in [0u32, 1 << 20, 0] {
        header.extend(word.to_le_bytes());
    }
    header
}

struct Guest {
    memory: GuestMemory,
    transport: Arc<MmioTransport>,
    queues: Vec<TestQueue>,
    devices: DeviceLoop,
}

impl Guest {
    /// A VM whose one device is a socket device with a driver, and one registered port.
    fn new(far_end: impl Into<OwnedFd>) -> Self {
        let memory = test_queue::memory();
        let vsock = Arc::new(Mutex::new(Vsock::new(CID).unwrap()));
        vsock.lock().unwrap().listen(PORT, far_end.into()).unwrap();
        let transport = Arc::new(MmioTransport::new(vsock.clone(), Arc::new(memory.clone())).unwrap());
        let devices = DeviceLoop::new(std::slice::from_ref(&transport), &vsock).unwrap();
        let write = |offset, value: u32| transport.write(offset, &value.to_le_bytes());
        write(STATUS, 1);
        write(STATUS, 3);
        write(0x24, 1);
        write(0x20, 1);
        write(STATUS, 11);
        let queues: Vec<_> = [128, 128, 8]
            .into_iter()
            .enumerate()
            .map(|(index, size)| {
                let queue = TestQueue::new(&memory, index as u64, size);
                write(0x30, index as u32);
                write(0x38, u32::from(size));
                write(0x80, queue.descriptors() as u32);
                write(0x90, queue.available() as u32);
                write(0xa0, queue.used() as u32);
                write(0x44, 1);
                queue
            })
            .collect();
        write(STATUS, 15);
        assert_eq!(transport.status(), 15);
        Self {
            memory,
            transport,
            queues,
            devices,
        }
    }

    /// Puts a packet into the transmit queue and kicks.
    fn send(&mut self, op: u16, payload: &[u8]) {
        let packet = [header(payload.len(), op), payload.to_vec()].concat();
        // Each packet has its place: none is taken before the loop turns.
        let address = BUFFERS + u64::from(self.queues[TX].available_index()) * 0x8000;
        self.memory.write_slice(&packet, GuestAddress(address)).unwrap();
        self.queues[TX].add(&[(address, packet.len() as u32, false)]);
        self.transport.write(0x50, &(TX as u32).to_le_bytes());
    }
}

const REQUEST: u16 = 1;
const RW: u16 = 5;

#[test]
fn what_the_guest_sent_before_its_end_is_delivered_to_a_slow_reader() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut guest = Guest::new(writer);
    guest.send(REQUEST, &[]);
    // More than a pipe holds.
    for part in 0..5u8 {
        guest.send(RW, &[part; 30_000]);
    }
    let reading = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        let mut bytes = vec![0; 150_000];
        reader.read_exact(&mut bytes).unwrap();
        bytes
    });
    guest.devices.deliver(Duration::from_secs(30)).unwrap();
    let bytes = reading.join().unwrap();
    assert!(
        bytes
            .chunks(30_000)
            .zip(0..)
            .all(|(part, value)| part == [value; 30_000])
    );
}

#[test]
fn a_reader_that_does_not_read_is_waited_for_no_longer_than_the_limit() {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut guest = Guest::new(writer);
    guest.send(REQUEST, &[]);
    for part in 0..5u8 {
        guest.send(RW, &[part; 30_000]);
    }
    let began = Instant::now();
    guest.devices.deliver(Duration::from_millis(50)).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert!(began.elapsed() < Duration::from_secs(10));
    drop(reader);
}

#[test]
fn without_anything_to_deliver_nothing_is_waited_for() {
    let (_reader, writer) = std::io::pipe().unwrap();
    let guest = Guest::new(writer);
    let began = Instant::now();
    guest.devices.deliver(Duration::from_secs(60)).unwrap();
    assert!(began.elapsed() < Duration::from_secs(30));
}
