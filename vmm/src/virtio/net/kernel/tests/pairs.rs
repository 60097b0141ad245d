//! Several pairs, each on a server of its own.

use super::*;
use crate::virtio::net::tests::pairs::{PAIRS, Pairs, set_pairs};

/// A driver of two pairs, and the kernel's stand-ins.
struct Served {
    guest: Pairs,
    taps: Vec<RawFd>,
    fakes: [Fake; 2],
    /// Other ends of the tap's queues.
    _wires: Vec<OwnedFd>,
}

impl Served {
    fn new() -> Self {
        let mut net = Net::new(0, 2).unwrap();
        let (near, far): (Vec<_>, Vec<_>) = (0..2)
            .map(|_| {
                let kind = SockType::SeqPacket;
                socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK).unwrap()
            })
            .unzip();
        let taps = far.iter().map(AsRawFd::as_raw_fd).collect();
        net.attach(far, MAC, 1500).unwrap();
        for tap in &mut net.wire.as_mut().unwrap().taps {
            tap.plain = true;
        }
        let fakes = [Fake::default(), Fake::default()];
        net.serve_with(fakes.iter().map(Fake::device).collect()).unwrap();
        assert_eq!(
            fakes[0].take_operations(),
            [Operation::SetOwner, Operation::GetFeatures]
        );
        assert_eq!(
            fakes[1].take_operations(),
            [],
            "a worker for a pair that may never be on"
        );
        Self {
            guest: Pairs::on(net),
            taps,
            fakes,
            _wires: near,
        }
    }

    fn started() -> Self {
        let mut served = Self::new();
        served.guest.start(PAIRS).unwrap();
        served.fakes[0].take_operations();
        served
    }

    fn set_pairs(&mut self, count: u16) -> Option<u8> {
        self.guest.command(&set_pairs(count))
    }

    fn attached(&self) -> Option<bool> {
        self.guest.net.wire.as_ref().unwrap().taps[1].attached.get()
    }

    fn state(&mut self) -> crate::virtio::net::NetState {
        self.guest.net.save()
    }

    /// What the servers were asked since the last time.
    fn operations(&self) -> [Vec<Operation>; 2] {
        [self.fakes[0].take_operations(), self.fakes[1].take_operations()]
    }

    fn running(&self, pair: usize) -> [Operation; 2] {
        [backend(0, self.taps[pair]), backend(1, self.taps[pair])]
    }
}

fn paused() -> Vec<Operation> {
    let mut operations = HALTED.to_vec();
    operations.extend([Operation::GetBase(0), Operation::GetBase(1)]);
    operations
}

#[test]
fn a_pair_gets_its_server_when_it_is_turned_on() {
    let mut served = Served::new();
    served.guest.start(PAIRS).unwrap();
    let [first, second] = served.operations();
    assert!(first.ends_with(&served.running(0)), "{first:?}");
    assert_eq!(second, []);

    assert_eq!(served.set_pairs(2), Some(0));
    let [first, second] = served.operations();
    assert_eq!(first, []);
    assert_eq!(second[..2], [Operation::SetOwner, Operation::GetFeatures]);
    assert!(second.ends_with(&served.running(1)), "{second:?}");
    assert_eq!(served.attached(), Some(true));
    let kicks: Vec<_> = second
        .iter()
        .filter_map(|operation| match operation {
            Operation::SetKick(file) => Some((file.index, file.fd)),
            _ => None,
        })
        .collect();
    let expected = [2, 3].map(|queue| served.guest.net.kicks[queue].as_raw_fd());
    assert_eq!(kicks, [(0, expected[0]), (1, expected[1])]);
    let place = |queue: usize| {
        let address = GuestAddress(served.guest.queues[queue].descriptors());
        served.guest.memory.get_host_address(address).unwrap() as u64
    };
    let places: Vec<_> = second
        .iter()
        .filter_map(|operation| match operation {
            Operation::SetAddress(address) => Some(address.descriptors),
            _ => None,
        })
        .collect();
    assert_eq!(places, [place(2), place(3)]);

    // Off and on again: the kernel knows it.
    served.fakes[1].set_bases([7, 9]);
    assert_eq!(served.set_pairs(1), Some(0));
    assert_eq!(served.operations(), [vec![], paused()]);
    assert_eq!(served.attached(), Some(false));
    let state = served.state();
    assert_eq!(
        (
            state.on,
            state.queues[2].next_available,
            state.queues[3].next_available
        ),
        (1, 7, 9)
    );
    assert_eq!(served.set_pairs(2), Some(0));
    assert_eq!(served.operations(), [vec![], served.running(1).to_vec()]);
}

#[test]
fn kicks_of_pairs_are_none_of_this_processs_business() {
    let mut served = Served::started();
    for queue in 0..4 {
        served.guest.net.kicks[queue].write(1).unwrap();
    }
    assert!(!pending(&served.guest.net));
    assert_eq!(served.set_pairs(2), Some(0));
    assert!(!pending(&served.guest.net));
}

