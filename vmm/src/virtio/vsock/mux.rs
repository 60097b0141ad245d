//! The streams of a guest, by their ports.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_protocol::ports::HOST_CID;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Effect, Key, Origin};
use super::event::{ConnectError, VsockError, VsockEvent};
use super::far_end::FarEnd;
use super::packet::{HEADER_SIZE, Header, TYPE_STREAM, op};
use crate::memory::GuestMemory;
use crate::virtio::DeviceError;
use crate::virtio::queue::Chain;

/// Most streams, registered and connected together: three for each of some hundred processes.
pub const MAX_STREAMS: usize = 1024;

/// Resets that may wait for receive buffers before the transmit queue stops. More than the packets a
/// guest has in flight, so that a driver which waits for its answers is not waited for.
const MAX_RESETS: usize = 512;

/// First port of the host's ends of streams that the host opens: far above those it listens on.
const FIRST_LOCAL_PORT: u32 = 1 << 30;
/// One past the last.
const END_LOCAL_PORT: u32 = 1 << 31;

/// `VMADDR_PORT_ANY`, never the port of a socket.
const PORT_ANY: u32 = u32::MAX;

/// How long the guest has to answer a connection: a guest that still boots has none to.
pub const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Poller's names of the wake-up eventfd and the timer: no stream has these keys, whose host port is
/// [`PORT_ANY`].
const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// Readiness reports taken at once.
const EVENTS: usize = 64;

/// Streams and registrations.
#[derive(Debug)]
pub struct Mux {
    guest_cid: u32,
    poller: Arc<Epoll>,
    wake: EventFd,
    timer: TimerFd,
    /// When connections that the guest has not answered fail, soonest first. Those that are over stay until
    /// then.
    deadlines: VecDeque<(Instant, Key)>,
    registered: BTreeMap<u32, FarEnd>,
    streams: BTreeMap<Key, Connection>,
    /// Streams that have something for the guest, each once, in turn.
    ready: VecDeque<Key>,
    resets: VecDeque<Header>,
    events: Vec<VsockEvent>,
    next_local_port: u32,
}

impl Mux {
    pub fn new(guest_cid: u32) -> Result<Self, VsockError> {
        let poller = Epoll::new().map_err(VsockError::Poller)?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(VsockError::Poller)?;
        let timer = TimerFd::new().map_err(|error| VsockError::Poller(error.into()))?;
        for (fd, token) in [(wake.as_raw_fd(), WAKE), (timer.as_raw_fd(), TIMER)] {
            poller
                .ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
                .map_err(VsockError::Poller)?;
        }
        Ok(Self {
            guest_cid,
            poller: Arc::new(poller),
            wake,
            timer,
            deadlines: VecDeque::new(),
            registered: BTreeMap::new(),
            streams: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            events: Vec::new(),
            next_local_port: FIRST_LOCAL_PORT,
        })
    }

    pub fn listen(&mut self, port: u32, far_end: OwnedFd) -> Result<(), VsockError> {
        self.check_room(port)?;
        if self.registered.contains_key(&port) || self.stream_on(port).is_some() {
            return Err(VsockError::PortInUse(port));
        }
        let far = FarEnd::new(far_end).map_err(VsockError::FarEnd)?;
        self.registered.insert(port, far);
        Ok(())
    }

    pub fn unlisten(&mut self, port: u32) -> Result<(), VsockError> {
        if self.registered.remove(&port).is_some() {
            return Ok(());
        }
        let key = self
            .stream_on(port)
            .filter(|key| {
                self.streams
                    .get(key)
                    .is_some_and(|stream| stream.origin() == Origin::Guest)
            })
            .ok_or(VsockError::UnknownPort(port))?;
        if let Some(stream) = self.remove(key) {
            self.events.push(VsockEvent::Closed { port });
            if !stream.draining() {
                self.reset_stream(key);
            }
        }
        self.wake();
        Ok(())
    }

    pub fn connect(&mut self, port: u32, far_end: OwnedFd, token: u64) -> Result<(), VsockError> {
        self.check_room(port)?;
        let far = FarEnd::new(far_end).map_err(VsockError::FarEnd)?;
        let key = Key {
            host_port: self.local_port(),
            guest_port: port,
        };
        self.deadlines.push_back((Instant::now() + CONNECT_TIME, key));
        self.set_timer()?;
        self.streams.insert(key, Connection::requested(far, token));
        self.settle(key);
        self.wake();
        Ok(())
    }

    pub fn take_events(&mut self) -> Vec<VsockEvent> {
        std::mem::take(&mut self.events)
    }

    /// Descriptor that is readable when [`poll`](Self::poll) has something to do.
    pub fn event_fd(&self) -> RawFd {
        self.poller.as_raw_fd()
    }

    /// Makes the event descriptor readable.
    pub fn wake(&self) {
        // It can fail only if the counter is full: then it is readable.
        let _ = self.wake.write(1);
    }

