//! rtnetlink requests, as values.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// A request and what to call it in an error.
#[derive(Clone, Debug)]
pub struct Request {
    /// For "cannot …".
    pub what: String,
    /// Beyond `NLM_F_REQUEST | NLM_F_ACK`.
    pub flags: u16,
    /// The message.
    pub message: RouteNetlinkMessage,
    /// An error that means it is done already.
    pub done: Option<i32>,
}

/// An address with the length of its network prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    /// Address.
    pub address: IpAddr,
    /// Bits, at most 32 or 128.
    pub prefix: u8,
}

impl Cidr {
    /// Parses `address/prefix`.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let cidr = Self {
            address: address.parse().ok()?,
            prefix: prefix.parse().ok()?,
        };
        let bits = if cidr.address.is_ipv4() { 32 } else { 128 };
        (cidr.prefix <= bits).then_some(cidr)
    }

    /// The network of all addresses of a family.
    pub fn any(like: IpAddr) -> Self {
        let address = match like {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Self { address, prefix: 0 }
    }
}

impl std::fmt::Display for Cidr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Ethernet address; zero for other kinds.
    pub hardware: [u8; 6],
}

impl Link {
    /// From a kernel's answer.
    pub fn from_message(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            hardware: [0; 6],
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(address) => link.hardware = address.try_into().unwrap_or_default(),
                _ => (),
            }
        }
        link
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Renames a link, which must be down for it.
pub fn rename_link(link: &Link, name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let what = format!("rename interface {} to {name}", link.name);
    Request {
        what,
        flags: 0,
        message: RouteNetlinkMessage::SetLink(message),
        done: None,
    }
}

/// Gives a link its name and size and brings it up. An MTU of 0 is left as it is.
pub fn set_link(link: &Link, name: &str, mtu: u32) -> Vec<Request> {
    let mut requests = Vec::new();
    if link.name != name {
        requests.push(rename_link(link, name));
    }
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    if mtu != 0 {
        message.attributes.push(LinkAttribute::Mtu(mtu));
    }
    let what = format!("bring interface {name} up with MTU {mtu}");
    requests.push(Request {
        what,
        flags: 0,
        message: RouteNetlinkMessage::SetLink(message),
        done: None,
    });
    requests
}

fn address_message(link: u32, cidr: Cidr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(cidr.address);
    message.header.prefix_len = cidr.prefix;
    message.header.index = link;
    message.header.scope = AddressScope::Universe;
    message.attributes.push(AddressAttribute::Address(cidr.address));
    message.attributes.push(AddressAttribute::Local(cidr.address));
    message
}

/// Adds an address.
pub fn add_address(link: u32, cidr: Cidr) -> Request {
    let mut message = address_message(link, cidr);
    match cidr.address {
        IpAddr::V4(address) if cidr.prefix < 31 => {
            let host_bits = u32::MAX.checked_shr(cidr.prefix.into()).unwrap_or(0);
            let broadcast = Ipv4Addr::from(u32::from(address) | host_bits);
            message.attributes.push(AddressAttribute::Broadcast(broadcast));
        }
        IpAddr::V4(_) => (),
        // The host has checked that the address is free; the guest need not wait for it to be usable.
        IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
    }
    Request {
        what: format!("add address {cidr}"),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewAddress(message),
        done: Some(libc::EEXIST),
    }
}

/// Removes an address.
pub fn delete_address(link: u32, cidr: Cidr) -> Request {
    Request {
        what: format!("remove address {cidr}"),
        flags: 0,
        message: RouteNetlinkMessage::DelAddress(address_message(link, cidr)),
        // Removing a primary address takes its secondaries along.
        done: Some(libc::EADDRNOTAVAIL),
    }
}

/// A route.
#[derive(Clone, Debug)]
pub struct RouteSpec {
    /// Network it leads to.
    pub destination: Cidr,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Index of the interface.
    pub link: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// The gateway is reachable though no address says so.
    pub on_link: bool,
    /// Priority, 0: the kernel's default.
    pub metric: u32,
}

fn route_message(route: &RouteSpec) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.destination.address);
    message.header.destination_prefix_length = route.destination.prefix;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::from(route.scope);
    message.header.kind = RouteType::Unicast;
    if route.on_link {
        message.header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if route.destination.prefix > 0 {
        attributes.push(RouteAttribute::Destination(route.destination.address.into()));
    }
    attributes.push(RouteAttribute::Oif(route.link));
    attributes.extend(
        route
            .gateway
            .map(|gateway| RouteAttribute::Gateway(gateway.into())),
    );
    attributes.extend(
        route
            .source
            .map(|source| RouteAttribute::PrefSource(source.into())),
    );
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

impl std::fmt::Display for RouteSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "route {}", self.destination)?;
        self.gateway.map_or(Ok(()), |gateway| write!(f, " via {gateway}"))
    }
}

/// Adds or replaces a route.
pub fn set_route(route: &RouteSpec) -> Request {
    Request {
        what: format!("add {route}"),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewRoute(route_message(route)),
        done: Some(libc::EEXIST),
    }
}

/// Removes a route.
pub fn delete_route(route: &RouteSpec) -> Request {
    Request {
        what: format!("remove {route}"),
        flags: 0,
        message: RouteNetlinkMessage::DelRoute(route_message(route)),
        done: Some(libc::ESRCH),
    }
}

fn neighbor_message(link: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = link;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message
        .attributes
        .push(NeighbourAttribute::Destination(address.into()));
    message
}

/// Adds or replaces a permanent neighbour.
pub fn set_neighbor(link: u32, address: IpAddr, hardware: [u8; 6]) -> Request {
    let mut message = neighbor_message(link, address);
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(hardware.to_vec()));
    Request {
        what: format!("add neighbour {address}"),
        flags: NLM_F_CREATE | NLM_F_REPLACE,
        message: RouteNetlinkMessage::NewNeighbour(message),
        done: None,
    }
}

/// Removes a neighbour.
pub fn delete_neighbor(link: u32, address: IpAddr) -> Request {
    Request {
        what: format!("remove neighbour {address}"),
        flags: 0,
        message: RouteNetlinkMessage::DelNeighbour(neighbor_message(link, address)),
        done: Some(libc::ENOENT),
    }
}
