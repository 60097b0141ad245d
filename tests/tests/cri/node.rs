//! What a kubelet decides for a node: classes of service, and limits beside those of processor time and memory.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_tests::cri::api::{HugepageLimit, LinuxContainerResources};
use bulkhead_tests::cri::mount;
use bulkhead_tests::fixture::shell;
use bulkhead_tests::host;
use bulkhead_tests::pod::{CGROUP, Container};

use crate::pods;

const ROOT: &str = "/sys/fs/cgroup";

/// A class: the pod's cgroup as CRI is told, its directory, and what containers of the class get.
struct Class {
    parent: String,
    directory: PathBuf,
    oom_score_adj: i64,
    resources: LinuxContainerResources,
}

fn cgroup_of(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    PathBuf::from(text.trim().strip_prefix("0::").unwrap())
}

fn own(container: &Container<'_>, file: &str) -> String {
    let text = container.sh(&format!("cat /sys/fs/cgroup/{file}")).text();
    text.trim().to_owned()
}

#[test]
fn pods_of_each_class_are_in_its_cgroup() {
    let test = pods("classes");
    let limits = |cpu_quota, memory_limit_in_bytes, cpu_shares| LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota,
        memory_limit_in_bytes,
        cpu_shares,
        ..Default::default()
    };
    let plain = |path: &str| format!("{CGROUP}/{path}");
    // The kubelet's drivers of cgroups: paths, and slices as systemd names them.
    let slices = "/bulkhead.slice/bulkhead-burstable.slice/bulkhead-burstable-pod2.slice";
    let classes = [
        Class {
            directory: plain("pod1").into(),
            parent: plain("pod1"),
            oom_score_adj: -997,
            resources: limits(100_000, 128 << 20, 1024),
        },
        Class {
            directory: slices.into(),
            parent: slices.into(),
            oom_score_adj: 993,
            resources: limits(0, 0, 256),
        },
        Class {
            directory: plain("besteffort/pod3").into(),
            parent: plain("besteffort/pod3"),
            oom_score_adj: 1000,
            resources: limits(0, 0, 2),
        },
    ];
    for (number, class) in classes.iter().enumerate() {
        let pod = test
            .pod(&number.to_string())
            .linux(|linux| linux.cgroup_parent.clone_from(&class.parent))
            .run();
        let main = pod
            .container("main", &["sleep", "1000"])
            .resources(|resources| {
                *resources = class.resources.clone();
                resources.oom_score_adj = class.oom_score_adj;
            })
            .start();
        let shim = pod.shim();
        let vmms = host::vmms_of(shim);
        assert_eq!(vmms.len(), 1);
        for pid in [vec![shim], vmms].concat() {
            let group = cgroup_of(pid);
            assert_eq!(group.parent(), Some(class.directory.as_path()), "{pid}");
        }
        let score = main.sh("cat /proc/1/oom_score_adj").text();
        assert_eq!(score.trim(), class.oom_score_adj.to_string());
        let quota = match class.resources.cpu_quota {
            0 => "max".to_owned(),
            quota => quota.to_string(),
        };
        assert_eq!(own(&main, "cpu.max"), format!("{quota} 100000"));
    }
    for left in [
        plain("besteffort"),
        "/bulkhead.slice/bulkhead-burstable.slice".into(),
        "/bulkhead.slice".into(),
    ] {
        fs::remove_dir(Path::new(ROOT).join(left.trim_start_matches('/'))).unwrap();
    }
}

#[test]
fn other_limits_hold_in_the_guest_and_on_the_host() {
    let test = pods("limits");
    let pages = test
        .work
        .join("pods/0b6c-33/volumes/kubernetes.io~empty-dir/pages");
    fs::create_dir_all(&pages).unwrap();
    shell(&format!(
        "mount -t hugetlbfs -o pagesize=2M hugetlbfs {}",
        pages.display()
    ));
    let pod = test.pod("pod").run();
    let main = pod
        .probe("main", &["tick"])
        .mount(mount(&pages, "/pages", false))
        .resources(|resources| {
            resources.cpu_shares = 2048;
            resources.memory_limit_in_bytes = 128 << 20;
            resources.cpuset_cpus = "0".into();
            resources.cpuset_mems = "0".into();
            resources.hugepage_limits = vec![HugepageLimit {
                page_size: "2MB".into(),
                limit: 4 << 20,
                ..Default::default()
            }];
            resources.unified = [("pids.max", "20"), ("io.weight", "default 300")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into();
        })
        .start();
    for (file, value) in [
        ("cpu.weight", "79"),
        ("cpuset.cpus.effective", "0"),
        ("hugetlb.2MB.max", "4194304"),
        ("pids.max", "20"),
        ("io.weight", "default 300"),
    ] {
        assert_eq!(own(&main, file), value, "{file}");
    }
    assert_eq!(main.exec(&["/probe", "huge", "/pages/a", "2"]).code, 0);
    assert_ne!(main.exec(&["/probe", "huge", "/pages/b", "4"]).code, 0);
    let forks = main.sh("for i in $(seq 30); do sleep 5 & done; wait");
    assert!(forks.code != 0 && forks.stderr.contains("fork"), "{forks}");

    let host = Path::new(ROOT).join(cgroup_of(pod.shim()).strip_prefix("/").unwrap());
    let of_host = |file: &str| {
        let text = fs::read_to_string(host.join(file)).unwrap();
        text.trim().to_owned()
    };
    assert_eq!(of_host("cpu.weight"), "79");
    assert_eq!(of_host("cpuset.cpus"), "0");
    assert_eq!(of_host("cpuset.mems"), "0");
    assert_ne!(of_host("memory.max"), "max");
    main.remove();
    // What no container asks for any more is not kept from the next one.
    assert_eq!(of_host("cpu.weight"), "100");
    drop(pod);
    shell(&format!("umount {}", pages.display()));
}
