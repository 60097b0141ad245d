//! The socket device: packets of a guest, right and wrong, in any state of its connections, while the host connects,
//! closes, reads and writes.
//!
//! A finding is, besides a fault or a panic: a byte that arrives and was not sent at that place of its stream, more
//! bytes buffered or packets queued than there may be, a packet that is longer than its buffer or not of this
//! device, an event about a stream that is not there, and a device that spins.

#![no_main]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use bulkhead_vmm::memory::GuestMemory;
use bulkhead_vmm::virtio::queue::RING_FEATURES;
use bulkhead_vmm::virtio::test_queue::{self, BUFFERS, TestQueue};
use bulkhead_vmm::virtio::vsock::packet::{HEADER_SIZE, Header, MAX_PAYLOAD, TYPE_STREAM, op};
use bulkhead_vmm::virtio::vsock::{BUFFER_SIZE, Vsock, VsockEvent};
use bulkhead_vmm::virtio::{DeviceError, DeviceState, VirtioDevice};
use libfuzzer_sys::fuzz_target;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vm_memory::{Bytes, GuestAddress};

const CID: u32 = 3;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 5000;
const RX_BUFFER: u32 = 4096;
const RX_BUFFERS: u64 = 64;
const TX_BUFFER: u64 = 2 * test_queue::LOW;
/// Streams: those of even number the guest opens, the others the host.
const STREAMS: usize = 4;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A packet with a header as it should be but for the operation and what is given.
    Packet {
        stream: u8,
        op: u8,
        flags: u8,
        buf_alloc: Option<u16>,
        fwd_cnt: Option<u32>,
        len: Option<u32>,
        kind: Option<u16>,
        cid: Option<u64>,
        ports: Option<(u32, u32)>,
        trailing: u16,
    },
    /// A data packet that is in order, its buffer cut after so many bytes.
    Data {
        stream: u8,
        len: u16,
        cut: u8,
    },
    /// Any bytes.
    Raw(Vec<u8>),
    /// Receive buffers of a size.
    Buffers {
        count: u8,
        size: Option<u16>,
    },
    /// Event buffers.
    EventBuffer(u8),
    Listen(u8),
    Connect(u8),
    Unlisten(u8),
    Write {
        stream: u8,
        len: u16,
    },
    Read {
        stream: u8,
        len: u16,
    },
    Shutdown {
        stream: u8,
        how: u8,
    },
    Close(u8),
    Run,
    /// The time for answers to connections is over.
    Expire,
    /// The driver resets the device and starts it again.
    Restart,
    /// The VM is saved and restored.
    Restore,
}

#[derive(Default)]
struct Stream {
    near: Option<UnixStream>,
    /// The host's port, once the host has opened the stream.
    host_port: Option<u32>,
    /// Bytes sent by the guest, read by the host, written by the host, received by the guest.
    sent: usize,
    read: usize,
    written: usize,
    received: usize,
    open: bool,
}

struct World {
    memory: GuestMemory,
    queues: [TestQueue; 3],
    vsock: Vsock,
    buffers: BTreeMap<u32, (u64, u32)>,
    next_buffer: u64,
    events_given: u16,
    streams: [Stream; STREAMS],
}

/// Bytes that differ from place to place, from a table: a comparison must cost little.
fn pattern(start: usize, len: usize) -> Vec<u8> {
    const PERIOD: usize = 1 << 20;
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let byte = |i: usize| (i ^ i >> 8 ^ i >> 16).wrapping_mul(31) as u8;
        (0..2 * PERIOD).map(|i| byte(i % PERIOD)).collect()
    });
    table[start % PERIOD..][..len].to_vec()
}

fn queues(memory: &GuestMemory) -> [TestQueue; 3] {
    [(0, 128), (1, 128), (2, 8)].map(|(index, size)| TestQueue::new(memory, index, size))
}

