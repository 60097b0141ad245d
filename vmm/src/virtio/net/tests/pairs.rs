//! Several pairs of queues, and the commands that turn them on and off.

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ_HASH_CONFIG, VIRTIO_NET_CTRL_MQ_RSS_CONFIG, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ,
};
use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_NEXT;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::virtio::net::pairs::Changes;
use crate::virtio::test_queue::GAP;
use crate::virtio::{Activation, DeviceState, RestoreError};

pub const PAIRS: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
/// The control queue of a device with two pairs.
pub const CONTROL: usize = 4;
/// Where its rings are, apart from buffers; and what goes over it.
const CONTROL_RINGS: u64 = 8;
const COMMAND: u64 = 0xd_0000;
const ANSWER: u64 = 0xd_1000;

const OK: Option<u8> = Some(0);
const ERR: Option<u8> = Some(1);

/// A driver of a device with two pairs.
pub struct Pairs {
    pub memory: GuestMemory,
    /// Receive and transmit queues of the pairs, and the control queue.
    pub queues: Vec<TestQueue>,
    pub net: Net,
    /// Other ends of the two queues of the tap.
    wires: Vec<std::fs::File>,
}

/// `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
pub fn set_pairs(count: u16) -> [u8; 4] {
    let [low, high] = count.to_le_bytes();
    [4, 0, low, high]
}

/// Puts sockets in the place of two queues of a tap; their other ends.
fn attach(net: &mut Net) -> Vec<std::fs::File> {
    let kind = SockType::SeqPacket;
    let (near, far): (Vec<_>, Vec<_>) = (0..2)
        .map(|_| socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).unwrap())
        .unzip();
    net.attach(far, MAC, 1500).unwrap();
    for tap in &mut net.wire.as_mut().unwrap().taps {
        tap.plain = true;
    }
    near.into_iter().map(std::fs::File::from).collect()
}

impl Pairs {
    pub fn on(mut net: Net) -> Self {
        let kicks = (0..=CONTROL).map(|_| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        net.set_queue_events(kicks.collect());
        let memory = test_queue::memory();
        let places = [(0, 256), (1, 256), (2, 256), (3, 256), (CONTROL_RINGS, 16)];
        Self {
            queues: places
                .map(|(place, size)| TestQueue::new(&memory, place, size))
                .into(),
            memory,
            net,
            wires: Vec::new(),
        }
    }

    fn new() -> Self {
        let mut net = Net::new(0, 2).unwrap();
        let wires = attach(&mut net);
        Self {
            wires,
            ..Self::on(net)
        }
    }

    fn started() -> Self {
        let mut guest = Self::new();
        guest.start(PAIRS).unwrap();
        guest
    }

    pub fn activation(&self, features: u64) -> Activation {
        let queues: Vec<_> = self.queues.iter().collect();
        test_queue::activation(&self.memory, &queues, RING_FEATURES | MERGEABLE | features)
    }

    pub fn start(&mut self, features: u64) -> Result<(), DeviceError> {
        self.net.activate(self.activation(features))
    }

    pub fn run(&mut self) {
        for _ in 0..100 {
            if !pending(&self.net) {
                return;
            }
            self.net.process_event().unwrap();
        }
        panic!("device spins");
    }

    /// Makes a command available on a queue.
    fn post(&mut self, queue: usize, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(COMMAND)).unwrap();
        self.memory.write_slice(&[0xff; 4], GuestAddress(ANSWER)).unwrap();
        // Class and command are apart from what belongs to them, as Linux has it.
        let head = bytes.len().min(2);
        let mut buffers = vec![(COMMAND, head as u32, false)];
        if bytes.len() > head {
            buffers.push((COMMAND + head as u64, (bytes.len() - head) as u32, false));
        }
        buffers.push((ANSWER, 1, true));
        self.queues[queue].add(&buffers);
    }

    /// Sends a command by a queue; the answer.
    fn command_by(&mut self, queue: usize, bytes: &[u8]) -> Option<u8> {
        self.post(queue, bytes);
        self.net.kicks[queue].write(1).unwrap();
        self.run();
        let used = self.queues[queue].take_used();
        let mut answer = [0; 2];
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        assert_eq!(answer[1], 0xff, "more than the answer");
        match used[..] {
            [] => None,
            [(_, 1)] => Some(answer[0]),
            _ => panic!("{used:?}"),
        }
    }

    pub fn command(&mut self, bytes: &[u8]) -> Option<u8> {
        self.command_by(CONTROL, bytes)
    }

