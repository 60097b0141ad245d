//! A socket for batches of requests: one write, one answer for each.

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::NetworkError;
use super::message::{Cidr, Link, Request};

/// Answers fit: the kernel sends at most 32 KiB at once.
const BUFFER: usize = 64 * 1024;

/// An rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket.
    ///
    /// # Errors
    /// The kernel has no rtnetlink.
    pub fn open() -> Result<Self, NetworkError> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(NetworkError::Socket)?;
        socket.bind_auto().map_err(NetworkError::Socket)?;
        socket
            .connect(&SocketAddr::new(0, 0))
            .map_err(NetworkError::Socket)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sends requests in one go and waits for all answers.
    ///
    /// # Errors
    /// The first that the kernel refused; the others have been carried out where possible.
    pub fn send(&mut self, requests: Vec<Request>) -> Result<(), NetworkError> {
        let first = self.sequence.wrapping_add(1);
        let mut buffer = Vec::new();
        for request in &requests {
            self.append(
                &mut buffer,
                request.message.clone(),
                NLM_F_REQUEST | NLM_F_ACK | request.flags,
            );
        }
        if buffer.is_empty() {
            return Ok(());
        }
        self.socket.send(&buffer, 0).map_err(NetworkError::Socket)?;
        let mut result = Ok(());
        let mut pending = requests.len();
        while pending > 0 {
            for message in self.receive()? {
                let NetlinkPayload::Error(answer) = message.payload else {
                    continue;
                };
                let index = message.header.sequence_number.wrapping_sub(first);
                let Some(request) = usize::try_from(index).ok().and_then(|index| requests.get(index)) else {
                    continue;
                };
                pending = pending.saturating_sub(1);
                let errno = answer.code.map_or(0, |code| code.get().saturating_neg());
                if errno != 0 && request.done != Some(errno) && result.is_ok() {
                    let source = io::Error::from_raw_os_error(errno);
                    result = Err(NetworkError::Refused {
                        what: request.what.clone(),
                        source,
                    });
                }
            }
        }
        result
    }

    /// All interfaces.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn links(&mut self) -> Result<Vec<Link>, NetworkError> {
        let mut links = Vec::new();
        self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
            if let RouteNetlinkMessage::NewLink(link) = message {
                links.push(Link::from_message(link));
            }
        })?;
        Ok(links)
    }

    /// All addresses, with the index of their interface.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn addresses(&mut self) -> Result<Vec<(u32, Cidr)>, NetworkError> {
        let mut addresses = Vec::new();
        self.dump(
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
            |message| {
                let RouteNetlinkMessage::NewAddress(message) = message else {
                    return;
                };
                // IFA_LOCAL is the interface's own address, IFA_ADDRESS the peer's on a point-to-point link.
                let (mut local, mut any) = (None, None);
                for attribute in message.attributes {
                    match attribute {
                        AddressAttribute::Local(address) => local = Some(address),
                        AddressAttribute::Address(address) => any = Some(address),
                        _ => (),
                    }
                }
                if let Some(address) = local.or(any) {
                    addresses.push((
                        message.header.index,
                        Cidr {
                            address,
                            prefix: message.header.prefix_len,
                        },
                    ));
                }
            },
        )?;
        Ok(addresses)
    }

    fn dump(
        &mut self,
        request: RouteNetlinkMessage,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> Result<(), NetworkError> {
        let mut buffer = Vec::new();
        self.append(&mut buffer, request, NLM_F_REQUEST | NLM_F_DUMP);
        self.socket.send(&buffer, 0).map_err(NetworkError::Socket)?;
        loop {
            for message in self.receive()? {
                match message.payload {
                    NetlinkPayload::InnerMessage(message) => each(message),
                    NetlinkPayload::Error(answer) => {
                        let errno = answer.code.map_or(0, |code| code.get().saturating_neg());
                        return Err(NetworkError::Socket(io::Error::from_raw_os_error(errno)));
                    }
                    NetlinkPayload::Done(_) => return Ok(()),
                    _ => (),
                }
            }
        }
    }

    fn append(&mut self, buffer: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        // Messages begin at multiples of four bytes.
        let start = buffer.len().next_multiple_of(4);
        buffer.resize(start + message.buffer_len(), 0);
        if let Some(space) = buffer.get_mut(start..) {
            message.serialize(space);
        }
    }

    fn receive(&mut self) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetworkError> {
        let mut buffer = Vec::with_capacity(BUFFER);
        let length = loop {
            match self.socket.recv(&mut buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                result => break result.map_err(NetworkError::Socket)?,
            }
        };
        parse(buffer.get(..length).unwrap_or_default())
    }
}

/// The messages of a datagram.
pub(super) fn parse(mut data: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>, NetworkError> {
    let mut messages = Vec::new();
    while !data.is_empty() {
        let message =
            NetlinkMessage::<RouteNetlinkMessage>::deserialize(data).map_err(|_| NetworkError::Reply)?;
        let length = usize::try_from(message.header.length).map_err(|_| NetworkError::Reply)?;
        if length == 0 {
            return Err(NetworkError::Reply);
        }
        messages.push(message);
        data = data.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}
