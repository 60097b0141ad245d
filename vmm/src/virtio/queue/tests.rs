use proptest::prelude::*;
use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::*;
use crate::virtio::test_queue::{self, BUFFERS, GAP, LOW, TestQueue, write_descriptor};

const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;

fn pair(size: u16) -> (TestQueue, DeviceQueue) {
    let memory = test_queue::memory();
    let driver = TestQueue::new(&memory, 0, size);
    let device = driver.device_queue();
    (driver, device)
}

fn chain_error(device: &mut DeviceQueue) -> ChainError {
    match device.pop() {
        Err(DeviceError::Chain(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_chain_is_copied_in_and_out() {
    let (mut driver, mut device) = pair(8);
    let memory = device.memory().clone();
    memory.write_slice(b"hello", GuestAddress(BUFFERS)).unwrap();
    memory
        .write_slice(b"world", GuestAddress(BUFFERS + 0x100))
        .unwrap();
    let head = driver.add(&[
        (BUFFERS, 5, false),
        (BUFFERS + 0x100, 5, false),
        (BUFFERS + 0x200, 3, true),
        (BUFFERS + 0x300, 4, true),
    ]);
    let chain = device.pop().unwrap().unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (10, 7));
    let mut data = [0; 6];
    chain.read_at(&memory, 3, &mut data).unwrap();
    assert_eq!(&data, b"loworl");
    chain.write_at(&memory, 2, b"abcd").unwrap();
    let byte: u8 = memory.read_obj(GuestAddress(BUFFERS + 0x202)).unwrap();
    let rest: [u8; 4] = memory.read_obj(GuestAddress(BUFFERS + 0x300)).unwrap();
    assert_eq!((byte, &rest), (b'a', b"bcd\0"));
    assert!(matches!(
        chain.read_at(&memory, 5, &mut data),
        Err(DeviceError::Protocol(_))
    ));
    assert!(matches!(
        chain.write_at(&memory, 4, b"abcd"),
        Err(DeviceError::Protocol(_))
    ));
    assert!(matches!(
        chain.write_at(&memory, usize::MAX, b"abcd"),
        Err(DeviceError::Protocol(_))
    ));
    device.add_used(chain, 6).unwrap();
    assert_eq!(driver.take_used(), [(u32::from(head), 6)]);
    assert!(device.pop().unwrap().is_none());
}

#[test]
fn vectors_cover_exactly_the_bytes_asked_for() {
    let (mut driver, mut device) = pair(8);
    let memory = device.memory().clone();
    driver.add(&[(BUFFERS, 5, false), (BUFFERS + 0x100, 5, false)]);
    let chain = device.pop().unwrap().unwrap();
    let mut vectors = chain.read_vectors(&memory, 3, 6).unwrap();
    let lengths = |vectors: &IoVecs<'_>| vectors.as_slice().iter().map(|v| v.iov_len).collect::<Vec<_>>();
    assert_eq!(lengths(&vectors), [2, 4]);
    let front = vectors.split_to(3);
    assert_eq!((lengths(&front), front.len()), (vec![2, 1], 3));
    assert_eq!((lengths(&vectors), vectors.len()), (vec![3], 3));
    memory.write_slice(&[0xff; 0x200], GuestAddress(BUFFERS)).unwrap();
    front.zero();
    let bytes: [u8; 6] = memory.read_obj(GuestAddress(BUFFERS + 2)).unwrap();
    assert_eq!(bytes, [0xff, 0, 0, 0xff, 0xff, 0xff]);
    let bytes: [u8; 2] = memory.read_obj(GuestAddress(BUFFERS + 0x100)).unwrap();
    assert_eq!(bytes, [0, 0xff]);
    vectors.advance(3);
    assert!(vectors.is_empty() && vectors.as_slice().is_empty());
    assert!(chain.read_vectors(&memory, 5, 6).is_err());
    assert!(chain.write_vectors(&memory, 0, 1).is_err());
    assert!(chain.write_vectors(&memory, 0, 0).unwrap().is_empty());
}

#[test]
fn an_empty_ring_arms_the_kick_and_interrupts_are_suppressed() {
    let memory = test_queue::memory();
    let mut driver = TestQueue::new(&memory, 0, 8);
    let interrupt = test_queue::interrupt();
    let mut device = DeviceQueue::new(driver.queue(), Arc::new(memory), interrupt.clone(), RING_FEATURES);
    driver.add(&[(BUFFERS, 5, true)]);
    driver.add(&[(BUFFERS, 5, true)]);
    driver.set_used_event(1);
    let chain = device.pop().unwrap().unwrap();
    assert_eq!(driver.available_event(), 0);
    device.add_used(chain, 0).unwrap();
    device.signal().unwrap();
    assert!(interrupt.event().read().is_err());
    let chain = device.pop().unwrap().unwrap();
    device.add_used(chain, 0).unwrap();
    assert!(device.pop().unwrap().is_none());
    assert_eq!(driver.available_event(), 2);
    device.signal().unwrap();
    assert_eq!(interrupt.event().read().unwrap(), 1);
    device.signal().unwrap();
    assert!(interrupt.event().read().is_err());
}

#[test]
fn without_event_idx_the_flag_suppresses_interrupts() {
    let memory = test_queue::memory();
    let mut driver = TestQueue::new(&memory, 0, 8);
    let interrupt = test_queue::interrupt();
    let mut device = DeviceQueue::new(driver.queue(), Arc::new(memory.clone()), interrupt.clone(), 0);
    for (flag, raised) in [(1u16, false), (0, true)] {
        memory.write_obj(flag, GuestAddress(driver.available())).unwrap();
        driver.add(&[(BUFFERS, 5, true)]);
        let chain = device.pop().unwrap().unwrap();
        device.add_used(chain, 0).unwrap();
        device.signal().unwrap();
        assert_eq!(interrupt.event().read().is_ok(), raised);
    }
}

#[test]
fn a_chain_can_be_put_back() {
    let (mut driver, mut device) = pair(4);
    let head = driver.add(&[(BUFFERS, 5, true)]);
    let chain = device.pop().unwrap().unwrap();
    device.undo_pop(chain);
    let chain = device.pop().unwrap().unwrap();
    assert_eq!(chain.head(), head);
    assert!(device.pop().unwrap().is_none());
}

#[test]
fn the_index_wraps_around() {
    let (mut driver, mut device) = pair(4);
    for _ in 0..70_000 {
        let head = driver.add(&[(BUFFERS, 5, true), (BUFFERS, 5, true), (BUFFERS, 5, true)]);
        let chain = device.pop().unwrap().unwrap();
        device.add_used(chain, 1).unwrap();
        assert_eq!(driver.take_used(), [(u32::from(head), 1)]);
    }
}

#[test]
fn an_available_index_that_ran_ahead_is_refused() {
    let (mut driver, mut device) = pair(8);
    driver.set_available_index(9);
    assert!(matches!(
        device.pop(),
        Err(DeviceError::Queue(virtio_queue::Error::InvalidAvailRingIndex))
    ));
    driver.set_available_index(8);
    device.pop().expect_err("descriptor 0 has length zero");
}

#[test]
fn a_queue_that_is_not_ready_is_refused() {
    let (driver, _) = pair(8);
    let mut queue = driver.queue();
    queue.set_ready(false);
    let mut device = DeviceQueue::new(queue, Arc::new(test_queue::memory()), test_queue::interrupt(), 0);
    assert!(matches!(
        device.pop(),
        Err(DeviceError::Queue(virtio_queue::Error::QueueNotReady))
    ));
}

#[test]
fn a_used_ring_outside_memory_is_refused() {
    let (mut driver, _) = pair(8);
    driver.add(&[(BUFFERS, 5, true)]);
    let mut queue = driver.queue();
    queue.try_set_used_ring_address(GuestAddress(GAP)).unwrap();
    let memory = Arc::new(driver_memory(&driver));
    let mut device = DeviceQueue::new(queue, memory, test_queue::interrupt(), RING_FEATURES);
    let chain = device.pop().unwrap().unwrap();
    assert!(matches!(device.add_used(chain, 0), Err(DeviceError::Queue(_))));
}

fn driver_memory(driver: &TestQueue) -> GuestMemory {
    driver.device_queue().memory().as_ref().clone()
}

#[test]
fn loops_are_refused() {
    for next in [0, 1] {
        let (mut driver, mut device) = pair(2);
        driver.set_descriptor(0, BUFFERS, 1, NEXT, 1);
        driver.set_descriptor(1, BUFFERS, 1, NEXT, next);
        driver.publish(0);
        assert_eq!(chain_error(&mut device), ChainError::Loop);
    }
}

#[test]
fn a_cut_chain_is_refused() {
    let (mut driver, mut device) = pair(8);
    driver.set_descriptor(0, BUFFERS, 1, NEXT, 8);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::Index(8));
    driver.publish(0xffff);
    assert_eq!(chain_error(&mut device), ChainError::Index(0xffff));
}

#[test]
fn buffers_outside_memory_are_refused() {
    for (address, len) in [
        (GAP, 1),
        (GAP - 1, 2),
        (u64::MAX, 2),
        (3 * LOW, 1),
        (0, u32::MAX),
        (GAP - 1, LOW as u32 + 2),
    ] {
        let (mut driver, mut device) = pair(8);
        driver.add(&[(address, len, true)]);
        assert_eq!(chain_error(&mut device), ChainError::Buffer(address, len));
    }
}

#[test]
fn bad_order_and_zero_length_are_refused() {
    let (mut driver, mut device) = pair(8);
    driver.add(&[(BUFFERS, 1, true), (BUFFERS, 1, false)]);
    assert_eq!(chain_error(&mut device), ChainError::Order);
    driver.add(&[(BUFFERS, 1, false), (BUFFERS, 0, true)]);
    assert_eq!(chain_error(&mut device), ChainError::ZeroLength);
}

#[test]
fn a_chain_over_four_gigabytes_is_refused() {
    let size = 1 << 30;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
    let mut driver = TestQueue::new(&memory, 0, 8);
    let mut device = driver.device_queue();
    driver.add(&[(0, size as u32, false); 4]);
    assert_eq!(chain_error(&mut device), ChainError::TooLong);
}

#[test]
fn indirect_tables_are_followed_and_checked() {
    let table = BUFFERS;
    let (mut driver, mut device) = pair(8);
    let memory = device.memory().clone();
    for index in 0..20 {
        let flags = if index < 19 { NEXT } else { WRITE };
        write_descriptor(&memory, table, index, BUFFERS + 0x1000, 2, flags, index + 1);
    }
    // The write flag of the descriptor that names the table means nothing: virtio 1.2, 2.7.5.3.2.
    driver.set_descriptor(0, BUFFERS + 0x1000, 3, NEXT, 1);
    driver.set_descriptor(1, table, 20 * 16, INDIRECT | WRITE, 0);
    driver.publish(0);
    let chain = device.pop().unwrap().unwrap();
    assert_eq!(
        (chain.readable().len(), chain.readable_len(), chain.writable_len()),
        (20, 41, 2)
    );
    device.add_used(chain, 2).unwrap();

    for (len, error) in [
        (0, ChainError::IndirectLength(0)),
        (17, ChainError::IndirectLength(17)),
        (16 * 65536, ChainError::IndirectLength(16 * 65536)),
        (16, ChainError::Index(1)),
    ] {
        driver.set_descriptor(0, table, len, INDIRECT, 0);
        driver.publish(0);
        assert_eq!(chain_error(&mut device), error);
    }
    driver.set_descriptor(0, table, 16, INDIRECT | NEXT, 1);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::Indirect);
    driver.set_descriptor(0, GAP, 16, INDIRECT, 0);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::Table(GAP));
    driver.set_descriptor(0, u64::MAX, 16, INDIRECT, 0);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::Table(u64::MAX));
    // A table inside a table.
    write_descriptor(&memory, table, 0, table, 16, INDIRECT, 0);
    driver.set_descriptor(0, table, 16, INDIRECT, 0);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::Indirect);

    // Without the feature no table is allowed.
    let queue = device.save().restore().unwrap();
    let mut plain = DeviceQueue::new(queue, memory, test_queue::interrupt(), 0);
    driver.publish(0);
    assert_eq!(chain_error(&mut plain), ChainError::Indirect);
}

