//! State of one stream.

use std::num::Wrapping;

use super::far_end::{FarEnd, Transfer};
use super::packet::{HEADER_SIZE, Header, MAX_PAYLOAD, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::ring::Ring;
use crate::memory::GuestMemory;
use crate::virtio::DeviceError;
use crate::virtio::queue::Chain;

/// Bytes from the guest that one stream buffers, and the credit the guest has (virtio 1.2, 5.10.6.3).
pub const BUFFER_SIZE: usize = 256 << 10;

/// The guest hears of freed buffer space when there is this much of it that it does not know of.
const CREDIT_STEP: u32 = (BUFFER_SIZE / 4) as u32;

/// Name of a stream: the ports of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// How a stream came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The guest connected to a registered host port.
    Guest,
    /// The host connected; the token names its request.
    Host { token: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has not answered the host's request.
    Connecting,
    /// Both ends know the stream.
    Established,
    /// The guest is done with it; what it sent is still being written.
    Draining,
}

/// What a packet did to a stream beyond its own state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The guest accepted the host's request.
    Accepted,
    /// The guest refused the host's request; the stream is to be forgotten.
    Refused,
    /// The packet was out of place: the guest is to get a reset.
    Violation,
}

/// Control packets the guest has yet to get.
#[derive(Debug, Default)]
struct Pending {
    request: bool,
    response: bool,
    /// Flags of a `SHUTDOWN`, 0 for none.
    shutdown: u32,
    credit_update: bool,
    credit_request: bool,
}

/// One stream.
#[derive(Debug)]
pub struct Connection {
    origin: Origin,
    phase: Phase,
    far: FarEnd,
    pending: Pending,
    /// The stream is in the multiplexer's list of those that have something for the guest.
    pub queued: bool,

    /// Bytes from the guest that the far end has not taken yet.
    buffer: Ring<BUFFER_SIZE>,
    /// Bytes received from the guest, and of them those out of the buffer, now and as the guest knows.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    announced: Wrapping<u32>,
    has_received: bool,
    /// The guest sends no more.
    guest_sent_all: bool,
    /// The far end was told so, after the last byte.
    finished: bool,
    /// The far end takes nothing any more; what the guest sends is dropped.
    far_deaf: bool,

    /// Bytes sent to the guest, and the guest's word on its buffer.
    sent: Wrapping<u32>,
    peer_size: u32,
    peer_forwarded: Wrapping<u32>,
    /// The guest was asked for credit and has not given any since.
    credit_asked: bool,
    /// The guest receives no more.
    guest_deaf: bool,
    /// The far end gives nothing any more.
    far_sent_all: bool,
}

impl Connection {
    /// A stream the guest asked for by `request`.
    pub fn accepted(far: FarEnd, request: &Header) -> Self {
        let mut connection = Self::new(far, Origin::Guest, Phase::Established);
        connection.pending.response = true;
        connection.take_credit(request);
        connection
    }

    /// A stream the guest is to be asked for.
    pub fn requested(far: FarEnd, token: u64) -> Self {
        let mut connection = Self::new(far, Origin::Host { token }, Phase::Connecting);
        connection.pending.request = true;
        connection
    }