    /// Gives receive buffers to a pair.
    pub fn give(&mut self, pair: usize, count: u64) {
        for n in 0..count {
            let at = BUFFERS + 0x2_0000 * pair as u64 + n * 0x800;
            self.queues[2 * pair].add(&[(at, 0x800, true)]);
        }
        self.net.kicks[2 * pair].write(1).unwrap();
    }

    /// Sends a frame by a pair.
    pub fn send(&mut self, pair: usize, frame: &[u8]) {
        self.memory.write_slice(frame, GuestAddress(TX_BUFFER)).unwrap();
        self.queues[2 * pair + 1].add(&[(TX_BUFFER, frame.len() as u32, false)]);
        self.net.kicks[2 * pair + 1].write(1).unwrap();
    }

    /// What the device did last with the two queues of the tap.
    fn attached(&self) -> [Option<bool>; 2] {
        let taps = &self.net.wire.as_ref().unwrap().taps;
        [taps[0].attached.get(), taps[1].attached.get()]
    }

    fn state(&mut self) -> NetState {
        let DeviceState::Net(state) = self.net.save_state() else {
            panic!("another device's");
        };
        state
    }
}

#[test]
fn one_pair_needs_no_commands() {
    let net = Net::new(0, 1).unwrap();
    assert_eq!(net.features() & PAIRS, 0);
    assert_eq!(net.queue_sizes(), [256, 256]);
}

#[test]
fn several_pairs_are_offered_with_a_control_queue() {
    let net = Net::new(0, 4).unwrap();
    assert_eq!(net.features() & PAIRS, PAIRS);
    assert_eq!(net.queue_sizes(), [256, 256, 256, 256, 256, 256, 256, 256, 16]);
    let mut config = [0xff; 14];
    net.read_config(0, &mut config);
    // `status`, `max_virtqueue_pairs`, `mtu`.
    assert_eq!(config[6..], [0, 0, 4, 0, 0, 0, 0, 0]);
}

#[test]
fn a_wire_has_as_many_queues_as_there_are_pairs() {
    let mut net = Net::new(5, 2).unwrap();
    let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let error = net.attach(vec![near.into()], MAC, 1500).unwrap_err();
    assert!(
        matches!(error, SlotError::Wire(5, NetError::Queues(1, 2))),
        "{error:?}"
    );
}

#[test]
fn a_pair_is_served_while_it_is_on() {
    let mut guest = Pairs::started();
    for pair in 0..2 {
        guest.give(pair, 40);
    }
    let frame = frame(100);
    let mut received = [0; 200];
    for round in 0..3_u64 {
        // Off: nothing moves.
        guest.wires[1].write_all(&frame).unwrap();
        guest.send(1, &frame);
        guest.run();
        assert_eq!(
            (guest.queues[2].take_used(), guest.queues[3].take_used()),
            (vec![], vec![])
        );
        assert!(guest.wires[1].read(&mut received).is_err());

        assert_eq!(guest.command(&set_pairs(2)), OK);
        assert_eq!(guest.attached(), [None, Some(true)]);
        guest.run();
        // What has waited, in both directions.
        assert_eq!(guest.queues[2].take_used().len(), 1, "round {round}");
        assert_eq!(guest.queues[3].take_used().len(), 1);
        assert_eq!(guest.wires[1].read(&mut received).unwrap(), 100);
        // The first pair is not affected.
        guest.wires[0].write_all(&frame).unwrap();
        guest.wires[1].write_all(&frame).unwrap();
        guest.send(0, &frame);
        guest.run();
        assert_eq!(guest.queues[0].take_used().len(), 1);
        assert_eq!(guest.queues[2].take_used().len(), 1);
        assert_eq!(guest.wires[0].read(&mut received).unwrap(), 100);
        assert_eq!(guest.queues[1].take_used().len(), 1);
        // As it is already.
        assert_eq!(guest.command(&set_pairs(2)), OK);

        assert_eq!(guest.command(&set_pairs(1)), OK);
        assert_eq!(guest.attached(), [None, Some(false)]);
    }
}

#[test]
fn a_reset_leaves_one_pair() {
    let mut guest = Pairs::started();
    assert_eq!(guest.command(&set_pairs(2)), OK);
    guest.net.reset();
    assert_eq!(guest.attached(), [None, Some(false)]);
    assert_eq!((guest.state().on, guest.state().queues), (0, vec![]));
    assert_eq!(guest.command(&set_pairs(2)), None);
    guest.start(PAIRS).unwrap();
    assert_eq!((guest.state().on, guest.attached()), (1, [None, Some(false)]));
}

