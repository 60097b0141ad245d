#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteScope;
use proptest::collection::vec;
use proptest::prelude::*;
use protobuf::Message;

use super::*;

fn eth0(flags: LinkFlags) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = 2;
    link.header.flags = flags;
    link.header.link_layer_type = LinkLayerType::Ether;
    link.attributes = vec![
        LinkAttribute::IfName("eth0".into()),
        LinkAttribute::Mtu(1450),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
    ];
    link
}

fn address_message(index: u32, scope: AddressScope) -> RouteNetlinkMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = 24;
    message.header.scope = scope;
    message.attributes = vec![AddressAttribute::Address(IpAddr::V4(Ipv4Addr::new(10, 88, 0, 5)))];
    RouteNetlinkMessage::NewAddress(message)
}

fn found() -> Found {
    let addresses = [address_message(2, AddressScope::Universe)];
    let eth0 = interface(&eth0(LinkFlags::Up), &addresses).unwrap().unwrap();
    Found {
        interfaces: vec![eth0],
        ..Found::default()
    }
}

fn default_route(oif: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        RouteAttribute::Gateway(RouteAddress::Inet(Ipv4Addr::new(10, 88, 0, 1))),
        RouteAttribute::Oif(oif),
    ];
    message
}

#[test]
fn an_interface_is_copied_with_its_addresses() {
    let addresses = [
        address_message(2, AddressScope::Universe),
        address_message(2, AddressScope::Link),
        address_message(3, AddressScope::Universe),
    ];
    let got = interface(&eth0(LinkFlags::Up), &addresses).unwrap().unwrap();
    assert_eq!(
        (got.name.as_str(), got.mtu, got.mac),
        ("eth0", 1450, [2, 0, 0, 0, 0, 1])
    );
    assert_eq!(got.addresses, ["10.88.0.5/24"]);
}

#[test]
fn loopback_and_unused_interfaces_are_left_out() {
    assert_eq!(
        interface(&eth0(LinkFlags::Up | LinkFlags::Loopback), &[]).unwrap(),
        None
    );
    assert_eq!(interface(&eth0(LinkFlags::empty()), &[]).unwrap(), None);
    let mut tunnel = eth0(LinkFlags::Up);
    tunnel.header.link_layer_type = LinkLayerType::Tunnel;
    assert_eq!(interface(&tunnel, &[]).unwrap(), None);
    let addresses = [address_message(2, AddressScope::Universe)];
    assert!(matches!(
        interface(&tunnel, &addresses),
        Err(NetworkError::Kind(_))
    ));
}

#[test]
fn routes_of_the_kernel_and_of_other_interfaces_are_left_out() {
    let found = found();
    let got = route(&found, &default_route(2)).unwrap();
    assert_eq!(
        (
            got.gateway.as_str(),
            got.destination.as_str(),
            got.interface.as_str()
        ),
        ("10.88.0.1", "", "eth0")
    );
    assert!(route(&found, &default_route(1)).is_none());
    let mut kernel = default_route(2);
    kernel.header.protocol = RouteProtocol::Kernel;
    assert!(route(&found, &kernel).is_none());
}

#[test]
fn only_permanent_neighbours_are_copied() {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = 2;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(Ipv4Addr::new(169, 254, 1, 1))),
        NeighbourAttribute::LinkLayerAddress(vec![0xee; 6]),
    ];
    assert!(neighbor(&found(), &message).is_none());
    message.header.state = NeighbourState::Permanent;
    assert_eq!(neighbor(&found(), &message).unwrap().address, "169.254.1.1");
}

#[test]
fn a_default_route_without_a_gateway_says_of_which_family_it_is() {
    for (family, expected) in [(AddressFamily::Inet, "0.0.0.0/0"), (AddressFamily::Inet6, "::/0")] {
        let mut message = default_route(2);
        message.header.address_family = family;
        message.attributes = vec![RouteAttribute::Oif(2)];
        assert_eq!(route(&found(), &message).unwrap().destination, expected);
    }
}

/// As the kernel sends it: over its bytes.
fn sent(message: RouteNetlinkMessage) -> RouteNetlinkMessage {
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let mut header = NetlinkHeader::default();
    header.message_type = message.message_type();
    RouteNetlinkMessage::deserialize(&header, &bytes).unwrap()
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

fn family(v6: bool) -> AddressFamily {
    if v6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    }
}

