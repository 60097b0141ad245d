#![allow(clippy::unwrap_used)]

mod pairs;

use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, RawFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::*;
use crate::virtio::net::VhostError;
use crate::virtio::net::vhost::fake::Fake;
use crate::virtio::net::vhost::{Operation, RingAddress, RingFile, RingState};
use crate::virtio::queue::RING_FEATURES;
use crate::virtio::test_queue::{self, BUFFERS, GAP, LOW, TestQueue};
use crate::virtio::{Activation, DeviceState, Turn, VirtioDevice};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const SIZE: u16 = 64;
const RINGS: u64 = RING_FEATURES | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A device on a wire of sockets, its driver's queues, and the kernel's stand-in.
struct Guest {
    memory: GuestMemory,
    queues: [TestQueue; 2],
    interrupt: Arc<Interrupt>,
    kicks: Vec<EventFd>,
    net: Net,
    tap: RawFd,
    wire: std::fs::File,
    fake: Fake,
}

impl Guest {
    /// With the kernel's server, or without.
    fn new(kernel: bool) -> Self {
        let (near, far) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK,
        )
        .unwrap();
        let tap = far.as_raw_fd();
        let mut net = Net::new(0, 1).unwrap();
        let kicks: Vec<EventFd> = (0..2)
            .map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap())
            .collect();
        assert!(net.owns_queue_events());
        net.set_queue_events(kicks.iter().map(|kick| kick.try_clone().unwrap()).collect());
        net.attach(vec![far], MAC, 1500).unwrap();
        net.tap().unwrap().plain = true;
        let fake = Fake::default();
        if kernel {
            net.serve_with(vec![fake.device()]).unwrap();
            fake.take_operations();
        }
        let memory = test_queue::memory();
        Self {
            queues: [0, 1].map(|index| TestQueue::new(&memory, index, SIZE)),
            memory,
            interrupt: test_queue::interrupt(),
            kicks,
            net,
            tap,
            wire: near.into(),
            fake,
        }
    }

    /// One that has started.
    fn started(kernel: bool) -> Self {
        let mut guest = Self::new(kernel);
        guest.start().unwrap();
        guest.take_kicks();
        guest.fake.take_operations();
        guest
    }

    fn activation(&self) -> Activation {
        Activation {
            interrupt: self.interrupt.clone(),
            ..test_queue::activation(
                &self.memory,
                &[&self.queues[0], &self.queues[1]],
                RINGS | 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_MAC,
            )
        }
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        self.net.activate(self.activation())
    }

    /// Numbers of kicks, which the kernel's stand-in leaves alone.
    fn take_kicks(&self) -> Vec<u64> {
        self.kicks.iter().map(|kick| kick.read().unwrap_or(0)).collect()
    }

    fn host(&self, address: u64) -> u64 {
        self.memory.get_host_address(GuestAddress(address)).unwrap() as u64
    }

    /// What the kernel writes when it has used so many buffers.
    fn set_used(&self, indices: [u16; 2]) {
        for (queue, index) in self.queues.iter().zip(indices) {
            self.memory
                .write_obj(index.to_le(), GuestAddress(queue.used() + 2))
                .unwrap();
        }
    }

    fn state(&mut self) -> Vec<DeviceQueueState> {
        let DeviceState::Net(state) = self.net.save_state() else {
            panic!("another device's");
        };
        state.queues
    }

    fn take_error(&self) {
        // As the kernel does: it has the eventfd by its number.
        let vhost = &self.net.vhosts[0];
        nix::unistd::write(vhost.errors(), &1_u64.to_ne_bytes()).unwrap();
    }
}

