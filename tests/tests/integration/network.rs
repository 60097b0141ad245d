//! A network namespace that a CNI plugin has prepared.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::{Finished, Fixture, Run, Session, config};
use hmac_sha256::Hash;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::fixture;

mod queues;
mod vhost;

/// Where Debian has the plugins, and where others do.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

const BRIDGE: &str = "bulkhead0";

/// The bridge's addresses.
const HOST: &str = "10.213.7.1";
const HOST_6: &str = "fd13:213:7::1";

/// Namespaces with one interface each on a bridge, made by the real plugins.
struct Network<'a> {
    test: &'a Fixture,
    names: Vec<String>,
    /// `ip netns` mounts its directory when it makes the first namespace, and leaves it mounted.
    directory_is_ours: bool,
}

impl<'a> Network<'a> {
    fn new(test: &'a Fixture, count: usize) -> Self {
        let names = (0..count)
            .map(|number| test.id(&format!("net{number}")))
            .collect();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let network = Self {
            test,
            names,
            directory_is_ours: !mounts.contains(" /run/netns "),
        };
        for name in &network.names {
            shell(&format!("ip netns add {name}"));
            let _ = network.plugin("ADD", name).text();
        }
        network
    }

    fn plugin(&self, verb: &str, name: &str) -> Finished {
        let directory = PLUGINS
            .iter()
            .find(|path| Path::new(path).join("bridge").exists());
        let directory = directory.unwrap_or_else(|| panic!("no CNI plugins in {PLUGINS:?}"));
        let ranges = json!([[{ "subnet": "10.213.7.0/24" }], [{ "subnet": "fd13:213:7::/64" }]]);
        let configuration = json!({
            "cniVersion": "1.0.0", "name": "bulkhead-tests", "type": "bridge", "bridge": BRIDGE,
            "isGateway": true, "mtu": 1400,
            "ipam": {
                "type": "host-local", "dataDir": self.test.work.join("cni"), "ranges": ranges,
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            },
        });
        let mut command = Command::new(Path::new(directory).join("bridge"));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", name)
            .env("CNI_NETNS", format!("/run/netns/{name}"))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", directory);
        let mut session = Session::start(command, config().seconds(20));
        session.send(&configuration.to_string());
        session.close_input();
        session.finish()
    }

    /// A container in the namespace of this number.
    fn run(&self, number: usize, script: &str) -> Run<'a> {
        self.run_with(number, script, |_| ())
    }

    /// The same with a changed specification.
    fn run_with(&self, number: usize, script: &str, change: impl FnOnce(&mut Value)) -> Run<'a> {
        let path = format!("/run/netns/{}", self.names[number]);
        self.test
            .spec(&number.to_string(), &["/bin/sh", "-c", script], |mut spec| {
                let namespaces = spec.0["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.retain(|namespace| namespace["type"] != "network");
                namespaces.push(json!({ "type": "network", "path": path }));
                change(&mut spec.0);
                spec
            })
    }

    /// What a command says of the namespace of this number.
    fn host(&self, number: usize, line: &str) -> String {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("ip netns exec {} {line}", self.names[number])]);
        Session::start(command, config().seconds(20)).finish().text()
    }

    /// Takes everything away, and checks that the plugin finds it as it made it.
    fn remove(self) {
        for (number, name) in self.names.iter().enumerate() {
            let links = self.host(number, "ip -o link");
            assert_eq!(links.lines().count(), 2, "not only lo and eth0: {links}");
            let filters = self.host(number, "tc filter show dev eth0 ingress");
            assert_eq!(filters, "");
            let _ = self.plugin("DEL", name).text();
            let links = self.host(number, "ip -o link");
            assert_eq!(links.lines().count(), 1, "{links}");
            shell(&format!("ip netns del {name}"));
        }
        shell(&format!("ip link del {BRIDGE}"));
        if self.directory_is_ours {
            shell("umount /run/netns && rmdir /run/netns");
        }
    }
}