/// What a route says: whether of IPv6, destination with prefix, gateway, source, metric, flag, scope.
type RouteValues = (
    bool,
    Option<(IpAddr, u8)>,
    Option<IpAddr>,
    Option<IpAddr>,
    u32,
    bool,
    u8,
);

fn any_route() -> impl Strategy<Value = RouteValues> {
    any::<bool>().prop_flat_map(|v6| {
        let most: u8 = if v6 { 128 } else { 32 };
        (
            Just(v6),
            proptest::option::of((any_address(v6), 1..=most)),
            proptest::option::of(any_address(v6)),
            proptest::option::of(any_address(v6)),
            any::<u32>(),
            any::<bool>(),
            prop_oneof![Just(0u8), Just(200), Just(253)],
        )
    })
}

fn route_message(values: &RouteValues) -> RouteNetlinkMessage {
    let (v6, destination, gateway, source, metric, on_link, scope) = *values;
    let mut message = RouteMessage::default();
    message.header.address_family = family(v6);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.kind = RouteType::Unicast;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::from(scope);
    if on_link {
        message.header.flags = RouteFlags::Onlink;
    }
    if let Some((address, prefix)) = destination {
        message.header.destination_prefix_length = prefix;
        message
            .attributes
            .push(RouteAttribute::Destination(address.into()));
    }
    message
        .attributes
        .extend(gateway.map(|address| RouteAttribute::Gateway(address.into())));
    message
        .attributes
        .extend(source.map(|address| RouteAttribute::PrefSource(address.into())));
    message.attributes.push(RouteAttribute::Priority(metric));
    message.attributes.push(RouteAttribute::Oif(2));
    sent(RouteNetlinkMessage::NewRoute(message))
}

fn neighbour_message(address: IpAddr, hardware: [u8; 6]) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address.is_ipv6());
    message.header.ifindex = 2;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(address.into()),
        NeighbourAttribute::LinkLayerAddress(hardware.to_vec()),
    ];
    sent(RouteNetlinkMessage::NewNeighbour(message))
}

fn routes_of(messages: &[RouteValues], found: &Found) -> Vec<Route> {
    let of = |values| match route_message(values) {
        RouteNetlinkMessage::NewRoute(message) => route(found, &message).unwrap(),
        other => panic!("{other:?}"),
    };
    messages.iter().map(of).collect()
}

fn neighbors_of(list: &[(IpAddr, [u8; 6])], found: &Found) -> Vec<Neighbor> {
    let of = |&(address, hardware): &(IpAddr, [u8; 6])| match neighbour_message(address, hardware) {
        RouteNetlinkMessage::NewNeighbour(message) => neighbor(found, &message).unwrap(),
        other => panic!("{other:?}"),
    };
    list.iter().map(of).collect()
}

/// The address that a text of the request stands for.
fn parsed(text: &str) -> Option<IpAddr> {
    (!text.is_empty()).then(|| text.parse().unwrap())
}

fn parsed_network(text: &str) -> (IpAddr, u8) {
    let (address, prefix) = text.split_once('/').unwrap();
    (address.parse().unwrap(), prefix.parse().unwrap())
}

fn any_neighbors() -> impl Strategy<Value = Vec<(IpAddr, [u8; 6])>> {
    let address = any::<bool>().prop_flat_map(any_address);
    vec((address, any::<[u8; 6]>()), 0..5)
}

