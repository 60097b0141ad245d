//! OCI resources, which speak cgroup v1, as files of cgroup v2.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::CgroupError;

/// A value to write into a file of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// File name.
    pub file: String,
    /// Text to write.
    pub value: String,
    /// The file or the device it names may be missing in the guest: then the setting is skipped.
    pub optional: bool,
}

/// Bounds of `cpu.weight` and `cpu.shares`.
const WEIGHTS: (u64, u64) = (1, 10_000);
const SHARES: (u64, u64) = (2, 262_144);

/// Default of `cpu.max`'s period in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

const MAX: &str = "max";

/// The settings for all limits that are given, in the order to write them.
///
/// # Errors
/// A value makes no sense.
pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, CgroupError> {
    let mut list = List::default();
    if let Some(cpu) = resources.cpu() {
        list.cpu(cpu)?;
    }
    if let Some(memory) = resources.memory() {
        list.memory(memory)?;
    }
    if let Some(pids) = resources.pids() {
        // Zero is how Go writes an absent limit.
        list.add("pids.max", limit(pids.limit().max(0), 0));
    }
    if let Some(io) = resources.block_io() {
        list.io(io)?;
    }
    for hugepages in resources.hugepage_limits().iter().flatten() {
        let size = file_name("hugepageLimits.pageSize", hugepages.page_size())?;
        list.optional(format!("hugetlb.{size}.max"), limit(hugepages.limit(), -1));
    }
    let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
    unified.sort();
    for (file, value) in unified {
        list.add(file_name("unified", file)?, value.clone());
    }
    Ok(list.0)
}

/// A number, or `max` if it is not above `none`.
fn limit(value: i64, none: i64) -> String {
    if value <= none {
        MAX.into()
    } else {
        value.to_string()
    }
}

/// A name that stays in its directory.
fn file_name<'a>(field: &'static str, name: &'a str) -> Result<&'a str, CgroupError> {
    let plain = !name.is_empty() && !name.starts_with('.') && !name.contains(['/', '\0']);
    if plain {
        Ok(name)
    } else {
        Err(invalid(field, name))
    }
}

fn invalid(field: &'static str, value: impl ToString) -> CgroupError {
    CgroupError::Invalid {
        field,
        value: value.to_string(),
    }
}

/// `cpu.shares` to `cpu.weight`: the line through the ends of both ranges, as runc and systemd draw it.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(SHARES.0, SHARES.1);
    WEIGHTS.0 + (shares - SHARES.0) * (WEIGHTS.1 - WEIGHTS.0) / (SHARES.1 - SHARES.0)
}

/// `blkio.weight` (10 to 1000) to `io.weight` (1 to 10000).
fn weight_of_io(weight: u16) -> u64 {
    let weight = u64::from(weight.clamp(10, 1000));
    1 + (weight - 10) * 9999 / 990
}

#[derive(Default)]
struct List(Vec<Setting>);

impl List {
    fn add(&mut self, file: &str, value: String) {
        self.0.push(Setting {
            file: file.into(),
            value,
            optional: false,
        });
    }

    fn optional(&mut self, file: String, value: String) {
        self.0.push(Setting {
            file,
            value,
            optional: true,
        });
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), CgroupError> {
        // Zero is how Go writes absent numbers.
        if let Some(shares @ 1..) = cpu.shares() {
            self.add("cpu.weight", weight_of_shares(shares).to_string());
        }
        let quota = cpu.quota().filter(|quota| *quota != 0);
        let period = cpu.period().filter(|period| *period != 0);
        if quota.is_some() || period.is_some() {
            let quota = match quota {
                Some(quota) => limit(quota, -1),
                None => MAX.into(),
            };
            self.add("cpu.max", format!("{quota} {}", period.unwrap_or(DEFAULT_PERIOD)));
        }
        if let Some(burst) = cpu.burst() {
            self.add("cpu.max.burst", burst.to_string());
        }
        if let Some(idle) = cpu.idle() {
            if !matches!(idle, 0 | 1) {
                return Err(invalid("cpu.idle", idle));
            }
            self.add("cpu.idle", idle.to_string());
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                self.add(file, list.into());
            }
        }
        Ok(())
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), CgroupError> {
        // Zero is how Go writes absent numbers.
        let given = |value: Option<i64>| value.filter(|value| *value != 0);
        let (bound, swap) = (given(memory.limit()), given(memory.swap()));
        if let Some(total) = swap {
            // The OCI value counts memory and swap together, `memory.swap.max` swap alone.
            let value = match (total, bound) {
                (..0, _) => MAX.into(),
                (_, Some(bound @ 1..)) if total >= bound => (total - bound).to_string(),
                (_, Some(1..)) => {
                    return Err(invalid("memory.swap", format!("{total}, less than memory.limit")));
                }
                _ => return Err(invalid("memory.swap", format!("{total} without memory.limit"))),
            };
            // A guest without swap support has no such file.
            self.optional("memory.swap.max".into(), value);
        } else if bound.is_some_and(|bound| bound < 0) {
            self.optional("memory.swap.max".into(), MAX.into());
        }
        if let Some(low) = given(memory.reservation()) {
            self.add("memory.low", limit(low, -1));
        }
        if let Some(bound) = bound {
            self.add("memory.max", limit(bound, -1));
        }
        Ok(())
    }

    fn io(&mut self, io: &LinuxBlockIo) -> Result<(), CgroupError> {
        if let Some(weight @ 1..) = io.weight() {
            self.optional("io.weight".into(), weight_of_io(weight).to_string());
        }
        let kinds: [(&str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
            ("rbps", io.throttle_read_bps_device()),
            ("wbps", io.throttle_write_bps_device()),
            ("riops", io.throttle_read_iops_device()),
            ("wiops", io.throttle_write_iops_device()),
        ];
        for (key, devices) in kinds {
            for device in devices.iter().flatten() {
                let (major, minor) = (device.major(), device.minor());
                if major < 0 || minor < 0 {
                    return Err(invalid("blockIO device", format!("{major}:{minor}")));
                }
                // A device of the host has another number in the guest, or none.
                self.optional(
                    "io.max".into(),
                    format!("{major}:{minor} {key}={}", limit_u64(device.rate())),
                );
            }
        }
        Ok(())
    }
}

