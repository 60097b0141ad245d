#![allow(clippy::unwrap_used)]

use std::net::Ipv4Addr;

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