#[test]
fn pairs_are_not_turned_on_without_an_end() {
    let mut guest = Pairs::started();
    let mut done = 0;
    for _ in 0..200 {
        done += usize::from(guest.command(&set_pairs(2)) == OK);
        assert_eq!(guest.command(&set_pairs(1)), OK);
    }
    // One more a second.
    assert!((32..100).contains(&done), "{done}");
    // A start does not change that.
    guest.net.reset();
    let mut guest = Pairs {
        wires: guest.wires,
        ..Pairs::on(guest.net)
    };
    guest.start(PAIRS).unwrap();
    for _ in 0..100 {
        let _ = guest.command(&set_pairs(2));
        let _ = guest.command(&set_pairs(1));
    }
    assert_eq!(guest.state().on, 1);

    let begin = std::time::Instant::now();
    let mut changes = Changes::new(begin);
    let mut in_a_row = |seconds: u64| {
        let now = begin + std::time::Duration::from_secs(seconds);
        (0..100).filter(|_| changes.take(now)).count()
    };
    assert_eq!(
        [0, 0, 1, 1, 4, 1_000_000].map(&mut in_a_row),
        [32, 0, 1, 0, 3, 32]
    );
}

#[test]
fn other_commands_are_refused() {
    let mut guest = Pairs::started();
    let mut long = vec![4, 0, 2, 0];
    long.resize(3000, 0);
    let refused: [&[u8]; 12] = [
        &set_pairs(0),
        &set_pairs(3),
        &set_pairs(0x8000),
        &set_pairs(0xffff),
        &[4, VIRTIO_NET_CTRL_MQ_RSS_CONFIG as u8, 2, 0],
        &[4, VIRTIO_NET_CTRL_MQ_HASH_CONFIG as u8, 2, 0],
        // Promiscuous mode, a table of addresses.
        &[0, 0, 1],
        &[1, 0, 2, 0],
        &[4],
        &[4, 0],
        &[4, 0, 2],
        &long,
    ];
    for command in refused {
        assert_eq!(
            guest.command(command),
            ERR,
            "{:?}",
            &command[..command.len().min(8)]
        );
    }
    // Nothing but room for an answer.
    guest.queues[CONTROL].add(&[(ANSWER, 1, true)]);
    guest.net.kicks[CONTROL].write(1).unwrap();
    guest.run();
    assert_eq!(guest.queues[CONTROL].take_used().len(), 1);
    assert_eq!((guest.state().on, guest.attached()), (1, [None, None]));
    assert_eq!(guest.command(&set_pairs(2)), OK);
}

#[test]
fn malformed_commands_stop_the_device() {
    type Harm = fn(&mut TestQueue);
    let harms: [(&str, Harm); 8] = [
        ("no answer", |queue| {
            queue.add(&[(COMMAND, 4, false)]);
        }),
        ("command out of range", |queue| {
            queue.add(&[(GAP, 4, false), (ANSWER, 1, true)]);
        }),
        ("answer out of range", |queue| {
            queue.add(&[(COMMAND, 4, false), (GAP, 1, true)]);
        }),
        ("zero length", |queue| {
            queue.add(&[(COMMAND, 0, false), (ANSWER, 1, true)]);
        }),
        ("answer first", |queue| {
            queue.add(&[(ANSWER, 1, true), (COMMAND, 4, false)]);
        }),
        ("loop", |queue| {
            queue.set_descriptor(7, COMMAND, 4, VRING_DESC_F_NEXT, 7);
            queue.publish(7);
        }),
        ("head outside the table", |queue| queue.publish(16)),
        ("index ahead", |queue| queue.set_available_index(100)),
    ];
    for (name, harm) in harms {
        let mut guest = Pairs::started();
        assert_eq!(guest.command(&set_pairs(2)), OK);
        guest.give(0, 40);
        harm(&mut guest.queues[CONTROL]);
        guest.net.kicks[CONTROL].write(1).unwrap();
        let error = guest.net.process_event().unwrap_err();
        assert!(
            matches!(
                error,
                DeviceError::Chain(_) | DeviceError::Protocol(_) | DeviceError::Queue(_)
            ),
            "{name}: {error:?}"
        );
        // It stands still, and nobody is kept awake.
        guest.wires[0].write_all(&frame(100)).unwrap();
        guest.net.kicks[CONTROL].write(1).unwrap();
        assert!(!pending(&guest.net), "{name}");
        assert_eq!(
            (guest.state().on, guest.attached()),
            (0, [None, Some(false)]),
            "{name}"
        );
    }
}