#[test]
fn an_indirect_loop_and_too_many_segments_are_refused() {
    let (mut driver, mut device) = pair(8);
    let memory = device.memory().clone();
    write_descriptor(&memory, BUFFERS, 0, BUFFERS, 1, NEXT, 0);
    driver.set_descriptor(0, BUFFERS, 16, INDIRECT, 0);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::Loop);
    let count = MAX_SEGMENTS as u16 + 1;
    for index in 0..count {
        write_descriptor(
            &memory,
            BUFFERS,
            index,
            BUFFERS,
            1,
            if index + 1 < count { NEXT } else { 0 },
            index + 1,
        );
    }
    driver.set_descriptor(0, BUFFERS, u32::from(count) * 16, INDIRECT, 0);
    driver.publish(0);
    assert_eq!(chain_error(&mut device), ChainError::TooManySegments);
}

#[test]
fn state_survives_a_round_trip() {
    let (mut driver, mut device) = pair(8);
    driver.add(&[(BUFFERS, 5, true)]);
    let chain = device.pop().unwrap().unwrap();
    device.add_used(chain, 5).unwrap();
    driver.add(&[(BUFFERS, 7, true)]);
    let json = serde_json::to_string(&device.save()).unwrap();
    let state: DeviceQueueState = serde_json::from_str(&json).unwrap();
    let queue = state.restore().unwrap();
    let mut restored = DeviceQueue::new(
        queue,
        device.memory().clone(),
        test_queue::interrupt(),
        RING_FEATURES,
    );
    assert_eq!(restored.save(), device.save());
    assert_eq!(restored.pop().unwrap().unwrap().writable_len(), 7);
    for bad in [
        DeviceQueueState { size: 3, ..state },
        DeviceQueueState { max_size: 0, ..state },
        DeviceQueueState {
            descriptors: 8,
            ..state
        },
        DeviceQueueState {
            available: 1,
            ..state
        },
        DeviceQueueState { used: 2, ..state },
    ] {
        bad.restore().expect_err("not a queue");
    }
}