impl World {
    fn new() -> Result<Self, DeviceError> {
        let memory = test_queue::memory();
        let mut world = Self {
            queues: queues(&memory),
            memory,
            vsock: Vsock::new(CID).expect("there are descriptors"),
            buffers: BTreeMap::new(),
            next_buffer: 0,
            events_given: 0,
            streams: Default::default(),
        };
        world.activate()?;
        Ok(world)
    }

    fn activate(&mut self) -> Result<(), DeviceError> {
        self.queues = queues(&self.memory);
        self.buffers.clear();
        self.events_given = 0;
        let queues: Vec<&TestQueue> = self.queues.iter().collect();
        self.vsock
            .activate(test_queue::activation(&self.memory, &queues, RING_FEATURES))
    }

    /// A stream that was cut off: its bytes count no more.
    fn forget(&mut self) {
        for stream in &mut self.streams {
            *stream = Stream::default();
        }
    }

    fn header(&self, stream: usize, op: u16) -> Header {
        let this = &self.streams[stream];
        Header {
            src_cid: CID.into(),
            dst_cid: 2,
            src_port: GUEST_PORT + stream as u32,
            dst_port: this.host_port.unwrap_or(PORT + stream as u32),
            kind: TYPE_STREAM,
            op,
            buf_alloc: 1 << 20,
            fwd_cnt: this.received as u32,
            ..Header::default()
        }
    }

