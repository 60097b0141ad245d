#![allow(clippy::unwrap_used)]

use std::sync::atomic::AtomicUsize;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::registers::*;
use super::*;
use crate::virtio::queue::{DeviceQueue, DeviceQueueState};
use crate::virtio::worker::WorkState;

#[derive(Debug, Default)]
struct Fake {
    activations: Arc<AtomicUsize>,
    kicks: Arc<AtomicUsize>,
    active: bool,
    queues: Vec<DeviceQueueState>,
    fails: bool,
    /// What a kick comes to, if not an error.
    turn: Option<Turn>,
    /// Resets wait for this.
    hold: Option<Arc<std::sync::Barrier>>,
}

impl VirtioDevice for Fake {
    fn name(&self) -> &str {
        "fake0"
    }
    fn device_type(&self) -> u32 {
        4
    }
    fn features(&self) -> u64 {
        1 << 32 | 0b101
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = (offset as usize + index) as u8;
        }
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        assert!(!self.active, "activated twice");
        assert_eq!(activation.queues.len(), 2);
        assert_eq!(activation.features & !self.features(), 0);
        let queues = DeviceQueue::from_activation(activation);
        self.queues = queues.iter().map(DeviceQueue::save).collect();
        self.active = true;
        self.activations.fetch_add(1, Ordering::SeqCst);
        if self.fails {
            Err(DeviceError::Protocol("no"))
        } else {
            Ok(())
        }
    }
    fn save_state(&mut self) -> DeviceState {
        DeviceState::Fs(WorkState {
            queues: self.queues.clone(),
            known: Vec::new(),
        })
    }
    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        assert!(!self.active);
        match state {
            DeviceState::Fs(_) => Ok(()),
            _ => Err(RestoreError::Kind),
        }
    }
    fn reset(&mut self) {
        assert!(self.active);
        if let Some(hold) = &self.hold {
            hold.wait();
            hold.wait();
        }
        self.active = false;
    }
    fn process_queue(&mut self, _: usize) -> Result<Turn, DeviceError> {
        assert!(self.active, "kicked before activation");
        self.kicks.fetch_add(1, Ordering::SeqCst);
        self.turn.ok_or(DeviceError::Protocol("malformed"))
    }
}

fn transport(fake: Fake) -> MmioTransport {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
    MmioTransport::new(Arc::new(Mutex::new(fake)), Arc::new(memory)).unwrap()
}

fn read(transport: &MmioTransport, offset: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &MmioTransport, offset: u64, value: u32) {
    transport.write(offset, &value.to_le_bytes());
}

/// Does what a driver does up to DRIVER_OK.
fn start(transport: &MmioTransport) {
    for status in [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER] {
        write(transport, STATUS, status);
    }
    write(transport, 0x24, 1);
    write(transport, 0x20, 1);
    write(transport, STATUS, 11);
    assert_eq!(read(transport, STATUS), 11);
    for queue in 0..2 {
        write(transport, 0x30, queue);
        assert_eq!(read(transport, 0x44), 0);
        write(transport, 0x38, 8);
        let base = 0x1000 * (queue + 1);
        for (register, address) in [(0x80, base), (0x90, base + 0x400), (0xa0, base + 0x800)] {
            write(transport, register, address);
        }
        write(transport, 0x44, 1);
        assert_eq!(read(transport, 0x44), 1, "queue {queue}");
    }
    write(transport, STATUS, 15);
}

#[test]
fn identity_and_features() {
    let transport = transport(Fake::default());
    assert_eq!(read(&transport, 0), 0x7472_6976);
    assert_eq!((read(&transport, 4), read(&transport, 8)), (2, 4));
    assert_eq!(read(&transport, 0x10), 0b101);
    write(&transport, 0x14, 1);
    assert_eq!(read(&transport, 0x10), 1);
    write(&transport, 0x14, 2);
    assert_eq!(read(&transport, 0x10), 0);
    assert_eq!(read(&transport, 0x34), 16);
    write(&transport, 0x30, 9);
    assert_eq!(read(&transport, 0x34), 0);
    assert_eq!(read(&transport, 0xb0), u32::MAX);
}

#[test]
fn driver_starts_resets_and_starts_again() {
    let activations = Arc::new(AtomicUsize::new(0));
    let transport = transport(Fake {
        activations: activations.clone(),
        ..Fake::default()
    });
    for round in 1..=3 {
        start(&transport);
        assert_eq!(read(&transport, STATUS), 15);
        assert_eq!(activations.load(Ordering::SeqCst), round);
        write(&transport, STATUS, 0);
        assert_eq!(read(&transport, STATUS), 0);
    }
}

