use std::io::pipe;

use super::*;

#[test]
fn the_host_keeps_to_the_guests_credit() {
    let mut guest = Guest::new();
    guest.buf_alloc = 10_000;
    let mut near = guest.establish_socket();
    near.write_all(&pattern(0, 30_000)).unwrap();
    guest.run();
    let mut packets = guest.packets();
    assert_eq!(packets.pop().unwrap().0.op, op::CREDIT_REQUEST);
    assert_eq!(payload(packets), pattern(0, 10_000));
    // An answer that gives nothing brings no second question.
    for _ in 0..3 {
        guest.send_op(op::CREDIT_UPDATE);
        guest.run();
        assert_eq!(guest.ops(), NONE);
    }
    let header = Header {
        fwd_cnt: 4_000,
        ..guest.header(op::CREDIT_UPDATE)
    };
    guest.send(header, &[]);
    let mut packets = guest.packets();
    assert_eq!(packets.pop().unwrap().0.op, op::CREDIT_REQUEST);
    assert_eq!(payload(packets), pattern(10_000, 4_000));
    // A guest that claims to have read more than it got has no more room for it.
    let header = Header {
        fwd_cnt: 20_000,
        ..guest.header(op::CREDIT_UPDATE)
    };
    guest.send(header, &[]);
    assert_eq!(guest.ops(), NONE);
    let header = Header {
        fwd_cnt: 14_000,
        buf_alloc: u32::MAX,
        ..guest.header(op::CREDIT_UPDATE)
    };
    guest.send(header, &[]);
    guest.run();
    assert_eq!(payload(guest.packets()), pattern(14_000, 16_000));
}

#[test]
fn a_guest_that_overruns_its_credit_is_reset_and_what_it_sent_arrives() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe().unwrap();
    guest.establish(writer);
    // The pipe is filled first, so that all of the credit is needed.
    let mut sent = 0;
    let mut packet = |guest: &mut Guest, len: usize| {
        guest.send_data(&pattern(sent, len));
        sent += len;
    };
    packet(&mut guest, 64 << 10);
    for _ in 0..4 {
        packet(&mut guest, 64 << 10);
    }
    assert_eq!(guest.vsock.buffered(), BUFFER_SIZE);
    assert_eq!((guest.ops(), guest.events()), (vec![op::CREDIT_UPDATE], vec![]));
    guest.send_data(b"!");
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], vec![]));
    guest.send_data(b"!");
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], vec![]));

    let mut all = Vec::new();
    let mut part = vec![0; 10_000];
    loop {
        let count = reader.read(&mut part).unwrap();
        all.extend_from_slice(&part[..count]);
        if count == 0 {
            break;
        }
        guest.run();
    }
    assert_eq!(all, pattern(0, sent));
    assert_eq!((guest.ops(), guest.events()), (vec![], CLOSED.into()));
    assert_eq!(guest.vsock.buffered(), 0);
}

#[test]
fn packets_come_in_any_number_of_descriptors() {
    let data = pattern(0, 1000);
    let layouts: [&[usize]; 5] = [
        &[44 + 1000],
        &[44, 1000],
        &[20, 24, 1, 999],
        &[43, 2, 999],
        &[44, 100, 100, 100, 100, 100, 100, 100, 100, 100, 100, 200],
    ];
    for layout in layouts {
        let mut guest = Guest::new();
        let mut near = guest.establish_socket();
        let header = Header {
            len: 1000,
            ..guest.header(op::RW)
        };
        let mut rest = [header.encode().to_vec(), data.clone(), pattern(0, 200)].concat();
        let mut buffers = Vec::new();
        let mut at = TX_BUFFER;
        for &len in layout {
            let tail = rest.split_off(len);
            guest.memory.write_slice(&rest, GuestAddress(at)).unwrap();
            buffers.push((at, len as u32, false));
            at += len as u64 + 3;
            rest = tail;
        }
        guest.tx.add(&buffers);
        guest.kick(TX);
        assert_eq!(drain(&mut near), (data.clone(), false), "{layout:?}");
        assert_eq!(guest.tx.take_used().len(), 2);
    }
}