/// Text of the SHA-256 sum, as `sha256sum` prints it.
fn sum(bytes: &[u8]) -> String {
    Hash::hash(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Connects, as soon as somebody listens.
fn connect(address: &str) -> TcpStream {
    let deadline = Instant::now() + config().seconds(20);
    loop {
        match TcpStream::connect(address) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn accept_all(listener: &TcpListener) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(config().seconds(20))).unwrap();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_guest_has_the_interface_that_the_plugin_made() {
    let test = fixture("interface");
    let network = Network::new(&test, 1);
    let script = "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip -o addr show dev eth0 scope global; ip route; ip -6 route";
    let seen = network.run(0, script).finish().text();
    let host = network.host(0, "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu");
    assert!(
        host.ends_with("\n1400\n") && seen.starts_with(&host),
        "{host}{seen}"
    );
    for part in [
        " 10.213.7.2/24 ",
        " fd13:213:7::2/64 ",
        "default via 10.213.7.1 ",
        "default via fd13:213:7::1 ",
    ] {
        assert!(seen.contains(part), "no {part:?} in {seen}");
    }
    network.remove();
}

#[test]
fn streams_go_both_ways_between_containers_and_the_host() {
    exchange(&fixture("network"), &[]);
}

/// Sends streams between two containers and the host; the containers are run with `options`.
fn exchange(test: &Fixture, options: &[&str]) {
    let network = Network::new(test, 2);

    // Into the container: several megabytes, so that offloads and merged buffers have something to do.
    let server = network
        .run(
            0,
            "nc -l -p 7000 < /dev/null | sha256sum; nc -l -p 7001 < /dev/null",
        )
        .with(options)
        .start();
    let content: Vec<u8> = (0..4_u32 << 20)
        .map(|number| (number * 7 + (number >> 9)) as u8)
        .collect();
    let mut stream = connect("10.213.7.2:7000");
    stream.write_all(&content).unwrap();
    drop(stream);
    server.wait_for(&sum(&content));

    // Out of the container, by both families; then from one container to the other.
    let ipv4 = TcpListener::bind((HOST, 0)).unwrap();
    let ipv6 = TcpListener::bind((HOST_6, 0)).unwrap();
    let script = format!(
        "set -e; dd if=/dev/urandom of=/file bs=1M count=4 2>/dev/null; sha256sum /file; nc {HOST} {} < /file; \
         echo six | nc {HOST_6} {}; for i in 1 2 3 4 5 6 7 8 9; do echo neighbour | nc 10.213.7.2 7001 && break; sleep 1; done",
        ipv4.local_addr().unwrap().port(),
        ipv6.local_addr().unwrap().port(),
    );
    let client = network.run(1, &script).with(options).start();
    let bytes = accept_all(&ipv4);
    assert_eq!(bytes.len(), 4 << 20);
    client.wait_for(&sum(&bytes));
    assert_eq!(accept_all(&ipv6), b"six\n");
    server.wait_for("neighbour\n");
    let _ = client.finish().expect_code(0);
    let _ = server.finish().expect_code(0);
    network.remove();
    let _ = fs::remove_dir_all(test.work.join("cni"));
}

#[test]
fn a_namespace_serves_one_machine_and_is_released_when_the_shim_is_killed() {
    let test = fixture("taken");
    let network = Network::new(&test, 1);
    let id = network.run(0, "sleep 1000").detach();
    let other = test.id("other");
    // The same specification under another name.
    let spec = fs::read_to_string(test.work.join(format!("{id}.json"))).unwrap();
    let file = test.work.join("other.json");
    fs::write(&file, spec.replace(&id, &other)).unwrap();
    let mut command = test
        .containerd
        .ctr(&["run", "--rm", "--runtime", &config().runtime, "--config"]);
    command.arg(&file).arg(&other);
    let done = Session::start(command, config().seconds(30)).finish();
    let _ = done.expect_error(&["used by another virtual machine"]);
    // The first one's traffic still goes its way.
    let filters = network.host(0, "tc filter show dev eth0 ingress");
    assert!(filters.contains("Redirect"), "{filters}");

    let (shim, _) = test.task(&id).unwrap();
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    let gone = wait_until(config().seconds(10), || test.task(&id).is_none());
    assert!(gone, "{:?}", test.task(&id));
    // containerd shows no task without a shim, before it has run the shim's delete.
    let released = || network.host(0, "tc filter show dev eth0 ingress").is_empty();
    assert!(wait_until(config().seconds(10), released));
    let alone = || network.host(0, "ip -o link").lines().count() == 2;
    assert!(wait_until(config().seconds(10), alone));
    test.remove(&id);
    network.remove();
}
