#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::test_queue::{self, BUFFERS, TestQueue};

/// Start and blocks of the range.
const START: u64 = 1 << 30;
const BLOCKS: u64 = 8;

struct Guest {
    memory: GuestMemory,
    queue: TestQueue,
    mem: Mem,
}

/// A guest of which `usable` blocks are usable and `requested` wanted.
fn guest(usable: u64, requested: u64) -> Guest {
    let memory = GuestMemory::from_ranges(&[
        (GuestAddress(0), test_queue::LOW as usize),
        (GuestAddress(START), (BLOCKS * BLOCK_SIZE) as usize),
    ])
    .unwrap();
    let queue = TestQueue::new(&memory, 0, 8);
    let mut mem = Mem::new(START, BLOCKS * BLOCK_SIZE);
    let features = mem.features();
    mem.activate(test_queue::activation(&memory, &[&queue], features))
        .unwrap();
    mem.request(requested * BLOCK_SIZE, usable * BLOCK_SIZE).unwrap();
    Guest { memory, queue, mem }
}

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST_SIZE];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

impl Guest {
    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        self.send(&request(kind, START + block * BLOCK_SIZE, count))
    }

    fn send(&mut self, bytes: &[u8]) -> (u16, u16) {
        self.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
        let answer = BUFFERS + 0x100;
        self.queue.add(&[
            (BUFFERS, bytes.len() as u32, false),
            (answer, RESPONSE_SIZE as u32, true),
        ]);
        self.mem.process_queue(0).unwrap();
        assert_eq!(self.queue.take_used().len(), 1);
        let kind: u16 = self.memory.read_obj(GuestAddress(answer)).unwrap();
        let state: u16 = self.memory.read_obj(GuestAddress(answer + 8)).unwrap();
        (u16::from_le(kind), u16::from_le(state))
    }

    fn mark(&self, block: u64) {
        self.memory
            .write_obj(7u8, GuestAddress(START + block * BLOCK_SIZE))
            .unwrap();
    }

    fn marked(&self) -> Vec<u64> {
        let byte = |block| -> u8 {
            self.memory
                .read_obj(GuestAddress(START + block * BLOCK_SIZE))
                .unwrap()
        };
        (0..BLOCKS).filter(|block| byte(*block) == 7).collect()
    }

    fn config(&self, field: u64) -> u64 {
        let mut data = [0; 8];
        self.mem.read_config(8 * field, &mut data);
        u64::from_le_bytes(data)
    }
}

#[test]
fn blocks_come_and_go_and_unplugged_ones_lose_their_memory() {
    let mut guest = guest(6, 4);
    assert_eq!(guest.ask(PLUG, 1, 3), (ACK, 0));
    assert_eq!(guest.ask(STATE, 1, 3), (ACK, PLUGGED));
    assert_eq!(guest.ask(STATE, 0, 2), (ACK, MIXED));
    assert_eq!(guest.ask(STATE, 4, 4), (ACK, UNPLUGGED));
    for block in 1..4 {
        guest.mark(block);
    }
    assert_eq!(guest.ask(UNPLUG, 2, 1), (ACK, 0));
    assert_eq!(guest.marked(), [1, 3]);
    assert_eq!(guest.mem.plugged(), 2 * BLOCK_SIZE);
    assert_eq!(guest.mem.save().plugged, [(1, 1), (3, 1)]);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((guest.marked(), guest.mem.plugged()), (vec![], 0));
    assert_eq!(guest.ask(STATE, 0, 8), (ACK, UNPLUGGED));
}

#[test]
fn no_more_is_plugged_than_was_requested() {
    let mut guest = guest(8, 4);
    assert_eq!(guest.ask(PLUG, 0, 5), (NACK, 0));
    assert_eq!(guest.ask(PLUG, 0, 3), (ACK, 0));
    assert_eq!(guest.ask(PLUG, 6, 2), (NACK, 0));
    assert_eq!(guest.ask(PLUG, 6, 1), (ACK, 0));
    // A smaller request leaves what is plugged until the driver gives it up.
    guest.mem.request(BLOCK_SIZE, 0).unwrap();
    assert_eq!(guest.mem.plugged(), 4 * BLOCK_SIZE);
    assert_eq!(guest.ask(PLUG, 4, 1), (NACK, 0));
    assert_eq!(guest.ask(UNPLUG, 0, 3), (ACK, 0));
    assert_eq!(guest.mem.plugged(), guest.mem.requested());
}