fn pending(net: &Net) -> bool {
    // SAFETY: the descriptor is open as long as the device is.
    let fd = unsafe { BorrowedFd::borrow_raw(net.event_fd().unwrap()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
}

fn backend(index: u32, fd: RawFd) -> Operation {
    Operation::SetBackend(RingFile { index, fd })
}

const HALTED: [Operation; 2] = [
    Operation::SetBackend(RingFile { index: 0, fd: -1 }),
    Operation::SetBackend(RingFile { index: 1, fd: -1 }),
];

#[test]
fn the_kernel_is_told_where_rings_and_memory_are() {
    let mut guest = Guest::new(true);
    guest.start().unwrap();
    let mut operations = guest.fake.take_operations().into_iter();
    // Checksums are between the driver and the tap.
    assert_eq!(operations.next(), Some(Operation::SetFeatures(RINGS)));
    let Some(Operation::SetMemory(regions)) = operations.next() else {
        panic!("no memory");
    };
    let regions: Vec<_> = regions
        .iter()
        .map(|region| (region.guest, region.size, region.host, region.flags))
        .collect();
    assert_eq!(
        regions,
        [(0, LOW, guest.host(0), 0), (2 * LOW, LOW, guest.host(2 * LOW), 0)]
    );
    let errors = guest.net.vhosts[0].errors().as_raw_fd();
    for (index, queue) in (0..).zip(&guest.queues) {
        let state = |number| RingState { index, number };
        let file = |fd| RingFile { index, fd };
        let kick = guest.net.kicks[index as usize].as_raw_fd();
        let expected = [
            Operation::SetSize(state(SIZE.into())),
            Operation::SetBase(state(0)),
            Operation::SetAddress(RingAddress {
                index,
                flags: 0,
                descriptors: guest.host(queue.descriptors()),
                used: guest.host(queue.used()),
                available: guest.host(queue.available()),
                log: 0,
            }),
            Operation::SetCall(file(guest.interrupt.event().as_raw_fd())),
            Operation::SetError(file(errors)),
            Operation::SetKick(file(kick)),
        ];
        let told: Vec<_> = operations.by_ref().take(expected.len()).collect();
        assert_eq!(told, expected);
    }
    let rest: Vec<_> = operations.collect();
    assert_eq!(rest, [backend(0, guest.tap), backend(1, guest.tap)]);
    // A kick from before.
    assert_eq!(guest.take_kicks(), [1, 1]);
}

#[test]
fn frames_and_kicks_are_none_of_this_processs_business() {
    let mut guest = Guest::started(true);
    guest.wire.write_all(&[0; 100]).unwrap();
    for kick in &guest.kicks {
        kick.write(1).unwrap();
    }
    assert!(!pending(&guest.net));
    guest.net.process_event().unwrap();
    assert_eq!(guest.net.process_queue(1).unwrap(), Turn::Done);
    assert_eq!(guest.take_kicks(), [1, 1]);
    assert_eq!(guest.fake.take_operations(), []);
}

#[test]
fn the_used_bit_is_set_while_the_kernel_interrupts() {
    let mut guest = Guest::new(true);
    assert_eq!(guest.interrupt.status(), 0);
    guest.start().unwrap();
    assert_eq!(guest.interrupt.status(), 1);
    guest.interrupt.config_change().unwrap();
    assert_eq!(guest.interrupt.status(), 3);
    guest.interrupt.acknowledge(3);
    assert_eq!(guest.interrupt.status(), 1);
    guest.net.reset();
    assert_eq!(guest.interrupt.status(), 0);
}

#[test]
fn a_pause_halts_the_rings_and_learns_where_they_are() {
    let mut guest = Guest::started(true);
    guest.fake.set_bases([5, 65_535]);
    guest.set_used([5, 65_535]);
    guest.net.pause().unwrap();
    let mut expected = HALTED.to_vec();
    expected.extend([Operation::GetBase(0), Operation::GetBase(1)]);
    assert_eq!(guest.fake.take_operations(), expected);
    // Nothing is asked twice.
    guest.net.pause().unwrap();
    assert_eq!(guest.fake.take_operations(), []);
    let state = guest.state();
    let indices: Vec<_> = state
        .iter()
        .map(|queue| (queue.next_available, queue.next_used, queue.size, queue.ready))
        .collect();
    assert_eq!(indices, [(5, 5, SIZE, true), (65_535, 65_535, SIZE, true)]);
    assert_eq!(
        (state[0].descriptors, state[0].available, state[0].used),
        (
            guest.queues[0].descriptors(),
            guest.queues[0].available(),
            guest.queues[0].used()
        )
    );

    guest.net.resume();
    let running = [backend(0, guest.tap), backend(1, guest.tap)];
    assert_eq!(guest.fake.take_operations(), running);
    assert_eq!(guest.take_kicks(), [1, 1]);
    guest.net.resume();
    assert_eq!(
        (guest.fake.take_operations(), guest.take_kicks()),
        (vec![], vec![0, 0])
    );
    assert!(!pending(&guest.net));
}

#[test]
fn a_device_goes_on_with_the_kernel_or_without() {
    // Three frames leave through this process.
    let mut own = Guest::started(false);
    for _ in 0..3 {
        own.queues[1].add(&[(BUFFERS, 100, false)]);
    }
    own.kicks[1].write(1).unwrap();
    assert!(pending(&own.net));
    own.net.process_event().unwrap();
    let state = own.state();
    assert_eq!((state[1].next_available, state[1].next_used), (3, 3));

    let mut kernel = Guest::new(true);
    let queues = state.iter().map(|state| state.restore().unwrap()).collect();
    let activation = Activation {
        queues,
        ..kernel.activation()
    };
    kernel.net.activate(activation).unwrap();
    let base = |index, number| Operation::SetBase(RingState { index, number });
    let operations = kernel.fake.take_operations();
    assert!(
        operations.contains(&base(0, 0)) && operations.contains(&base(1, 3)),
        "{operations:?}"
    );
    kernel.fake.set_bases([0, 4]);
    kernel.set_used([0, 4]);
    kernel.net.pause().unwrap();

    // The fifth.
    let mut own = Guest::new(false);
    for _ in 0..5 {
        own.queues[1].add(&[(BUFFERS, 100, false)]);
    }
    let queues = kernel
        .state()
        .iter()
        .map(|state| state.restore().unwrap())
        .collect();
    let activation = Activation {
        queues,
        ..own.activation()
    };
    own.net.activate(activation).unwrap();
    own.net.process_event().unwrap();
    let mut frame = [0; 200];
    assert_eq!(own.wire.read(&mut frame).unwrap(), 100);
    assert!(own.wire.read(&mut frame).is_err());
    assert_eq!(own.state()[1].next_used, 5);
}

#[test]
fn a_reset_takes_the_rings_back_and_a_start_hands_them_out_again() {
    let mut guest = Guest::started(true);
    guest.net.reset();
    assert_eq!(guest.fake.take_operations(), HALTED);
    assert_eq!(guest.state(), []);
    guest.net.reset();
    guest.net.pause().unwrap();
    guest.net.resume();
    assert_eq!(guest.fake.take_operations(), []);
    guest.start().unwrap();
    let operations = guest.fake.take_operations();
    assert!(!operations.contains(&Operation::SetOwner));
    assert_eq!(
        operations[operations.len() - 2..],
        [backend(0, guest.tap), backend(1, guest.tap)]
    );
}

#[test]
fn a_detached_wire_is_let_go() {
    let mut guest = Guest::started(true);
    guest.net.detach().unwrap();
    assert_eq!(guest.fake.take_operations(), HALTED);
    assert_eq!((guest.net.device_type(), guest.interrupt.status()), (0, 0));
    assert!(guest.wire.write(&[0; 100]).is_err());
    assert!(guest.net.vhosts.is_empty());
    // The slot's next wire has no server.
    let (near, far) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK,
    )
    .unwrap();
    guest.net.attach(vec![far], MAC, 1500).unwrap();
    guest.net.tap().unwrap().plain = true;
    guest.wire = near.into();
    guest.start().unwrap();
    guest.queues[1].add(&[(BUFFERS, 100, false)]);
    guest.net.process_event().unwrap();
    assert_eq!(guest.wire.read(&mut [0; 200]).unwrap(), 100);
    assert_eq!(guest.fake.take_operations(), []);
}

#[test]
fn a_server_needs_a_wire_and_a_device() {
    let mut empty = Net::new(2, 1).unwrap();
    let vhost = vec![Fake::default().device()];
    assert!(matches!(empty.serve_with(vhost), Err(SlotError::Empty(2))));
    let mut guest = Guest::new(false);
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(
        guest.net.serve_by(vec![null.into()]),
        Err(SlotError::Wire(0, NetError::Vhost(_)))
    ));
}

