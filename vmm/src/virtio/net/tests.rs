#![allow(clippy::unwrap_used)]

mod malformed;
pub mod pairs;
mod real_tap;

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::GuestMemory;
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::test_queue::{self, BUFFERS, TestQueue};
use crate::virtio::{DeviceError, VirtioDevice};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 12;
const TX_BUFFER: u64 = 0xc_0000;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const LARGE: u64 = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

/// Device, driver, and the other end of the wire.
struct Guest {
    memory: GuestMemory,
    rx: TestQueue,
    tx: TestQueue,
    net: Net,
    wire: std::fs::File,
}

impl Guest {
    /// A device whose tap is one end of a pair of sockets, which keep frames apart as a tap does.
    fn new(features: u64) -> Self {
        let kind = SockType::SeqPacket;
        let (near, far) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).unwrap();
        setsockopt(&near, sockopt::SndBuf, &(1 << 20)).unwrap();
        let mut net = Net::new(0, 1).unwrap();
        net.attach(vec![far], MAC, 1500).unwrap();
        net.tap().unwrap().plain = true;
        let memory = test_queue::memory();
        let mut guest = Self {
            rx: TestQueue::new(&memory, 0, 256),
            tx: TestQueue::new(&memory, 1, 256),
            memory,
            net,
            wire: near.into(),
        };
        let features = RING_FEATURES | features;
        let activation = test_queue::activation(&guest.memory, &[&guest.rx, &guest.tx], features);
        guest.net.activate(activation).unwrap();
        guest
    }

    fn kick(&mut self, queue: usize) {
        self.net.process_queue(queue).unwrap();
    }

    fn run(&mut self) {
        for _ in 0..100 {
            if !pending(&self.net) {
                return;
            }
            self.net.process_event().unwrap();
        }
        panic!("device spins");
    }

    /// Gives receive buffers, one behind the other from `BUFFERS` on.
    fn give(&mut self, count: u64, size: u32) {
        for n in 0..count {
            self.rx.add(&[(BUFFERS + n * u64::from(size), size, true)]);
        }
        self.kick(RX);
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    /// Makes a frame in these pieces available.
    fn post(&mut self, frame: &[u8], pieces: &[usize]) {
        self.memory.write_slice(frame, GuestAddress(TX_BUFFER)).unwrap();
        let mut at = TX_BUFFER;
        let mut buffers = Vec::new();
        for &len in pieces {
            buffers.push((at, len as u32, false));
            at += len as u64;
        }
        self.tx.add(&buffers);
    }
}

fn pending(net: &Net) -> bool {
    // SAFETY: the descriptor is open as long as the device is.
    let fd = unsafe { BorrowedFd::borrow_raw(net.event_fd().unwrap()) };
    poll(
        &mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)],
        PollTimeout::ZERO,
    )
    .unwrap()
        == 1
}

/// A frame with a header in front, both different from byte to byte.
fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ i >> 8).wrapping_mul(31) as u8).collect()
}

#[test]
fn the_configuration_space_holds_the_address() {
    let guest = Guest::new(0);
    let mut config = [0xff; 14];
    guest.net.read_config(0, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [0; 8]);
    assert_eq!((guest.net.name(), guest.net.device_type()), ("net0", 1));
}

