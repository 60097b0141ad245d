//! A guest's driver in miniature, and what all tests of the device share.

#![allow(clippy::unwrap_used)]

mod far_ends;
mod flow;
mod malformed;
mod property;
mod states;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_SIZE, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::memory::GuestMemory;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::test_queue::{self, BUFFERS, TestQueue};
use crate::virtio::{DeviceError, DeviceState, VirtioDevice};

const CID: u32 = 3;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZE: u16 = 128;
const RX_BUFFER: u64 = 4096;
/// Receive buffers lie from `BUFFERS` on, what is transmitted from here on.
const TX_BUFFER: u64 = 0x9_0000;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;

/// Device and driver.
struct Guest {
    memory: GuestMemory,
    rx: TestQueue,
    tx: TestQueue,
    event: TestQueue,
    vsock: Vsock,
    /// Receive buffers handed out, by the head of their chain.
    buffers: BTreeMap<u32, u64>,
    next_buffer: u64,
    /// Credit the guest gives with every packet.
    buf_alloc: u32,
    /// Ports whose first byte was told of.
    first_data: Vec<u32>,
}

/// A device as it was saved.
fn restored(state: VsockState) -> Vsock {
    let mut vsock = Vsock::new(state.guest_cid).unwrap();
    vsock.restore_state(&DeviceState::Vsock(state)).unwrap();
    vsock
}

impl Guest {
    /// An active device whose driver has given no receive buffers yet.
    fn starved() -> Self {
        Self::with(Vsock::new(CID).unwrap())
    }

    /// An active device with plenty of receive buffers.
    fn new() -> Self {
        let mut guest = Self::starved();
        guest.give(64);
        guest
    }

    fn with(vsock: Vsock) -> Self {
        let memory = test_queue::memory();
        let mut guest = Self {
            rx: TestQueue::new(&memory, 0, QUEUE_SIZE),
            tx: TestQueue::new(&memory, 1, QUEUE_SIZE),
            event: TestQueue::new(&memory, 2, 8),
            memory,
            vsock,
            buffers: BTreeMap::new(),
            next_buffer: 0,
            buf_alloc: 1 << 20,
            first_data: Vec::new(),
        };
        let activation = test_queue::activation(
            &guest.memory,
            &[&guest.rx, &guest.tx, &guest.event],
            RING_FEATURES,
        );
        guest.vsock.activate(activation).unwrap();
        guest.run();
        guest
    }

    /// Gives receive buffers to the device and kicks.
    fn give(&mut self, count: usize) {
        for _ in 0..count {
            let address = BUFFERS + self.next_buffer % 64 * RX_BUFFER;
            self.next_buffer += 1;
            let head = self.rx.add(&[(address, RX_BUFFER as u32, true)]);
            self.buffers.insert(u32::from(head), address);
        }
        self.kick(RX);
    }

    fn kick(&mut self, queue: usize) {
        self.vsock.process_queue(queue).unwrap();
    }