#[test]
fn a_broken_ring_stops_the_device() {
    let mut guest = Guest::started(true);
    guest.take_error();
    assert!(pending(&guest.net));
    let error = guest.net.process_event().unwrap_err();
    assert!(matches!(error, DeviceError::Protocol(_)), "{error:?}");
    assert_eq!(guest.fake.take_operations(), HALTED);
    assert!(!pending(&guest.net));
    assert_eq!(guest.interrupt.status(), 0);
    // What was told before a start is forgotten by it.
    guest.take_error();
    guest.start().unwrap();
    assert!(!pending(&guest.net));
    guest.net.process_event().unwrap();
}

#[test]
fn rings_that_are_off_or_outside_of_memory_do_not_start() {
    let mut guest = Guest::new(true);
    let mut activation = guest.activation();
    activation.queues[1].set_ready(false);
    let error = guest.net.activate(activation).unwrap_err();
    assert!(
        matches!(error, DeviceError::Queue(Error::QueueNotReady)),
        "{error:?}"
    );
    assert_eq!(guest.fake.take_operations(), []);

    type Place = fn(&mut Queue, GuestAddress) -> Result<(), Error>;
    let places: [Place; 3] = [
        Queue::try_set_desc_table_address,
        Queue::try_set_avail_ring_address,
        Queue::try_set_used_ring_address,
    ];
    for place in places {
        // In the hole, into it, behind the end, around the end of addresses.
        for address in [GAP, GAP - 16, 3 * LOW - 16, 0_u64.wrapping_sub(16)] {
            let mut activation = guest.activation();
            place(&mut activation.queues[1], GuestAddress(address)).unwrap();
            let error = guest.net.activate(activation).unwrap_err();
            assert!(
                matches!(error, DeviceError::Vhost(VhostError::Address(_))),
                "{address:#x}: {error:?}"
            );
            let operations = guest.fake.take_operations();
            assert!(
                !operations
                    .iter()
                    .any(|operation| matches!(operation, Operation::SetBackend(_))),
                "{operations:?}"
            );
        }
    }
    assert_eq!(guest.interrupt.status(), 0);
    assert!(!pending(&guest.net));
}

