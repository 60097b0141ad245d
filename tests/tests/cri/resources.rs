//! Sizes and limits: the VM, the containers in it, and the pod's cgroup on the host.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_tests::config;
use bulkhead_tests::cri::api::LinuxContainerResources;
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::pod::{CGROUP, Container, Pod};

use crate::pods;

const MIB: i64 = 1 << 20;

/// Limits of a container: thousandths of a processor and MiB.
fn limits(milli: i64, mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: milli * 100,
        memory_limit_in_bytes: mib * MIB,
        ..Default::default()
    }
}

/// Processors on line and memory in MiB that the guest's kernel shows.
fn guest(container: &Container<'_>) -> (usize, i64) {
    let text = container
        .sh("grep -c ^processor /proc/cpuinfo; sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")
        .text();
    let mut lines = text.lines();
    let mut number = || lines.next().unwrap().trim().parse::<i64>().unwrap();
    (usize::try_from(number()).unwrap(), number() / 1024)
}

/// A file of the container's own cgroup, as the guest has it.
fn own(container: &Container<'_>, file: &str) -> String {
    container
        .sh(&format!("cat /sys/fs/cgroup/{file}"))
        .text()
        .trim()
        .to_owned()
}

/// The cgroup on the host in which the pod's shim and VMM are.
fn cgroup(pod: &Pod<'_>) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", pod.shim())).unwrap();
    let path = text.trim().strip_prefix("0::/").unwrap();
    assert!(Path::new("/").join(path).starts_with(CGROUP), "{path}");
    Path::new("/sys/fs/cgroup").join(path)
}

/// Whether the guest is back at `(vcpus, memory)`. The kernel keeps a block or two of which it cannot move a page.
fn is_back(container: &Container<'_>, (vcpus, memory): (usize, i64)) -> bool {
    let now = guest(container);
    now.0 == vcpus && now.1 <= memory + 32
}