proptest! {
    /// From the bytes of the kernel to those of the agent's request: interface, addresses, routes and neighbours.
    #[test]
    fn what_the_kernel_lists_arrives(
        mac in any::<[u8; 6]>(),
        mtu in 68u32..=65_535,
        name in "[a-z][a-z0-9.-]{0,14}",
        addresses in vec(any::<bool>().prop_flat_map(|v6| (any_address(v6), 0..=(if v6 { 128u8 } else { 32 }))), 0..4),
        routes in vec(any_route(), 0..5),
        neighbors in any_neighbors(),
    ) {
        let mut link = eth0(LinkFlags::Up);
        link.attributes = vec![
            LinkAttribute::IfName(name.clone()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::Address(mac.to_vec()),
        ];
        let RouteNetlinkMessage::NewLink(link) = sent(RouteNetlinkMessage::NewLink(link)) else { panic!() };
        let listed: Vec<_> = addresses.iter().map(|(address, prefix)| {
            let mut message = AddressMessage::default();
            message.header.family = family(address.is_ipv6());
            message.header.index = 2;
            message.header.prefix_len = *prefix;
            message.attributes = vec![AddressAttribute::Address(*address), AddressAttribute::Local(*address)];
            sent(RouteNetlinkMessage::NewAddress(message))
        }).collect();
        let mut found = Found {
            interfaces: vec![interface(&link, &listed).unwrap().unwrap()],
            ..Found::default()
        };
        found.routes = routes_of(&routes, &found);
        found.neighbors = neighbors_of(&neighbors, &found);
        let request = found.request(&Found::default()).write_to_bytes().unwrap();
        let request = ConfigureNetworkRequest::parse_from_bytes(&request).unwrap();

        let [interface] = request.interfaces.as_slice() else { panic!("{request:?}") };
        prop_assert_eq!(&interface.name, &name);
        prop_assert_eq!(&interface.hardware_address, &mac.to_vec());
        prop_assert_eq!(interface.mtu, mtu);
        let arrived: Vec<_> = interface.addresses.iter().map(|text| parsed_network(text)).collect();
        prop_assert_eq!(arrived, addresses);
        prop_assert_eq!(request.routes.len(), routes.len());
        for (arrived, sent) in request.routes.iter().zip(&routes) {
            let (v6, destination, gateway, source, metric, on_link, scope) = *sent;
            prop_assert_eq!(&arrived.interface, &name);
            prop_assert_eq!(parsed(&arrived.gateway), gateway);
            prop_assert_eq!(parsed(&arrived.source), source);
            prop_assert_eq!((arrived.metric, arrived.on_link, arrived.scope), (metric, on_link, scope.into()));
            let to = (!arrived.destination.is_empty()).then(|| parsed_network(&arrived.destination));
            match destination {
                Some(destination) => prop_assert_eq!(to, Some(destination)),
                // The family of a default route must be told by something.
                None => {
                    let tells = to.map(|(address, _)| address).or(gateway).or(source);
                    prop_assert_eq!(tells.map(|address| address.is_ipv6()), Some(v6));
                    prop_assert!(to.is_none_or(|(address, prefix)| address.is_unspecified() && prefix == 0));
                }
            }
        }
        let arrived: Vec<_> = request.neighbors.iter().map(|neighbor| {
            (neighbor.address.parse().unwrap(), neighbor.hardware_address.clone().try_into().unwrap())
        }).collect();
        prop_assert_eq!(arrived, neighbors);
        prop_assert!(request.gone_routes.is_empty() && request.gone_neighbors.is_empty());
    }

    /// A guest that had the state before has the present one after the request.
    #[test]
    fn what_has_gone_is_told_and_nothing_else(
        pool in vec((any_route(), any::<[bool; 2]>()), 0..8),
        near in vec((any_neighbors(), any::<[bool; 2]>()), 0..4),
    ) {
        let state = |when: usize| {
            let mut found = found();
            let routes: Vec<_> = pool.iter().filter(|(_, at)| at[when]).map(|(route, _)| *route).collect();
            let neighbors: Vec<_> = near.iter().filter(|(_, at)| at[when]).flat_map(|(list, _)| list.clone()).collect();
            found.routes = routes_of(&routes, &found);
            found.neighbors = neighbors_of(&neighbors, &found);
            found
        };
        let (before, now) = (state(0), state(1));
        let request = now.request(&before);
        prop_assert_eq!(&request.routes, &now.routes);
        prop_assert_eq!(&request.neighbors, &now.neighbors);
        prop_assert!(request.gone_routes.iter().all(|gone| !now.routes.contains(gone)));
        prop_assert!(request.gone_neighbors.iter().all(|gone| !now.neighbors.contains(gone)));
        let stays = |route: &&Route| !request.gone_routes.contains(route);
        prop_assert!(before.routes.iter().filter(stays).all(|route| now.routes.contains(route)));
        let stays = |neighbor: &&Neighbor| !request.gone_neighbors.contains(neighbor);
        prop_assert!(before.neighbors.iter().filter(stays).all(|neighbor| now.neighbors.contains(neighbor)));
        // Of an interface that is left out nothing is told.
        let mut without = now.clone();
        without.leave_out(&[2]);
        prop_assert_eq!(without, Found::default());
    }
}