#[test]
fn steps_out_of_order_are_ignored() {
    let transport = transport(Fake::default());
    write(&transport, STATUS, 15);
    assert_eq!(read(&transport, STATUS), 0);
    write(&transport, STATUS, ACKNOWLEDGE);
    write(&transport, STATUS, ACKNOWLEDGE | DRIVER_OK);
    assert_eq!(read(&transport, STATUS), ACKNOWLEDGE);
    write(&transport, STATUS, ACKNOWLEDGE | DRIVER);
    write(&transport, STATUS, DRIVER);
    assert_eq!(read(&transport, STATUS), 3);
    // A queue cannot be set up before the features are agreed on.
    write(&transport, 0x38, 8);
    write(&transport, 0x44, 1);
    assert_eq!(read(&transport, 0x44), 0);
}

#[test]
fn features_the_device_does_not_have_are_refused() {
    let transport = transport(Fake::default());
    write(&transport, STATUS, 1);
    write(&transport, STATUS, 3);
    write(&transport, 0x20, 0b10);
    write(&transport, 0x24, 1);
    write(&transport, 0x20, 1);
    write(&transport, STATUS, 11);
    assert_eq!(read(&transport, STATUS), 3);
    write(&transport, 0x24, 0);
    write(&transport, 0x20, 0b100);
    write(&transport, STATUS, 11);
    assert_eq!(read(&transport, STATUS), 11);
}

#[test]
fn queue_outside_memory_stays_off() {
    let transport = transport(Fake::default());
    write(&transport, STATUS, 1);
    write(&transport, STATUS, 3);
    write(&transport, 0x24, 1);
    write(&transport, 0x20, 1);
    write(&transport, STATUS, 11);
    write(&transport, 0x38, 8);
    write(&transport, 0x84, 1);
    write(&transport, 0x44, 1);
    assert_eq!(read(&transport, 0x44), 0);
}

#[test]
fn failed_queue_marks_the_device_and_interrupts() {
    let kicks = Arc::new(AtomicUsize::new(0));
    let transport = transport(Fake {
        kicks: kicks.clone(),
        ..Fake::default()
    });
    transport.process_queue(0);
    assert_eq!(read(&transport, STATUS), 0, "not active, not called");
    start(&transport);
    for _ in 0..3 {
        transport.process_queue(0);
    }
    assert_eq!(kicks.load(Ordering::SeqCst), 1, "a failed device stands still");
    assert_eq!(read(&transport, STATUS), 15 | NEEDS_RESET);
    assert_eq!(read(&transport, INTERRUPT_STATUS), 2);
    write(&transport, INTERRUPT_ACK, 2);
    assert_eq!(read(&transport, INTERRUPT_STATUS), 0);
    write(&transport, STATUS, 0);
    assert_eq!(read(&transport, STATUS), 0);
    start(&transport);
    assert_eq!(read(&transport, STATUS), 15);
    transport.process_queue(0);
    assert_eq!(kicks.load(Ordering::SeqCst), 2, "a reset device works again");
}

#[test]
fn failed_activation_marks_the_device() {
    let transport = transport(Fake {
        fails: true,
        ..Fake::default()
    });
    start(&transport);
    assert_eq!(read(&transport, STATUS), 15 | NEEDS_RESET);
}

#[test]
fn a_queue_with_more_in_it_kicks_itself() {
    for (turn, kicks) in [(Turn::Done, 0), (Turn::Again, 1)] {
        let transport = transport(Fake {
            turn: Some(turn),
            ..Fake::default()
        });
        start(&transport);
        transport.process_queue(1);
        let [other, queue] = transport.watched_queues() else {
            panic!("two queues");
        };
        other.read().unwrap_err();
        assert_eq!(queue.read().unwrap_or(0), kicks);
    }
}

#[test]
fn the_status_is_told_while_a_reset_waits_for_the_host() {
    let hold = Arc::new(std::sync::Barrier::new(2));
    let transport = transport(Fake {
        hold: Some(hold.clone()),
        ..Fake::default()
    });
    start(&transport);
    assert_eq!(transport.status(), 15);
    std::thread::scope(|scope| {
        scope.spawn(|| write(&transport, STATUS, 0));
        hold.wait();
        assert_eq!(transport.status(), 0);
        hold.wait();
    });
}

proptest! {
    /// Whatever a driver writes, in whatever width, nothing panics, and the device is never activated twice
    /// or kicked before it is active (the fake asserts both).
    #[test]
    fn hostile_register_accesses(accesses in prop::collection::vec(
        (prop_oneof![Just(STATUS), 0u64..0x110], prop_oneof![Just(11u32), Just(15), 0u32..16, any::<u32>()], 0usize..9, any::<bool>()),
        0..200,
    )) {
        let transport = transport(Fake::default());
        for (offset, value, width, is_read) in accesses {
            let mut data = [0; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            let width = if width == 0 { 4 } else { width.min(8) };
            if is_read {
                transport.read(offset, &mut data[..width]);
            } else {
                transport.write(offset, &data[..width]);
            }
            transport.process_queue((value % 3) as usize);
        }
    }
}