#[test]
fn receive_buffers_may_be_in_pieces() {
    let mut guest = Guest::starved();
    let (mut near, far) = UnixStream::pair().unwrap();
    guest.vsock.listen(PORT, far.into()).unwrap();
    guest.send_op(op::REQUEST);
    near.write_all(&pattern(0, 100)).unwrap();
    for _ in 0..2 {
        guest.rx.add(&[
            (BUFFERS, 30, true),
            (BUFFERS + 0x100, 16, true),
            (BUFFERS + 0x200, 50, true),
        ]);
    }
    guest.kick(RX);
    guest.run();
    let used: Vec<u32> = guest.rx.take_used().iter().map(|used| used.1).collect();
    assert_eq!(used, [44, 96]);
    let mut data = [0; 52];
    guest
        .memory
        .read_slice(&mut data[..2], GuestAddress(BUFFERS + 0x10e))
        .unwrap();
    guest
        .memory
        .read_slice(&mut data[2..], GuestAddress(BUFFERS + 0x200))
        .unwrap();
    assert_eq!(data.to_vec(), pattern(0, 52));
}

/// Feeds `total` bytes into the stream, as far as the credit goes; then closes like Linux does.
struct Feeder {
    total: usize,
    sent: usize,
    free: usize,
    closed: bool,
    forwarded: u32,
}

impl Feeder {
    fn new(total: usize) -> Self {
        Self {
            total,
            sent: 0,
            free: BUFFER_SIZE,
            closed: false,
            forwarded: 0,
        }
    }

    fn feed(&mut self, guest: &mut Guest) {
        for (header, _) in guest.packets() {
            if header.op == op::CREDIT_UPDATE {
                self.free += (header.fwd_cnt - self.forwarded) as usize;
                self.forwarded = header.fwd_cnt;
            }
        }
        while self.sent < self.total && self.free > 0 {
            let len = (self.total - self.sent).min(self.free).min(61_111);
            guest.send_data(&pattern(self.sent, len));
            self.sent += len;
            self.free -= len;
        }
        if self.sent == self.total && !self.closed {
            guest.send_shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
            self.closed = true;
        }
    }
}

#[test]
fn ten_mebibytes_pass_through_a_slow_pipe_unharmed() {
    const TOTAL: usize = 10 << 20;
    for reset in [false, true] {
        let mut guest = Guest::new();
        let (mut reader, writer) = pipe().unwrap();
        guest.establish(writer);
        let mut feeder = Feeder::new(TOTAL);
        let mut received = Vec::new();
        let mut part = vec![0; 40_000];
        loop {
            feeder.feed(&mut guest);
            if reset && feeder.closed {
                // Linux gives up on the closing handshake after some seconds.
                guest.send_op(op::RST);
            }
            assert!(guest.vsock.buffered() <= BUFFER_SIZE);
            // 1000 and 40000 bytes in turn: never in step with the packets.
            let size = if received.len() % 3 == 0 { 1000 } else { 40_000 };
            let count = reader.read(&mut part[..size]).unwrap();
            if count == 0 {
                break;
            }
            received.extend_from_slice(&part[..count]);
            guest.run();
            let drained = guest.vsock.buffered() == 0 && feeder.closed;
            assert_eq!(guest.events() == CLOSED, drained);
            if drained {
                let (rest, eof) = drain(&mut reader);
                received.extend_from_slice(&rest);
                assert!(eof);
                break;
            }
        }
        assert_eq!(received.len(), TOTAL);
        assert!(received == pattern(0, TOTAL));
    }
}

