use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_NEXT;

use super::*;
use crate::virtio::test_queue::GAP;

/// Address, length and direction of each descriptor.
type Buffers = &'static [(u64, u32, bool)];

/// Lets the driver do `harm`, kicks `queue` and expects the device to stop in good order: an error, no
/// further access, and the stream that was open ends with what was sent.
fn stops(queue: usize, harm: impl FnOnce(&mut Guest)) -> DeviceError {
    let mut guest = Guest::starved();
    guest.give(1);
    let mut near = guest.establish_socket();
    guest.send_data(b"data");
    // Data for the guest, so that the receive buffers are looked at; the good one first.
    near.write_all(&pattern(0, 10_000)).unwrap();
    harm(&mut guest);
    let mut result = guest.vsock.process_queue(queue).map(|_| ());
    if result.is_ok() {
        result = guest.vsock.process_event();
    }
    let error = result.unwrap_err();
    let mut data = [0; 10];
    assert_eq!(near.read(&mut data).unwrap(), 4);
    assert_eq!(guest.events(), CLOSED);
    // The rings are not touched again, whatever happens.
    guest.rx.take_used();
    guest.tx.take_used();
    guest.run();
    for queue in [RX, TX, EVENT] {
        guest.kick(queue);
    }
    assert_eq!((guest.rx.take_used(), guest.tx.take_used()), (vec![], vec![]));
    error
}

#[test]
fn transmitted_chains() {
    const GOOD: u32 = HEADER_SIZE as u32;
    let cases: [(&str, Buffers); 8] = [
        ("out of range", &[(GAP, GOOD, false)]),
        ("into the gap", &[(GAP - 10, GOOD, false)]),
        ("wraps", &[(u64::MAX - 10, GOOD, false)]),
        ("wrong direction", &[(TX_BUFFER, GOOD, true)]),
        ("writable tail", &[(TX_BUFFER, GOOD, false), (BUFFERS, 10, true)]),
        ("zero length", &[(TX_BUFFER, GOOD, false), (TX_BUFFER, 0, false)]),
        ("short header", &[(TX_BUFFER, GOOD - 1, false)]),
        (
            "payload out of range",
            &[(TX_BUFFER, GOOD, false), (GAP, 1, false)],
        ),
    ];
    for (name, buffers) in cases {
        let error = stops(TX, |guest| {
            guest.tx.add(buffers);
        });
        assert!(
            matches!(error, DeviceError::Chain(_) | DeviceError::Protocol(_)),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn a_payload_longer_than_its_buffers() {
    for len in [1, 4096, u32::MAX - 43, u32::MAX] {
        let error = stops(TX, |guest| {
            let header = Header {
                len,
                ..guest.header(op::RW)
            };
            guest
                .memory
                .write_slice(&header.encode(), GuestAddress(TX_BUFFER))
                .unwrap();
            guest.tx.add(&[(TX_BUFFER, HEADER_SIZE as u32, false)]);
        });
        assert!(matches!(error, DeviceError::Protocol(_)), "{len}: {error:?}");
    }
}

#[test]
fn receive_chains() {
    let cases: [(&str, Buffers); 6] = [
        ("out of range", &[(GAP, 4096, true)]),
        ("wrong direction", &[(BUFFERS, 4096, false)]),
        ("readable head", &[(BUFFERS, 44, false), (BUFFERS, 4096, true)]),
        ("zero length", &[(BUFFERS, 4096, true), (BUFFERS, 0, true)]),
        ("header only", &[(BUFFERS, HEADER_SIZE as u32, true)]),
        ("not even a header", &[(BUFFERS, 10, true)]),
    ];
    for (name, buffers) in cases {
        let error = stops(RX, |guest| {
            guest.rx.take_used();
            guest.rx.add(buffers);
            guest.rx.add(buffers);
        });
        assert!(
            matches!(error, DeviceError::Chain(_) | DeviceError::Protocol(_)),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn loops_and_wild_indices() {
    type Harm = fn(&mut TestQueue);
    let harms: [(&str, Harm); 4] = [
        ("loop", |queue| {
            queue.set_descriptor(70, TX_BUFFER, 100, VRING_DESC_F_NEXT, 70);
            queue.publish(70);
        }),
        ("next outside the table", |queue| {
            queue.set_descriptor(70, TX_BUFFER, 100, VRING_DESC_F_NEXT, QUEUE_SIZE);
            queue.publish(70);
        }),
        ("head outside the table", |queue| queue.publish(QUEUE_SIZE)),
        ("index ahead", |queue| queue.set_available_index(1000)),
    ];
    for (name, harm) in harms {
        for index in [RX, TX] {
            let error = stops(index, |guest| {
                harm(if index == RX { &mut guest.rx } else { &mut guest.tx });
            });
            assert!(
                matches!(error, DeviceError::Chain(_) | DeviceError::Queue(_)),
                "{name} on queue {index}: {error:?}"
            );
        }
    }
}

#[test]
fn event_buffers() {
    for buffers in [[(BUFFERS, 3, true)], [(BUFFERS, 8, false)], [(GAP, 8, true)]] {
        let state = Guest::new().vsock.save();
        let mut guest = Guest::with(restored(state));
        guest.event.add(&buffers);
        assert!(guest.vsock.process_queue(EVENT).is_err(), "{buffers:?}");
        guest.kick(EVENT);
    }
}

#[test]
fn too_few_queues() {
    let memory = test_queue::memory();
    let queue = TestQueue::new(&memory, 0, 8);
    let activation = test_queue::activation(&memory, &[&queue, &queue], 0);
    let mut vsock = Vsock::new(CID).unwrap();
    assert!(matches!(
        vsock.activate(activation),
        Err(DeviceError::Protocol(_))
    ));
}
