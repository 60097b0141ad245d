use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Streams: two registrations and one connection by the host, and one port that is nothing.
const STREAMS: usize = 4;

#[derive(Clone, Debug)]
enum Action {
    /// A packet on a stream, right or wrong.
    Packet {
        stream: usize,
        op: u16,
        flags: u32,
        len: usize,
        buf_alloc: u32,
        fwd_cnt: Option<u32>,
    },
    /// A data packet that is in order.
    Data {
        stream: usize,
        len: usize,
    },
    HostWrites {
        stream: usize,
        len: usize,
    },
    HostReads {
        stream: usize,
        len: usize,
    },
    HostCloses {
        stream: usize,
    },
    Buffers {
        count: usize,
    },
    Unlisten {
        stream: usize,
    },
    Events,
}

fn action() -> impl Strategy<Value = Action> {
    let stream = 0..STREAMS;
    prop_oneof![
        3 => (stream.clone(), 0..10u16, 0..5u32, 0..3000usize, prop_oneof![Just(1 << 20), 0..10_000u32],
              proptest::option::weighted(0.3, any::<u32>()))
            .prop_map(|(stream, op, flags, len, buf_alloc, fwd_cnt)| {
                Action::Packet { stream, op, flags, len, buf_alloc, fwd_cnt }
            }),
        3 => (stream.clone()).prop_map(|stream| Action::Packet {
            stream, op: op::REQUEST, flags: 0, len: 0, buf_alloc: 1 << 20, fwd_cnt: None
        }),
        8 => (stream.clone(), 1..60_000usize).prop_map(|(stream, len)| Action::Data { stream, len }),
        4 => (stream.clone(), 1..20_000usize).prop_map(|(stream, len)| Action::HostWrites { stream, len }),
        4 => (stream.clone(), 1..90_000usize).prop_map(|(stream, len)| Action::HostReads { stream, len }),
        1 => stream.clone().prop_map(|stream| Action::HostCloses { stream }),
        6 => (1..32usize).prop_map(|count| Action::Buffers { count }),
        1 => stream.prop_map(|stream| Action::Unlisten { stream }),
        3 => Just(Action::Events),
    ]
}

struct World {
    guest: Guest,
    nears: Vec<Option<UnixStream>>,
    host_ports: [u32; STREAMS],
    /// Bytes by stream: sent by the guest, read by the host, written by the host, received by the guest.
    guest_sent: [usize; STREAMS],
    host_read: [usize; STREAMS],
    host_wrote: [usize; STREAMS],
    guest_read: [usize; STREAMS],
    /// The device has joined the guest to the far end: what was sent before does not count.
    opened: [bool; STREAMS],
}

impl World {
    fn new() -> Self {
        let mut guest = Guest::new();
        let mut nears = Vec::new();
        for stream in 0..3 {
            let (near, far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            if stream < 2 {
                guest.vsock.listen(PORT + stream, far.into()).unwrap();
            } else {
                guest.vsock.connect(GUEST_PORT + 2, far.into(), 1).unwrap();
            }
            nears.push(Some(near));
        }
        nears.push(None);
        guest.run();
        let request = guest.packets()[0].0;
        Self {
            guest,
            nears,
            host_ports: [PORT, PORT + 1, request.src_port, 1],
            guest_sent: [0; STREAMS],
            host_read: [0; STREAMS],
            host_wrote: [0; STREAMS],
            guest_read: [0; STREAMS],
            opened: [false; STREAMS],
        }
    }

    fn header(&self, stream: usize, op: u16) -> Header {
        Header {
            src_port: GUEST_PORT + stream as u32,
            dst_port: self.host_ports[stream],
            fwd_cnt: self.guest_read[stream] as u32,
            ..self.guest.header(op)
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Packet {
                stream,
                op,
                flags,
                len,
                buf_alloc,
                fwd_cnt,
            } => {
                let header = self.header(stream, op);
                let header = Header {
                    flags,
                    buf_alloc,
                    fwd_cnt: fwd_cnt.unwrap_or(header.fwd_cnt),
                    ..header
                };
                if op == op::RW {
                    // Payload must be what the model expects, should it be accepted.
                    self.act(Action::Data { stream, len });
                } else {
                    self.post(header, &vec![0xee; len]);
                }
            }
            Action::Data { stream, len } => {
                let payload = pattern(self.guest_sent[stream], len);
                if self.opened[stream] {
                    self.guest_sent[stream] += len;
                }
                self.post(self.header(stream, op::RW), &payload);
            }
            Action::HostWrites { stream, len } => {
                let data = pattern(self.host_wrote[stream], len);
                if let Some(near) = &mut self.nears[stream] {
                    self.host_wrote[stream] += near.write(&data).unwrap_or(0);
                }
            }
            Action::HostReads { stream, len } => self.host_reads(stream, len),
            Action::HostCloses { stream } => self.nears[stream] = None,
            Action::Buffers { count } => {
                let room = 64 - self.guest.buffers.len();
                self.guest.give(count.min(room));
            }
            Action::Unlisten { stream } => {
                let _ = self.guest.vsock.unlisten(self.host_ports[stream]);
            }
            Action::Events => self.guest.run(),
        }
    }

    fn post(&mut self, header: Header, payload: &[u8]) {
        self.guest.send(header, payload);
        // Buffers are reused at once, so every packet must have been taken.
        assert_eq!(self.guest.tx.take_used().len(), 1);
    }

    fn host_reads(&mut self, stream: usize, len: usize) {
        let Some(near) = &mut self.nears[stream] else {
            return;
        };
        let mut data = vec![0; len];
        let count = near.read(&mut data).unwrap_or(0);
        let at = self.host_read[stream];
        assert!(data[..count] == pattern(at, count)[..], "stream {stream} at {at}");
        self.host_read[stream] += count;
        assert!(self.host_read[stream] <= self.guest_sent[stream]);
    }

    fn check(&mut self) {
        for (header, payload) in self.guest.packets_only() {
            let stream = (header.dst_port - GUEST_PORT) as usize;
            if header.op == op::RW {
                assert_eq!(payload, pattern(self.guest_read[stream], payload.len()));
                self.guest_read[stream] += payload.len();
                assert!(self.guest_read[stream] <= self.host_wrote[stream]);
            }
        }
        for event in self.guest.events() {
            match event {
                VsockEvent::Connected { port } => self.opened[(port - PORT) as usize] = true,
                VsockEvent::ConnectResult { result: Ok(()), .. } => self.opened[2] = true,
                _ => {}
            }
        }
        assert!(self.guest.vsock.buffered() <= 3 * BUFFER_SIZE);
        assert!(self.guest.vsock.queued_packets() <= 512 + 3);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Whatever the guest sends: no panic, bounded memory, and bytes that arrive are the first that were
    /// sent, in order.
    #[test]
    fn arbitrary_packets(actions in vec(action(), 1..150)) {
        let mut world = World::new();
        for action in actions {
            world.act(action);
            world.check();
        }
        world.guest.run();
        world.check();
    }

    /// Whatever bytes the header is made of.
    #[test]
    fn arbitrary_headers(headers in vec(any::<[u8; HEADER_SIZE]>(), 1..50)) {
        let mut guest = Guest::new();
        let _near = guest.establish_socket();
        for raw in headers {
            guest.memory.write_slice(&raw, GuestAddress(TX_BUFFER)).unwrap();
            guest.tx.add(&[(TX_BUFFER, 4096, false)]);
            if guest.vsock.process_queue(TX).is_err() {
                prop_assert!(u32::from_le_bytes(raw[24..28].try_into().unwrap()) > 4096 - 44);
                break;
            }
        }
    }
}
