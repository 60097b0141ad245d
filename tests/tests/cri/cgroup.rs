//! Where the pod's processes are on the host.

use std::fs;
use std::path::Path;

use bulkhead_tests::host;

use crate::pods;

#[test]
fn shim_and_vmm_are_in_the_pods_cgroup() {
    let test = pods("cgroup");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    assert!(main.is_running());
    let parent = pod.config.linux.cgroup_parent.clone();
    let shim = pod.shim();
    for pid in [vec![shim], host::vmms_of(shim)].concat() {
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(
            groups.contains(&parent),
            "{pid} is in {groups} and not below {parent}"
        );
    }
    let memory = Path::new("/sys/fs/cgroup")
        .join(parent.trim_start_matches('/'))
        .join("memory.current");
    let memory: u64 = fs::read_to_string(memory).unwrap().trim().parse().unwrap();
    assert!(
        memory > 16 << 20,
        "the virtual machine's memory is counted: {memory}"
    );
}