#[test]
fn a_pair_whose_queues_are_off_stays_off() {
    for queue in [2, 3] {
        let mut guest = Pairs::new();
        let mut activation = guest.activation(PAIRS);
        activation.queues[queue].set_ready(false);
        guest.net.activate(activation).unwrap();
        assert_eq!(guest.command(&set_pairs(2)), ERR);
        assert_eq!((guest.state().on, guest.attached()), (1, [None, None]));
        guest.give(0, 40);
        guest.wires[0].write_all(&frame(100)).unwrap();
        guest.run();
        assert_eq!(guest.queues[0].take_used().len(), 1);
    }
}

#[test]
fn a_driver_of_one_pair_has_its_control_queue_behind_that() {
    let mut guest = Pairs::new();
    guest.start(1 << VIRTIO_NET_F_CTRL_VQ).unwrap();
    assert_eq!(guest.command_by(2, &set_pairs(1)), ERR);
    assert_eq!(guest.command_by(2, &set_pairs(2)), ERR);
    assert_eq!(guest.command(&set_pairs(2)), None);
    assert_eq!(guest.state().queues.len(), 5);

    let mut guest = Pairs::new();
    guest.start(0).unwrap();
    assert_eq!(guest.command_by(2, &set_pairs(1)), None);
    assert_eq!((guest.state().on, guest.state().queues.len()), (1, 5));

    let error = Pairs::new().start(1 << VIRTIO_NET_F_MQ).unwrap_err();
    assert!(matches!(error, DeviceError::Protocol(_)), "{error:?}");
}

#[test]
fn a_restored_device_has_the_pairs_on_that_it_had() {
    let mut guest = Pairs::started();
    assert_eq!(guest.command(&set_pairs(2)), OK);
    guest.give(1, 40);
    guest.wires[1].write_all(&frame(100)).unwrap();
    guest.run();
    let state = guest.state();
    assert_eq!((state.pairs, state.on, state.queues.len()), (2, 2, 5));
    assert_eq!(state.queues[2].next_used, 1);
    // The one command.
    assert_eq!(
        (state.queues[4].next_available, state.queues[4].next_used),
        (1, 1)
    );
    let bytes = postcard::to_stdvec(&state).unwrap();
    let state: NetState = postcard::from_bytes(&bytes).unwrap();

    let mut net = Net::new(0, 2).unwrap();
    net.restore_state(&DeviceState::Net(state.clone())).unwrap();
    let wires = attach(&mut net);
    let kicks = std::mem::take(&mut guest.net.kicks);
    net.set_queue_events(kicks);
    guest.net = net;
    guest.wires = wires;
    let activation = Activation {
        queues: state
            .queues
            .iter()
            .map(|queue| queue.restore().unwrap())
            .collect(),
        ..guest.activation(PAIRS)
    };
    guest.net.activate(activation).unwrap();
    assert_eq!((guest.state().on, guest.attached()), (2, [None, Some(true)]));
    guest.queues[2].take_used();
    guest.wires[1].write_all(&frame(100)).unwrap();
    guest.run();
    assert_eq!(guest.queues[2].take_used().len(), 1);
    guest.queues[CONTROL].take_used();
    assert_eq!(guest.command(&set_pairs(1)), OK);
    // A driver that starts anew begins with one.
    guest.net.reset();
    guest.start(PAIRS).unwrap();
    assert_eq!(guest.state().on, 1);

    for pairs in [1, 3] {
        let error = Net::new(0, pairs)
            .unwrap()
            .restore_state(&DeviceState::Net(state.clone()))
            .unwrap_err();
        assert!(
            matches!(
                error,
                RestoreError::Differs {
                    what: "pairs of queues",
                    ..
                }
            ),
            "{error:?}"
        );
    }
    // Who wrote it down lied.
    let mut guest = Pairs::new();
    let lie = NetState { on: 3, ..state };
    guest.net.restore_state(&DeviceState::Net(lie)).unwrap();
    assert!(matches!(guest.start(PAIRS), Err(DeviceError::Protocol(_))));
}

#[test]
fn commands_are_answered_when_the_wire_is_gone() {
    let mut guest = Pairs::started();
    assert_eq!(guest.command(&set_pairs(2)), OK);
    guest.net.detach().unwrap();
    assert_eq!(guest.command(&set_pairs(1)), ERR);
    assert_eq!(guest.state().queues, []);
    guest.net.reset();
    assert_eq!(guest.command(&set_pairs(1)), None);

    // A restored driver had one.
    let mut guest = Pairs::on(Net::new(0, 2).unwrap());
    guest.start(PAIRS).unwrap();
    assert_eq!(guest.command(&set_pairs(1)), ERR);
    assert!(!pending(&guest.net));
}
