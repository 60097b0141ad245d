use super::*;

#[test]
fn a_registration_serves_one_connection() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    guest.send(
        Header {
            src_port: GUEST_PORT + 1,
            ..guest.header(op::REQUEST)
        },
        &[],
    );
    let packets = guest.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.dst_port),
        (op::RST, GUEST_PORT + 1)
    );
    assert_eq!(packets.len(), 1);
    assert_eq!(guest.events(), []);

    guest.send_data(b"to the host");
    assert_eq!(drain(&mut near), (b"to the host".to_vec(), false));
    near.write_all(b"to the guest").unwrap();
    guest.run();
    assert_eq!(payload(guest.packets()), b"to the guest");
}

#[test]
fn the_first_byte_of_a_registration_is_told_once() {
    let mut guest = Guest::new();
    for round in 1..=2 {
        let mut near = guest.establish_socket();
        guest.send_op(op::CREDIT_UPDATE);
        guest.send_data(&[]);
        guest.events();
        assert_eq!(guest.first_data.len(), round - 1, "nothing has come");
        guest.send_data(b"a");
        assert_eq!(drain(&mut near).0, b"a");
        assert_eq!(
            guest.vsock.take_events(),
            [VsockEvent::FirstData { port: PORT }],
            "as soon as it is there"
        );
        guest.first_data.push(PORT);
        guest.send_data(b"b");
        guest.send_op(op::RST);
        assert_eq!(guest.events(), CLOSED);
        assert_eq!(guest.first_data.len(), round);
    }
}

#[test]
fn first_bytes_nobody_reads_are_told_and_streams_of_the_host_are_not() {
    let mut guest = Guest::new();
    let near = guest.establish_socket();
    drop(near);
    guest.send_data(b"a");
    guest.events();
    assert_eq!(guest.first_data, [PORT]);

    let mut guest = Guest::new();
    let (mut near, request) = connect(&mut guest, 7);
    guest.send(answer(&guest, &request, op::RESPONSE), &[]);
    guest.send(answer(&guest, &request, op::RW), b"a");
    assert_eq!(drain(&mut near).0, b"a");
    guest.events();
    assert!(guest.first_data.is_empty());
}

#[test]
fn what_has_no_connection_is_reset() {
    let mut guest = Guest::new();
    for op in [
        op::REQUEST,
        op::RESPONSE,
        op::RW,
        op::SHUTDOWN,
        op::CREDIT_UPDATE,
        op::CREDIT_REQUEST,
        99,
    ] {
        guest.send_op(op);
        let packets = guest.packets();
        let (header, _) = packets[0];
        assert_eq!((packets.len(), header.op), (1, op::RST));
        assert_eq!((header.src_port, header.dst_port), (PORT, GUEST_PORT));
    }
    guest.send_op(op::RST);
    assert_eq!(guest.ops(), NONE);
    assert_eq!(guest.events(), []);
}

#[test]
fn other_socket_types_are_reset_and_other_addresses_dropped() {
    let mut guest = Guest::new();
    let (_near, far) = UnixStream::pair().unwrap();
    guest.vsock.listen(PORT, far.into()).unwrap();
    guest.send(
        Header {
            kind: 2,
            ..guest.header(op::REQUEST)
        },
        &[],
    );
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[0].0.kind), (op::RST, 2));
    for (src_cid, dst_cid) in [(4, 2), (3, 3), (3, 1 << 32 | 2), (1 << 32 | 3, 2)] {
        guest.send(
            Header {
                src_cid,
                dst_cid,
                ..guest.header(op::REQUEST)
            },
            &[],
        );
    }
    assert_eq!(guest.ops(), NONE);
    assert_eq!(guest.events(), []);
}

/// Opens a stream from the host; returns the near end and the device's request.
fn connect(guest: &mut Guest, token: u64) -> (UnixStream, Header) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    guest.vsock.connect(GUEST_PORT, far.into(), token).unwrap();
    guest.run();
    let packets = guest.packets();
    assert_eq!((packets.len(), packets[0].0.op), (1, op::REQUEST));
    assert_eq!(packets[0].0.dst_port, GUEST_PORT);
    (near, packets[0].0)
}