#[test]
fn wrong_ranges_are_refused() {
    let mut guest = guest(4, 4);
    assert_eq!(guest.ask(PLUG, 0, 1), (ACK, 0));
    let wrong = [
        // Plugged already, in part or as a whole; beyond the usable part; none.
        (PLUG, 0, 1),
        (PLUG, 0, 2),
        (PLUG, 3, 2),
        (PLUG, 4, 1),
        (PLUG, 1, 0),
        (PLUG, 1, u16::MAX),
        // Not plugged, in part or as a whole.
        (UNPLUG, 1, 1),
        (UNPLUG, 0, 2),
        (UNPLUG, 0, 0),
        (STATE, 0, 9),
        (STATE, 8, 1),
        (STATE, 0, 0),
        // No such request.
        (4, 0, 1),
        (u16::MAX, 0, 1),
    ];
    for (kind, block, count) in wrong {
        assert_eq!(
            guest.ask(kind, block, count),
            (ERROR, 0),
            "{kind} {block} {count}"
        );
    }
    for address in [
        0,
        START - BLOCK_SIZE,
        START + 4096,
        u64::MAX,
        u64::MAX - BLOCK_SIZE + 1,
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(guest.send(&request(kind, address, 1)), (ERROR, 0), "{address:#x}");
        }
    }
    assert_eq!(guest.mem.plugged(), BLOCK_SIZE);
}

#[test]
fn malformed_requests_stop_the_device() {
    let whole = (BUFFERS, REQUEST_SIZE as u32, false);
    let room = (BUFFERS + 0x100, RESPONSE_SIZE as u32, true);
    let malformed: [&[(u64, u32, bool)]; 5] = [
        &[(BUFFERS, 23, false), room],
        &[whole],
        &[whole, (BUFFERS + 0x100, 9, true)],
        &[room],
        &[(test_queue::GAP, REQUEST_SIZE as u32, false), room],
    ];
    for buffers in malformed {
        let mut guest = guest(4, 4);
        guest.queue.add(buffers);
        guest.mem.process_queue(0).expect_err("malformed");
    }
}

#[test]
fn the_configuration_tells_the_sizes_and_interrupts() {
    let mut guest = guest(4, 2);
    let interrupt = guest.mem.changes.interrupt.clone().unwrap();
    assert_eq!(interrupt.status(), 2);
    assert_eq!(guest.ask(PLUG, 0, 1), (ACK, 0));
    let fields: Vec<u64> = (0..8).map(|field| guest.config(field)).collect();
    let expected = [1, 0, START / BLOCK_SIZE, BLOCKS, 4, 1, 2, 0].map(|blocks| blocks * BLOCK_SIZE);
    assert_eq!(fields, expected);
    // Cut to the range; what is usable stays so.
    guest.mem.request(u64::MAX, u64::MAX).unwrap();
    assert_eq!([4, 6].map(|field| guest.config(field) / BLOCK_SIZE), [8, 8]);
    guest.mem.request(3 * BLOCK_SIZE - 1, 0).unwrap();
    assert_eq!([4, 6].map(|field| guest.config(field) / BLOCK_SIZE), [8, 2]);
    assert_eq!(guest.mem.config_generation(), 3);
}

#[test]
fn a_reset_leaves_blocks_plugged() {
    let mut guest = guest(4, 2);
    assert_eq!(guest.ask(PLUG, 0, 2), (ACK, 0));
    guest.mem.reset();
    assert_eq!(guest.mem.plugged(), 2 * BLOCK_SIZE);
    assert_eq!(
        guest.mem.process_queue(0).map_err(|error| error.to_string()),
        Ok(Turn::Done)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the driver asks, the count agrees with the blocks and stays below what was requested.
    #[test]
    fn the_count_is_that_of_the_blocks(requests in proptest::collection::vec((0u16..5, 0u64..10, 0u16..10), 0..40)) {
        let mut guest = guest(6, 5);
        for (kind, block, count) in requests {
            guest.ask(kind, block, count);
            let plugged = guest.mem.blocks.iter().filter(|plugged| **plugged).count() as u64;
            prop_assert_eq!(plugged * BLOCK_SIZE, guest.mem.plugged());
            prop_assert!(plugged <= 5);
            prop_assert!(guest.mem.blocks[6..].iter().all(|plugged| !plugged));
        }
    }
}
