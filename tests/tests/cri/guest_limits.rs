//! Limits of a container hold when it goes over them, and what it does to itself leaves the rest of its pod alone.

use std::fs;
use std::time::Instant;

use bulkhead_tests::config;
use bulkhead_tests::cri::api::{Capability, LinuxContainerResources, ProfileType, SecurityProfile};
use bulkhead_tests::cri::mount;
use bulkhead_tests::fixture::shell;
use bulkhead_tests::pod::{Container, Pod};

use crate::pods;

/// Paths that the kubelet has masked where a pod says nothing of `procMount`.
const MASKED: [&str; 9] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/scsi",
    "/sys/firmware",
];

/// Paths that are then read-only.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn own(container: &Container<'_>, file: &str) -> String {
    let text = container.sh(&format!("cat /sys/fs/cgroup/{file}")).text();
    text.trim().to_owned()
}

/// A counter of one of the container's files.
fn counter(container: &Container<'_>, file: &str, key: &str) -> u64 {
    let text = own(container, file);
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value
        .unwrap_or_else(|| panic!("no {key} in {text}"))
        .parse()
        .unwrap()
}

fn seccomp(kind: ProfileType) -> SecurityProfile {
    SecurityProfile {
        profile_type: kind.into(),
        ..Default::default()
    }
}

/// What becomes of each operation of the probe.
fn tried(container: &Container<'_>, operations: &[&str]) -> Vec<String> {
    let script: String = operations
        .iter()
        .map(|operation| format!("/probe errno {operation} || exit 1;"))
        .collect();
    let text = container.sh(&script).text();
    operations
        .iter()
        .zip(text.lines())
        .map(|(operation, outcome)| format!("{operation}: {outcome}"))
        .collect()
}

fn expect(container: &Container<'_>, expected: &[(&str, &str)]) {
    let operations: Vec<&str> = expected.iter().map(|(operation, _)| *operation).collect();
    let expected: Vec<String> = expected
        .iter()
        .map(|(operation, outcome)| format!("{operation}: {outcome}"))
        .collect();
    assert_eq!(tried(container, &operations), expected);
}

/// The pod's other containers and its agent are well: commands run, and a new container comes and goes.
fn expect_well(pod: &Pod<'_>, other: &Container<'_>, name: &str) {
    assert!(other.is_running());
    assert_eq!(other.sh("echo written > /w && cat /w").text(), "written\n");
    assert!(other.stats().cpu.usage_core_nano_seconds.value > 0);
    let new = pod.container(name, &["sh", "-c", "echo new"]).finish();
    assert_eq!(new.text(), "new\n");
}

#[test]
fn what_a_container_may_not_do_is_refused() {
    let test = pods("refusals");
    let pod = test.pod("pod").run();
    let default = pod
        .probe("default", &["tick"])
        .security(|security| {
            security.seccomp = Some(seccomp(ProfileType::RUNTIME_DEFAULT)).into();
            // As the kubelet asks for; without, containerd asks for none.
            security.masked_paths = MASKED.map(String::from).to_vec();
            security.readonly_paths = READ_ONLY.map(String::from).to_vec();
        })
        .start();
    expect(
        &default,
        &[
            // The default profile of seccomp.
            ("call keyctl", "EPERM"),
            ("call vsock", "EPERM"),
            ("call user-namespace", "EPERM"),
            ("call userfaultfd", "EPERM"),
            // Capabilities that a container has, and such that it has not.
            ("chown /tmp", "ok"),
            ("call raw-socket", "ok"),
            ("call mount", "EPERM"),
            ("call bpf", "EPERM"),
            ("call set-time", "EPERM"),
            // Devices: nodes may be made, and those of the list be opened.
            ("null /dev/null2", "ok"),
            ("kmsg /dev/kmsg2", "EPERM"),
            ("disk /dev/disk2", "EPERM"),
            // Paths that are masked or read-only.
            ("write /proc/sys/kernel/domainname", "EROFS"),
            ("write /sys/kernel/rcu_expedited", "EROFS"),
            ("write /sys/fs/cgroup/pids.max", "EROFS"),
        ],
    );
    let masked = "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null | wc -c; ls /proc/acpi /sys/firmware 2>/dev/null | grep -v : | wc -w";
    assert_eq!(default.sh(masked).text(), "0\n0\n");

    // The same calls without a profile reach the kernel, which knows better than to refuse them all.
    let unconfined = pod
        .probe("unconfined", &["tick"])
        .security(|security| security.seccomp = Some(seccomp(ProfileType::UNCONFINED)).into())
        .start();
    let outcomes = tried(&unconfined, &["call keyctl", "call vsock"]);
    assert!(
        outcomes.iter().all(|outcome| !outcome.ends_with("EPERM")),
        "{outcomes:?}"
    );

    let bare = pod
        .probe("bare", &["tick"])
        .security(|security| {
            security.capabilities = Some(Capability {
                drop_capabilities: vec!["ALL".into()],
                ..Default::default()
            })
            .into();
        })
        .start();
    expect(
        &bare,
        &[
            ("chown /tmp", "EPERM"),
            ("call raw-socket", "EPERM"),
            ("null /dev/null2", "EPERM"),
            ("sethostname x", "EPERM"),
        ],
    );
    pod.remove().unwrap();
}