/// Addresses around the edges of memory and of the tables, and any other.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..3 * LOW + 0x1000,
        GAP - 32..GAP + 32,
        2 * LOW - 32..2 * LOW + 32,
        3 * LOW - 32..3 * LOW + 32,
        Just(0),
        any::<u64>()
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        0..64u32,
        (0..64u32).prop_map(|n| n * 16),
        0..0x20_0000u32,
        any::<u32>()
    ]
}

#[test]
fn a_driver_cannot_have_more_outstanding_than_entries() {
    let memory = test_queue::memory();
    let mut driver = TestQueue::new(&memory, 0, 8);
    let mut queue = driver.device_queue();
    for _ in 0..8 {
        driver.add(&[(BUFFERS, 8, true)]);
    }
    let mut chains: Vec<_> = (0..8).map(|_| queue.pop().unwrap().unwrap()).collect();
    assert!(queue.pop().unwrap().is_none());
    // One comes back, so one may come.
    queue.add_used(chains.remove(0), 0).unwrap();
    driver.add(&[(BUFFERS, 8, true)]);
    let chain = queue.pop().unwrap().unwrap();
    queue.undo_pop(chain);
    let chain = queue.pop().unwrap().unwrap();
    assert_eq!(chain.head(), 0);
    driver.add(&[(BUFFERS, 8, true)]);
    queue.pop().expect_err("a ninth");
}

