//! A blocking rtnetlink socket.

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::NetworkError;

/// An rtnetlink socket of the current network namespace.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub fn open() -> Result<Self, NetworkError> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(NetworkError::Socket)?;
        socket.bind_auto().map_err(NetworkError::Socket)?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(NetworkError::Socket)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Asks for a list.
    pub fn dump(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        self.exchange(what, message, NLM_F_DUMP)
    }

    /// Asks for a change; `create` for one that makes something new.
    pub fn change(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        create: bool,
    ) -> Result<(), NetworkError> {
        let flags = if create { NLM_F_CREATE | NLM_F_EXCL } else { 0 };
        self.exchange(what, message, NLM_F_ACK | flags).map(drop)
    }

    fn exchange(
        &mut self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetworkError> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut buffer = vec![0; request.buffer_len()];
        request.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map_err(NetworkError::Socket)?;
        let mut answers = Vec::new();
        loop {
            let (packet, _) = self.socket.recv_from_full().map_err(NetworkError::Socket)?;
            let mut rest = packet.as_slice();
            while !rest.is_empty() {
                let answer =
                    NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(NetworkError::Decode)?;
                // Messages are aligned to four bytes (netlink(7)).
                let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX);
                rest = rest.get(length.next_multiple_of(4).max(4)..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => {
                        return Err(NetworkError::Refused {
                            what: what.to_owned(),
                            error: error.to_io(),
                        });
                    }
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }
}