#[test]
fn all_pairs_that_are_on_pause_and_go_on() {
    let mut served = Served::started();
    served.guest.net.pause().unwrap();
    assert_eq!(served.operations(), [paused(), vec![]]);
    served.guest.net.resume();
    assert_eq!(served.operations(), [served.running(0).to_vec(), vec![]]);
    assert_eq!(served.set_pairs(2), Some(0));
    served.operations();
    served.guest.net.pause().unwrap();
    assert_eq!(served.operations(), [paused(), paused()]);
    let state = served.state();
    assert_eq!((state.pairs, state.on, state.queues.len()), (2, 2, 5));
    served.guest.net.resume();
    assert_eq!(
        served.operations(),
        [served.running(0).to_vec(), served.running(1).to_vec()]
    );

    // Another life.
    let mut other = Served::new();
    other
        .guest
        .net
        .restore_state(&DeviceState::Net(state.clone()))
        .unwrap();
    let activation = Activation {
        queues: state
            .queues
            .iter()
            .map(|queue| queue.restore().unwrap())
            .collect(),
        ..other.guest.activation(PAIRS)
    };
    other.guest.net.activate(activation).unwrap();
    for (pair, operations) in other.operations().iter().enumerate() {
        assert!(operations.ends_with(&other.running(pair)), "{operations:?}");
    }
    assert_eq!(other.attached(), Some(true));
}

#[test]
fn a_reset_takes_all_pairs_back() {
    let mut served = Served::started();
    assert_eq!(served.set_pairs(2), Some(0));
    served.operations();
    served.guest.net.reset();
    assert_eq!(served.operations(), [HALTED.to_vec(), HALTED.to_vec()]);
    assert_eq!(served.attached(), Some(false));
    served.guest.start(PAIRS).unwrap();
    let [first, second] = served.operations();
    assert!(first.ends_with(&served.running(0)), "{first:?}");
    assert_eq!(second, []);
    // Its rings may be elsewhere now.
    assert_eq!(served.set_pairs(2), Some(0));
    let [_, second] = served.operations();
    assert!(!second.contains(&Operation::SetOwner));
    assert!(matches!(second[0], Operation::SetFeatures(_)), "{second:?}");
    assert!(second.ends_with(&served.running(1)), "{second:?}");
}

#[test]
fn a_pair_that_the_kernel_refuses_stays_off() {
    for refused in ["start its worker", "take a ring's addresses", "serve the tap"] {
        let mut served = Served::started();
        served.fakes[1].refuse(Some(refused));
        assert_eq!(served.set_pairs(2), Some(1), "{refused}");
        assert_eq!(
            (served.state().on, served.attached()),
            (1, Some(false)),
            "{refused}"
        );
        assert!(!pending(&served.guest.net));
        served.fakes[1].refuse(None);
        served.operations();
        assert_eq!(served.set_pairs(2), Some(0), "{refused}");
        let [first, second] = served.operations();
        assert_eq!(first, []);
        assert!(second.ends_with(&served.running(1)), "{refused}: {second:?}");
    }
}

#[test]
fn a_pair_that_cannot_be_turned_off_stops_the_device() {
    let mut served = Served::started();
    assert_eq!(served.set_pairs(2), Some(0));
    served.fakes[1].refuse(Some("tell a ring's position"));
    served.operations();
    // The answer comes first.
    served.guest.net.kicks[4].write(1).unwrap();
    let bytes = set_pairs(1);
    let (at, answer) = (GuestAddress(0xd_0000), GuestAddress(0xd_1000));
    served.guest.memory.write_slice(&bytes, at).unwrap();
    served.guest.queues[4].take_used();
    served.guest.queues[4].add(&[(at.0, 4, false), (answer.0, 1, true)]);
    let error = served.guest.net.process_event().unwrap_err();
    assert!(matches!(error, DeviceError::Vhost(_)), "{error:?}");
    assert_eq!(served.guest.queues[4].take_used().len(), 1);
    assert_eq!(served.guest.memory.read_obj::<u8>(answer).unwrap(), 1);
    let [first, second] = served.operations();
    assert_eq!(first, HALTED);
    assert!(second.ends_with(&HALTED), "{second:?}");
    assert_eq!(served.attached(), Some(false));
    assert!(!pending(&served.guest.net));
}

#[test]
fn a_broken_ring_of_any_pair_stops_the_device() {
    let mut served = Served::started();
    assert_eq!(served.set_pairs(2), Some(0));
    served.operations();
    // As the kernel does: it has the eventfd by its number.
    nix::unistd::write(served.guest.net.vhosts[1].errors(), &1_u64.to_ne_bytes()).unwrap();
    let error = served.guest.net.process_event().unwrap_err();
    assert!(matches!(error, DeviceError::Protocol(_)), "{error:?}");
    assert_eq!(served.operations(), [HALTED.to_vec(), HALTED.to_vec()]);
    assert_eq!(served.attached(), Some(false));
    assert!(!pending(&served.guest.net));
}

#[test]
fn each_pair_needs_a_server() {
    let mut served = Served::new();
    served.guest.net.detach().unwrap();
    assert!(served.guest.net.vhosts.is_empty());
    let (_near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let second = far.try_clone().unwrap();
    served
        .guest
        .net
        .attach(vec![far.into(), second.into()], MAC, 1500)
        .unwrap();
    let error = served.guest.net.serve_with(vec![Fake::default().device()]);
    assert!(
        matches!(error, Err(SlotError::Wire(0, NetError::Servers(1, 2)))),
        "{error:?}"
    );
}
