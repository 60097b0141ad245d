//! Packet header (virtio 1.2, 5.10.6).

/// Bytes of a header.
pub const HEADER_SIZE: usize = 44;

/// The only socket type: stream (virtio 1.2, 5.10.6.2).
pub const TYPE_STREAM: u16 = 1;

/// Most payload bytes in a packet to the guest, what Linux uses itself.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// Operations (virtio 1.2, 5.10.6).
pub mod op {
    /// Opens a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends a connection.
    pub const RST: u16 = 3;
    /// The sender will not receive or not send any more.
    pub const SHUTDOWN: u16 = 4;
    /// Payload.
    pub const RW: u16 = 5;
    /// Tells how much the sender can take.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks for a `CREDIT_UPDATE`.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of `SHUTDOWN`: the sender receives no more data (virtio 1.2, 5.10.6.5).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of `SHUTDOWN`: the sender sends no more data.
pub const SHUTDOWN_SEND: u32 = 2;

/// A packet header in host byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Payload bytes behind the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, one of [`op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its receive buffer so far, modulo 2³².
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header as the guest wrote it.
    pub fn decode(raw: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = raw.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The header in guest byte order.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut raw = [0; HEADER_SIZE];
        let mut rest = raw.as_mut_slice();
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        raw
    }

    /// The reset that answers this packet.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The header's fields together are as long as the header, so a part is never short.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut field = [0; N];
    let (head, tail) = rest.split_at(N);
    field.copy_from_slice(head);
    *rest = tail;
    field
}

fn put<const N: usize>(rest: &mut &mut [u8], field: [u8; N]) {
    let (head, tail) = std::mem::take(rest).split_at_mut(N);
    head.copy_from_slice(&field);
    *rest = tail;
}
