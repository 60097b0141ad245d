//! What the kernel says. Needs root: each test makes network namespaces of its own.

#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;

use super::*;

/// Runs `test` on a thread in a network namespace of its own, whose loopback is up.
fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            test()
        });
        thread.join().unwrap()
    })
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn own() -> NetworkNamespace {
    let thread = nix::unistd::gettid();
    NetworkNamespace::Path(format!("/proc/{}/task/{thread}/ns/net", std::process::id()).into())
}

#[test]
#[ignore = "needs root and bpf(2)"]
fn every_port_of_loopback_leads_to_one_socket() {
    in_namespace(|| {
        ip("addr add 192.0.2.1/32 dev lo");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let forwarder = Forwarder::open().unwrap();
        let asked: [SocketAddr; 3] = [
            "127.0.0.1:80".parse().unwrap(),
            "127.1.2.3:65535".parse().unwrap(),
            "[::1]:443".parse().unwrap(),
        ];
        // The queue of the socket holds them.
        let mut callers: Vec<_> = asked
            .iter()
            .map(|address| TcpStream::connect(address).unwrap())
            .collect();
        let refused = TcpStream::connect("192.0.2.1:80").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let (sender, mut taken) = tokio::sync::mpsc::unbounded_channel();
        runtime.block_on(async {
            let run = forwarder.run(|connection| sender.send(connection).unwrap());
            let take = async {
                for (address, caller) in asked.iter().zip(&mut callers) {
                    let connection = taken.recv().await.unwrap();
                    assert_eq!(SocketAddr::new(connection.address, connection.port), *address);
                    let mut socket = std::fs::File::from(connection.socket);
                    socket.write_all(b"hello").unwrap();
                    let mut text = [0; 5];
                    caller.read_exact(&mut text).unwrap();
                    assert_eq!(&text, b"hello");
                    Connection::reset(&socket.into());
                    assert_eq!(
                        caller.read(&mut text).unwrap_err().kind(),
                        ErrorKind::ConnectionReset
                    );
                }
            };
            tokio::select! { result = run => panic!("{result:?}"), () = take => {} }
        });
        // The kernel's own way again.
        let refused = TcpStream::connect("127.0.0.1:80").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
#[ignore = "needs root"]
fn a_namespace_has_one_sandbox() {
    in_namespace(|| {
        let first = claim().unwrap();
        assert!(matches!(claim(), Err(NetworkError::InUse)));
        in_namespace(|| claim().map(drop).unwrap());
        drop(first);
        claim().unwrap();
    });
    // A thread's own namespace stands for containerd's, which is the host's.
    let host = NetworkNamespace::Path("/proc/self/ns/net".into());
    let error = std::thread::spawn(move || enter(&host))
        .join()
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, NetworkError::Host(_)), "{error}");
    assert_eq!(error.kind(), Kind::InvalidArgument);
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn interfaces_are_followed_and_given_back() {
    in_namespace(|| {
        let pair = |name: &str, peer: &str| {
            ip(&format!("link add {name} type veth peer name {peer}"));
            ip(&format!("link set {peer} up"));
            ip(&format!("link set {name} up"));
        };
        pair("eth0", "host0");
        // The far ends would be interfaces of the pod too.
        ip("link set host0 down");
        let namespace = own();
        let mut records = Vec::new();
        let mut record = |entry: &Entry| {
            records.push(entry.clone());
            Ok(())
        };
        let mut follower = Follower::new(&namespace, 1).unwrap();
        let first = follower.update(2, &mut record).unwrap();
        assert!(first.failed.is_none(), "{:?}", first.failed);
        assert_eq!(first.attach.len(), 1);
        assert_eq!(first.request.unwrap().interfaces[0].name, "eth0");
        let nothing = follower.update(2, &mut record).unwrap();
        assert!(nothing.attach.is_empty() && nothing.request.is_none());

        ip("addr add 192.0.2.2/24 dev eth0");
        ip("link set eth0 mtu 1400");
        ip("route add 198.51.100.0/24 via 192.0.2.1 dev eth0");
        let changed = follower.update(2, &mut record).unwrap().request.unwrap();
        assert_eq!(changed.interfaces[0].addresses, ["192.0.2.2/24"]);
        assert_eq!(changed.interfaces[0].mtu, 1400);
        assert_eq!(changed.routes[0].destination, "198.51.100.0/24");
        ip("route del 198.51.100.0/24");
        let changed = follower.update(2, &mut record).unwrap().request.unwrap();
        assert!(changed.routes.is_empty());
        assert_eq!(changed.gone_routes[0].gateway, "192.0.2.1");

        ip("link del eth0");
        let gone = follower.update(2, &mut record).unwrap();
        assert_eq!(gone.detach, [0]);
        assert!(gone.request.unwrap().interfaces.is_empty());

        drop(first.attach);
        pair("eth1", "host1");
        ip("link set host1 down");
        let again = follower.update(2, &mut record).unwrap();
        assert_eq!(again.attach[0].0, 0);
        let redirections = || {
            let output = Command::new("tc").args(["qdisc", "show"]).output().unwrap();
            String::from_utf8(output.stdout)
                .unwrap()
                .matches("ingress")
                .count()
        };
        assert_eq!(redirections(), 2);
        drop(again.attach);
        assert_eq!(redirections(), 1);
        let Entry::Redirection {
            namespace,
            inode,
            interface,
        } = records.last().unwrap()
        else {
            panic!("{records:?}");
        };
        assert_eq!(interface, "eth1");
        undo_redirection(namespace, inode + 1, interface).unwrap();
        assert_eq!(redirections(), 1);
        undo_redirection(namespace, *inode, interface).unwrap();
        assert_eq!(redirections(), 0);
        undo_redirection(namespace, *inode, interface).unwrap();

        let tc = |arguments: &str| {
            let status = Command::new("tc").args(arguments.split(' ')).status().unwrap();
            assert!(status.success(), "tc {arguments}");
        };
        // What a kill before the filter leaves, and what somebody else has made meanwhile.
        tc("qdisc add dev eth1 ingress");
        undo_redirection(namespace, *inode, interface).unwrap();
        assert_eq!(redirections(), 0);
        tc("qdisc add dev eth1 ingress");
        tc("filter add dev eth1 ingress prio 1 protocol all matchall action drop");
        undo_redirection(namespace, *inode, interface).unwrap();
        assert_eq!(redirections(), 1);
        // One that is there before is somebody else's, and nothing is written down.
        pair("eth2", "host2");
        ip("link set host2 down");
        tc("qdisc add dev eth2 ingress");
        let recorded = records.len();
        let mut follower = Follower::new(&own(), 1).unwrap();
        let mut record = |entry: &Entry| {
            records.push(entry.clone());
            Ok(())
        };
        let refused = follower.update(2, &mut record).unwrap().failed.unwrap();
        assert!(refused.to_string().contains("add an ingress queue"), "{refused}");
        assert_eq!(records.len(), recorded);
    });
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_tap_has_the_queues_it_is_to_have_and_one_of_them_attached() {
    let said = |command: &str| {
        let mut words = command.split(' ');
        let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let interface = interfaces::Interface {
        index: 1,
        name: "eth0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1400,
        addresses: Vec::new(),
    };
    for queues in [1, 2, 4] {
        in_namespace(|| {
            let mut netlink = netlink::Netlink::open().unwrap();
            let tap = tap::make(&mut netlink, &interface, "bulkhead0", queues).unwrap();
            assert_eq!(tap.taps.len(), usize::from(queues));
            let link = said("ip -d link show bulkhead0");
            assert!(link.contains("mtu 1400 ") && link.contains(",UP"), "{link}");
            if queues == 1 {
                assert!(!link.contains("multi_queue"), "{link}");
            } else {
                let expected = format!("multi_queue numqueues 1 numdisabled {} ", queues - 1);
                assert!(link.contains(&expected), "{link}");
                let disciplines = said("tc qdisc show dev bulkhead0");
                assert!(disciplines.starts_with("qdisc noqueue "), "{disciplines}");
                assert_eq!(disciplines.lines().count(), 1, "{disciplines}");
            }
            let taken = tap::make(&mut netlink, &interface, "bulkhead0", queues).unwrap_err();
            let NetworkError::Tap { error, .. } = taken else {
                panic!("{taken}");
            };
            assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
            drop(tap);
            assert!(!said("ip -o link").contains("bulkhead0"));
        });
    }
}
