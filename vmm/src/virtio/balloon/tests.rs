use vm_memory::Bytes;

use super::*;
use crate::virtio::test_queue::{self, BUFFERS, GAP, LOW, TestQueue};

struct Guest {
    memory: GuestMemory,
    queues: Vec<TestQueue>,
    balloon: Balloon,
}

fn guest() -> Guest {
    let memory = test_queue::memory();
    let queues: Vec<_> = (0..3).map(|index| TestQueue::new(&memory, index, 32)).collect();
    let mut balloon = Balloon::new();
    let references: Vec<_> = queues.iter().collect();
    let activation = test_queue::activation(&memory, &references, balloon.features());
    balloon.activate(activation).unwrap();
    Guest {
        memory,
        queues,
        balloon,
    }
}

impl Guest {
    fn fill(&self, address: u64, len: usize) {
        self.memory
            .write_slice(&vec![0xaa; len], GuestAddress(address))
            .unwrap();
    }

    fn page_is_zero(&self, address: u64) -> bool {
        let mut page = vec![0; PAGE_SIZE as usize];
        self.memory.read_slice(&mut page, GuestAddress(address)).unwrap();
        page.iter().all(|&byte| byte == 0)
    }

    fn send_pages(&mut self, queue: usize, pages: &[u32]) -> Result<(), DeviceError> {
        for (index, page) in pages.iter().enumerate() {
            self.memory
                .write_obj(page.to_le(), GuestAddress(BUFFERS + 4 * index as u64))
                .unwrap();
        }
        self.queues[queue].add(&[(BUFFERS, 4 * pages.len() as u32, false)]);
        self.balloon.process_queue(queue).map(|_| ())
    }
}

#[test]
fn inflated_pages_go_back_and_others_stay() {
    let mut guest = guest();
    guest.fill(0x8_0000, 0x8000);
    guest.fill(2 * LOW, 0x1000);
    // Up, down, a repetition and the other region.
    guest
        .send_pages(INFLATE, &[0x81, 0x82, 0x87, 0x86, 0x81, 0x200])
        .unwrap();
    assert_eq!(guest.queues[INFLATE].take_used(), [(0, 0)]);
    let zero: Vec<_> = (0..8)
        .map(|page| guest.page_is_zero(0x8_0000 + page * PAGE_SIZE))
        .collect();
    assert_eq!(zero, [false, true, true, false, false, false, true, true]);
    assert!(guest.page_is_zero(2 * LOW));
    guest.send_pages(DEFLATE, &[0x81]).unwrap();
    assert_eq!(guest.queues[DEFLATE].take_used(), [(0, 0)]);
    guest.fill(0x8_1000, 0x1000);
    assert!(!guest.page_is_zero(0x8_1000));
}

#[test]
fn reported_ranges_lose_their_whole_pages() {
    let mut guest = guest();
    guest.fill(0x8_0000, 0x6000);
    guest.queues[2].add(&[
        (0x8_0000, 0x1000, true),
        (0x8_2800, 0x2000, true),
        (0x8_5000, 0x800, true),
    ]);
    guest.balloon.process_queue(2).unwrap();
    assert_eq!(guest.queues[2].take_used(), [(0, 0)]);
    let zero: Vec<_> = (0..6)
        .map(|page| guest.page_is_zero(0x8_0000 + page * PAGE_SIZE))
        .collect();
    assert_eq!(zero, [true, false, false, true, false, false]);
}

#[test]
fn a_readable_report_discards_nothing() {
    let mut guest = guest();
    guest.fill(0x8_0000, 0x1000);
    guest.queues[2].add(&[(0x8_0000, 0x1000, false)]);
    guest.balloon.process_queue(2).unwrap();
    assert!(!guest.page_is_zero(0x8_0000));
}

#[test]
fn malformed_requests_stop_the_device() {
    for page in [(GAP / PAGE_SIZE) as u32, 0x1ff, 0x300, u32::MAX] {
        guest().send_pages(INFLATE, &[page]).expect_err("outside");
    }
    for (queue, buffer) in [
        (INFLATE, (BUFFERS, 3, false)),
        (INFLATE, (BUFFERS, MAX_PFN_BYTES as u32 + 4, false)),
        (INFLATE, (BUFFERS, 0, false)),
        (2, (GAP - PAGE_SIZE, 0x2000, true)),
        (2, (u64::MAX - 1, 2, true)),
    ] {
        let mut guest = guest();
        guest.queues[queue].add(&[buffer]);
        guest.balloon.process_queue(queue).expect_err("malformed");
    }
}

#[test]
fn the_target_is_in_the_configuration_and_interrupts() {
    let mut guest = guest();
    let interrupt = guest.balloon.changes.interrupt.clone().unwrap();
    guest.balloon.set_target_mib(3).unwrap();
    assert_eq!(interrupt.status(), 2);
    assert_eq!(guest.balloon.config_generation(), 1);
    let mut data = [0; 4];
    guest.balloon.read_config(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 768);
    guest.balloon.write_config(4, &600u32.to_le_bytes());
    assert_eq!(guest.balloon.actual_mib(), 2);
    guest.balloon.write_config(0, &[0xff; 4]);
    guest.balloon.write_config(4, &[0xff; 2]);
    guest.balloon.read_config(0, &mut data);
    assert_eq!((u32::from_le_bytes(data), guest.balloon.actual_mib()), (768, 2));
    let state = guest.balloon.save();
    assert_eq!((state.target, state.actual, state.queues.len()), (768, 600, 3));
}

#[test]
fn a_queue_that_never_empties_lets_others_have_their_turn() {
    for queue in [INFLATE, DEFLATE, 2] {
        let mut guest = guest();
        let buffer = (BUFFERS, 4, queue > DEFLATE);
        let page = 0x80u32.to_le();
        guest.memory.write_obj(page, GuestAddress(BUFFERS)).unwrap();
        let head = guest.queues[queue].add(&[buffer]);
        for _ in 0..3 {
            let turn = guest.queues[queue].while_full(head, || guest.balloon.process_queue(queue).unwrap());
            assert_eq!(turn, Turn::Again);
            assert_eq!(guest.queues[queue].take_used().len(), BUDGET);
        }
    }
}