    /// Next port for a stream opened by the host, kept over snapshots so that a restored guest, which may
    /// remember the old ones, is given new ones.
    pub fn next_local_port(&self) -> u32 {
        self.next_local_port
    }

    pub fn set_next_local_port(&mut self, port: u32) {
        if (FIRST_LOCAL_PORT..END_LOCAL_PORT).contains(&port) {
            self.next_local_port = port;
        }
    }

    /// Whether bytes of the guest wait for a far end to take them.
    pub fn has_undelivered(&self) -> bool {
        self.streams.values().any(|stream| stream.buffered() > 0)
    }

    /// Whether the transmit queue must wait until the guest has taken some resets.
    pub fn congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether there may be a packet for the guest.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Takes the packet in `chain`.
    ///
    /// # Errors
    /// The chain does not hold a whole packet.
    pub fn receive(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), DeviceError> {
        if chain.writable_len() != 0 {
            return Err(DeviceError::Protocol("transmit buffer is device-writable"));
        }
        let mut raw = [0; HEADER_SIZE];
        chain.read_at(memory, 0, &mut raw)?;
        let header = Header::decode(&raw);
        if header.len as usize > chain.readable_len() - HEADER_SIZE {
            return Err(DeviceError::Protocol("packet is longer than its buffers"));
        }
        if header.src_cid != u64::from(self.guest_cid) || header.dst_cid != u64::from(HOST_CID) {
            return Ok(());
        }
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        if header.kind != TYPE_STREAM {
            self.answer_reset(&header);
            return Ok(());
        }
        let Some(stream) = self.streams.get_mut(&key) else {
            self.receive_unknown(key, &header);
            return Ok(());
        };
        let origin = stream.origin();
        let fresh = !stream.has_received();
        let effect = stream.receive(&header, chain, memory)?;
        if fresh && origin == Origin::Guest && stream.has_received() {
            let port = key.host_port;
            self.events.push(VsockEvent::FirstData { port });
        }
        match effect {
            Effect::None => {}
            Effect::Accepted => match stream.far().watch(&self.poller, token_of(key)) {
                Ok(()) => self.connect_result(origin, Ok(())),
                Err(_) => {
                    self.remove(key);
                    self.connect_result(origin, Err(ConnectError::FarEnd));
                    self.answer_reset(&header);
                }
            },
            Effect::Refused => {
                self.remove(key);
                self.connect_result(origin, Err(ConnectError::Refused));
            }
            Effect::Violation => {
                if stream.connecting() {
                    self.remove(key);
                    self.connect_result(origin, Err(ConnectError::Refused));
                } else {
                    stream.abandon();
                }
                self.answer_reset(&header);
            }
        }
        self.settle(key);
        Ok(())
    }

