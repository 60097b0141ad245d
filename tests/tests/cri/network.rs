//! The pod's network: pods, host and the host's ports.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use bulkhead_tests::cri::api::PortMapping;
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::{NGINX_IMAGE, NGINX_PAGE};
use bulkhead_tests::settings::GATEWAY;
use bulkhead_tests::{Container, Pod, config};

use crate::pods;

/// The body of the page that a server gives; `None` if there is no answer.
fn page(address: &str) -> Option<String> {
    let limit = config().seconds(5);
    let mut stream = TcpStream::connect_timeout(&address.parse().ok()?, limit).ok()?;
    stream.set_read_timeout(Some(limit)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

/// A container that serves a page on port 80: nginx where the host has it, busybox otherwise.
fn server<'a>(pod: &'a Pod<'_>) -> Container<'a> {
    if pod.has_image(NGINX_IMAGE) {
        return pod.container_of(NGINX_IMAGE, "server", &[]).start();
    }
    let script = format!("mkdir /srv; printf '{NGINX_PAGE}' > /srv/index.html; exec httpd -f -h /srv");
    pod.container("server", &["sh", "-c", &script]).start()
}

#[test]
fn the_host_and_pods_reach_a_server_of_a_pod() {
    let test = pods("server");
    let pod = test.pod("server").run();
    let server = server(&pod);
    let address = format!("{}:80", pod.ip());
    let answered = wait_until(config().seconds(20), || {
        page(&address).as_deref() == Some(NGINX_PAGE)
    });
    assert!(answered, "no page from {address}: {:?}", server.log());
    // Inside the pod on its own address and on localhost.
    let beside = pod.container("beside", &["sleep", "1000"]).start();
    assert_eq!(beside.sh("wget -qO- http://127.0.0.1/").text(), NGINX_PAGE);

    let other = test.pod("client").run();
    let client = other.container("client", &["sleep", "1000"]).start();
    let get = format!("wget -T 5 -qO- http://{}/", pod.ip());
    assert_eq!(client.sh(&get).text(), NGINX_PAGE);
    assert_ne!(pod.ip(), other.ip());
    assert_eq!(client.sh(&format!("ping -c 1 -W 5 {GATEWAY}")).code, 0);
    let route = client.sh("ip route").text();
    assert!(
        route.contains(&format!("default via {GATEWAY} dev eth0")),
        "{route}"
    );
}

#[test]
fn a_host_port_leads_to_the_pod() {
    let test = pods("host-port");
    let pod = test
        .pod("pod")
        .with(|config| {
            config.port_mappings = vec![PortMapping {
                container_port: 80,
                host_port: 12000,
                ..Default::default()
            }];
        })
        .run();
    let server = server(&pod);
    let address = format!("{GATEWAY}:12000");
    let answered = wait_until(config().seconds(20), || {
        page(&address).as_deref() == Some(NGINX_PAGE)
    });
    assert!(answered, "no page from {address}: {:?}", server.log());
    pod.stop().unwrap();
    let gone = wait_until(Duration::from_secs(10), || page(&address).is_none());
    assert!(gone, "the port is still mapped");
}
