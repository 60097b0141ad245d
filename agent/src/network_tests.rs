#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags};
use proptest::prelude::*;
use protobuf::Message;

use super::*;

fn interface(mac: &[u8], name: &str) -> proto::Interface {
    proto::Interface {
        hardware_address: mac.to_vec(),
        name: name.into(),
        ..Default::default()
    }
}

fn eth(index: u32, last: u8) -> Link {
    Link {
        index,
        name: format!("eth{index}"),
        hardware: [2, 0, 0, 0, 0, last],
    }
}

#[test]
fn interfaces_are_found_by_hardware_address() {
    let mut links = [eth(0, 9), eth(1, 7)];
    assert_eq!(
        claim(&mut links, &interface(&[2, 0, 0, 0, 0, 7], "net0"))
            .unwrap()
            .index,
        1
    );
    assert_eq!(links[1].name, "net0");
    let error = claim(&mut links, &interface(&[2, 0, 0, 0, 0, 8], "net1")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no interface with hardware address 02:00:00:00:00:08"
    );
    for (mac, name) in [
        (&[1u8, 2][..], "a"),
        (&[2, 0, 0, 0, 0, 7], ""),
        (&[2, 0, 0, 0, 0, 7], "a/b"),
        (&[2, 0, 0, 0, 0, 7], "sixteen-letters-"),
    ] {
        assert!(
            matches!(
                claim(&mut links, &interface(mac, name)),
                Err(NetworkError::Invalid { .. })
            ),
            "{name}"
        );
    }
}

#[test]
fn names_in_use_are_freed_first() {
    let links = [eth(0, 1), eth(1, 2)];
    let swap = [(links[0].clone(), "eth1", 0), (links[1].clone(), "eth0", 0)];
    let names: Vec<String> = link_requests(&links, &swap)
        .into_iter()
        .map(|request| request.what)
        .collect();
    assert_eq!(
        names,
        [
            "rename interface eth0 to bulkhead0",
            "rename interface eth1 to bulkhead1",
            "rename interface bulkhead0 to eth1",
            "bring interface eth1 up with MTU 0",
            "rename interface bulkhead1 to eth0",
            "bring interface eth0 up with MTU 0",
        ]
    );
    let keep = [(links[0].clone(), "eth0", 1400)];
    assert_eq!(link_requests(&links, &keep).len(), 1);
}

#[test]
fn routes_without_sense_are_refused() {
    let route = |destination: &str, gateway: &str, source: &str| proto::Route {
        destination: destination.into(),
        gateway: gateway.into(),
        source: source.into(),
        ..Default::default()
    };
    for good in [
        route("", "10.0.0.1", ""),
        route("10.0.0.0/8", "", "10.0.0.2"),
        route("", "fe80::1", ""),
    ] {
        assert!(route_spec(&good, 2).is_ok());
    }
    for bad in [
        route("", "", ""),
        route("10.0.0.0/33", "", ""),
        route("10.0.0.0/8", "fe80::1", ""),
        route("x", "", ""),
    ] {
        assert!(matches!(route_spec(&bad, 2), Err(NetworkError::Invalid { .. })));
    }
}

#[test]
fn cidrs() {
    assert_eq!(Cidr::parse("192.0.2.1/24").unwrap().to_string(), "192.0.2.1/24");
    assert_eq!(Cidr::parse("2001:db8::1/64").unwrap().prefix, 64);
    for text in ["192.0.2.1", "192.0.2.1/33", "::/129", "/", "a/1", "1.2.3.4/-1"] {
        assert_eq!(Cidr::parse(text), None, "{text}");
    }
}