#[test]
fn addresses_and_mtus_are_checked() {
    let null = || -> OwnedFd { std::fs::File::open("/dev/null").unwrap().into() };
    let attach = |mac, mtu| match Net::new(3, 1).unwrap().attach(vec![null()], mac, mtu) {
        Err(SlotError::Wire(3, error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(matches!(attach([1, 0, 0, 0, 0, 1], 1500), NetError::Address));
    assert!(matches!(attach([0; 6], 1500), NetError::Address));
    assert!(matches!(attach(MAC, 67), NetError::Mtu(67)));
    assert!(matches!(attach(MAC, 1500), NetError::Poller(_)));
}

#[test]
fn what_is_not_a_tap_cannot_be_activated() {
    let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut net = Net::new(0, 1).unwrap();
    net.attach(vec![near.into()], MAC, 1500).unwrap();
    let memory = test_queue::memory();
    let queue = TestQueue::new(&memory, 0, 8);
    let activation = test_queue::activation(&memory, &[&queue, &queue], 0);
    assert!(matches!(net.activate(activation), Err(DeviceError::Backend(_))));
}

#[test]
fn an_empty_slot_is_no_device() {
    let mut net = Net::new(1, 1).unwrap();
    assert_eq!(net.device_type(), 0);
    let memory = test_queue::memory();
    let mut queue = TestQueue::new(&memory, 0, 8);
    let activation = test_queue::activation(&memory, &[&queue, &queue], 0);
    // A restored driver had one here.
    net.activate(activation).unwrap();
    net.process_queue(RX).unwrap();
    net.process_queue(TX).unwrap();
    assert!(queue.take_used().is_empty());
    net.process_event().unwrap();
    assert!(matches!(net.detach(), Err(SlotError::Empty(1))));
    assert_eq!(net.save().wire, None);
}

#[test]
fn a_slot_is_used_again() {
    let mut guest = Guest::new(MERGEABLE);
    guest.give(4, 2048);
    let (_near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(
        guest.net.attach(vec![far.into()], MAC, 1500),
        Err(SlotError::Occupied(0))
    ));
    guest.net.detach().unwrap();
    // The tap is closed, and a driver that has not noticed finds nothing.
    assert_eq!(guest.net.device_type(), 0);
    assert!(guest.wire.write(&frame(100)).is_err());
    guest.net.process_queue(RX).unwrap();
    assert_eq!(guest.rx.take_used(), []);
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let other = [2, 0, 0, 0, 0, 9];
    guest.net.attach(vec![far.into()], other, 9000).unwrap();
    assert_eq!(
        (guest.net.device_type(), guest.net.save().wire),
        (1, Some((other, 9000)))
    );
    // Only a driver that starts anew gets frames.
    guest.net.process_queue(RX).unwrap();
    assert!(guest.net.save().queues.is_empty());
    drop(near);
}

#[test]
fn frames_leave_in_any_number_of_descriptors() {
    let mut guest = Guest::new(0);
    let frame = frame(1000);
    let layouts: [&[usize]; 4] = [&[1000], &[12, 988], &[5, 7, 14, 974], &[11, 2, 987]];
    for pieces in layouts {
        guest.post(&frame, pieces);
        guest.kick(TX);
        let mut received = [0; 2000];
        assert_eq!(guest.wire.read(&mut received).unwrap(), 1000, "{pieces:?}");
        assert!(received[..1000] == frame);
        assert_eq!(guest.tx.take_used().len(), 1);
    }
}

#[test]
fn frames_of_a_bad_size_are_dropped() {
    let mut guest = Guest::new(0);
    for len in [12, 25, 12 + 18 + 65_536] {
        guest.post(&frame(len), &[len]);
    }
    guest.post(&frame(26), &[26]);
    guest.kick(TX);
    assert_eq!(guest.tx.take_used().len(), 4);
    let mut received = [0; 100];
    assert_eq!(guest.wire.read(&mut received).unwrap(), 26);
    assert_eq!(
        guest.wire.read(&mut received).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
}

#[test]
fn a_full_tap_holds_frames_back_without_spinning() {
    let mut guest = Guest::new(0);
    let frame = frame(1500);
    for _ in 0..256 {
        guest.post(&frame, &[1500]);
    }
    guest.kick(TX);
    guest.run();
    let sent = guest.tx.take_used().len();
    assert!((1..256).contains(&sent), "{sent}");
    let mut left = 256;
    let mut received = [0; 2000];
    while left > 0 {
        match guest.wire.read(&mut received) {
            Ok(len) => {
                assert_eq!(len, 1500);
                left -= 1;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                assert!(pending(&guest.net), "{left} frames are stuck");
                guest.run();
            }
        }
    }
    guest.run();
    assert_eq!(guest.tx.take_used().len(), 256 - sent);
}

#[test]
fn a_frame_arrives_in_one_buffer() {
    let mut guest = Guest::new(MERGEABLE);
    guest.give(4, 2048);
    let frame = frame(1000);
    assert_eq!(guest.wire.write(&frame).unwrap(), 1000);
    guest.run();
    let used = guest.rx.take_used();
    assert_eq!((used.len(), used[0].1), (1, 1000));
    let received = guest.bytes(BUFFERS, 1000);
    assert_eq!(received[10..12], [1, 0], "num_buffers");
    assert_eq!((&received[..10], &received[12..]), (&frame[..10], &frame[12..]));
}

#[test]
fn a_large_frame_is_spread_over_buffers() {
    let mut guest = Guest::new(LARGE);
    guest.give(128, 1024);
    for round in 0..3_u64 {
        let frame = frame(5000);
        assert_eq!(guest.wire.write(&frame).unwrap(), 5000);
        guest.run();
        let used = guest.rx.take_used();
        let lengths: Vec<u32> = used.iter().map(|used| used.1).collect();
        assert_eq!(lengths, [1024, 1024, 1024, 1024, 904]);
        let received = guest.bytes(BUFFERS + round * 5 * 1024, 5000);
        assert_eq!(received[10..12], [5, 0]);
        assert!(received[12..] == frame[12..]);
    }
    let full = frame(HEADER + 14 + 65_535);
    assert_eq!(guest.wire.write(&full).unwrap(), full.len());
    guest.run();
    assert_eq!(guest.rx.take_used().len(), full.len().div_ceil(1024));
}

#[test]
fn frames_wait_for_buffers_without_spinning() {
    let mut guest = Guest::new(LARGE);
    // Not enough for the largest frame, so that nothing may be read yet.
    guest.give(16, 2048);
    for len in [100, 3000, 200] {
        assert_eq!(guest.wire.write(&frame(len)).unwrap(), len);
    }
    guest.run();
    assert!(!pending(&guest.net));
    assert_eq!(guest.rx.take_used(), []);
    guest.give(20, 2048);
    let lengths: Vec<u32> = guest.rx.take_used().iter().map(|used| used.1).collect();
    assert_eq!(lengths, [100, 2048, 952, 200]);
}

#[test]
fn without_mergeable_buffers_each_holds_a_frame() {
    let mut guest = Guest::new(0);
    guest.give(2, 1530);
    for len in [1526, 60] {
        assert_eq!(guest.wire.write(&frame(len)).unwrap(), len);
    }
    guest.run();
    let lengths: Vec<u32> = guest.rx.take_used().iter().map(|used| used.1).collect();
    assert_eq!(lengths, [1526, 60]);
    assert_eq!(guest.bytes(BUFFERS + 1530 + 10, 2), [1, 0]);
}

#[test]
fn saving_gives_held_buffers_back() {
    let mut guest = Guest::new(LARGE);
    guest.give(64, 2048);
    assert_eq!(guest.wire.write(&frame(100)).unwrap(), 100);
    guest.run();
    let state = guest.net.save();
    assert_eq!(state.wire, Some((MAC, 1500)));
    assert_eq!(
        (state.queues[RX].next_available, state.queues[RX].next_used),
        (1, 1)
    );
    guest.wire.write_all(&frame(100)).unwrap();
    guest.run();
    assert_eq!(guest.rx.take_used(), [(0, 100), (1, 100)]);
}

#[test]
fn after_a_reset_nothing_is_touched() {
    let mut guest = Guest::new(MERGEABLE);
    guest.give(4, 2048);
    guest.net.reset();
    guest.wire.write_all(&frame(100)).unwrap();
    guest.post(&frame(100), &[100]);
    guest.run();
    guest.kick(TX);
    assert_eq!((guest.rx.take_used(), guest.tx.take_used()), (vec![], vec![]));
}

#[test]
fn a_wire_that_breaks_is_an_error() {
    let mut guest = Guest::new(MERGEABLE);
    let (unconnected, other) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK,
    )
    .unwrap();
    drop(other);
    guest.wire = unconnected.into();
    guest.post(&frame(100), &[100]);
    assert!(matches!(
        guest.net.process_queue(TX),
        Err(DeviceError::Backend(_))
    ));
    guest.kick(TX);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Frames come out whole and in order, whatever their sizes and those of the buffers.
    #[test]
    fn frames_keep_their_order(
        sizes in vec(26..9000usize, 1..40),
        buffer in 100..4000u32,
        batch in 1..64u64,
    ) {
        let mut guest = Guest::new(LARGE);
        let mut at = Vec::new();
        let mut received: Vec<Vec<u8>> = Vec::new();
        let mut next = 0;
        let mut partial = (0, Vec::new());
        let mut written = 0;
        for _ in 0..5000 {
            if received.len() == sizes.len() {
                break;
            }
            if written < sizes.len() && guest.wire.write(&frame(sizes[written])).is_ok() {
                written += 1;
            }
            // As many as the ring takes, in place of those that came back.
            while at.len() - next < 200.min(batch as usize * 40) {
                let address = BUFFERS + (at.len() as u64 % 100) * 4000;
                guest.rx.add(&[(address, buffer, true)]);
                at.push(address);
            }
            guest.kick(RX);
            guest.run();
            for (_, len) in guest.rx.take_used() {
                let data = guest.bytes(at[next], len as usize);
                next += 1;
                if partial.0 == 0 {
                    partial = (u16::from_le_bytes([data[10], data[11]]), Vec::new());
                }
                partial.0 -= 1;
                partial.1.extend(data);
                if partial.0 == 0 {
                    received.push(std::mem::take(&mut partial.1));
                }
            }
        }
        if u64::from(buffer) * 200.min(batch * 40) >= 65_565 {
            prop_assert_eq!(received.len(), sizes.len());
        }
        for (received, &size) in received.iter().zip(&sizes) {
            prop_assert!(received[HEADER..] == frame(size)[HEADER..]);
        }
    }
}
