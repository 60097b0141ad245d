use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::test_queue::{self, BUFFERS, GAP, TestQueue};

fn device() -> (TestQueue, Rng, GuestMemory) {
    let memory = test_queue::memory();
    let driver = TestQueue::new(&memory, 0, 64);
    let mut rng = Rng::new();
    let features = rng.features();
    rng.activate(test_queue::activation(&memory, &[&driver], features))
        .unwrap();
    (driver, rng, memory)
}

#[test]
fn every_buffer_is_filled_and_nothing_else() {
    let (mut driver, mut rng, memory) = device();
    let head = driver.add(&[(BUFFERS, 64, true), (BUFFERS + 0x1000, 32, true)]);
    let second = driver.add(&[(BUFFERS + 0x2000, 64, true)]);
    rng.process_queue(0).unwrap();
    assert_eq!(
        driver.take_used(),
        [(u32::from(head), 96), (u32::from(second), 64)]
    );
    let read = |offset| {
        let mut bytes = [0; 64];
        memory
            .read_slice(&mut bytes, GuestAddress(BUFFERS + offset))
            .unwrap();
        bytes
    };
    let (first, second) = (read(0), read(0x2000));
    // 64 equal or zero bytes happen once in 2^512.
    assert_ne!(first, [0; 64]);
    assert_ne!(first, second);
    assert_ne!(read(0x1000)[..32], [0; 32]);
    assert_eq!(read(0x1000)[32..], [0; 32]);
    assert_eq!(read(64), [0; 64]);
}

#[test]
fn a_huge_request_is_answered_in_part() {
    let (mut driver, mut rng, memory) = device();
    driver.add(&[(BUFFERS, 0x2_0000, true)]);
    rng.process_queue(0).unwrap();
    assert_eq!(driver.take_used(), [(0, MAX_REQUEST as u32)]);
    let beyond: u64 = memory
        .read_obj(GuestAddress(BUFFERS + MAX_REQUEST as u64))
        .unwrap();
    assert_eq!(beyond, 0);
}

#[test]
fn malformed_requests_stop_the_device() {
    for buffers in [
        &[(BUFFERS, 8, false)][..],
        &[(BUFFERS, 0, true)],
        &[(GAP - 4, 8, true)],
    ] {
        let (mut driver, mut rng, _) = device();
        driver.add(buffers);
        rng.process_queue(0).expect_err("malformed");
        assert!(driver.take_used().is_empty());
    }
    let (mut driver, mut rng, _) = device();
    driver.set_available_index(65);
    rng.process_queue(0).expect_err("ran ahead");
}

#[test]
fn after_a_reset_nothing_is_touched() {
    let (mut driver, mut rng, _) = device();
    rng.reset();
    driver.add(&[(BUFFERS, 8, true)]);
    rng.process_queue(0).unwrap();
    assert!(driver.take_used().is_empty());
    assert_eq!(rng.save_state(), DeviceState::Rng(None));
}

#[test]
fn a_queue_that_never_empties_lets_others_have_their_turn() {
    let (mut driver, mut rng, _) = device();
    let head = driver.add(&[(BUFFERS, 8, true)]);
    for _ in 0..3 {
        let turn = driver.while_full(head, || rng.process_queue(0).unwrap());
        assert_eq!(turn, Turn::Again);
        assert_eq!(driver.take_used().len(), BUDGET);
    }
}