fn answer(guest: &Guest, request: &Header, op: u16) -> Header {
    Header {
        dst_port: request.src_port,
        ..guest.header(op)
    }
}

#[test]
fn the_host_connects() {
    let mut guest = Guest::new();
    let (mut near, request) = connect(&mut guest, 7);
    near.write_all(b"early").unwrap();
    guest.run();
    assert_eq!((guest.ops(), guest.events()), (vec![], vec![]));
    guest.send(answer(&guest, &request, op::RESPONSE), &[]);
    let ok = VsockEvent::ConnectResult {
        token: 7,
        result: Ok(()),
    };
    assert_eq!(guest.events(), [ok]);
    guest.run();
    assert_eq!(payload(guest.packets()), b"early");
    guest.send(answer(&guest, &request, op::RW), b"answer");
    assert_eq!(drain(&mut near).0, b"answer");
    guest.send(answer(&guest, &request, op::RST), &[]);
    assert_eq!(guest.events(), [VsockEvent::Closed { port: GUEST_PORT }]);
    assert_eq!(drain(&mut near), (vec![], true));
    assert_eq!(guest.ops(), NONE);
}

#[test]
fn the_guest_refuses() {
    let mut guest = Guest::new();
    let (mut near, request) = connect(&mut guest, 8);
    guest.send(answer(&guest, &request, op::RST), &[]);
    let refused = |token| VsockEvent::ConnectResult {
        token,
        result: Err(ConnectError::Refused),
    };
    assert_eq!(guest.events(), [refused(8)]);
    assert_eq!(drain(&mut near), (vec![], true));
    let (_near, other) = connect(&mut guest, 9);
    assert_ne!(other.src_port, request.src_port);
    guest.send(answer(&guest, &other, op::RW), b"x");
    assert_eq!(guest.events(), [refused(9)]);
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn a_connect_waits_for_the_guest_to_boot() {
    let mut vsock = Vsock::new(CID).unwrap();
    let (_near, far) = UnixStream::pair().unwrap();
    vsock.connect(GUEST_PORT, far.into(), 1).unwrap();
    vsock.process_event().unwrap();
    vsock.reset();
    assert_eq!(vsock.take_events(), []);
    let mut guest = Guest::with(vsock);
    guest.give(1);
    assert_eq!(guest.ops(), [op::REQUEST]);
}

#[test]
fn a_guest_that_does_not_answer_fails_the_connection() {
    let timed_out = |token| VsockEvent::ConnectResult {
        token,
        result: Err(ConnectError::TimedOut),
    };
    let mut guest = Guest::new();
    let (mut near, request) = connect(&mut guest, 7);
    let now = std::time::Instant::now();
    guest.vsock.expire(now);
    assert_eq!(guest.events(), [], "in good time");
    guest.vsock.expire(now + 2 * CONNECT_TIME);
    assert_eq!(guest.events(), [timed_out(7)]);
    assert_eq!(drain(&mut near), (vec![], true), "the far end is closed");
    guest.kick(RX);
    assert_eq!(guest.ops(), [op::RST]);
    guest.send(answer(&guest, &request, op::RESPONSE), &[]);
    assert_eq!(guest.ops(), [op::RST], "too late");
    assert_eq!(guest.events(), []);

    // One that was answered stands, and one the guest could not even be asked for fails.
    let (_near, request) = connect(&mut guest, 8);
    guest.send(answer(&guest, &request, op::RESPONSE), &[]);
    guest.events();
    guest.vsock.expire(std::time::Instant::now() + 2 * CONNECT_TIME);
    assert_eq!(guest.events(), []);
    let mut vsock = Vsock::new(CID).unwrap();
    let (_near, far) = UnixStream::pair().unwrap();
    vsock.connect(GUEST_PORT, far.into(), 9).unwrap();
    vsock.expire(std::time::Instant::now() + 2 * CONNECT_TIME);
    assert_eq!(vsock.take_events(), [timed_out(9)]);
}

#[test]
fn the_far_end_closes_its_side_first() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    near.write_all(b"last words").unwrap();
    near.shutdown(std::net::Shutdown::Write).unwrap();
    guest.run();
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, &*packets[0].1), (op::RW, &b"last words"[..]));
    assert_eq!(
        (packets[1].0.op, packets[1].0.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND)
    );
    assert_eq!(packets.len(), 2);
    guest.send_data(b"still here");
    assert_eq!(drain(&mut near), (b"still here".to_vec(), false));
    assert_eq!(guest.events(), []);
    guest.send_shutdown(SHUTDOWN_SEND);
    assert_eq!(drain(&mut near), (vec![], true));
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
    guest.run();
}

