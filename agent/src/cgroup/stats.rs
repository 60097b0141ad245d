//! What a container uses.

use std::fs;

use bulkhead_protocol::agent as proto;

use super::{Cgroup, CgroupError};
use crate::error::failed;

/// Keys and numbers of a flat-keyed file.
pub type KeyValues = Vec<(String, u64)>;

/// Parses a flat-keyed file: one `key number` per line. Other lines are skipped.
pub fn key_values(text: &str) -> KeyValues {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// A limit file: a number or `max`, which is [`u64::MAX`].
fn limit(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        number => number.parse().unwrap_or(0),
    }
}

/// One line of `io.stat`: `8:0 rbytes=1 wbytes=2 …`.
fn io_stat(line: &str) -> Option<proto::IoStat> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stat = proto::IoStat {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..Default::default()
    };
    for (key, value) in counters.split(' ').filter_map(|pair| pair.split_once('=')) {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => stat.rbytes = value,
            "wbytes" => stat.wbytes = value,
            "rios" => stat.rios = value,
            "wios" => stat.wios = value,
            _ => (),
        }
    }
    Some(stat)
}

/// Reads a container's counters.
#[derive(Clone, Copy, Debug)]
pub struct Stats;

impl Stats {
    /// The files of a group. A controller that the kernel lacks leaves its fields at zero.
    ///
    /// # Errors
    /// The group does not exist.
    pub fn read(cgroup: &Cgroup) -> Result<proto::ContainerStatsResponse, CgroupError> {
        let path = cgroup.file("cpu.stat");
        let cpu = fs::read_to_string(&path).map_err(failed("read", &path))?;
        let text = |name: &str| fs::read_to_string(cgroup.file(name)).unwrap_or_default();
        let map = |name: &str| key_values(&text(name)).into_iter().collect();
        Ok(proto::ContainerStatsResponse {
            cpu: key_values(&cpu).into_iter().collect(),
            memory_stat: map("memory.stat"),
            memory_current: limit(&text("memory.current")),
            memory_max: limit(&text("memory.max")),
            swap_current: limit(&text("memory.swap.current")),
            swap_max: limit(&text("memory.swap.max")),
            memory_events: map("memory.events"),
            pids_current: limit(&text("pids.current")),
            pids_max: limit(&text("pids.max")),
            io: text("io.stat").lines().filter_map(io_stat).collect(),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn io_line() {
        let stat = io_stat("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=9 dios=9").unwrap_or_default();
        assert_eq!((stat.major, stat.minor), (254, 16));
        assert_eq!((stat.rbytes, stat.wbytes, stat.rios, stat.wios), (4096, 1, 2, 3));
        assert_eq!(io_stat("254:16"), None);
    }

    #[test]
    fn keys_and_limits() {
        assert_eq!(key_values("a 1\nb x\nc 3\n"), [("a".into(), 1), ("c".into(), 3)]);
        assert_eq!([limit("max\n"), limit("12\n"), limit("")], [u64::MAX, 12, 0]);
    }

    proptest! {
        #[test]
        fn any_text_parses(text in "\\PC{0,60}") {
            key_values(&text);
            io_stat(&text);
            limit(&text);
        }

        /// What the kernel writes into its files is what is read.
        #[test]
        fn counters_of_the_kernel_are_read(
            keys in prop::collection::btree_map("[a-z_]{1,12}", any::<u64>(), 0..9),
            devices in prop::collection::vec((any::<[u32; 2]>(), any::<[u64; 6]>()), 0..4),
            most in prop::option::of(0..u64::MAX),
        ) {
            let text: String = keys.iter().map(|(key, value)| format!("{key} {value}\n")).collect();
            prop_assert_eq!(key_values(&text), keys.into_iter().collect::<Vec<_>>());
            let text: String = devices.iter().map(|([major, minor], [a, b, c, d, e, f])| {
                format!("{major}:{minor} rbytes={a} wbytes={b} rios={c} wios={d} dbytes={e} dios={f}\n")
            }).collect();
            let read: Vec<_> = text.lines().filter_map(io_stat).collect();
            prop_assert_eq!(read.len(), devices.len());
            for (stat, ([major, minor], [a, b, c, d, ..])) in read.iter().zip(devices) {
                prop_assert_eq!((stat.major, stat.minor), (major, minor));
                prop_assert_eq!([stat.rbytes, stat.wbytes, stat.rios, stat.wios], [a, b, c, d]);
            }
            let text = most.map_or_else(|| "max\n".to_owned(), |most| format!("{most}\n"));
            prop_assert_eq!(limit(&text), most.unwrap_or(u64::MAX));
        }
    }
}
