//! The pod's interfaces, as CNI plugins make them: what the guest has of them, and what follows later.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use bulkhead_tests::cri::api::DnsConfig;
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::settings::{GATEWAY, GATEWAY_6, MTU};
use bulkhead_tests::{Container, Pod, config};
use nix::sched::{CloneFlags, setns};

use crate::pods;

/// What a pod is given at most to notice a change.
fn soon() -> Duration {
    config().seconds(10)
}

fn run(program: &str, arguments: &str) -> String {
    let output = Command::new(program)
        .args(arguments.split_whitespace())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments}: {}",
        text(output.stderr)
    );
    text(output.stdout)
}

/// Runs a command in the pod's network namespace on the host.
fn in_pod(pod: &Pod<'_>, command: &str) -> String {
    run("nsenter", &format!("--net=/proc/{}/ns/net {command}", pod.shim()))
}

fn ipv6(pod: &Pod<'_>) -> String {
    pod.status().network.additional_ips[0].ip.clone()
}

/// Waits until `script` prints `text` in a container.
#[track_caller]
fn eventually(container: &Container<'_>, script: &str, text: &str) {
    let mut seen = String::new();
    let found = wait_until(soon(), || {
        seen = container.sh(script).stdout.clone();
        seen.contains(text)
    });
    assert!(found, "{script}: no {text:?} in {seen}");
}

#[test]
fn addresses_routes_and_mtu_are_the_plugins() {
    let test = pods("addresses");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let seen = main.sh("ip addr show eth0; ip route; ip -6 route").text();
    for text in [
        format!("mtu {MTU}"),
        format!("inet {}/16", pod.ip()),
        format!("inet6 {}/64", ipv6(&pod)),
        format!("default via {GATEWAY} dev eth0"),
        format!("default via {GATEWAY_6} dev eth0"),
    ] {
        assert!(seen.contains(&text), "no {text:?} in {seen}");
    }
    assert!(main.sh("ip addr show lo").text().contains("127.0.0.1/8"));
}

#[test]
fn pods_and_the_host_reach_each_other() {
    let test = pods("reach");
    let (a, b) = (test.pod("a").run(), test.pod("b").run());
    let ask = a.container("ask", &["sleep", "1000"]).start();
    let probe = a.probe("probe", &["tick"]).start();
    let server = b.probe("server", &["count", "[::]:8080"]).start();
    server.wait_for_log("listening");
    let (v4, v6) = (format!("{}:8080", b.ip()), format!("[{}]:8080", ipv6(&b)));
    // Large frames: as many as fit into a segment, and the largest that must not be split.
    let many = config().crowd(3_000_000).to_string();
    for address in [&v4, &v6] {
        let sent = probe.exec(&["/probe", "send", address, &many]);
        assert_eq!(sent.text(), format!("{many} bytes\n"), "pod to pod {address}");
        let mut stream = TcpStream::connect(address.as_str()).unwrap();
        stream.set_read_timeout(Some(config().seconds(30))).unwrap();
        stream.write_all(&[1; 100_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "100000 bytes", "host to pod {address}");
    }
    let size = MTU - 28;
    let ping = format!(
        "ping -c 1 -W 10 -s {size} {} && ping -c 1 -W 10 {}",
        b.ip(),
        ipv6(&b)
    );
    assert_eq!(ask.sh(&ping).code, 0);

    for gateway in [GATEWAY.to_owned(), format!("[{GATEWAY_6}]")] {
        let listener = TcpListener::bind(format!("{gateway}:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let served = thread::spawn(move || {
            let (mut caller, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            caller.read_to_end(&mut bytes).unwrap();
            write!(caller, "host {}", bytes.len()).unwrap();
        });
        let sent = probe.exec(&["/probe", "send", &address, &many]);
        assert_eq!(sent.text(), format!("host {many}\n"));
        served.join().unwrap();
        let echo = UdpSocket::bind(format!("{gateway}:0")).unwrap();
        let address = echo.local_addr().unwrap().to_string();
        let served = thread::spawn(move || {
            let mut data = [0; 100];
            let (length, from) = echo.recv_from(&mut data).unwrap();
            echo.send_to(&data[..length], from).unwrap();
        });
        assert_eq!(
            probe.exec(&["/probe", "datagram", &address, "echo"]).text(),
            "echo\n"
        );
        served.join().unwrap();
    }
}

/// Answers questions for IPv4 addresses with 192.0.2.7 and others with nothing (RFC 1035, 4.1), until a datagram
/// comes that is too short for a question.
fn serve_names(socket: &UdpSocket) {
    let mut data = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut data)
        && length > 12
    {
        let question = &data[12..length];
        let end = 1 + question.iter().position(|byte| *byte == 0).unwrap();
        let wanted = question[end..end + 2] == [0, 1];
        let mut answer = vec![
            data[0],
            data[1],
            0x81,
            0x80,
            0,
            1,
            0,
            u8::from(wanted),
            0,
            0,
            0,
            0,
        ];
        answer.extend_from_slice(&question[..end + 4]);
        if wanted {
            answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7]);
        }
        socket.send_to(&answer, from).unwrap();
    }
}

