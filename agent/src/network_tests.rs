#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

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