    /// Puts the next packet for the guest into `chain` and returns its length; `None`: there is none.
    ///
    /// # Errors
    /// The chain cannot hold a packet with payload.
    pub fn send(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<Option<usize>, DeviceError> {
        if chain.readable_len() != 0 {
            return Err(DeviceError::Protocol("receive buffer is device-readable"));
        }
        if chain.writable_len() <= HEADER_SIZE {
            return Err(DeviceError::Protocol("receive buffer is too small"));
        }
        loop {
            if let Some(header) = self.resets.front() {
                chain.write_at(memory, 0, &header.encode())?;
                self.resets.pop_front();
                return Ok(Some(HEADER_SIZE));
            }
            let Some(key) = self.ready.pop_front() else {
                return Ok(None);
            };
            let Some(stream) = self.streams.get_mut(&key) else {
                continue;
            };
            stream.queued = false;
            let sent = stream.send(key, u64::from(self.guest_cid), chain, memory)?;
            self.settle(key);
            if sent.is_some() {
                return Ok(sent);
            }
        }
    }

    /// Looks which far ends are ready and writes what waits for them.
    ///
    /// # Errors
    /// The poller failed.
    pub fn poll(&mut self) -> io::Result<()> {
        let mut ready = [EpollEvent::default(); EVENTS];
        let count = match self.poller.wait(0, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &ready[..count] {
            match event.data() {
                WAKE => {
                    let _ = self.wake.read();
                    continue;
                }
                TIMER => {
                    self.expire(Instant::now());
                    continue;
                }
                _ => {}
            }
            let key = key_of(event.data());
            if let Some(stream) = self.streams.get_mut(&key) {
                stream.far().notice(event.event_set());
                stream.flush();
                self.settle(key);
            }
        }
        Ok(())
    }

    /// Fails the connections whose time is up at `now`.
    pub fn expire(&mut self, now: Instant) {
        while let Some((_, key)) = self.deadlines.pop_front_if(|(deadline, _)| *deadline <= now) {
            let Some(stream) = self.streams.get(&key).filter(|stream| stream.connecting()) else {
                continue;
            };
            let (origin, asked) = (stream.origin(), !stream.wants_to_send());
            self.remove(key);
            self.connect_result(origin, Err(ConnectError::TimedOut));
            if asked {
                self.reset_stream(key);
            }
        }
        // It can fail only for a time that is no time; the next connection sets it again.
        let _ = self.set_timer();
    }

    /// Sets the timer to the first deadline.
    fn set_timer(&mut self) -> Result<(), VsockError> {
        let set = match self.deadlines.front() {
            Some((deadline, _)) => {
                // Zero would stop the timer.
                let left = deadline.saturating_duration_since(Instant::now());
                self.timer.reset(left.max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
        set.map_err(|error| VsockError::Poller(error.into()))
    }

    /// The guest has forgotten all streams: connects fail, the others end when they are written out.
    /// Registrations stay.
    pub fn abandon_all(&mut self) {
        self.resets.clear();
        self.ready.clear();
        let keys: Vec<Key> = self.streams.keys().copied().collect();
        for key in keys {
            let Some(stream) = self.streams.get_mut(&key) else {
                continue;
            };
            if stream.connecting() {
                let origin = stream.origin();
                self.remove(key);
                self.connect_result(origin, Err(ConnectError::DeviceReset));
            } else {
                stream.queued = false;
                stream.abandon();
                self.settle(key);
            }
        }
    }

    #[cfg(any(test, fuzzing))]
    pub fn buffered(&self) -> usize {
        self.streams.values().map(Connection::buffered).sum()
    }

    #[cfg(any(test, fuzzing))]
    pub fn queued_packets(&self) -> usize {
        self.ready.len() + self.resets.len()
    }

    fn receive_unknown(&mut self, key: Key, header: &Header) {
        let far = match header.op {
            op::RST => return,
            op::REQUEST if key.guest_port != PORT_ANY => self.registered.remove(&key.host_port),
            _ => None,
        };
        let Some(mut far) = far else {
            self.answer_reset(header);
            return;
        };
        let port = key.host_port;
        self.events.push(VsockEvent::Connected { port });
        if far.watch(&self.poller, token_of(key)).is_err() {
            self.events.push(VsockEvent::Closed { port });
            self.answer_reset(header);
            return;
        }
        self.streams.insert(key, Connection::accepted(far, header));
        self.settle(key);
    }

    /// Acts on a stream whose state may have changed: ends it, or has it wait for a receive buffer.
    fn settle(&mut self, key: Key) {
        let Some(stream) = self.streams.get_mut(&key) else {
            return;
        };
        if stream.over() {
            let (draining, origin) = (stream.draining(), stream.origin());
            self.remove(key);
            if !draining {
                self.reset_stream(key);
            }
            let port = match origin {
                Origin::Guest => key.host_port,
                Origin::Host { .. } => key.guest_port,
            };
            self.events.push(VsockEvent::Closed { port });
        } else if stream.wants_to_send() && !stream.queued {
            stream.queued = true;
            self.ready.push_back(key);
        }
    }

    fn remove(&mut self, key: Key) -> Option<Connection> {
        let stream = self.streams.remove(&key)?;
        if stream.queued {
            self.ready.retain(|&other| other != key);
        }
        Some(stream)
    }

    fn connect_result(&mut self, origin: Origin, result: Result<(), ConnectError>) {
        if let Origin::Host { token } = origin {
            self.events.push(VsockEvent::ConnectResult { token, result });
        }
    }

    fn answer_reset(&mut self, header: &Header) {
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    fn reset_stream(&mut self, key: Key) {
        self.resets.push_back(Header {
            src_cid: u64::from(HOST_CID),
            dst_cid: u64::from(self.guest_cid),
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        });
    }

    fn check_room(&self, port: u32) -> Result<(), VsockError> {
        if port == PORT_ANY {
            return Err(VsockError::BadPort(port));
        }
        if self.registered.len() + self.streams.len() >= MAX_STREAMS {
            return Err(VsockError::TooManyStreams);
        }
        Ok(())
    }

    /// The stream whose host end is `port`.
    fn stream_on(&self, port: u32) -> Option<Key> {
        let first = Key {
            host_port: port,
            guest_port: 0,
        };
        let (&key, _) = self.streams.range(first..).next()?;
        (key.host_port == port).then_some(key)
    }

    /// A free port; there are more of them than streams can be.
    fn local_port(&mut self) -> u32 {
        loop {
            let port = self.next_local_port;
            self.next_local_port = match port + 1 {
                END_LOCAL_PORT => FIRST_LOCAL_PORT,
                next => next,
            };
            if self.stream_on(port).is_none() && !self.registered.contains_key(&port) {
                return port;
            }
        }
    }
}

fn token_of(key: Key) -> u64 {
    u64::from(key.host_port) << 32 | u64::from(key.guest_port)
}

fn key_of(token: u64) -> Key {
    Key {
        host_port: (token >> 32) as u32,
        guest_port: token as u32,
    }
}