    fn post(&mut self, packet: &[u8], cut: usize) -> Result<(), DeviceError> {
        // The device may hold packets back only while its answers have no buffers.
        if self.queues[TX].available_index() % 32 == 31 {
            self.take_packets();
        }
        self.memory
            .write_slice(packet, GuestAddress(TX_BUFFER))
            .expect("packets are short");
        let len = packet.len() as u32;
        let cut = (cut as u32).min(len);
        let parts = [
            (TX_BUFFER, cut, false),
            (TX_BUFFER + u64::from(cut), len - cut, false),
        ];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.1 > 0).collect();
        if parts.is_empty() {
            return Ok(());
        }
        self.queues[TX].add(&parts);
        self.vsock.process_queue(TX).map(drop)?;
        // Packets share one place: one that was held back must not change.
        for _ in 0..1000 {
            let used = self.queues[TX].take_used();
            if let Some((_, len)) = used.first() {
                assert_eq!(*len, 0, "a transmit buffer was written to");
                return Ok(());
            }
            self.give(32, RX_BUFFER)?;
            self.take_packets();
            self.vsock.process_queue(TX).map(drop)?;
        }
        panic!("a packet is never taken");
    }

    fn give(&mut self, count: usize, size: u32) -> Result<(), DeviceError> {
        for _ in 0..count.min(RX_BUFFERS as usize - self.buffers.len()) {
            let taken: Vec<u64> = self.buffers.values().map(|(address, _)| *address).collect();
            let address = loop {
                let address = BUFFERS + self.next_buffer % RX_BUFFERS * u64::from(RX_BUFFER);
                self.next_buffer += 1;
                if !taken.contains(&address) {
                    break address;
                }
            };
            let head = self.queues[RX].add(&[(address, size, true)]);
            self.buffers.insert(head.into(), (address, size));
        }
        self.vsock.process_queue(RX).map(drop)
    }

    fn run(&mut self) -> Result<(), DeviceError> {
        for _ in 0..1000 {
            // SAFETY: the descriptor is open as long as the device is.
            let fd = unsafe { BorrowedFd::borrow_raw(self.vsock.event_fd().expect("it has one")) };
            let ready = poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO);
            if ready != Ok(1) {
                return Ok(());
            }
            self.vsock.process_event()?;
        }
        panic!("the device spins");
    }

    fn take_packets(&mut self) {
        for (head, len) in self.queues[RX].take_used() {
            let (address, size) = self.buffers.remove(&head).expect("a buffer the device has");
            assert!(
                len <= size && len as usize >= HEADER_SIZE,
                "{len} bytes in a buffer of {size}"
            );
            let mut packet = vec![0; len as usize];
            self.memory
                .read_slice(&mut packet, GuestAddress(address))
                .expect("it is RAM");
            let payload = packet.split_off(HEADER_SIZE);
            let header = Header::decode(&packet.try_into().expect("a header"));
            assert_eq!(header.len as usize, payload.len());
            assert!(payload.len() <= MAX_PAYLOAD);
            assert_eq!((header.src_cid, header.dst_cid), (2, CID.into()));
            let stream = header.dst_port.wrapping_sub(GUEST_PORT) as usize;
            let Some(stream) = self.streams.get_mut(stream) else {
                // An answer to a packet about nothing.
                assert_eq!(header.op, op::RST);
                continue;
            };
            match header.op {
                op::REQUEST => stream.host_port = Some(header.src_port),
                op::RW => {
                    assert_eq!(payload, pattern(stream.received, payload.len()));
                    stream.received += payload.len();
                    assert!(stream.received <= stream.written);
                }
                _ => {}
            }
        }
    }

    fn check(&mut self) {
        self.take_packets();
        for event in self.vsock.take_events() {
            let stream = match event {
                VsockEvent::Connected { port } => Some((port - PORT, true)),
                VsockEvent::ConnectResult {
                    token,
                    result: Ok(()),
                } => Some((token as u32, true)),
                VsockEvent::Closed { port } if port < GUEST_PORT => Some((port - PORT, false)),
                VsockEvent::Closed { port } => Some((port - GUEST_PORT, false)),
                VsockEvent::ConnectResult { .. } | VsockEvent::FirstData { .. } => None,
            };
            if let Some((stream, open)) = stream {
                let stream = &mut self.streams[stream as usize];
                assert_ne!(stream.open, open, "{event:?}");
                stream.open = open;
            }
        }
        assert!(self.vsock.buffered() <= STREAMS * BUFFER_SIZE);
        assert!(self.vsock.queued_packets() <= 512 + STREAMS);
    }

    fn new_far_end(&mut self, stream: usize) -> Option<UnixStream> {
        let this = &mut self.streams[stream];
        if this.near.is_some() || this.open {
            return None;
        }
        let (near, far) = UnixStream::pair().expect("there are descriptors");
        near.set_nonblocking(true).expect("it is a socket");
        *this = Stream {
            near: Some(near),
            ..Stream::default()
        };
        Some(far)
    }

    fn act(&mut self, step: Step) -> Result<(), DeviceError> {
        let number = |stream: u8| usize::from(stream) % STREAMS;
        match step {
            Step::Packet {
                stream,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
                len,
                kind,
                cid,
                ports,
                trailing,
            } => {
                let mut header = self.header(number(stream), (op % 9).into());
                header.flags = flags.into();
                header.buf_alloc = buf_alloc.map_or(header.buf_alloc, Into::into);
                header.fwd_cnt = fwd_cnt.unwrap_or(header.fwd_cnt);
                header.len = len.unwrap_or(0);
                header.kind = kind.unwrap_or(header.kind);
                header.src_cid = cid.unwrap_or(header.src_cid);
                (header.src_port, header.dst_port) = ports.unwrap_or((header.src_port, header.dst_port));
                if header.op == op::RW && (header.len > 0 || self.other_stream(&header)) {
                    // What it carries is not what the model expects.
                    return Ok(());
                }
                let mut packet = header.encode().to_vec();
                packet.resize(HEADER_SIZE + usize::from(trailing), 0xee);
                self.post(&packet, HEADER_SIZE)?;
            }
            Step::Data { stream, len, cut } => {
                let stream = number(stream);
                let len = usize::from(len);
                let mut header = self.header(stream, op::RW);
                header.len = len as u32;
                let payload = pattern(self.streams[stream].sent, len);
                self.check();
                let counts = self.streams[stream].open;
                self.post(&[header.encode().to_vec(), payload].concat(), cut.into())?;
                if counts {
                    self.streams[stream].sent += len;
                }
            }
            Step::Raw(bytes) => {
                let Some(header) = bytes.first_chunk::<HEADER_SIZE>().map(Header::decode) else {
                    return self.post(&bytes, 0);
                };
                if header.op != op::RW {
                    self.post(&bytes, 0)?;
                }
            }
            Step::Buffers { count, size } => {
                let size = size.map_or(RX_BUFFER, |size| u32::from(size) % RX_BUFFER + 1);
                self.give(count.into(), size)?;
            }
            Step::EventBuffer(count) => {
                for _ in 0..count % 4 {
                    if self.events_given < 8 {
                        self.queues[EVENT].add(&[(test_queue::LOW - 8, 8, true)]);
                        self.events_given += 1;
                    }
                }
                self.vsock.process_queue(EVENT)?;
                let used = self.queues[EVENT].take_used();
                assert!(used.iter().all(|(_, len)| *len == 4));
                self.events_given -= used.len() as u16;
            }
            Step::Listen(stream) => {
                let stream = number(stream) & !1;
                if let Some(far) = self.new_far_end(stream) {
                    let _ = self.vsock.listen(PORT + stream as u32, far.into());
                }
            }
            Step::Connect(stream) => {
                let stream = number(stream) | 1;
                if let Some(far) = self.new_far_end(stream) {
                    let port = GUEST_PORT + stream as u32;
                    let _ = self.vsock.connect(port, far.into(), stream as u64);
                }
            }
            Step::Unlisten(stream) => {
                let _ = self.vsock.unlisten(PORT + number(stream) as u32);
            }
            Step::Write { stream, len } => {
                let this = &mut self.streams[number(stream)];
                let data = pattern(this.written, len.into());
                if let Some(near) = &mut this.near {
                    this.written += near.write(&data).unwrap_or(0);
                }
            }
            Step::Read { stream, len } => {
                let this = &mut self.streams[number(stream)];
                let mut data = vec![0; len.into()];
                if let Some(near) = &mut this.near {
                    let count = near.read(&mut data).unwrap_or(0);
                    assert!(
                        data[..count] == pattern(this.read, count)[..],
                        "bytes at {}",
                        this.read
                    );
                    this.read += count;
                    assert!(this.read <= this.sent);
                }
            }
            Step::Shutdown { stream, how } => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(how) % 3];
                if let Some(near) = &self.streams[number(stream)].near {
                    let _ = near.shutdown(how);
                }
            }
            Step::Close(stream) => self.streams[number(stream)].near = None,
            Step::Run => self.run()?,
            Step::Expire => self.vsock.expire(Instant::now() + Duration::from_secs(60)),
            Step::Restart => {
                self.check();
                self.vsock.reset();
                self.check();
                self.forget();
                self.activate()?;
            }
            Step::Restore => {
                self.check();
                let state = self.vsock.save();
                self.vsock = Vsock::new(state.guest_cid).expect("there are descriptors");
                self.vsock
                    .restore_state(&DeviceState::Vsock(state.clone()))
                    .expect("it is a socket device's state");
                assert_eq!(self.vsock.save().next_local_port, state.next_local_port);
                self.forget();
                self.activate()?;
            }
        }
        Ok(())
    }

    /// Whether a header is about another stream than its ports say.
    fn other_stream(&self, header: &Header) -> bool {
        header.src_cid != u64::from(CID)
    }
}

fuzz_target!(|steps: Vec<Step>| {
    // SAFETY: it is what the VMM does.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let Ok(mut world) = World::new() else { return };
    for step in steps {
        if world.act(step).is_err() {
            // The device has stopped; its streams have ended.
            world.vsock.take_events();
            return;
        }
        world.check();
    }
    if world.run().is_ok() {
        world.check();
    }
});