#[test]
fn a_container_gets_no_more_processor_time_than_its_quota() {
    let test = pods("quota");
    let pod = test.pod("pod").run();
    let main = pod
        .probe("main", &["tick"])
        .resources(|resources| {
            resources.cpu_period = 100_000;
            resources.cpu_quota = 50_000;
        })
        .start();
    let of = |key: &str| counter(&main, "cpu.stat", key);
    let now = || -> f64 {
        let text = main.sh("cat /proc/uptime").text();
        text.split(' ').next().unwrap().parse().unwrap()
    };
    let (began, before, throttled) = (now(), of("usage_usec"), of("nr_throttled"));
    // Four seconds of the guest's clock each; on a busy machine the guest itself may get less than the quota.
    for _ in 0..4 {
        assert_eq!(main.exec(&["/probe", "burn", "4000"]).code, 0);
        if of("nr_throttled") - throttled >= 5 {
            break;
        }
    }
    assert!(of("nr_throttled") - throttled >= 5, "{}", own(&main, "cpu.stat"));
    let used = of("usage_usec") - before;
    let limit = (now() - began) * 1e6 / 2.0;
    // What is used beyond the quota of a period is taken off the next: at most the two at the ends count in full.
    assert!((used as f64) < limit + 200_000.0, "{used} of {limit} µs");
    pod.remove().unwrap();
}

#[test]
fn a_container_stays_on_its_processors() {
    let test = pods("cpuset");
    let pod = test.pod("pod").handler("kata-sized").run();
    let two = |resources: &mut LinuxContainerResources| {
        resources.cpu_period = 100_000;
        resources.cpu_quota = 200_000;
    };
    let free = pod.probe("free", &["tick"]).resources(two).start();
    let bound = pod
        .probe("bound", &["tick"])
        .resources(|resources| resources.cpuset_cpus = "0".into())
        .start();
    let processors: usize = {
        let text = bound.sh("grep -c ^processor /proc/cpuinfo").text();
        text.trim().parse().unwrap()
    };
    assert!(processors >= 2, "{processors}");
    let pin =
        |container: &Container<'_>, processor: &str| container.exec(&["/probe", "pin", processor]).text();
    assert_eq!((pin(&free, "0"), pin(&free, "1")), ("ok\n".into(), "ok\n".into()));
    // One of the guest's stands for the host's first.
    let mut outcomes: Vec<String> = (0..processors)
        .map(|number| pin(&bound, &number.to_string()))
        .collect();
    outcomes.sort();
    assert_eq!(outcomes.pop().as_deref(), Some("ok\n"));
    assert!(
        outcomes.iter().all(|outcome| outcome == "EINVAL\n"),
        "{outcomes:?}"
    );
    pod.remove().unwrap();
}

#[test]
fn a_containers_disk_is_no_faster_than_its_limit() {
    let test = pods("io");
    let handler = format!("{}-blockfile", config().handler);
    let pod = test.pod("pod").handler(&handler).run();
    // The first slot is the first container's.
    let free = pod.probe("free", &["tick"]).start();
    let number = free.sh("cat /sys/block/vda/dev").text().trim().to_owned();
    assert_eq!(free.exec(&["/probe", "fill", "/file", "2"]).text(), "2 ok\n");
    free.stop(0);
    free.remove();
    let limit = format!("{number} wbps=262144");
    let limited = pod
        .probe("limited", &["tick"])
        .resources(|resources| {
            resources.unified.insert("io.max".into(), limit.clone());
        })
        .start();
    assert!(own(&limited, "io.max").contains("wbps=262144"));
    let script = "read a _ < /proc/uptime; /probe fill /file 2; read b _ < /proc/uptime; echo $a $b";
    let text = limited.sh(script).text();
    let times = text.lines().nth(1).unwrap();
    let (from, to) = times.split_once(' ').unwrap();
    let taken = to.parse::<f64>().unwrap() - from.parse::<f64>().unwrap();
    // 2 MiB at 256 KiB a second.
    assert!(taken > 6.0, "{taken} s");
    drop(pod);
    test.containerd.remove_snapshots("blockfile");
}