proptest! {
    /// Whatever the table says, the parser ends, and what it lets through is inside memory and in order.
    #[test]
    fn any_table_gives_a_sound_chain_or_an_error(
        descriptors in prop::collection::vec((address(), length(), 0..8u32, 0..20u16), 16),
        indirect in prop::collection::vec((address(), length(), 0..8u32, 0..20u16), 16),
        heads in prop::collection::vec(0..20u16, 1..8),
        event_idx in any::<bool>(),
    ) {
        let memory = test_queue::memory();
        let mut driver = TestQueue::new(&memory, 0, 16);
        let features = if event_idx { RING_FEATURES } else { 1 << VIRTIO_RING_F_INDIRECT_DESC };
        let mut device =
            DeviceQueue::new(driver.queue(), Arc::new(memory.clone()), test_queue::interrupt(), features);
        for (index, (address, len, flags, next)) in (0u16..).zip(descriptors) {
            driver.set_descriptor(index, address, len, flags, next);
        }
        for (index, (address, len, flags, next)) in (0u16..).zip(indirect) {
            write_descriptor(&memory, BUFFERS, index, address, len, flags, next);
        }
        for head in heads {
            driver.publish(head);
        }
        while let Ok(Some(chain)) = device.pop() {
            prop_assert!(chain.readable().len() + chain.writable().len() <= MAX_SEGMENTS);
            for segment in chain.readable().iter().chain(chain.writable()) {
                prop_assert!(segment.len > 0);
                prop_assert!(memory.check_range(GuestAddress(segment.address), segment.len as usize));
            }
            let (readable, writable) = (chain.readable_len(), chain.writable_len());
            let vectors = chain.read_vectors(&memory, 0, readable).unwrap();
            prop_assert_eq!(vectors.as_slice().iter().map(|v| v.iov_len).sum::<usize>(), readable);
            prop_assert!(chain.write_vectors(&memory, 1, writable).is_err());
            device.add_used(chain, 0).unwrap();
        }
        device.signal().unwrap();
    }

    /// Copies through any split of a buffer agree with the flat bytes.
    #[test]
    fn copies_do_not_depend_on_the_split(
        lengths in prop::collection::vec(1..50u32, 1..8),
        offset in 0..100usize,
        count in 0..100usize,
    ) {
        let memory = test_queue::memory();
        let mut driver = TestQueue::new(&memory, 0, 16);
        let mut device = driver.device_queue();
        let mut flat = Vec::new();
        let mut buffers = Vec::new();
        for (index, &len) in lengths.iter().enumerate() {
            let address = BUFFERS + 0x100 * index as u64;
            let data: Vec<u8> = (0..len).map(|byte| (byte as usize + index * 60) as u8).collect();
            memory.write_slice(&data, GuestAddress(address)).unwrap();
            flat.extend(data);
            buffers.push((address, len, false));
        }
        driver.add(&buffers);
        let chain = device.pop().unwrap().unwrap();
        let mut data = vec![0; count];
        let result = chain.read_at(&memory, offset, &mut data);
        match flat.get(offset..offset + count) {
            Some(expected) => {
                result.unwrap();
                prop_assert_eq!(data, expected);
            }
            None => prop_assert!(result.is_err()),
        }
    }
}
