//! A container's counters as containerd's metrics.

use bulkhead_sandbox::ContainerStats;
use bulkhead_sandbox::network::Counters;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};

/// Translates cgroup v2 counters. The network is the pod's, which its containers share.
#[must_use]
pub fn metrics(stats: &ContainerStats, network: &[Counters]) -> Metrics {
    let interfaces = network.iter().map(|counters| NetworkStat {
        name: counters.name.clone(),
        rx_bytes: counters.rx_bytes,
        rx_packets: counters.rx_packets,
        rx_errors: counters.rx_errors,
        rx_dropped: counters.rx_dropped,
        tx_bytes: counters.tx_bytes,
        tx_packets: counters.tx_packets,
        tx_errors: counters.tx_errors,
        tx_dropped: counters.tx_dropped,
        ..NetworkStat::default()
    });
    let cpu = |key: &str| stats.cpu.get(key).copied().unwrap_or(0);
    let memory = |key: &str| stats.memory_stat.get(key).copied().unwrap_or(0);
    let event = |key: &str| stats.memory_events.get(key).copied().unwrap_or(0);
    let entries = stats.io.iter().map(|line| IOEntry {
        major: line.major.into(),
        minor: line.minor.into(),
        rbytes: line.rbytes,
        wbytes: line.wbytes,
        rios: line.rios,
        wios: line.wios,
        ..IOEntry::default()
    });
    Metrics {
        pids: Some(PidsStat {
            current: stats.pids_current,
            limit: limit(stats.pids_max),
            ..Default::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: cpu("usage_usec"),
            user_usec: cpu("user_usec"),
            system_usec: cpu("system_usec"),
            nr_periods: cpu("nr_periods"),
            nr_throttled: cpu("nr_throttled"),
            throttled_usec: cpu("throttled_usec"),
            nr_bursts: cpu("nr_bursts"),
            burst_usec: cpu("burst_usec"),
            ..CPUStat::default()
        })
        .into(),
        memory: Some(MemoryStat {
            anon: memory("anon"),
            file: memory("file"),
            kernel_stack: memory("kernel_stack"),
            slab: memory("slab"),
            sock: memory("sock"),
            shmem: memory("shmem"),
            file_mapped: memory("file_mapped"),
            file_dirty: memory("file_dirty"),
            file_writeback: memory("file_writeback"),
            anon_thp: memory("anon_thp"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            slab_reclaimable: memory("slab_reclaimable"),
            slab_unreclaimable: memory("slab_unreclaimable"),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            workingset_refault: memory("workingset_refault_anon")
                .saturating_add(memory("workingset_refault_file")),
            workingset_activate: memory("workingset_activate_anon")
                .saturating_add(memory("workingset_activate_file")),
            workingset_nodereclaim: memory("workingset_nodereclaim"),
            pgrefill: memory("pgrefill"),
            pgscan: memory("pgscan"),
            pgsteal: memory("pgsteal"),
            pgactivate: memory("pgactivate"),
            pgdeactivate: memory("pgdeactivate"),
            pglazyfree: memory("pglazyfree"),
            pglazyfreed: memory("pglazyfreed"),
            thp_fault_alloc: memory("thp_fault_alloc"),
            thp_collapse_alloc: memory("thp_collapse_alloc"),
            usage: stats.memory_current,
            usage_limit: stats.memory_max,
            swap_usage: stats.swap_current,
            swap_limit: stats.swap_max,
            ..MemoryStat::default()
        })
        .into(),
        memory_events: Some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            oom_group_kill: event("oom_group_kill"),
            ..MemoryEvents::default()
        })
        .into(),
        io: Some(IOStat {
            usage: entries.collect(),
            ..IOStat::default()
        })
        .into(),
        network: interfaces.collect(),
        ..Metrics::default()
    }
}