#[test]
fn a_fork_bomb_leaves_the_others_alone() {
    let test = pods("bomb");
    let pod = test.pod("pod").run();
    let other = pod.container("other", &["sleep", "1000"]).start();
    // Within a limit of its own,
    let bounded = pod
        .probe("bounded", &["tick"])
        .resources(|resources| {
            resources.unified.insert("pids.max".into(), "50".into());
        })
        .start();
    let forked = bounded.exec(&["/probe", "fork", "100"]).text();
    let (count, errno) = forked.trim().split_once(' ').unwrap();
    assert!(
        count.parse::<u32>().unwrap() < 50 && errno == "EAGAIN",
        "{forked}"
    );
    bounded.stop(0);
    // and without one: half of what the guest can have is the container's.
    let bomb = pod.probe("bomb", &["bomb"]).start();
    bomb.wait_for_log("bombing");
    let most: u64 = own(&other, "pids.max").parse().unwrap();
    assert!((100..100_000).contains(&most), "{most}");
    expect_well(&pod, &other, "beside");
    let begun = Instant::now();
    bomb.stop(0);
    assert!(begun.elapsed() < config().seconds(30));
    assert_eq!(bomb.status().exit_code, 137);
    expect_well(&pod, &other, "after");
    pod.remove().unwrap();
}

#[test]
fn a_container_that_takes_all_of_the_guests_memory_dies_alone() {
    let test = pods("greed");
    let pod = test.pod("pod").run();
    let other = pod.container("other", &["sleep", "1000"]).start();
    let greedy = pod.probe("greedy", &["allocate", "100000"]).start();
    let status = greedy.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    expect_well(&pod, &other, "new");
    pod.remove().unwrap();
}

#[test]
fn a_full_disk_leaves_the_others_alone() {
    let test = pods("full");
    let memory = test
        .work
        .join("pods/0b6c-44/volumes/kubernetes.io~empty-dir/memory");
    fs::create_dir_all(&memory).unwrap();
    shell(&format!("mount -t tmpfs -o size=4m tmpfs {}", memory.display()));
    let handler = format!("{}-blockfile", config().handler);
    let pod = test.pod("pod").handler(&handler).run();
    let other = pod.container("other", &["sleep", "1000"]).start();
    let hoarder = pod
        .probe("hoarder", &["tick"])
        .mount(mount(&memory, "/memory", false))
        .start();
    for (file, most) in [("/all-of-it", 64), ("/memory/file", 4), ("/dev/shm/file", 64)] {
        let filled = hoarder.exec(&["/probe", "fill", file, "500"]).text();
        let (count, errno) = filled.trim().split_once(' ').unwrap();
        assert!(
            count.parse::<u32>().unwrap() <= most && errno == "ENOSPC",
            "{file}: {filled}"
        );
    }
    assert!(hoarder.is_running());
    assert_eq!(other.sh("echo written > /w && cat /w").text(), "written\n");
    // Its disk has a slot, and a pod has no more than two of them.
    hoarder.stop(0);
    hoarder.remove();
    expect_well(&pod, &other, "new");
    drop(pod);
    test.containerd.remove_snapshots("blockfile");
    shell(&format!("umount {}", memory.display()));
}

/// What an init system does in a privileged container: it puts processes into groups of its own with limits.
#[test]
fn a_privileged_container_governs_groups_of_its_own() {
    let test = pods("delegated");
    let pod = test
        .pod("pod")
        .linux(|linux| linux.security_context.mut_or_insert_default().privileged = true)
        .run();
    let main = pod
        .container("main", &["sleep", "1000"])
        .security(|security| security.privileged = true)
        .resources(|resources| {
            resources.unified.insert("pids.max".into(), "200".into());
        })
        .start();
    let made = main.sh("cd /sys/fs/cgroup && mkdir init job && \
         for process in $(cat cgroup.procs); do echo $process > init/cgroup.procs 2>/dev/null; done; \
         echo '+memory +pids +cpu' > cgroup.subtree_control && echo 5 > job/pids.max && cat job/pids.max");
    assert_eq!(made.text(), "5\n");
    // A command comes into a group of the container, as the one that the container has begun with takes no more.
    let job =
        main.sh("echo $$ > /sys/fs/cgroup/job/cgroup.procs; for i in $(seq 10); do sleep 5 & done; wait");
    assert!(job.code != 0 && job.stderr.contains("fork"), "{job}");
    // Its own limits are not its to change.
    let lifted = main.sh("echo max > /sys/fs/cgroup/pids.max; cat /sys/fs/cgroup/pids.max");
    assert_eq!(lifted.text(), "200\n");
    assert!(main.is_running());
    pod.remove().unwrap();
}
