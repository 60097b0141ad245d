//! Drivers that break the rules: the device stops in good order.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_NEXT;

use super::*;
use crate::virtio::test_queue::GAP;

/// Address, length and direction of each descriptor.
type Buffers = &'static [(u64, u32, bool)];

/// Lets the driver do `harm`, kicks `queue` and expects the device to stop.
fn stops(queue: usize, features: u64, harm: impl FnOnce(&mut Guest)) -> DeviceError {
    let mut guest = Guest::new(features);
    guest.wire.write_all(&frame(100)).unwrap();
    harm(&mut guest);
    let error = guest.net.process_queue(queue).unwrap_err();
    let _ = (guest.rx.take_used(), guest.tx.take_used());
    guest.run();
    guest.kick(RX);
    guest.kick(TX);
    assert_eq!((guest.rx.take_used(), guest.tx.take_used()), (vec![], vec![]));
    error
}

#[test]
fn malformed_transmit_chains() {
    let cases: [(&str, Buffers); 6] = [
        ("out of range", &[(GAP, 100, false)]),
        ("into the gap", &[(TX_BUFFER, 100, false), (GAP - 10, 100, false)]),
        ("wrong direction", &[(TX_BUFFER, 100, true)]),
        ("writable tail", &[(TX_BUFFER, 100, false), (BUFFERS, 10, true)]),
        ("zero length", &[(TX_BUFFER, 100, false), (TX_BUFFER, 0, false)]),
        ("short header", &[(TX_BUFFER, 11, false)]),
    ];
    for (name, buffers) in cases {
        let error = stops(TX, 0, |guest| {
            guest.tx.add(buffers);
        });
        assert!(
            matches!(error, DeviceError::Chain(_) | DeviceError::Protocol(_)),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn malformed_receive_chains() {
    let cases: [(&str, u64, Buffers); 6] = [
        ("out of range", 0, &[(GAP, 2000, true)]),
        ("wrong direction", 0, &[(BUFFERS, 2000, false)]),
        ("readable head", 0, &[(BUFFERS, 12, false), (BUFFERS, 2000, true)]),
        ("zero length", 0, &[(BUFFERS, 2000, true), (BUFFERS, 0, true)]),
        ("less than a frame", 0, &[(BUFFERS, 1529, true)]),
        ("less than a header", MERGEABLE, &[(BUFFERS, 11, true)]),
    ];
    for (name, features, buffers) in cases {
        let error = stops(RX, features, |guest| {
            guest.rx.add(buffers);
        });
        assert!(
            matches!(error, DeviceError::Chain(_) | DeviceError::Protocol(_)),
            "{name}: {error:?}"
        );
    }
}

#[test]
fn a_full_ring_that_cannot_hold_a_frame() {
    let error = stops(RX, LARGE, |guest| {
        for n in 0..256 {
            guest.rx.add(&[(BUFFERS + n * 64, 64, true)]);
        }
    });
    assert!(matches!(error, DeviceError::Protocol(_)), "{error:?}");
}

#[test]
fn loops_and_wild_indices() {
    type Harm = fn(&mut TestQueue);
    let harms: [(&str, Harm); 4] = [
        ("loop", |queue| {
            queue.set_descriptor(7, TX_BUFFER, 100, VRING_DESC_F_NEXT, 7);
            queue.publish(7);
        }),
        ("next outside the table", |queue| {
            queue.set_descriptor(7, TX_BUFFER, 100, VRING_DESC_F_NEXT, 256);
            queue.publish(7);
        }),
        ("head outside the table", |queue| queue.publish(256)),
        ("index ahead", |queue| queue.set_available_index(1000)),
    ];
    for (name, harm) in harms {
        for index in [RX, TX] {
            let error = stops(index, MERGEABLE, |guest| {
                harm(if index == RX { &mut guest.rx } else { &mut guest.tx });
            });
            assert!(
                matches!(error, DeviceError::Chain(_) | DeviceError::Queue(_)),
                "{name} on queue {index}: {error:?}"
            );
        }
    }
}