/// containerd writes "no limit" on the number of processes as zero.
fn limit(value: u64) -> u64 {
    if value == u64::MAX { 0 } else { value }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashMap;

    use bulkhead_sandbox::IoStat;
    use proptest::collection::{hash_map, vec};
    use proptest::prelude::*;
    use protobuf::{Message, MessageDyn};

    use super::*;

    /// Names and values of a message's numbers.
    fn numbers(message: &dyn MessageDyn) -> HashMap<String, u64> {
        let descriptor = message.descriptor_dyn();
        let fields = descriptor.fields().filter(|field| field.is_singular());
        fields
            .map(|field| {
                let value = field.get_singular_field_or_default(message).to_u64().unwrap_or(0);
                (field.name().to_owned(), value)
            })
            .collect()
    }

    proptest! {
        /// An interface's counters arrive under its name, in their order.
        #[test]
        fn interfaces_arrive_in_containerd(list in vec(("[a-z0-9.@-]{1,15}", any::<[u64; 8]>()), 0..4)) {
            let counters: Vec<Counters> = list.iter().map(|(name, numbers)| {
                let [rx_bytes, rx_packets, rx_errors, rx_dropped, tx_bytes, tx_packets, tx_errors, tx_dropped] = *numbers;
                Counters {
                    name: name.clone(), rx_bytes, rx_packets, rx_errors, rx_dropped,
                    tx_bytes, tx_packets, tx_errors, tx_dropped,
                }
            }).collect();
            let bytes = metrics(&ContainerStats::default(), &counters).write_to_bytes().unwrap();
            let arrived: Vec<_> = Metrics::parse_from_bytes(&bytes).unwrap().network.into_iter().map(|one| (one.name, [
                one.rx_bytes, one.rx_packets, one.rx_errors, one.rx_dropped,
                one.tx_bytes, one.tx_packets, one.tx_errors, one.tx_dropped,
            ])).collect();
            prop_assert_eq!(arrived, list);
        }

        /// From the agent's message on its wire to containerd's on its own, every counter of a kernel's file arrives
        /// under its name.
        #[test]
        fn counters_arrive_in_containerd(
            cpu in hash_map("(usage|user|system|throttled|burst)_usec|nr_(periods|throttled|bursts)", any::<u64>(), 0..8),
            memory in hash_map("anon|file|slab|sock|shmem|pg(fault|scan|steal)|(in)?active_(anon|file)|thp_fault_alloc",
                any::<u64>(), 0..10),
            events in hash_map("low|high|max|oom|oom_kill|oom_group_kill", any::<u64>(), 0..6),
            singles in any::<[u64; 6]>(),
            io in vec(any::<([u32; 2], [u64; 4])>(), 0..3),
        ) {
            let [memory_current, memory_max, swap_current, swap_max, pids_current, pids_max] = singles;
            let io = io.into_iter().map(|([major, minor], [rbytes, wbytes, rios, wios])| {
                IoStat { major, minor, rbytes, wbytes, rios, wios, ..Default::default() }
            });
            let sent = ContainerStats {
                cpu, memory_stat: memory, memory_events: events, memory_current, memory_max, swap_current, swap_max,
                pids_current, pids_max, io: io.collect(), ..ContainerStats::default()
            };
            let stats = ContainerStats::parse_from_bytes(&sent.write_to_bytes().unwrap()).unwrap();
            prop_assert_eq!(&stats, &sent);
            let bytes = metrics(&stats, &[]).write_to_bytes().unwrap();
            let metrics = Metrics::parse_from_bytes(&bytes).unwrap();
            let groups: [(&dyn MessageDyn, _); 3] = [
                (&*metrics.cpu, &sent.cpu), (&*metrics.memory, &sent.memory_stat),
                (&*metrics.memory_events, &sent.memory_events),
            ];
            for (message, counters) in groups {
                let arrived = numbers(message);
                for (name, value) in counters {
                    prop_assert_eq!(arrived.get(name), Some(value), "{}", name);
                }
            }
            let memory = &metrics.memory;
            prop_assert_eq!([memory.usage, memory.usage_limit], [memory_current, memory_max]);
            prop_assert_eq!([memory.swap_usage, memory.swap_limit], [swap_current, swap_max]);
            prop_assert_eq!(metrics.pids.current, pids_current);
            prop_assert_eq!(metrics.io.usage.len(), sent.io.len());
            for (arrived, sent) in metrics.io.usage.iter().zip(&sent.io) {
                prop_assert_eq!([arrived.major, arrived.minor], [u64::from(sent.major), u64::from(sent.minor)]);
                prop_assert_eq!(
                    [arrived.rbytes, arrived.wbytes, arrived.rios, arrived.wios],
                    [sent.rbytes, sent.wbytes, sent.rios, sent.wios]
                );
            }
        }
    }

    #[test]
    fn counters_keep_their_meaning() {
        let stats = ContainerStats {
            cpu: HashMap::from([("usage_usec".into(), 7)]),
            memory_stat: HashMap::from([("anon".into(), 5), ("workingset_refault_file".into(), 2)]),
            memory_current: 10,
            memory_max: u64::MAX,
            memory_events: HashMap::from([("oom_kill".into(), 1)]),
            pids_current: 3,
            pids_max: u64::MAX,
            ..ContainerStats::default()
        };
        let eth0 = Counters {
            name: "eth0".into(),
            rx_bytes: 1,
            tx_dropped: 2,
            ..Counters::default()
        };
        let metrics = metrics(&stats, &[eth0]);
        let network = &metrics.network[0];
        assert_eq!(
            (network.name.as_str(), network.rx_bytes, network.tx_dropped),
            ("eth0", 1, 2)
        );
        assert_eq!(metrics.cpu.usage_usec, 7);
        assert_eq!((metrics.memory.anon, metrics.memory.usage), (5, 10));
        assert_eq!(metrics.memory.workingset_refault, 2);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 0));
        assert_eq!(metrics.memory_events.oom_kill, 1);
    }
}
