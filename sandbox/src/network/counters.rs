//! Counters of the pod's interfaces.

use std::fs;

/// What an interface has carried, as the pod sees it: received is what came to the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Name.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Frames received.
    pub rx_packets: u64,
    /// Frames received with an error.
    pub rx_errors: u64,
    /// Frames dropped on arrival.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Frames that could not be sent.
    pub tx_errors: u64,
    /// Frames dropped before they were sent.
    pub tx_dropped: u64,
}

/// Counters of the interfaces in the process's network namespace, but for loopback and the sandbox's taps. They
/// count what the network plugin's interface carries on the host, which the guest cannot change.
#[must_use]
pub fn counters() -> Vec<Counters> {
    parse(&fs::read_to_string("/proc/self/net/dev").unwrap_or_default())
}

/// Columns as in proc_pid_net(5): bytes, packets, errs, drop, fifo, frame, compressed and multicast received; the
/// same first four sent.
fn parse(text: &str) -> Vec<Counters> {
    let line = |line: &str| {
        let (name, numbers) = line.split_once(':')?;
        let name = name.trim();
        if name == "lo" || name.starts_with(super::tap::PREFIX) {
            return None;
        }
        let numbers: Vec<u64> = numbers
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .ok()?;
        let at = |index: usize| numbers.get(index).copied().unwrap_or(0);
        Some(Counters {
            name: name.to_owned(),
            rx_bytes: at(0),
            rx_packets: at(1),
            rx_errors: at(2),
            rx_dropped: at(3),
            tx_bytes: at(8),
            tx_packets: at(9),
            tx_errors: at(10),
            tx_dropped: at(11),
        })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_interfaces_count() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n  \
            eth0:    1         2    3    4    5     6          7         8       9      10   11   12   13    14      15         16\n\
            bulkhead0: 9         9    9    9    9     9          9         9       9       9    9    9    9     9       9          9\n";
        let expected = Counters {
            name: "eth0".into(),
            rx_bytes: 1,
            rx_packets: 2,
            rx_errors: 3,
            rx_dropped: 4,
            tx_bytes: 9,
            tx_packets: 10,
            tx_errors: 11,
            tx_dropped: 12,
        };
        assert_eq!(parse(text), [expected]);
    }
}