#[test]
fn the_guest_closes_its_side_first() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    guest.send_data(b"last words");
    guest.send_shutdown(SHUTDOWN_SEND);
    assert_eq!(drain(&mut near), (b"last words".to_vec(), true));
    assert_eq!((guest.ops(), guest.events()), (vec![], vec![]));
    near.write_all(b"still here").unwrap();
    guest.run();
    assert_eq!(payload(guest.packets()), b"still here");
    drop(near);
    guest.run();
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn the_guest_closes_both_sides() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    near.write_all(b"nobody reads this").unwrap();
    guest.send_shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
    // The kernel tells that its data was left unread.
    assert!(matches!(near.read(&mut [0]), Ok(0) | Err(_)));
}

#[test]
fn a_guest_that_stops_reading_may_go_on_writing() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    guest.send_shutdown(SHUTDOWN_RECEIVE);
    near.write_all(b"nobody reads this").unwrap();
    guest.run();
    assert_eq!((guest.ops(), guest.events()), (vec![], vec![]));
    guest.send_data(b"data");
    assert_eq!(drain(&mut near), (b"data".to_vec(), false));
    guest.send_shutdown(SHUTDOWN_SEND);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn a_reset_of_the_guest_ends_the_stream_without_an_answer() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    guest.send_data(b"data");
    guest.send_op(op::RST);
    assert_eq!(drain(&mut near), (b"data".to_vec(), true));
    assert_eq!((guest.ops(), guest.events()), (vec![], CLOSED.into()));
}

#[test]
fn packets_out_of_place_end_the_stream() {
    for op in [op::REQUEST, op::RESPONSE, 0, 8, 0xffff] {
        let mut guest = Guest::new();
        let mut near = guest.establish_socket();
        guest.send_data(b"data");
        guest.send_op(op);
        assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
        assert_eq!(drain(&mut near), (b"data".to_vec(), true));
    }
}

#[test]
fn data_behind_a_shutdown_is_a_violation() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    guest.send_shutdown(SHUTDOWN_SEND);
    guest.send_data(b"x");
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
    assert_eq!(drain(&mut near), (vec![], true));
}

#[test]
fn credit_is_told_when_asked_for() {
    let mut guest = Guest::new();
    let _near = guest.establish_socket();
    guest.send_data(b"12345");
    guest.send_op(op::CREDIT_UPDATE);
    assert_eq!(guest.ops(), NONE);
    guest.send_op(op::CREDIT_REQUEST);
    let packets = guest.packets();
    let (header, _) = packets[0];
    assert_eq!((packets.len(), header.op), (1, op::CREDIT_UPDATE));
    assert_eq!((header.buf_alloc as usize, header.fwd_cnt), (BUFFER_SIZE, 5));
}

#[test]
fn a_registration_can_be_withdrawn() {
    let mut guest = Guest::new();
    let (mut near, far) = UnixStream::pair().unwrap();
    guest.vsock.listen(PORT, far.into()).unwrap();
    let (_other, far) = UnixStream::pair().unwrap();
    let error = guest.vsock.listen(PORT, far.into()).unwrap_err();
    assert!(matches!(error, VsockError::PortInUse(PORT)));
    guest.vsock.unlisten(PORT).unwrap();
    assert_eq!(drain(&mut near), (vec![], true));
    guest.send_op(op::REQUEST);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], vec![]));
    let error = guest.vsock.unlisten(PORT).unwrap_err();
    assert!(matches!(error, VsockError::UnknownPort(PORT)));
}

