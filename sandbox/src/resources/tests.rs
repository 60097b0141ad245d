#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const HOST: Host = Host {
    processors: 8,
    memory_mib: 16_384,
};

fn config() -> Configuration {
    Configuration {
        vcpus: 1,
        memory_mib: 256,
        overhead_memory_mib: 64,
        templates: Templates::Off,
        ..Configuration::default()
    }
}

fn resources(value: Value) -> LinuxResources {
    serde_json::from_value(value).unwrap()
}

fn demand(value: Value) -> Demand {
    let mut demand = Demand::default();
    demand.update(&resources(value));
    demand
}

fn limits(milli: i64, mib: i64) -> Value {
    json!({"cpu": {"quota": milli * 100, "period": 100_000}, "memory": {"limit": mib << 20}})
}

fn sandbox(annotations: Value) -> Option<Demand> {
    let spec = json!({"ociVersion": "1.1.0", "annotations": annotations});
    Demand::of_sandbox(&serde_json::from_value(spec).unwrap())
}

fn size(sizing: &Sizing) -> (u8, u32) {
    let Size { vcpus, memory_mib } = sizing.wanted();
    (vcpus, memory_mib)
}

#[test]
fn without_limits_the_configuration_counts() {
    let mut sizing = Sizing::new(&config(), HOST, None);
    assert_eq!(
        sizing.boot(),
        Size {
            vcpus: 1,
            memory_mib: 256
        }
    );
    assert_eq!((sizing.max_vcpus(), sizing.hotplug_mib()), (8, 16_128));
    sizing.add("a", demand(json!({})));
    sizing.add(
        "b",
        demand(json!({"memory": {"limit": -1}, "cpu": {"quota": -1}})),
    );
    assert_eq!(size(&sizing), (1, 256));
}

#[test]
fn a_pods_annotations_decide_the_start() {
    let containerd = sandbox(json!({
        "io.kubernetes.cri.sandbox-cpu-period": "100000",
        "io.kubernetes.cri.sandbox-cpu-quota": "250000",
        "io.kubernetes.cri.sandbox-cpu-shares": "512",
        "io.kubernetes.cri.sandbox-memory": "536870912",
    }));
    let crio = sandbox(json!({
        "io.kubernetes.cri-o.PodLinuxResources":
            "{\"cpu_period\":100000,\"cpu_quota\":250000,\"cpu_shares\":512,\"memory_limit_in_bytes\":536870912}",
    }));
    assert!(containerd.is_some());
    assert_eq!(containerd, crio);
    let mut sizing = Sizing::new(&config(), HOST, containerd);
    assert_eq!(
        sizing.boot(),
        Size {
            vcpus: 3,
            memory_mib: 512 + 16 + 64
        }
    );
    // Containers that the pod's size covers change nothing, with or without limits of their own.
    sizing.add("a", demand(limits(1500, 256)));
    sizing.add("b", demand(json!({})));
    assert_eq!(size(&sizing), (3, 592));
    sizing.add("late", demand(limits(2500, 512)));
    assert_eq!(size(&sizing), (4, 592 + 264));
    sizing.remove("late");
    assert_eq!(size(&sizing), (3, 592));
}

#[test]
fn annotations_that_say_nothing_are_none() {
    assert_eq!(sandbox(json!({})), None);
    for value in ["0", "-1", "x", ""] {
        let annotations = json!({
            "io.kubernetes.cri.sandbox-memory": value,
            "io.kubernetes.cri.sandbox-cpu-quota": value,
            "io.kubernetes.cri.sandbox-cpu-shares": "2",
        });
        assert_eq!(sandbox(annotations), None, "{value}");
    }
    assert_eq!(
        sandbox(json!({"io.kubernetes.cri-o.PodLinuxResources": "["})),
        None
    );
}

#[test]
fn containers_grow_the_vm_and_their_end_shrinks_it() {
    let mut sizing = Sizing::new(&config(), HOST, None);
    sizing.add("a", demand(limits(2000, 512)));
    assert_eq!(size(&sizing), (2, 592));
    sizing.add("b", demand(limits(500, 256)));
    assert_eq!(size(&sizing), (3, 768 + 24 + 64));
    // One without limits gets what a VM without limits has.
    sizing.add("c", demand(json!({"cpu": {"shares": 4096}})));
    assert_eq!(size(&sizing), (7, 856 + 256));
    sizing.remove("a");
    sizing.remove("c");
    assert_eq!(size(&sizing), (1, 256 + 8 + 64));
    sizing.remove("b");
    assert_eq!(size(&sizing), (1, 256));
}

