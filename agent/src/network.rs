//! The guest's interfaces, addresses, routes and neighbours, set over rtnetlink.

pub mod channels;
pub mod forward;
mod message;
pub mod plug;
mod socket;

use std::collections::HashMap;
use std::net::IpAddr;

use bulkhead_protocol::agent as proto;
use message::{Cidr, Link};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use socket::Netlink;

/// Longest name of an interface, without the final NUL.
const MAX_NAME: usize = 15;

/// Why the network could not be configured.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A field of the request makes no sense.
    #[error("invalid {field}: {value:?}")]
    Invalid {
        /// Field in `agent.proto`.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// No interface has that hardware address.
    #[error("no interface with hardware address {0}")]
    NoHardware(String),
    /// No interface has that name.
    #[error("no interface {0:?}")]
    NoInterface(String),
    /// The socket failed.
    #[error("netlink socket")]
    Socket(#[source] std::io::Error),
    /// The kernel's answer cannot be understood.
    #[error("netlink reply")]
    Reply,
    /// The kernel refused.
    #[error("cannot {what}")]
    Refused {
        /// What was asked for.
        what: String,
        /// Why it was refused.
        #[source]
        source: std::io::Error,
    },
}

impl NetworkError {
    /// Whether the host's request is to blame.
    pub fn is_argument(&self) -> bool {
        matches!(
            self,
            Self::Invalid { .. } | Self::NoHardware(_) | Self::NoInterface(_)
        )
    }
}

/// Brings the interfaces, routes and neighbours to the given state. Addresses of the named interfaces that are not
/// in the request are removed, and so are the routes and neighbours it calls gone; the others are added or replaced.
///
/// # Errors
/// The request makes no sense or the kernel refuses a part.
pub fn configure(request: &proto::ConfigureNetworkRequest) -> Result<(), NetworkError> {
    let mut netlink = Netlink::open()?;
    let mut links = netlink.links()?;
    let before = links.clone();
    let mut changes = Vec::new();
    for interface in &request.interfaces {
        let link = claim(&mut links, interface)?;
        changes.push((link, interface.name.as_str(), interface.mtu));
    }
    netlink.send(link_requests(&before, &changes))?;
    let index: HashMap<String, u32> = links.iter().map(|link| (link.name.clone(), link.index)).collect();
    let present = netlink.addresses()?;
    netlink.send(requests(request, &index, &present)?)
}

/// Requests that bring addresses, routes and neighbours to the given state. `index` has the interfaces by name,
/// `present` the addresses there are.
fn requests(
    request: &proto::ConfigureNetworkRequest,
    index: &HashMap<String, u32>,
    present: &[(u32, Cidr)],
) -> Result<Vec<message::Request>, NetworkError> {
    let index_of = |name: &str| {
        index
            .get(name)
            .copied()
            .ok_or_else(|| NetworkError::NoInterface(name.to_owned()))
    };
    // Before the addresses: without its address a route may be gone, and then another of its kind would be taken.
    let mut batch = gone_requests(request, index)?;
    for interface in &request.interfaces {
        let link = index_of(&interface.name)?;
        let wanted: Vec<Cidr> = interface
            .addresses
            .iter()
            .map(|text| cidr("interfaces.addresses", text))
            .collect::<Result<_, _>>()?;
        for (_, address) in present
            .iter()
            .filter(|(at, address)| *at == link && !wanted.contains(address))
        {
            if !is_link_local(address.address) {
                batch.push(message::delete_address(link, *address));
            }
        }
        let missing = |address: &&Cidr| !present.contains(&(link, **address));
        batch.extend(
            wanted
                .iter()
                .filter(missing)
                .map(|address| message::add_address(link, *address)),
        );
    }
    // Routes to a gateway need the route to the gateway's own network first.
    let mut routes: Vec<_> = request.routes.iter().collect();
    routes.sort_by_key(|route| !route.gateway.is_empty());
    for route in routes {
        batch.push(message::set_route(&route_spec(
            route,
            index_of(&route.interface)?,
        )?));
    }
    for neighbor in &request.neighbors {
        let link = index_of(&neighbor.interface)?;
        let address = ip("neighbors.address", &neighbor.address)?;
        batch.push(message::set_neighbor(
            link,
            address,
            hardware("neighbors", &neighbor.hardware_address)?,
        ));
    }
    Ok(batch)
}

/// What [`configure`] would ask the kernel for, on a machine with one interface `eth0`: the number of bytes.
///
/// # Errors
/// The request makes no sense.
#[cfg(fuzzing)]
pub fn rehearse(request: &proto::ConfigureNetworkRequest) -> Result<usize, NetworkError> {
    use netlink_packet_core::NetlinkSerializable;
    let mut links = vec![Link {
        index: 2,
        name: "eth0".into(),
        hardware: [2, 0, 0, 0, 0, 1],
    }];
    let before = links.clone();
    let mut changes = Vec::new();
    for interface in &request.interfaces {
        let link = claim(&mut links, interface)?;
        changes.push((link, interface.name.as_str(), interface.mtu));
    }
    let mut all = link_requests(&before, &changes);
    let index = links.iter().map(|link| (link.name.clone(), link.index)).collect();
    all.extend(requests(request, &index, &[])?);
    let sizes = all.iter().map(|request| {
        let mut buffer = vec![0; request.message.buffer_len()];
        request.message.serialize(&mut buffer);
        buffer.len()
    });
    Ok(sizes.sum())
}

/// Requests that remove what is gone. What was on an interface that has gone went with it.
fn gone_requests(
    request: &proto::ConfigureNetworkRequest,
    index: &HashMap<String, u32>,
) -> Result<Vec<message::Request>, NetworkError> {
    let mut requests = Vec::new();
    for route in &request.gone_routes {
        if let Some(link) = index.get(&route.interface) {
            requests.push(message::delete_route(&route_spec(route, *link)?));
        }
    }
    for neighbor in &request.gone_neighbors {
        if let Some(link) = index.get(&neighbor.interface) {
            let address = ip("gone_neighbors.address", &neighbor.address)?;
            requests.push(message::delete_neighbor(*link, address));
        }
    }
    Ok(requests)
}

/// Requests that give links their names and sizes. If a name is in use by another link, all links that change
/// theirs get a temporary one first: they may be trading names.
fn link_requests(present: &[Link], changes: &[(Link, &str, u32)]) -> Vec<message::Request> {
    let conflict = changes.iter().any(|(link, name, _)| {
        present
            .iter()
            .any(|other| other.name == *name && other.index != link.index)
    });
    let mut requests = Vec::new();
    let mut changes = changes.to_vec();
    if conflict {
        for (link, _, _) in changes.iter_mut().filter(|(link, name, _)| link.name != *name) {
            let temporary = format!("bulkhead{}", link.index);
            requests.push(message::rename_link(link, &temporary));
            link.name = temporary;
        }
    }
    requests.extend(
        changes
            .iter()
            .flat_map(|(link, name, mtu)| message::set_link(link, name, *mtu)),
    );
    requests
}

/// The link with an interface's hardware address, which takes its name in the list.
fn claim(links: &mut [Link], interface: &proto::Interface) -> Result<Link, NetworkError> {
    let name = &interface.name;
    let plain = (1..=MAX_NAME).contains(&name.len())
        && !matches!(name.as_str(), "." | "..")
        && name
            .chars()
            .all(|c| c.is_ascii_graphic() && !matches!(c, '/' | ':'));
    if !plain {
        return Err(NetworkError::Invalid {
            field: "interfaces.name",
            value: name.clone(),
        });
    }
    let address = hardware("interfaces", &interface.hardware_address)?;
    let link = links.iter_mut().find(|link| link.hardware == address);
    let link = link.ok_or_else(|| NetworkError::NoHardware(hex(&address)))?;
    let before = link.clone();
    link.name.clone_from(name);
    Ok(before)
}

fn route_spec(route: &proto::Route, link: u32) -> Result<message::RouteSpec, NetworkError> {
    let optional = |field, text: &str| match text {
        "" => Ok(None),
        text => ip(field, text).map(Some),
    };
    let gateway = optional("routes.gateway", &route.gateway)?;
    let source = optional("routes.source", &route.source)?;
    let destination = match (route.destination.as_str(), gateway.or(source)) {
        ("", Some(like)) => Cidr::any(like),
        ("", None) => {
            return Err(NetworkError::Invalid {
                field: "routes",
                value: "empty".into(),
            });
        }
        (text, _) => cidr("routes.destination", text)?,
    };
    let scope = u8::try_from(route.scope).map_err(|_| NetworkError::Invalid {
        field: "routes.scope",
        value: route.scope.to_string(),
    })?;
    let mixed = [gateway, source]
        .iter()
        .flatten()
        .any(|other| other.is_ipv4() != destination.address.is_ipv4());
    if mixed {
        return Err(NetworkError::Invalid {
            field: "routes",
            value: "IPv4 mixed with IPv6".into(),
        });
    }
    Ok(message::RouteSpec {
        destination,
        gateway,
        source,
        link,
        scope,
        on_link: route.on_link,
        metric: route.metric,
    })
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

fn ip(field: &'static str, text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Invalid {
        field,
        value: text.to_owned(),
    })
}

fn cidr(field: &'static str, text: &str) -> Result<Cidr, NetworkError> {
    Cidr::parse(text).ok_or_else(|| NetworkError::Invalid {
        field,
        value: text.to_owned(),
    })
}

fn hardware(field: &'static str, bytes: &[u8]) -> Result<[u8; 6], NetworkError> {
    bytes.try_into().map_err(|_| NetworkError::Invalid {
        field,
        value: hex(bytes),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(":")
}

/// Brings the loopback interface up, which gives it its addresses.
///
/// # Errors
/// The kernel has no network.
pub fn loopback_up() -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is valid for reads.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) })
        .map(drop)
}

#[cfg(test)]
#[path = "network_tests.rs"]
mod tests;