#[test]
fn what_the_kernel_refuses_stops_the_device() {
    let mut guest = Guest::new(true);
    guest.fake.refuse(Some("serve the tap"));
    assert!(matches!(
        guest.start(),
        Err(DeviceError::Vhost(VhostError::Refused {
            what: "serve the tap",
            ..
        }))
    ));
    assert_eq!((guest.interrupt.status(), guest.state()), (0, vec![]));
    let operations = guest.fake.take_operations();
    assert_eq!(operations[operations.len() - 2..], HALTED);
    guest.fake.refuse(None);
    guest.start().unwrap();

    // A pause that does not succeed is followed by a resume.
    guest.fake.refuse(Some("tell a ring's position"));
    assert!(guest.net.pause().is_err());
    guest.fake.take_operations();
    guest.net.resume();
    assert_eq!(
        guest.fake.take_operations(),
        [backend(0, guest.tap), backend(1, guest.tap)]
    );
    assert!(!pending(&guest.net));

    // Whoever resumes cannot be told.
    guest.fake.refuse(None);
    guest.net.pause().unwrap();
    guest.fake.refuse(Some("serve the tap"));
    guest.net.resume();
    assert!(pending(&guest.net));
    assert!(matches!(guest.net.process_event(), Err(DeviceError::Vhost(_))));
    assert!(!pending(&guest.net));
    guest.net.process_event().unwrap();
}

#[test]
fn without_the_kernel_kicks_come_to_the_device_itself() {
    let mut guest = Guest::new(false);
    guest.kicks[1].write(1).unwrap();
    assert!(guest.net.event_fd().is_some());
    guest.start().unwrap();
    guest.net.process_event().unwrap();
    assert_eq!(guest.take_kicks(), [0, 0]);
    while pending(&guest.net) {
        guest.net.process_event().unwrap();
    }
    guest.queues[1].add(&[(BUFFERS, 60, false)]);
    guest.kicks[1].write(1).unwrap();
    assert!(pending(&guest.net));
    guest.net.process_event().unwrap();
    assert_eq!(guest.wire.read(&mut [0; 100]).unwrap(), 60);
    assert_eq!(guest.queues[1].take_used().len(), 1);
    // Buffers for frames that wait.
    guest.wire.write_all(&[0; 80]).unwrap();
    guest.net.process_event().unwrap();
    assert_eq!(guest.queues[0].take_used(), []);
    guest.queues[0].add(&[(BUFFERS, 2000, true)]);
    guest.kicks[0].write(1).unwrap();
    guest.net.process_event().unwrap();
    assert_eq!(guest.queues[0].take_used(), [(0, 80)]);
}

#[test]
fn a_device_that_has_stopped_does_not_keep_the_event_loop_awake() {
    for failure in [true, false] {
        let mut guest = Guest::started(false);
        if failure {
            guest.queues[1].add(&[(GAP, 100, false)]);
            guest.kicks[1].write(1).unwrap();
            assert!(guest.net.process_event().is_err());
        } else {
            guest.net.reset();
        }
        // Nobody calls the device now.
        guest.kicks[0].write(1).unwrap();
        guest.kicks[1].write(1).unwrap();
        guest.wire.write_all(&[0; 100]).unwrap();
        assert!(!pending(&guest.net), "failure: {failure}");
    }
}