#[test]
fn withdrawing_a_connected_port_cuts_the_stream() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    let (_other, far) = UnixStream::pair().unwrap();
    let error = guest.vsock.listen(PORT, far.into()).unwrap_err();
    assert!(matches!(error, VsockError::PortInUse(PORT)));
    guest.vsock.unlisten(PORT).unwrap();
    assert_eq!(drain(&mut near), (vec![], true));
    guest.run();
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn withdrawing_does_not_reach_streams_of_the_host() {
    let mut guest = Guest::new();
    let (_near, request) = connect(&mut guest, 1);
    assert!(guest.vsock.unlisten(request.src_port).is_err());
}

#[test]
fn streams_are_limited_and_ports_checked() {
    let mut vsock = Vsock::new(CID).unwrap();
    let null = || -> OwnedFd { std::fs::File::open("/dev/null").unwrap().into() };
    assert!(matches!(
        vsock.listen(u32::MAX, null()),
        Err(VsockError::BadPort(_))
    ));
    let (_near, far) = UnixStream::pair().unwrap();
    for port in 0..MAX_STREAMS as u32 {
        vsock.listen(port, far.try_clone().unwrap().into()).unwrap();
    }
    assert!(matches!(
        vsock.listen(5000, null()),
        Err(VsockError::TooManyStreams)
    ));
    assert!(matches!(
        vsock.connect(5000, null(), 0),
        Err(VsockError::TooManyStreams)
    ));
}

#[test]
fn a_device_reset_ends_streams_and_keeps_registrations() {
    let mut guest = Guest::new();
    let mut near = guest.establish_socket();
    let (_connecting, _) = connect(&mut guest, 5);
    let (_waiting, far) = UnixStream::pair().unwrap();
    guest.vsock.listen(PORT + 1, far.into()).unwrap();
    guest.send_data(b"data");
    guest.vsock.reset();
    assert!(guest.pending(), "there are events to collect");
    let failed = VsockEvent::ConnectResult {
        token: 5,
        result: Err(ConnectError::DeviceReset),
    };
    let events = guest.events();
    assert!(
        events.contains(&failed) && events.contains(&CLOSED[0]),
        "{events:?}"
    );
    assert_eq!(drain(&mut near), (b"data".to_vec(), true));

    let mut guest = Guest::with(guest.vsock);
    guest.give(4);
    guest.send(
        Header {
            dst_port: PORT + 1,
            ..guest.header(op::REQUEST)
        },
        &[],
    );
    assert_eq!(guest.ops(), [op::RESPONSE]);
}

#[test]
fn a_restored_guest_drops_its_connections_before_it_gets_new_ones() {
    let mut guest = Guest::new();
    let _near = guest.establish_socket();
    let (_host, request) = connect(&mut guest, 1);
    let state = guest.vsock.save();
    assert_eq!(state.queues.len(), 3);
    assert_eq!(state.queues[TX].next_available, 1);

    let mut guest = Guest::with(restored(state));
    guest.give(8);
    // Of its old stream.
    guest.send_data(b"x");
    let (_near, far) = UnixStream::pair().unwrap();
    guest.vsock.connect(GUEST_PORT, far.into(), 2).unwrap();
    guest.run();
    assert_eq!(guest.ops(), NONE);

    let event = BUFFERS + 0x4_8000;
    for n in 0..2 {
        guest.event.add(&[(event + 16 * n, 8, true)]);
    }
    guest.memory.write_obj(u32::MAX, GuestAddress(event)).unwrap();
    guest.kick(EVENT);
    let used = guest.event.take_used();
    assert_eq!((used.len(), used[0].1), (1, 4));
    assert_eq!(guest.memory.read_obj::<u32>(GuestAddress(event)).unwrap(), 0);
    assert_eq!(guest.event.available_event(), 2, "the next buffer must be kicked");
    guest.kick(EVENT);
    assert_eq!(guest.ops(), NONE, "the driver has not handled the event");

    guest.event.add(&[(event, 8, true)]);
    guest.kick(EVENT);
    let packets = guest.packets();
    assert_eq!((packets[0].0.op, packets[1].0.op), (op::RST, op::REQUEST));
    assert_ne!(packets[1].0.src_port, request.src_port);
}