#[test]
fn a_megabyte_from_the_host_passes_through_few_buffers() {
    let mut guest = Guest::starved();
    guest.give(3);
    let mut near = guest.establish_socket();
    let data = pattern(0, 1 << 20);
    let mut written = 0;
    let mut received = Vec::new();
    while received.len() < data.len() {
        if let Ok(count) = near.write(&data[written..]) {
            written += count;
        }
        guest.run();
        let packets = guest.packets();
        assert!(!packets.is_empty(), "stuck at {} of {written}", received.len());
        received.extend(payload(packets));
        let header = Header {
            fwd_cnt: received.len() as u32,
            ..guest.header(op::CREDIT_UPDATE)
        };
        guest.send(header, &[]);
    }
    assert_eq!(received, data);
}

#[test]
fn without_receive_buffers_nothing_spins_and_nothing_is_lost() {
    let mut guest = Guest::starved();
    let mut nears = Vec::new();
    for n in 0..3 {
        let (mut near, far) = UnixStream::pair().unwrap();
        guest.vsock.listen(PORT + n, far.into()).unwrap();
        let header = Header {
            dst_port: PORT + n,
            ..guest.header(op::REQUEST)
        };
        guest.send(header, &[]);
        near.write_all(&pattern(n as usize, 5000)).unwrap();
        nears.push(near);
    }
    guest.send(
        Header {
            dst_port: 1,
            ..guest.header(op::REQUEST)
        },
        &[],
    );
    nears[0].shutdown(std::net::Shutdown::Write).unwrap();
    guest.run();
    assert!(!guest.pending());
    let mut packets = Vec::new();
    for _ in 0..40 {
        guest.give(1);
        packets.extend(guest.packets_only());
    }
    let of = |port: u32| packets.iter().filter(move |(header, _)| header.src_port == port);
    assert_eq!(of(1).map(|(header, _)| header.op).collect::<Vec<_>>(), [op::RST]);
    for n in 0..3 {
        let mut ops: Vec<u16> = of(PORT + n).map(|(header, _)| header.op).collect();
        ops.dedup();
        let last: &[u16] = if n == 0 { &[op::SHUTDOWN] } else { &[] };
        assert_eq!(ops, [&[op::RESPONSE, op::RW], last].concat());
        let data: Vec<u8> = of(PORT + n).flat_map(|(_, payload)| payload.clone()).collect();
        assert_eq!(data, pattern(n as usize, 5000));
    }
    // Streams take turns.
    let first: Vec<u32> = packets
        .iter()
        .skip(4)
        .take(3)
        .map(|(header, _)| header.src_port)
        .collect();
    assert_eq!(first, [PORT, PORT + 1, PORT + 2]);
}

#[test]
fn a_flood_of_refused_connections_stops_until_the_guest_listens() {
    const COUNT: usize = 700;
    let mut guest = Guest::starved();
    let mut taken = 0;
    for port in 0..COUNT as u32 {
        let header = Header {
            dst_port: port,
            ..guest.header(op::REQUEST)
        };
        if port as usize - taken < usize::from(QUEUE_SIZE) {
            guest.send(header, &[]);
            taken += guest.tx.take_used().len();
        }
    }
    assert_eq!(taken, 512);
    assert_eq!(guest.vsock.queued_packets(), 512);
    assert!(!guest.pending());
    let mut resets = 0;
    for _ in 0..100 {
        guest.give(64);
        resets += guest.packets_only().len();
    }
    assert_eq!(resets, 512 + usize::from(QUEUE_SIZE));
}

#[test]
fn a_transmit_queue_that_never_empties_lets_others_have_their_turn() {
    let mut guest = Guest::new();
    let near = guest.establish_socket();
    let header = Header {
        op: op::CREDIT_UPDATE,
        ..guest.header(op::CREDIT_UPDATE)
    };
    let at = GuestAddress(TX_BUFFER);
    guest.memory.write_slice(&header.encode(), at).unwrap();
    let head = guest.tx.add(&[(TX_BUFFER, HEADER_SIZE as u32, false)]);
    let vsock = &mut guest.vsock;
    guest.tx.while_full(head, || vsock.process_queue(TX).unwrap());
    assert!(guest.pending(), "it goes on by itself");
    drop(near);
}
