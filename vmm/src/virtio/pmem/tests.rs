use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::test_queue::{self, BUFFERS, TestQueue};

fn device() -> (TestQueue, Pmem, GuestMemory) {
    let memory = test_queue::memory();
    let driver = TestQueue::new(&memory, 0, 64);
    let mut pmem = Pmem::new(0, 0x1_4000_0000, 0x80_0000);
    pmem.activate(test_queue::activation(&memory, &[&driver], pmem.features()))
        .unwrap();
    (driver, pmem, memory)
}

#[test]
fn the_configuration_names_the_region() {
    let (_, pmem, _) = device();
    let mut data = [0; 16];
    pmem.read_config(0, &mut data);
    assert_eq!(data[..8], 0x1_4000_0000u64.to_le_bytes());
    assert_eq!(data[8..], 0x80_0000u64.to_le_bytes());
    let mut high = [0; 4];
    pmem.read_config(4, &mut high);
    assert_eq!(u32::from_le_bytes(high), 1);
}

#[test]
fn a_flush_succeeds_and_anything_else_fails() {
    let (mut driver, mut pmem, memory) = device();
    for (kind, result) in [(0u32, 0u32), (1, u32::MAX), (u32::MAX, u32::MAX)] {
        memory.write_obj(kind.to_le(), GuestAddress(BUFFERS)).unwrap();
        memory
            .write_obj(0x5555_5555u32, GuestAddress(BUFFERS + 8))
            .unwrap();
        let head = driver.add(&[(BUFFERS, 4, false), (BUFFERS + 8, 4, true)]);
        pmem.process_queue(0).unwrap();
        assert_eq!(driver.take_used(), [(u32::from(head), 4)]);
        assert_eq!(memory.read_obj::<u32>(GuestAddress(BUFFERS + 8)).unwrap(), result);
    }
}

#[test]
fn malformed_requests_stop_the_device() {
    for buffers in [
        &[(BUFFERS, 4, true)][..],
        &[(BUFFERS, 4, false)],
        &[(BUFFERS, 3, false), (BUFFERS, 4, true)],
        &[(BUFFERS, 4, false), (BUFFERS, 3, true)],
        &[(BUFFERS, 4, true), (BUFFERS, 4, false)],
        &[(u64::MAX - 2, 4, false), (BUFFERS, 4, true)],
    ] {
        let (mut driver, mut pmem, _) = device();
        driver.add(buffers);
        pmem.process_queue(0).expect_err("malformed");
        assert!(driver.take_used().is_empty());
    }
}

#[test]
fn a_queue_that_never_empties_lets_others_have_their_turn() {
    let (mut driver, mut pmem, _) = device();
    let head = driver.add(&[(BUFFERS, 4, false), (BUFFERS + 8, 4, true)]);
    for _ in 0..3 {
        let turn = driver.while_full(head, || pmem.process_queue(0).unwrap());
        assert_eq!(turn, Turn::Again);
        assert_eq!(driver.take_used().len(), BUDGET);
    }
}