#[test]
fn an_update_makes_the_pods_start_void() {
    let pod = Some(demand(limits(4000, 1024)));
    let mut sizing = Sizing::new(&config(), HOST, pod);
    let boot = sizing.boot();
    assert_eq!(boot.vcpus, 4);
    sizing.add("a", demand(limits(4000, 1024)));
    sizing.update("a", &resources(limits(1000, 512)));
    // Memory of the start cannot be taken out; it goes back as free pages.
    assert_eq!(sizing.wanted(), Size { vcpus: 1, ..boot });
    sizing.update("a", &resources(json!({"memory": {"limit": 2048i64 << 20}})));
    assert_eq!(size(&sizing), (1, boot.memory_mib + 1056));
    sizing.update("a", &resources(json!({"cpu": {"quota": 600_000}})));
    assert_eq!(size(&sizing).0, 6);
    sizing.update("unknown", &resources(limits(8000, 4096)));
    assert_eq!(size(&sizing).0, 6);
    sizing.update_pod(&resources(limits(8000, 64)));
    assert_eq!(size(&sizing).0, 8);
}

#[test]
fn the_host_and_the_configuration_are_bounds() {
    let sizing = Sizing::new(&config(), HOST, Some(demand(limits(100_000, 1 << 30))));
    assert_eq!(
        sizing.boot(),
        Size {
            vcpus: 8,
            memory_mib: 16_384
        }
    );
    assert_eq!(sizing.hotplug_mib(), 0);
    let bounded = Configuration {
        max_vcpus: Some(2),
        max_memory_mib: Some(600),
        ..config()
    };
    let mut sizing = Sizing::new(&bounded, HOST, None);
    assert_eq!((sizing.max_vcpus(), sizing.hotplug_mib()), (2, 256));
    sizing.add("a", demand(limits(5000, 5000)));
    assert_eq!(size(&sizing), (2, 512));
    let many = Host {
        processors: 64,
        ..HOST
    };
    assert_eq!(Sizing::new(&config(), many, None).max_vcpus(), 8);
    assert_eq!(
        Sizing::new(&config(), many, Some(demand(limits(20_000, 64)))).max_vcpus(),
        20
    );
}

#[test]
fn huge_pages_come_on_top() {
    let mut sizing = Sizing::new(&config(), HOST, None);
    let mut value = limits(1000, 512);
    value["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": 128 << 20}]);
    sizing.add("a", demand(value));
    assert_eq!(size(&sizing), (1, 640 + 20 + 64));
}

#[test]
fn the_pods_cgroup_gets_the_sum() {
    let mut sizing = Sizing::new(&config(), HOST, None);
    let first = json!({"cpu": {"quota": 50_000, "shares": 512, "cpus": "2-3", "mems": "0"}, "memory": {"limit": 1 << 26}, "blockIO": {"weight": 300}});
    let second = json!({"cpu": {"quota": 150_000, "shares": 1024, "cpus": "3,6", "mems": "0-1"}, "blockIO": {"weight": 100}});
    sizing.add("a", demand(first));
    sizing.add("b", demand(second));
    let limits = sizing.host_limits(128);
    let guest = 256 + 128;
    assert_eq!(limits.memory_max, None, "one has no limit");
    sizing.update(
        "b",
        &serde_json::from_value(json!({"memory": {"limit": 1 << 26}})).unwrap(),
    );
    let limits = sizing.host_limits(128);
    assert_eq!(limits.memory_max, Some((guest + guest / 32 + 128) << 20));
    assert_eq!((limits.cpu_milli, limits.cpu_shares), (Some(2100), Some(1536)));
    assert_eq!(
        (limits.cpus.as_deref(), limits.mems.as_deref()),
        (Some("2,3,6"), Some("0,1"))
    );
    assert_eq!(limits.io_weight, Some(300));
    // One without limits takes them off the pod.
    sizing.add("c", demand(json!({})));
    let limits = sizing.host_limits(0);
    assert_eq!((limits.cpu_milli, limits.cpus, limits.mems), (None, None, None));
    assert_eq!(limits.cpu_shares, Some(1536));
}

#[test]
fn processors_of_the_host_become_the_guests() {
    let mut sizing = Sizing::new(&config(), HOST, None);
    sizing.add("a", demand(json!({"cpu": {"cpus": "2-3", "quota": 200_000}})));
    assert_eq!(sizing.guest_cpus("a").as_deref(), Some("0,1"));
    sizing.add("b", demand(json!({"cpu": {"cpus": "1,4", "quota": 200_000}})));
    assert_eq!(sizing.guest_cpus("a").as_deref(), Some("1,2"));
    assert_eq!(sizing.guest_cpus("b").as_deref(), Some("0,3"));
    sizing.add("c", demand(json!({})));
    assert_eq!(sizing.guest_cpus("c"), None);
    // The host's shared pool is larger than the VM.
    sizing.add("d", demand(json!({"cpu": {"cpus": "8-63"}})));
    assert_eq!(sizing.guest_cpus("a").as_deref(), Some("0,1,2,3,4"));
    assert_eq!(sizing.pinned().len(), 3);
}

