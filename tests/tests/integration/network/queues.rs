//! Pairs of queues of a guest's interface.

use bulkhead_tests::host;

use super::vhost::{DEVICE, workers};
use super::*;

/// Streams in each direction at once.
const STREAMS: usize = 6;

/// Bytes of each.
const LENGTH: usize = 2 << 20;

/// Sends streams both ways at once between the guest at `address` and `listener`; the sums of what came out of the guest.
fn exchange_at_once(address: &str, listener: &TcpListener, content: &[u8]) -> Vec<String> {
    std::thread::scope(|scope| {
        let outgoing: Vec<_> = (0..STREAMS)
            .map(|_| scope.spawn(|| sum(&accept_all(listener))))
            .collect();
        for number in 0..STREAMS {
            let address = format!("{address}:{}", 7000 + number);
            scope.spawn(move || connect(&address).write_all(content).unwrap());
        }
        outgoing
            .into_iter()
            .map(|stream| stream.join().unwrap())
            .collect()
    })
}

#[test]
fn an_interface_has_a_pair_of_queues_for_each_processor() {
    let test = fixture("queues");
    let network = Network::new(&test, 3);
    let content: Vec<u8> = (0..LENGTH).map(|at| (at * 13 + (at >> 7)) as u8).collect();
    // One processor for good; two when the driver takes the interface at boot; a second one that comes to a running guest,
    // which could have more than there are pairs. How many pairs there are, and how many are on.
    let cases = [
        (json!({ "vcpus": 1, "max_vcpus": 1 }), 1, (1, 1)),
        (
            json!({ "vcpus": 2, "max_vcpus": 2, "templates": "off" }),
            2,
            (2, 2),
        ),
        (json!({ "vcpus": 1, "max_vcpus": 6 }), 2, (4, 2)),
    ];
    for (number, (changes, processors, (there, on))) in cases.iter().enumerate() {
        let changes: Vec<_> = changes
            .as_object()
            .unwrap()
            .iter()
            .map(|(key, value)| (key.as_str(), value.clone()))
            .collect();
        let settings = test.configuration(&changes);
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let streams = (0..STREAMS)
            .map(|number| {
                format!(
                    "nc -l -p {} < /dev/null | sha256sum > /came{number} & nc {HOST} {port} < /file & ",
                    7000 + number
                )
            })
            .collect::<String>();
        let script = format!(
            "set -e; echo /sys/class/net/eth0/queues/*; dd if=/dev/urandom of=/file bs={LENGTH} count=1 2>/dev/null; \
             sha256sum < /file; {streams} wait; cat /came*; echo exchanged; nc -l -p 7999 < /dev/null"
        );
        let guest = network
            .run_with(number, &script, |spec| {
                spec["linux"]["resources"]["cpu"] =
                    json!({ "quota": processors * 100_000, "period": 100_000 });
            })
            .with(&["--runtime-config-path", &settings])
            .start();
        let address = format!("10.213.7.{}", 2 + number);
        let sums = exchange_at_once(&address, &listener, &content);
        assert!(sums.iter().all(|other| *other == sums[0]), "{sums:?}");
        guest.wait_for("exchanged\n");

        // As the host's kernel sees it.
        let link = network.host(number, "ip -d link show bulkhead0");
        match there {
            1 => assert!(!link.contains("multi_queue"), "{link}"),
            _ => {
                let queues = format!("multi_queue numqueues {on} numdisabled {} ", there - on);
                assert!(link.contains(&queues), "no {queues:?} in {link}");
            }
        }
        let (shim, _) = test.task(&test.id(&number.to_string())).unwrap();
        let expected = if Path::new(DEVICE).exists() { *on } else { 0 };
        let workers = workers(host::vmms_of(shim)[0]);
        assert_eq!(workers.len(), expected, "{workers:?}");

        drop(connect(&format!("{address}:7999")));
        let text = guest.finish().text();
        let queues: Vec<_> = ["rx", "tx"]
            .iter()
            .flat_map(|kind| (0..*on).map(move |queue| format!("/sys/class/net/eth0/queues/{kind}-{queue}")))
            .collect();
        assert!(
            text.starts_with(&format!("{}\n{}  -\n", queues.join(" "), sums[0])),
            "{text}"
        );
        let incoming = format!("{}  -\n", sum(&content));
        assert_eq!(text.matches(&incoming).count(), STREAMS, "{text}");
    }
    network.remove();
    let _ = fs::remove_dir_all(test.work.join("cni"));
}