#[test]
fn names_are_resolved() {
    let test = pods("names");
    let socket = UdpSocket::bind((GATEWAY, 53)).unwrap();
    socket.set_read_timeout(Some(config().seconds(60))).unwrap();
    let server = thread::spawn(move || serve_names(&socket));
    let pod = test
        .pod("pod")
        .with(|config| {
            config.dns_config = Some(DnsConfig {
                servers: vec![GATEWAY.into()],
                ..Default::default()
            })
            .into();
        })
        .run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let seen = main.sh("nslookup web.cluster.example").text();
    assert!(seen.contains("192.0.2.7"), "{seen}");
    let stop = UdpSocket::bind((GATEWAY, 0)).unwrap();
    stop.send_to(b"stop", (GATEWAY, 53)).unwrap();
    server.join().unwrap();
}

#[test]
fn changes_after_the_start_reach_the_guest() {
    let test = pods("late");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let shim = pod.shim();
    for round in 1..=3 {
        run(
            "ip",
            &format!("link add late-host type veth peer name net1 netns /proc/{shim}/ns/net"),
        );
        run("ip", "address add 10.253.0.1/24 dev late-host");
        run("ip", "link set late-host up");
        in_pod(&pod, "ip address add 10.253.0.2/24 dev net1");
        in_pod(&pod, "ip link set net1 mtu 1400 up");
        in_pod(&pod, "ip route add 198.51.100.0/24 via 10.253.0.1");
        eventually(&main, "ip addr show net1", "10.253.0.2/24");
        eventually(&main, "ip route", "198.51.100.0/24 via 10.253.0.1 dev net1");
        eventually(&main, "ip link show net1", "mtu 1400");
        assert_eq!(main.sh("ping -c 1 -W 10 10.253.0.1").code, 0, "round {round}");
        // It grows beyond what it was made with.
        in_pod(&pod, "ip link set net1 mtu 1600");
        in_pod(&pod, "ip address add 10.253.0.3/24 dev net1");
        in_pod(&pod, "ip route del 198.51.100.0/24");
        eventually(&main, "ip link show net1", "mtu 1600");
        eventually(&main, "ip addr show net1", "10.253.0.3/24");
        eventually(&main, "ip route | grep -c 198.51.100 || true", "0");
        in_pod(&pod, "ip address del 10.253.0.3/24 dev net1");
        eventually(&main, "ip addr show net1 | grep -c 10.253.0.3 || true", "0");
        run("ip", "link delete late-host");
        eventually(&main, "ip link | grep -c net1 || true", "0");
    }
    // The first interface is as it was.
    assert_eq!(main.sh(&format!("ping -c 1 -W 10 {GATEWAY}")).code, 0);
}

#[test]
fn traffic_is_counted() {
    let test = pods("counters");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let counters = || {
        let network = pod.stats().network.unwrap_or_default();
        let eth0 = network.default_interface.unwrap_or_default();
        (eth0.name.clone(), eth0.rx_bytes.value, eth0.tx_bytes.value)
    };
    let (name, received, sent) = counters();
    assert_eq!(name, "eth0");
    assert_eq!(
        main.sh(&format!("ping -c 5 -i 0.1 -s 1000 -W 10 {GATEWAY}")).code,
        0
    );
    let grown = wait_until(soon(), || {
        let (_, now_received, now_sent) = counters();
        now_received >= received + 5000 && now_sent >= sent + 5000
    });
    assert!(grown, "{received} {sent} -> {:?}", counters());
}

#[test]
fn the_namespace_is_given_back_as_it_was() {
    let test = pods("given-back");
    let pod = test.pod("pod").run();
    let namespace = File::open(format!("/proc/{}/ns/net", pod.shim())).unwrap();
    let look = move || {
        let namespace = namespace.try_clone().unwrap();
        let looking = thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            (run("ip", "-o link"), run("tc", "qdisc show"))
        });
        looking.join().unwrap()
    };
    let (links, queues) = look();
    assert!(
        links.contains("bulkhead0") && queues.contains("ingress"),
        "{links}{queues}"
    );
    pod.stop().unwrap();
    pod.remove().unwrap();
    // What the plugin made has gone by its own DEL, what the sandbox made by the sandbox.
    let (mut links, mut queues) = look();
    let clean = wait_until(soon(), || {
        (links, queues) = look();
        !links.contains("bulkhead") && !links.contains("eth0") && !queues.contains("ingress")
    });
    assert!(clean, "{links}{queues}");
}