    /// A header from the guest's port [`GUEST_PORT`] to the host's port [`PORT`].
    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: 2,
            src_port: GUEST_PORT,
            dst_port: PORT,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            ..Header::default()
        }
    }

    /// Queues a packet in one descriptor without a kick.
    fn post(&mut self, header: Header, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            ..header
        };
        let at = GuestAddress(TX_BUFFER);
        self.memory.write_slice(&header.encode(), at).unwrap();
        let body = GuestAddress(TX_BUFFER + HEADER_SIZE as u64);
        self.memory.write_slice(payload, body).unwrap();
        self.tx
            .add(&[(TX_BUFFER, (HEADER_SIZE + payload.len()) as u32, false)]);
    }

    /// Sends a packet in one descriptor.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.post(header, payload);
        self.kick(TX);
    }

    fn send_op(&mut self, op: u16) {
        self.send(self.header(op), &[]);
    }

    fn send_data(&mut self, payload: &[u8]) {
        self.send(self.header(op::RW), payload);
    }

    fn send_shutdown(&mut self, flags: u32) {
        let header = Header {
            flags,
            ..self.header(op::SHUTDOWN)
        };
        self.send(header, &[]);
    }

    /// Packets the device has sent since the last call. Their buffers go back to it.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let packets = self.packets_only();
        self.give(packets.len());
        packets
    }

    /// As [`packets`](Self::packets), and the buffers are kept.
    fn packets_only(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.rx.take_used();
        used.into_iter()
            .map(|(head, len)| {
                let address = self.buffers.remove(&head).unwrap();
                let mut packet = vec![0; len as usize];
                self.memory
                    .read_slice(&mut packet, GuestAddress(address))
                    .unwrap();
                let header = Header::decode(packet[..HEADER_SIZE].try_into().unwrap());
                let payload = packet.split_off(HEADER_SIZE);
                assert_eq!(header.len as usize, payload.len());
                assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
                (header, payload)
            })
            .collect()
    }

    /// Operations of the packets since the last call.
    fn ops(&mut self) -> Vec<u16> {
        self.packets().iter().map(|(header, _)| header.op).collect()
    }

    /// Whether the device asks for a `process_event`.
    fn pending(&self) -> bool {
        readable(self.vsock.event_fd().unwrap())
    }

    /// What the event loop does: serves the device until it asks for nothing.
    fn run(&mut self) {
        for _ in 0..1000 {
            if !self.pending() {
                return;
            }
            self.vsock.process_event().unwrap();
        }
        panic!("device spins");
    }

    /// Events since the last call; those of first bytes go to `first_data`.
    fn events(&mut self) -> Vec<VsockEvent> {
        let mut events = self.vsock.take_events();
        events.retain(|event| match event {
            VsockEvent::FirstData { port } => {
                self.first_data.push(*port);
                false
            }
            _ => true,
        });
        events
    }

    /// Establishes a stream to `far_end` from the guest's side.
    fn establish(&mut self, far_end: impl Into<OwnedFd>) {
        self.vsock.listen(PORT, far_end.into()).unwrap();
        self.send_op(op::REQUEST);
        let packets = self.packets();
        assert_eq!(packets[0].0.op, op::RESPONSE);
        assert_eq!(packets[0].0.buf_alloc as usize, BUFFER_SIZE);
        assert_eq!(self.events(), [VsockEvent::Connected { port: PORT }]);
    }

    /// Establishes a stream to one end of a socket pair and returns the other.
    fn establish_socket(&mut self) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        self.establish(far);
        near
    }
}

/// No packets.
const NONE: [u16; 0] = [];
const CLOSED: [VsockEvent; 1] = [VsockEvent::Closed { port: PORT }];

fn readable(fd: i32) -> bool {
    // SAFETY: the descriptor is open as long as its device, which the caller holds.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
}

/// Bytes that differ from place to place, also at distances of powers of two.
fn pattern(start: usize, len: usize) -> Vec<u8> {
    (start..start + len)
        .map(|i| (i ^ i >> 8 ^ i >> 16).wrapping_mul(31) as u8)
        .collect()
}

/// Everything that can be read now, and whether the end of file was seen.
fn drain(stream: &mut impl Read) -> (Vec<u8>, bool) {
    let mut all = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        match stream.read(&mut part) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend_from_slice(&part[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (all, false),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Payload of data packets, which there are only.
fn payload(packets: Vec<(Header, Vec<u8>)>) -> Vec<u8> {
    packets
        .into_iter()
        .flat_map(|(header, payload)| {
            assert_eq!(header.op, op::RW);
            payload
        })
        .collect()
}

#[test]
fn headers_survive_encoding() {
    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 0x1112_1314_1516_1718,
        src_port: 0x2122_2324,
        dst_port: 0x3132_3334,
        len: 0x4142_4344,
        kind: 0x5152,
        op: 0x6162,
        flags: 0x7172_7374,
        buf_alloc: 0x8182_8384,
        fwd_cnt: 0x9192_9394,
    };
    let raw = header.encode();
    assert_eq!(&raw[..3], [8, 7, 6]);
    assert_eq!(&raw[40..], [0x94, 0x93, 0x92, 0x91]);
    assert_eq!(Header::decode(&raw), header);
}

#[test]
fn the_configuration_space_holds_the_context_id() {
    let vsock = Vsock::new(CID).unwrap();
    let mut config = [0xff; 10];
    vsock.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!((vsock.device_type(), vsock.queue_sizes().len()), (19, 3));
}