fn of_host(directory: &Path, file: &str) -> String {
    fs::read_to_string(directory.join(file))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn an_update_grows_and_shrinks_the_running_vm() {
    let test = pods("resize");
    let pod = test.pod("pod").handler("kata-sized").run();
    let main = pod
        .container("main", &["sleep", "1000"])
        .resources(|resources| *resources = limits(500, 64))
        .start();
    let (vcpus, memory) = guest(&main);
    assert_eq!(vcpus, 1);
    let host = cgroup(&pod);
    let (bound, charged) = (of_host(&host, "memory.max"), of_host(&host, "memory.current"));
    let (bound, charged): (i64, i64) = (bound.parse().unwrap(), charged.parse().unwrap());

    main.update(limits(3000, 768)).unwrap();
    let (vcpus, grown) = guest(&main);
    assert_eq!(vcpus, 3);
    // 768 MiB, a part of it for its own books, and what the guest needs beside that.
    assert!((768..=memory + 640).contains(&grown), "{memory} -> {grown} MiB");
    assert_eq!(main.sh("nproc").text(), "3\n");
    assert_eq!(own(&main, "memory.max"), (768 * MIB).to_string());
    assert_eq!(own(&main, "cpu.max"), "300000 100000");
    assert_eq!(of_host(&host, "cpu.max"), "310000 100000");
    let raised: i64 = of_host(&host, "memory.max").parse().unwrap();
    assert!(raised - bound >= (grown - memory) * MIB, "{bound} -> {raised}");

    // The new memory is real: dd has a buffer of that size.
    let done = main.sh("dd if=/dev/zero of=/dev/null bs=400M count=1 2>/dev/null; echo $?");
    assert_eq!(done.text(), "0\n");
    let most: i64 = of_host(&host, "memory.peak").parse().unwrap();
    assert!(most - charged > 300 * MIB, "{charged} -> {most}");

    main.update(limits(500, 64)).unwrap();
    let shrunk = wait_until(config().seconds(30), || is_back(&main, (1, memory)));
    assert!(shrunk, "{:?} and not {:?}", guest(&main), (1, memory));
    assert_eq!(own(&main, "cpu.max"), "50000 100000");
    assert_eq!(of_host(&host, "cpu.max"), "60000 100000");
    let lowered = wait_until(config().seconds(30), || {
        let now: i64 = of_host(&host, "memory.max").parse().unwrap();
        now <= bound + 40 * MIB
    });
    assert!(lowered, "{} and not {bound}", of_host(&host, "memory.max"));
    let left = || of_host(&host, "memory.current").parse::<i64>().unwrap();
    assert!(
        wait_until(config().seconds(30), || left() < most - 250 * MIB),
        "the host has {} of {most} back",
        most - left()
    );
    pod.remove().unwrap();
}

#[test]
fn containers_that_come_and_go_change_the_vms_size() {
    let test = pods("sizes");
    let pod = test.pod("pod").handler("kata-sized").run();
    let first = pod
        .container("first", &["sleep", "1000"])
        .resources(|resources| *resources = limits(1000, 128))
        .start();
    let before = guest(&first);
    let second = pod
        .container("second", &["sleep", "1000"])
        .resources(|resources| {
            *resources = limits(2000, 512);
            resources.cpu_shares = 2048;
        })
        .start();
    let (vcpus, memory) = guest(&first);
    assert_eq!(vcpus, 3);
    assert!(memory > before.1 + 300, "{before:?} -> {memory}");
    assert_eq!(own(&second, "memory.max"), (512 * MIB).to_string());
    assert_eq!(own(&second, "cpu.weight"), "79");
    assert_eq!(own(&first, "memory.max"), (128 * MIB).to_string());
    let host = cgroup(&pod);
    assert_eq!(of_host(&host, "cpu.max"), "310000 100000");
    second.stop(0);
    second.remove();
    let shrunk = wait_until(config().seconds(30), || is_back(&first, before));
    assert!(shrunk, "{:?} and not {before:?}", guest(&first));
    assert_eq!(of_host(&host, "cpu.max"), "110000 100000");
    pod.remove().unwrap();
}

#[test]
fn a_pods_size_is_that_of_its_annotations() {
    let test = pods("annotated");
    let pod = test
        .pod("pod")
        .handler("kata-sized")
        .linux(|linux| linux.resources = Some(limits(1500, 512)).into())
        .run();
    let main = pod
        .container("main", &["sleep", "1000"])
        .resources(|resources| *resources = limits(1500, 512))
        .start();
    let (vcpus, memory) = guest(&main);
    assert_eq!(vcpus, 2);
    // All of the limit, and of the overhead what the kernel leaves.
    assert!((512..=592).contains(&memory), "{memory}");
    pod.remove().unwrap();
}

#[test]
fn a_container_out_of_memory_dies_alone() {
    let test = pods("oomed");
    let pod = test.pod("pod").run();
    let other = pod.container("other", &["sleep", "1000"]).start();
    let greedy = pod
        .probe("greedy", &["allocate", "200"])
        .resources(|resources| *resources = limits(1000, 48))
        .start();
    let status = greedy.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
    assert!(other.is_running());
    assert_eq!(other.sh("echo here").text(), "here\n");
    pod.remove().unwrap();
}

#[test]
fn figures_of_a_container_are_those_of_its_cgroup() {
    let test = pods("figures");
    let pod = test.pod("pod").run();
    let main = pod
        .container(
            "main",
            &[
                "sh",
                "-c",
                "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000",
            ],
        )
        .start();
    let usage = || -> u64 {
        let text = own(&main, "cpu.stat");
        let line = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        line.unwrap().parse().unwrap()
    };
    let before = usage();
    let stats = main.stats();
    let (after, current) = (usage(), own(&main, "memory.current").parse::<u64>().unwrap());
    let seen = stats.cpu.usage_core_nano_seconds.value / 1000;
    assert!((before..=after).contains(&seen), "{before} {seen} {after}");
    let memory = stats.memory.usage_bytes.value;
    assert!(
        memory > 0 && memory.abs_diff(current) < 8 << 20,
        "{memory} and {current}"
    );
    assert!(stats.memory.working_set_bytes.value <= memory);
    pod.remove().unwrap();
}