#[test]
fn lists_that_are_none_name_nothing() {
    assert_eq!(parse_list("0-1,4"), Some(BTreeSet::from([0, 1, 4])));
    for text in ["", "x", "1-", "-1", "2-0", "0-70000"] {
        assert_eq!(parse_list(text), None, "{text}");
    }
}

proptest! {
    /// Whatever is asked for, the size is one the VM can have, and memory is added in whole steps.
    #[test]
    fn sizes_are_possible(
        pod in proptest::option::of((any::<i64>(), any::<i64>())),
        containers in proptest::collection::vec((any::<i64>(), any::<i64>(), any::<u64>()), 0..5),
    ) {
        let pod = pod.map(|(quota, memory)| demand(json!({"cpu": {"quota": quota}, "memory": {"limit": memory}})));
        let mut sizing = Sizing::new(&config(), HOST, pod);
        for (index, (quota, memory, shares)) in containers.into_iter().enumerate() {
            let value = json!({"cpu": {"quota": quota, "shares": shares}, "memory": {"limit": memory}});
            sizing.add(&index.to_string(), demand(value));
            let size = sizing.wanted();
            prop_assert!((1..=sizing.max_vcpus()).contains(&size.vcpus));
            let added = size.memory_mib.checked_sub(sizing.boot().memory_mib).unwrap();
            prop_assert!(added <= sizing.hotplug_mib() && added.is_multiple_of(STEP_MIB));
            prop_assert!(sizing.host_limits(added).memory_max.is_none_or(|bytes| bytes > 0));
        }
    }

    /// A pod's limits are the same by containerd's annotations, by CRI-O's, and by the resources of a specification.
    #[test]
    fn three_ways_to_say_it_mean_the_same(quota in any::<i64>(), period in 0..i64::MAX, shares in 0..i64::MAX, memory in any::<i64>()) {
        let by_containerd = sandbox(json!({
            "io.kubernetes.cri.sandbox-cpu-quota": quota.to_string(),
            "io.kubernetes.cri.sandbox-cpu-period": period.to_string(),
            "io.kubernetes.cri.sandbox-cpu-shares": shares.to_string(),
            "io.kubernetes.cri.sandbox-memory": memory.to_string(),
        }));
        let by_crio = sandbox(json!({"io.kubernetes.cri-o.PodLinuxResources": json!({
            "cpu_quota": quota, "cpu_period": period, "cpu_shares": shares, "memory_limit_in_bytes": memory,
        }).to_string()}));
        prop_assert_eq!(&by_containerd, &by_crio);
        let by_spec = demand(json!({
            "cpu": {"quota": quota, "period": period, "shares": shares}, "memory": {"limit": memory},
        }));
        match by_containerd {
            Some(told) => prop_assert_eq!(told, by_spec),
            None => prop_assert!(by_spec.quota.is_none() && by_spec.memory.is_none()),
        }
    }

    /// Lists of processors survive: the kernel's form, ours, and back.
    #[test]
    fn lists_of_processors_survive(ranges in proptest::collection::vec((0u16..500, 0u16..20), 1..6)) {
        let text: Vec<_> = ranges.iter().map(|(first, more)| format!("{first}-{}", first + more)).collect();
        let named: BTreeSet<u16> = ranges.iter().flat_map(|(first, more)| *first..=first + more).collect();
        let read = parse_list(&text.join(","));
        prop_assert_eq!(read.as_ref(), Some(&named));
        prop_assert_eq!(parse_list(&list(&named)), Some(named));
    }
}

#[test]
fn a_vm_from_a_template_starts_small_and_grows_to_what_it_would_have_had() {
    let templated = Configuration {
        templates: Templates::Shared,
        ..config()
    };
    let boot = |vcpus, memory_mib| Size { vcpus, memory_mib };
    // By default it is the same.
    assert_eq!(Sizing::new(&templated, HOST, None).boot(), boot(1, 256));
    for (milli, mib, expected) in [
        (3000, 2048, boot(1, 256)),
        (500, 64, boot(1, 192)),
        (500, 1, boot(1, 128)),
        (1000, 200, boot(1, 256)),
    ] {
        let pod = demand(limits(milli, mib));
        let mut sizing = Sizing::new(&templated, HOST, Some(pod.clone()));
        assert_eq!(sizing.boot(), expected);
        let whole = Sizing::new(&config(), HOST, Some(pod.clone()));
        sizing.add("a", pod);
        let wanted = sizing.wanted();
        assert_eq!(wanted.vcpus, whole.boot().vcpus);
        assert!(
            wanted.memory_mib >= whole.boot().memory_mib,
            "{wanted:?} {:?}",
            whole.boot()
        );
        assert!(wanted.memory_mib < whole.boot().memory_mib + 64);
    }
}
