//! Servers that listen on the pod's localhost only, reached from the host.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use bulkhead_tests::{Container, Pod, config};
use nix::sched::{CloneFlags, setns};

use crate::pods;

/// What containerd does to forward a port: dials from inside the pod's namespace.
fn dial(pod: &Pod<'_>, address: &str) -> std::io::Result<TcpStream> {
    let namespace = File::open(format!("/proc/{}/ns/net", pod.shim())).unwrap();
    let address: SocketAddr = address.parse().unwrap();
    let dialling = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(config().seconds(30)))?;
        Ok(stream)
    });
    dialling.join().unwrap()
}

/// Waits until the server in a container listens.
fn listening(container: Container<'_>) -> Container<'_> {
    container.wait_for_log("listening");
    container
}

#[test]
fn a_server_on_the_pods_localhost_is_reached() {
    let test = pods("localhost");
    let pod = test.pod("pod").run();
    let _v4 = listening(pod.probe("v4", &["count", "127.0.0.1:8080"]).start());
    let _v6 = listening(pod.probe("v6", &["count", "[::1]:8081"]).start());
    // Each direction ends by itself; who dials one family's loopback means "localhost".
    for address in ["127.0.0.1:8080", "[::1]:8080", "127.0.0.1:8081", "[::1]:8081"] {
        let mut stream = dial(&pod, address).unwrap();
        stream.write_all(&[1; 300_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "300000 bytes", "{address}");
    }
    let mut refused = dial(&pod, "127.0.0.1:8082").unwrap();
    let error = refused.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // The pod's own address is not taken over.
    let other = dial(&pod, &format!("{}:8080", pod.ip()));
    assert_eq!(other.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}