/// The loopback interface of whatever machine runs the test: the requests must be what a kernel takes.
#[test]
fn the_kernel_answers() {
    let mut netlink = Netlink::open().unwrap();
    let links = netlink.links().unwrap();
    let loopback = links.iter().find(|link| link.name == "lo").unwrap();
    assert!(
        netlink
            .addresses()
            .unwrap()
            .iter()
            .all(|(index, _)| links.iter().any(|link| link.index == *index))
    );
    // Refused by the kernel for its content, or for lack of privilege; not for its form.
    let nothing = message::delete_address(loopback.index, Cidr::parse("192.0.2.77/32").unwrap());
    match netlink.send(vec![nothing.clone(), nothing]) {
        Ok(()) => (),
        Err(NetworkError::Refused { source, .. }) => assert_eq!(source.raw_os_error(), Some(libc::EPERM)),
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    /// An address is the same on its way from the host's kernel to the guest's.
    #[test]
    fn addresses_survive_the_way(v6 in any::<bool>(), bits in any::<u128>(), prefix in 0u8..=128) {
        let (address, prefix) = match v6 {
            true => (IpAddr::from(bits.to_be_bytes()), prefix),
            false => (IpAddr::from((bits as u32).to_be_bytes()), prefix % 33),
        };
        let cidr = Cidr { address, prefix };
        prop_assert_eq!(Cidr::parse(&cidr.to_string()), Some(cidr));
    }

    #[test]
    fn any_reply_parses(data in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = socket::parse(&data);
    }

    #[test]
    fn any_cidr_parses(text in "[0-9a-f.:/]{0,24}") {
        Cidr::parse(&text);
    }
}

fn any_address(v6: bool) -> BoxedStrategy<IpAddr> {
    if v6 {
        any::<u128>()
            .prop_map(|bits| Ipv6Addr::from_bits(bits).into())
            .boxed()
    } else {
        any::<u32>()
            .prop_map(|bits| Ipv4Addr::from_bits(bits).into())
            .boxed()
    }
}

fn any_cidr() -> impl Strategy<Value = Cidr> {
    any::<bool>().prop_flat_map(|v6| {
        (any_address(v6), 0..=(if v6 { 128u8 } else { 32 }))
            .prop_map(|(address, prefix)| Cidr { address, prefix })
    })
}

/// A route of one family as the host sends it.
fn any_route() -> impl Strategy<Value = proto::Route> {
    let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
    any::<bool>().prop_flat_map(move |v6| {
        let most: u8 = if v6 { 128 } else { 32 };
        (
            any_address(v6),
            0..=most,
            proptest::option::of(any_address(v6)),
            proptest::option::of(any_address(v6)),
            any::<u32>(),
            any::<bool>(),
            any::<u8>(),
        )
            .prop_map(
                move |(address, prefix, gateway, source, metric, on_link, scope)| proto::Route {
                    destination: Cidr { address, prefix }.to_string(),
                    gateway: text(gateway),
                    source: text(source),
                    interface: "eth0".into(),
                    metric,
                    on_link,
                    scope: scope.into(),
                    ..Default::default()
                },
            )
    })
}

fn any_neighbor() -> impl Strategy<Value = proto::Neighbor> {
    let address = any::<bool>().prop_flat_map(any_address);
    (address, any::<[u8; 6]>()).prop_map(|(address, hardware)| proto::Neighbor {
        address: address.to_string(),
        hardware_address: hardware.to_vec(),
        interface: "eth0".into(),
        ..Default::default()
    })
}

/// As the kernel reads it: from its bytes.
fn read(request: &message::Request) -> RouteNetlinkMessage {
    let mut bytes = vec![0; request.message.buffer_len()];
    request.message.serialize(&mut bytes);
    let mut header = NetlinkHeader::default();
    header.message_type = request.message.message_type();
    RouteNetlinkMessage::deserialize(&header, &bytes).unwrap()
}

fn plain(address: &RouteAddress) -> IpAddr {
    match address {
        RouteAddress::Inet(address) => (*address).into(),
        RouteAddress::Inet6(address) => (*address).into(),
        other => panic!("{other:?}"),
    }
}

/// The route that a message to the kernel asks for, as the host would have sent it.
fn route_of(message: &netlink_packet_route::route::RouteMessage) -> proto::Route {
    let header = &message.header;
    let mut route = proto::Route {
        scope: u8::from(header.scope).into(),
        on_link: header.flags.contains(RouteFlags::Onlink),
        ..Default::default()
    };
    let v6 = header.address_family == netlink_packet_route::AddressFamily::Inet6;
    let unspecified = if v6 { "::/0" } else { "0.0.0.0/0" };
    route.destination = unspecified.into();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => {
                route.destination = format!("{}/{}", plain(address), header.destination_prefix_length);
            }
            RouteAttribute::Gateway(address) => route.gateway = plain(address).to_string(),
            RouteAttribute::PrefSource(address) => route.source = plain(address).to_string(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Oif(2) => route.interface = "eth0".into(),
            other => panic!("{other:?}"),
        }
    }
    route
}