    fn new(far: FarEnd, origin: Origin, phase: Phase) -> Self {
        Self {
            origin,
            phase,
            far,
            pending: Pending::default(),
            queued: false,
            buffer: Ring::default(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            has_received: false,
            guest_sent_all: false,
            finished: false,
            far_deaf: false,
            sent: Wrapping(0),
            peer_size: 0,
            peer_forwarded: Wrapping(0),
            credit_asked: false,
            guest_deaf: false,
            far_sent_all: false,
        }
    }

    /// How the stream came to be.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// The far end.
    pub fn far(&mut self) -> &mut FarEnd {
        &mut self.far
    }

    /// Whether the guest has not answered yet.
    pub fn connecting(&self) -> bool {
        self.phase == Phase::Connecting
    }

    /// Whether the guest has forgotten the stream.
    pub fn draining(&self) -> bool {
        self.phase == Phase::Draining
    }

    /// Whether a byte of the guest has come.
    pub fn has_received(&self) -> bool {
        self.has_received
    }

    /// Bytes that wait for the far end.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Takes a packet of the guest; `chain` holds it, its payload in full.
    ///
    /// # Errors
    /// The payload is not in guest memory.
    pub fn receive(
        &mut self,
        header: &Header,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Effect, DeviceError> {
        self.take_credit(header);
        let effect = match (self.phase, header.op) {
            (Phase::Draining, op::RST) => Effect::None,
            (Phase::Draining, _) => Effect::Violation,
            (Phase::Connecting, op::RST) => Effect::Refused,
            (Phase::Established, op::RST) => {
                self.abandon();
                Effect::None
            }
            (Phase::Connecting, op::RESPONSE) if !self.pending.request => {
                self.phase = Phase::Established;
                Effect::Accepted
            }
            (Phase::Established, op::RW) if self.allows(header.len) => {
                self.take_payload(header.len as usize, chain, memory)?;
                Effect::None
            }
            (Phase::Established, op::SHUTDOWN) => {
                self.guest_sent_all |= header.flags & SHUTDOWN_SEND != 0;
                self.guest_deaf |= header.flags & SHUTDOWN_RECEIVE != 0;
                self.flush();
                Effect::None
            }
            (Phase::Established, op::CREDIT_UPDATE) => Effect::None,
            (Phase::Established, op::CREDIT_REQUEST) => {
                self.pending.credit_update = true;
                Effect::None
            }
            _ => Effect::Violation,
        };
        Ok(effect)
    }

    /// The guest is out of the stream: nothing more goes to it, and what it sent is written out.
    pub fn abandon(&mut self) {
        self.phase = Phase::Draining;
        self.pending = Pending::default();
        self.guest_sent_all = true;
        self.guest_deaf = true;
        self.flush();
    }

    /// Writes what is buffered as far as the far end takes it.
    pub fn flush(&mut self) {
        while !self.buffer.is_empty() && self.far.writable {
            match self.far.write(&self.buffer.slices()) {
                Transfer::Bytes(bytes) => {
                    self.buffer.consume(bytes);
                    self.forward(bytes);
                }
                Transfer::Blocked => break,
                Transfer::Over => self.deafen(),
            }
        }
        if self.guest_sent_all && self.buffer.is_empty() && !self.finished {
            self.finished = true;
            self.far.finish_writing();
        }
    }

    /// Whether nothing can move any more: see [`super::VsockEvent::Closed`].
    pub fn over(&self) -> bool {
        let to_host = self.far_deaf || (self.guest_sent_all && self.buffer.is_empty());
        let to_guest = self.guest_deaf || self.far_sent_all || !self.far.can_read();
        match self.phase {
            Phase::Connecting => false,
            Phase::Established => to_host && to_guest,
            Phase::Draining => to_host,
        }
    }

    /// Whether a receive buffer of the guest would probably be of use.
    pub fn wants_to_send(&self) -> bool {
        let pending = &self.pending;
        let control = pending.request
            || pending.response
            || pending.shutdown != 0
            || pending.credit_update
            || pending.credit_request;
        control || (self.has_input() && (self.peer_free() > 0 || !self.credit_asked))
    }

    /// Puts the next packet for the guest into `chain`, which has room for more than a header. Returns its
    /// length, or `None` if there turned out to be none.
    ///
    /// # Errors
    /// The chain's buffers are not in guest memory.
    pub fn send(
        &mut self,
        key: Key,
        guest_cid: u64,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Option<usize>, DeviceError> {
        let Some((op, flags, len)) = self.next_packet(chain, memory)? else {
            return Ok(None);
        };
        self.announced = self.forwarded;
        self.pending.credit_update = false;
        let header = Header {
            src_cid: u64::from(bulkhead_protocol::ports::HOST_CID),
            dst_cid: guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            len: len as u32,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUFFER_SIZE as u32,
            fwd_cnt: self.forwarded.0,
        };
        chain.write_at(memory, 0, &header.encode())?;
        Ok(Some(HEADER_SIZE + len))
    }

    /// Operation, flags and payload length of the next packet; the payload is in the chain already.
    fn next_packet(
        &mut self,
        chain: &Chain,
        memory: &GuestMemory,
    ) -> Result<Option<(u16, u32, usize)>, DeviceError> {
        if std::mem::take(&mut self.pending.request) {
            return Ok(Some((op::REQUEST, 0, 0)));
        }
        if std::mem::take(&mut self.pending.response) {
            return Ok(Some((op::RESPONSE, 0, 0)));
        }
        if self.has_input() {
            let room = chain.writable_len().saturating_sub(HEADER_SIZE).min(MAX_PAYLOAD);
            let len = room.min(self.peer_free() as usize);
            if len > 0 {
                let vectors = chain.write_vectors(memory, HEADER_SIZE, len)?;
                match self.far.read(vectors.as_slice()) {
                    Transfer::Bytes(bytes) => {
                        self.sent += bytes as u32;
                        return Ok(Some((op::RW, 0, bytes)));
                    }
                    Transfer::Blocked => {}
                    Transfer::Over => {
                        self.far_sent_all = true;
                        self.pending.shutdown |= SHUTDOWN_SEND;
                    }
                }
            } else if !self.credit_asked {
                self.credit_asked = true;
                self.pending.credit_request = true;
            }
        }
        if self.over() {
            // The reset that follows says it all.
            return Ok(None);
        }
        match std::mem::take(&mut self.pending.shutdown) {
            0 => {}
            flags => return Ok(Some((op::SHUTDOWN, flags, 0))),
        }
        if std::mem::take(&mut self.pending.credit_request) {
            return Ok(Some((op::CREDIT_REQUEST, 0, 0)));
        }
        if self.pending.credit_update {
            return Ok(Some((op::CREDIT_UPDATE, 0, 0)));
        }
        Ok(None)
    }

    /// Whether the far end may have something the guest is willing to read.
    fn has_input(&self) -> bool {
        self.phase == Phase::Established && self.far.readable && !self.far_sent_all && !self.guest_deaf
    }

    /// Bytes the guest can take now. A guest that takes back what it promised only starves itself.
    fn peer_free(&self) -> u32 {
        self.peer_size.saturating_sub((self.sent - self.peer_forwarded).0)
    }

    fn take_credit(&mut self, header: &Header) {
        self.peer_size = header.buf_alloc;
        self.peer_forwarded = Wrapping(header.fwd_cnt);
        // An answer without credit is no reason to ask again: the guest tells when it has read.
        self.credit_asked &= self.peer_free() == 0;
    }

    /// Whether `len` more bytes from the guest are within its credit and its word.
    fn allows(&self, len: u32) -> bool {
        let used = (self.received - self.forwarded).0;
        !self.guest_sent_all && len <= BUFFER_SIZE as u32 - used
    }

    fn take_payload(&mut self, len: usize, chain: &Chain, memory: &GuestMemory) -> Result<(), DeviceError> {
        self.received += len as u32;
        if len == 0 {
            return Ok(());
        }
        self.has_received = true;
        let mut taken = 0;
        if self.buffer.is_empty() && !self.far_deaf {
            let mut vectors = chain.read_vectors(memory, HEADER_SIZE, len)?;
            // A far end that is not open for writing is found out by the first write.
            while !vectors.is_empty() && (self.far.writable || !self.far.can_write()) {
                match self.far.write_guest(vectors.as_slice()) {
                    Transfer::Bytes(bytes) => {
                        vectors.advance(bytes);
                        taken += bytes;
                    }
                    Transfer::Blocked => break,
                    Transfer::Over => {
                        self.deafen();
                        break;
                    }
                }
            }
        }
        if self.far_deaf {
            taken = len;
        }
        self.forward(taken);
        self.buffer.append(len - taken, |offset, part| {
            chain.read_at(memory, HEADER_SIZE + taken + offset, part)
        })
    }

    /// The far end has failed: nothing can be written any more.
    fn deafen(&mut self) {
        self.far_deaf = true;
        self.pending.shutdown |= SHUTDOWN_RECEIVE;
        let dropped = self.buffer.len();
        self.buffer.consume(dropped);
        self.forward(dropped);
    }

    fn forward(&mut self, bytes: usize) {
        self.forwarded += bytes as u32;
        if (self.forwarded - self.announced).0 >= CREDIT_STEP && self.phase == Phase::Established {
            self.pending.credit_update = true;
        }
    }
}
