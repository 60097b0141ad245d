//! A container is in a VM of its own.

use std::collections::BTreeSet;
use std::fs;

use bulkhead_tests::{Finished, host};
use serde_json::Value;

use crate::fixture;

fn report(done: Finished) -> Value {
    serde_json::from_str(&done.text()).unwrap()
}

fn host_file(path: &str) -> String {
    fs::read_to_string(path).unwrap().trim().to_owned()
}

#[test]
fn the_kernel_is_the_guests() {
    let test = fixture("kernel");
    let report = report(test.probe("a", &["report"]).finish());
    assert_ne!(report["release"], host_file("/proc/sys/kernel/osrelease"));
    assert_ne!(report["boot_id"], host_file("/proc/sys/kernel/random/boot_id"));
    assert_eq!(
        report["processes"].as_object().unwrap().len(),
        1,
        "{}",
        report["processes"]
    );
    assert_eq!(report["links"], serde_json::json!(["lo"]));
    assert_eq!(report["cpus"], 1);
    // What a container of any runtime has in /dev, and none of the host's devices.
    let usual = [
        "console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
    ];
    let usual: BTreeSet<_> = usual
        .into_iter()
        .chain(["stdout", "tty", "urandom", "zero"])
        .collect();
    for device in report["devices"].as_array().unwrap() {
        assert!(usual.contains(device.as_str().unwrap()), "device {device}");
    }
}

#[test]
fn two_containers_are_two_vms() {
    let test = fixture("two-vms");
    let ids = ["a", "b"].map(|name| {
        test.run(name, bulkhead_tests::image::PROBE_IMAGE, &["sleep", "1000"])
            .detach()
    });
    let mut boots = BTreeSet::from([host_file("/proc/sys/kernel/random/boot_id")]);
    let mut vmms = BTreeSet::new();
    for id in &ids {
        let seen = report(test.ctr(&["tasks", "exec", "--exec-id", "x", id, "/probe", "report"]));
        assert!(
            boots.insert(seen["boot_id"].as_str().unwrap().to_owned()),
            "{id} shares a kernel"
        );
        // Its own two processes and no other: not the other container's, the agent's or the host's.
        let processes = seen["processes"].as_object().unwrap();
        let names: BTreeSet<_> = processes.values().map(|name| name.as_str().unwrap()).collect();
        assert_eq!((processes.len(), names), (2, BTreeSet::from(["probe", "sleep"])));
        let (shim, _) = test.task(id).unwrap();
        let found = host::vmms_of(shim);
        assert_eq!(found.len(), 1, "VMMs of {id}");
        vmms.extend(found);
    }
    assert_eq!(vmms.len(), 2);
    // A guest's process is no process of the host.
    assert!(
        !host::processes()
            .iter()
            .any(|process| process.command.starts_with("sleep 1000"))
    );
    ids.iter().for_each(|id| test.kill_and_remove(id));
}

#[test]
fn host_networking_is_refused() {
    let test = fixture("host-network");
    let refused = test.busybox("a", &["true"]).with(&["--net-host"]).finish();
    let _ = refused.expect_error(&["host network", "network namespace"]);
}
