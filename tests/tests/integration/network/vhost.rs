//! Who serves the rings of a guest's network device: the host's kernel, or the VMM.

use std::path::PathBuf;

use bulkhead_tests::host;

use super::*;

pub const DEVICE: &str = "/dev/vhost-net";

/// Whether the VMM has the kernel serve its network.
fn holds_device(vmm: i32) -> bool {
    let files = fs::read_dir(format!("/proc/{vmm}/fd")).unwrap();
    files
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .any(|target| target.ends_with("vhost-net"))
}

/// What `/proc` has of the kernel's workers for a VMM: since Linux 6.4 they are threads of it, before kernel threads. They
/// are named after the thread that has asked for them, which is the VMM's first.
pub fn workers(vmm: i32) -> Vec<PathBuf> {
    let name = format!("vhost-{vmm}");
    let threads = fs::read_dir(format!("/proc/{vmm}/task")).unwrap();
    let processes = fs::read_dir("/proc").unwrap();
    threads
        .chain(processes)
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name))
        .collect()
}

#[test]
fn the_kernel_carries_frames_where_it_can_and_may() {
    let test = fixture("vhost");
    let network = Network::new(&test, 3);
    let there = Path::new(DEVICE).exists();
    println!("{DEVICE} is there: {there}");
    // A wire that comes to a running guest, one that is there from the start, and one without the kernel's help.
    let cases = [
        (json!({}), there),
        (json!({ "templates": "off" }), there),
        (json!({ "vhost_net": false }), false),
    ];
    for (number, (changes, expected)) in cases.iter().enumerate() {
        let changes: Vec<_> = changes.as_object().unwrap().iter().collect();
        let changes: Vec<_> = changes
            .into_iter()
            .map(|(key, value)| (key.as_str(), value.clone()))
            .collect();
        let settings = test.configuration(&changes);
        let listener = TcpListener::bind((HOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let id = network
            .run(number, &format!("echo {number} | nc {HOST} {port}; sleep 1000"))
            .with(&["--runtime-config-path", &settings])
            .detach();
        assert_eq!(accept_all(&listener), format!("{number}\n").into_bytes());
        let (shim, _) = test.task(&id).unwrap();
        let vmm = host::vmms_of(shim)[0];
        assert_eq!(holds_device(vmm), *expected, "{changes:?}");
        let workers = workers(vmm);
        assert_eq!(!workers.is_empty(), *expected, "{changes:?}: {workers:?}");
        let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup")).unwrap();
        for worker in workers {
            assert_eq!(fs::read_to_string(worker.join("cgroup")).unwrap(), cgroup);
        }
        // Those of the kernel are in the jail as the others are.
        for task in fs::read_dir(format!("/proc/{vmm}/task")).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            for line in ["NoNewPrivs:\t1", "Seccomp:\t2", "CapPrm:\t00000000880000db"] {
                assert!(status.contains(line), "no {line:?} in {status}");
            }
        }
        test.kill_and_remove(&id);
    }
    network.remove();
    let _ = fs::remove_dir_all(test.work.join("cni"));
}

#[test]
fn streams_go_both_ways_without_the_kernels_help() {
    let test = fixture("vhost-off");
    let settings = test.configuration(&[("vhost_net", false.into())]);
    exchange(&test, &["--runtime-config-path", &settings]);
}