/// What of a route reaches the kernel: nothing of the address of a default route.
fn normal(route: &proto::Route) -> proto::Route {
    let mut route = route.clone();
    let network = Cidr::parse(&route.destination).unwrap();
    if network.prefix == 0 {
        route.destination = Cidr::any(network.address).to_string();
    }
    route
}

fn sorted<T: std::fmt::Debug>(items: impl IntoIterator<Item = T>) -> Vec<String> {
    let mut texts: Vec<String> = items.into_iter().map(|item| format!("{item:?}")).collect();
    texts.sort();
    texts
}

proptest! {
    /// Whatever the host asks for arrives in the guest's kernel, and nothing beside it: addresses by their difference,
    /// what is gone before what comes, and routes to a gateway after the others.
    #[test]
    fn a_request_becomes_what_the_kernel_is_asked_for(
        wanted in prop::collection::vec(any_cidr(), 0..4),
        old in prop::collection::vec(any_cidr(), 0..4),
        kept in any::<prop::sample::Index>(),
        routes in prop::collection::vec(any_route(), 0..5),
        neighbors in prop::collection::vec(any_neighbor(), 0..4),
        gone_routes in prop::collection::vec(any_route(), 0..3),
        gone_neighbors in prop::collection::vec(any_neighbor(), 0..3),
    ) {
        let mut present: Vec<(u32, Cidr)> = old.iter().map(|cidr| (2, *cidr)).collect();
        if !wanted.is_empty() {
            present.push((2, wanted[kept.index(wanted.len())]));
        }
        // Another interface's addresses are nobody's business.
        present.extend(old.iter().map(|cidr| (3, *cidr)));
        let request = proto::ConfigureNetworkRequest {
            interfaces: vec![proto::Interface {
                addresses: wanted.iter().map(Cidr::to_string).collect(),
                ..interface(&[2, 0, 0, 0, 0, 1], "eth0")
            }],
            routes, neighbors, gone_routes, gone_neighbors,
            ..Default::default()
        };
        let request = proto::ConfigureNetworkRequest::parse_from_bytes(&request.write_to_bytes().unwrap()).unwrap();
        let batch = requests(&request, &HashMap::from([("eth0".to_owned(), 2)]), &present).unwrap();
        let (mut added, mut removed) = (Vec::new(), Vec::new());
        let (mut set, mut deleted) = (Vec::new(), Vec::new());
        let (mut near, mut far) = (Vec::new(), Vec::new());
        for (at, message) in batch.iter().map(read).enumerate() {
            match message {
                RouteNetlinkMessage::NewAddress(ref message) | RouteNetlinkMessage::DelAddress(ref message) => {
                    prop_assert_eq!(message.header.index, 2);
                    let local = message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Local(address) => Some(*address),
                        _ => None,
                    });
                    let cidr = Cidr { address: local.unwrap(), prefix: message.header.prefix_len };
                    match read(&batch[at]) {
                        RouteNetlinkMessage::NewAddress(_) => added.push(cidr),
                        _ => removed.push(cidr),
                    }
                }
                RouteNetlinkMessage::NewRoute(message) => {
                    let route = route_of(&message);
                    let last: Option<&proto::Route> = set.last();
                    prop_assert!(!route.gateway.is_empty() || last.is_none_or(|last| last.gateway.is_empty()));
                    set.push(route);
                }
                RouteNetlinkMessage::DelRoute(message) => {
                    prop_assert!(added.is_empty() && set.is_empty() && near.is_empty());
                    deleted.push(route_of(&message));
                }
                RouteNetlinkMessage::NewNeighbour(ref message) | RouteNetlinkMessage::DelNeighbour(ref message) => {
                    prop_assert_eq!((message.header.ifindex, message.header.state), (2, NeighbourState::Permanent));
                    let mut neighbor = proto::Neighbor { interface: "eth0".into(), ..Default::default() };
                    for attribute in &message.attributes {
                        match attribute {
                            NeighbourAttribute::Destination(address) => {
                                use netlink_packet_route::neighbour::NeighbourAddress as Address;
                                neighbor.address = match address {
                                    Address::Inet(address) => address.to_string(),
                                    Address::Inet6(address) => address.to_string(),
                                    other => panic!("{other:?}"),
                                };
                            }
                            NeighbourAttribute::LinkLayerAddress(hardware) => {
                                neighbor.hardware_address.clone_from(hardware);
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    match read(&batch[at]) {
                        RouteNetlinkMessage::NewNeighbour(_) => near.push(neighbor),
                        _ => far.push(neighbor.address),
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        let own: Vec<Cidr> = present.iter().filter(|(link, _)| *link == 2).map(|(_, cidr)| *cidr).collect();
        let missing = wanted.iter().filter(|cidr| !own.contains(cidr));
        prop_assert_eq!(sorted(&added), sorted(missing));
        let surplus = own.iter().filter(|cidr| !wanted.contains(cidr) && !is_link_local(cidr.address));
        prop_assert_eq!(sorted(&removed), sorted(surplus));
        prop_assert_eq!(sorted(&set), sorted(request.routes.iter().map(normal)));
        prop_assert_eq!(sorted(&deleted), sorted(request.gone_routes.iter().map(normal)));
        prop_assert_eq!(sorted(&near), sorted(&request.neighbors));
        prop_assert_eq!(sorted(&far), sorted(request.gone_neighbors.iter().map(|gone| &gone.address)));
    }

    /// Whichever links trade their names, each ends with its own, and no step takes one that is in use.
    #[test]
    fn links_end_with_their_names(order in Just((0..5usize).collect::<Vec<_>>()).prop_shuffle(), named in 1usize..=5) {
        let links: Vec<Link> = (0..5).map(|index| eth(index, index as u8)).collect();
        let names: Vec<String> = order.iter().map(|place| format!("eth{place}")).collect();
        // The names of links that keep theirs are not given to others.
        let changes: Vec<(Link, &str, u32)> = (0..named)
            .filter(|place| order[*place] < named)
            .map(|place| (links[place].clone(), names[place].as_str(), 1400))
            .collect();
        prop_assume!(changes.len() == named);
        let mut now: Vec<String> = links.iter().map(|link| link.name.clone()).collect();
        for request in link_requests(&links, &changes) {
            let RouteNetlinkMessage::SetLink(message) = read(&request) else { panic!() };
            let index = message.header.index as usize;
            for attribute in &message.attributes {
                use netlink_packet_route::link::LinkAttribute;
                match attribute {
                    LinkAttribute::IfName(name) => {
                        prop_assert!(!now.contains(name), "{} is in use", name);
                        now[index].clone_from(name);
                    }
                    LinkAttribute::Mtu(mtu) => prop_assert_eq!(*mtu, 1400),
                    other => panic!("{other:?}"),
                }
            }
        }
        prop_assert_eq!(&now[..named], &names[..named]);
    }
}