fn limit_u64(rate: u64) -> String {
    if rate == 0 { MAX.into() } else { rate.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        settings(&resources)
            .map(|list| list.into_iter().map(|s| (s.file, s.value)).collect())
            .map_err(|error| error.to_string())
    }

    fn pairs(list: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
        Ok(list
            .iter()
            .map(|(file, value)| ((*file).into(), (*value).into()))
            .collect())
    }

    #[test]
    fn absent_limits_are_left_alone() {
        assert_eq!(of("{}"), pairs(&[]));
        assert_eq!(
            of(r#"{"memory":{},"cpu":{"shares":0,"quota":0,"period":0}}"#),
            pairs(&[])
        );
    }

    #[test]
    fn a_pods_limits() {
        let json = r#"{"memory":{"limit":134217728,"swap":134217728},"cpu":{"shares":512,"quota":50000,"period":100000},
            "pids":{"limit":100},"unified":{"memory.high":"1000"}}"#;
        let expected = [
            ("cpu.weight", "20"),
            ("cpu.max", "50000 100000"),
            ("memory.swap.max", "0"),
            ("memory.max", "134217728"),
            ("pids.max", "100"),
            ("memory.high", "1000"),
        ];
        assert_eq!(of(json), pairs(&expected));
    }

    #[test]
    fn minus_one_lifts_limits() {
        let json = r#"{"memory":{"limit":-1},"cpu":{"quota":-1},"pids":{"limit":-1}}"#;
        let expected = [
            ("cpu.max", "max 100000"),
            ("memory.swap.max", "max"),
            ("memory.max", "max"),
            ("pids.max", "max"),
        ];
        assert_eq!(of(json), pairs(&expected));
    }

    #[test]
    fn nonsense_is_refused() {
        for (json, error) in [
            (
                r#"{"memory":{"limit":10,"swap":5}}"#,
                "invalid memory.swap: 5, less than memory.limit",
            ),
            (
                r#"{"memory":{"swap":5}}"#,
                "invalid memory.swap: 5 without memory.limit",
            ),
            (r#"{"cpu":{"idle":2}}"#, "invalid cpu.idle: 2"),
            (r#"{"unified":{"../x":"1"}}"#, "invalid unified: ../x"),
            (r#"{"unified":{"a/b":"1"}}"#, "invalid unified: a/b"),
        ] {
            assert_eq!(of(json), Err(error.into()));
        }
    }

    #[test]
    fn throttling_names_device_and_rate() {
        let json = r#"{"blockIO":{"weight":1000,"throttleReadBpsDevice":[{"major":8,"minor":1,"rate":5}],
            "throttleWriteIOPSDevice":[{"major":8,"minor":1,"rate":7}]}}"#;
        assert_eq!(
            of(json),
            pairs(&[
                ("io.weight", "10000"),
                ("io.max", "8:1 rbps=5"),
                ("io.max", "8:1 wiops=7")
            ])
        );
    }

    #[test]
    fn shares_at_the_ends() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(weight_of_shares),
            [1, 1, 39, 10_000, 10_000]
        );
    }

    proptest! {
        #[test]
        fn weights_are_in_range_and_keep_order(a in any::<u64>(), b in any::<u64>(), io in any::<u16>()) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(weight_of_shares(low) <= weight_of_shares(high));
            prop_assert!((1..=10_000).contains(&weight_of_shares(a)));
            prop_assert!((1..=10_000).contains(&weight_of_io(io)));
        }

        #[test]
        fn swap_is_never_negative(limit in any::<i64>(), swap in any::<i64>()) {
            let json = format!(r#"{{"memory":{{"limit":{limit},"swap":{swap}}}}}"#);
            if let Ok(list) = of(&json) {
                prop_assert!(list.iter().all(|(_, value)| !value.starts_with('-')));
            }
        }
    }
}
