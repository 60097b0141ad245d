//! What the network plugin has set up in the pod's namespace.

use std::net::IpAddr;

use bulkhead_protocol::agent::{ConfigureNetworkRequest, Interface as GuestInterface, Neighbor, Route};
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::NetworkError;
use super::netlink::Netlink;

/// MTU of an interface that tells none.
const DEFAULT_MTU: u32 = 1500;

/// An Ethernet interface of the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub index: u32,
    pub name: String,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// "192.0.2.1/24"
    pub addresses: Vec<String>,
}

/// Everything the guest has to take over.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Found {
    pub interfaces: Vec<Interface>,
    routes: Vec<Route>,
    neighbors: Vec<Neighbor>,
}

impl Found {
    /// What brings a guest that was told `before` to this state.
    pub fn request(&self, before: &Self) -> ConfigureNetworkRequest {
        let interfaces = self.interfaces.iter().map(|interface| GuestInterface {
            hardware_address: interface.mac.to_vec(),
            name: interface.name.clone(),
            mtu: interface.mtu.into(),
            addresses: interface.addresses.clone(),
            ..GuestInterface::default()
        });
        ConfigureNetworkRequest {
            interfaces: interfaces.collect(),
            routes: self.routes.clone(),
            neighbors: self.neighbors.clone(),
            gone_routes: missing(&before.routes, &self.routes),
            gone_neighbors: missing(&before.neighbors, &self.neighbors),
            ..ConfigureNetworkRequest::default()
        }
    }

    /// Forgets interfaces, by index, and what is on them.
    pub fn leave_out(&mut self, indices: &[u32]) {
        let gone = |interface: &Interface| indices.contains(&interface.index);
        let names: Vec<String> = self
            .interfaces
            .iter()
            .filter(|interface| gone(interface))
            .map(|interface| interface.name.clone())
            .collect();
        self.interfaces.retain(|interface| !gone(interface));
        self.routes.retain(|route| !names.contains(&route.interface));
        self.neighbors
            .retain(|neighbor| !names.contains(&neighbor.interface));
    }

    fn name(&self, index: u32) -> Option<&str> {
        self.interfaces
            .iter()
            .find(|interface| interface.index == index)
            .map(|found| found.name.as_str())
    }
}

/// The entries of `before` that `now` lacks.
fn missing<T: Clone + PartialEq>(before: &[T], now: &[T]) -> Vec<T> {
    before
        .iter()
        .filter(|entry| !now.contains(entry))
        .cloned()
        .collect()
}

/// Lists interfaces, addresses, routes and permanent neighbours. `own` are the indices of the sandbox's taps.
pub(super) fn scan(netlink: &mut Netlink, own: &[u32]) -> Result<Found, NetworkError> {
    let links = netlink.dump(
        "list interfaces",
        RouteNetlinkMessage::GetLink(LinkMessage::default()),
    )?;
    let addresses = netlink.dump(
        "list addresses",
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
    )?;
    let mut found = Found::default();
    for message in links {
        if let RouteNetlinkMessage::NewLink(link) = message
            && !own.contains(&link.header.index)
            && let Some(interface) = interface(&link, &addresses)?
        {
            found.interfaces.push(interface);
        }
    }
    if found.interfaces.is_empty() {
        return Ok(found);
    }
    for message in netlink.dump(
        "list routes",
        RouteNetlinkMessage::GetRoute(RouteMessage::default()),
    )? {
        if let RouteNetlinkMessage::NewRoute(message) = message
            && let Some(route) = route(&found, &message)
        {
            found.routes.push(route);
        }
    }
    // Routes to a gateway need the route to the gateway's network first.
    found
        .routes
        .sort_by_key(|route| (!route.gateway.is_empty(), route.destination.is_empty()));
    let neighbours = netlink.dump(
        "list neighbours",
        RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
    )?;
    for message in neighbours {
        if let RouteNetlinkMessage::NewNeighbour(message) = message
            && let Some(neighbor) = neighbor(&found, &message)
        {
            found.neighbors.push(neighbor);
        }
    }
    Ok(found)
}

fn interface(
    link: &LinkMessage,
    addresses: &[RouteNetlinkMessage],
) -> Result<Option<Interface>, NetworkError> {
    let header = &link.header;
    if header.flags.contains(LinkFlags::Loopback) || !header.flags.contains(LinkFlags::Up) {
        return Ok(None);
    }
    let mut name = String::new();
    let mut mac = None;
    let mut mtu = DEFAULT_MTU;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name.clone_from(value),
            LinkAttribute::Address(value) => mac = <[u8; 6]>::try_from(value.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            _ => {}
        }
    }
    let addresses: Vec<String> = addresses
        .iter()
        .filter_map(|message| address(message, header.index))
        .collect();
    match (header.link_layer_type, mac) {
        (LinkLayerType::Ether, Some(mac)) => Ok(Some(Interface {
            index: header.index,
            name,
            mac,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
            addresses,
        })),
        _ if addresses.is_empty() => Ok(None),
        _ => Err(NetworkError::Kind(name)),
    }
}

fn address(message: &RouteNetlinkMessage, index: u32) -> Option<String> {
    let RouteNetlinkMessage::NewAddress(message) = message else {
        return None;
    };
    // The guest makes link-local addresses itself, from the same hardware address.
    if message.header.index != index || message.header.scope == AddressScope::Link {
        return None;
    }
    let mut address: Option<IpAddr> = None;
    for attribute in &message.attributes {
        match attribute {
            // IFA_LOCAL is the interface's own address; IFA_ADDRESS is the peer's on a point-to-point link.
            AddressAttribute::Local(local) => address = Some(*local),
            AddressAttribute::Address(other) => address = address.or(Some(*other)),
            _ => {}
        }
    }
    Some(format!("{}/{}", address?, message.header.prefix_len))
}

fn text(address: &RouteAddress) -> Option<String> {
    match address {
        RouteAddress::Inet(address) => Some(address.to_string()),
        RouteAddress::Inet6(address) => Some(address.to_string()),
        _ => None,
    }
}

fn route(found: &Found, message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    // The kernel adds its own routes in the guest as it has here.
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.kind != RouteType::Unicast
        || header.protocol == RouteProtocol::Kernel
        || header.flags.contains(RouteFlags::Cloned)
    {
        return None;
    }
    let mut route = Route {
        scope: u8::from(header.scope).into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        ..Route::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = format!("{}/{}", text(address)?, header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = text(address)?,
            RouteAttribute::PrefSource(address) => route.source = text(address)?,
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(index) => route.interface = found.name(*index)?.to_owned(),
            _ => {}
        }
    }
    if route.destination.is_empty() && route.gateway.is_empty() && route.source.is_empty() {
        // Nothing else would say of which family it is.
        route.destination = match header.address_family {
            AddressFamily::Inet => "0.0.0.0/0".into(),
            AddressFamily::Inet6 => "::/0".into(),
            _ => return None,
        };
    }
    (!route.interface.is_empty()).then_some(route)
}

fn neighbor(found: &Found, message: &NeighbourMessage) -> Option<Neighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbor = Neighbor {
        interface: found.name(message.header.ifindex)?.to_owned(),
        ..Neighbor::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                neighbor.address = address.to_string();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                neighbor.address = address.to_string();
            }
            NeighbourAttribute::LinkLayerAddress(address) => neighbor.hardware_address.clone_from(address),
            _ => {}
        }
    }
    (!neighbor.address.is_empty() && neighbor.hardware_address.len() == 6).then_some(neighbor)
}

#[cfg(test)]
mod tests;
