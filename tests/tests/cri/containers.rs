//! Containers of a pod: order, ends, commands, logs, figures.

use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_containerd::grpc;
use bulkhead_tests::cri::api::{ContainerState, KeyValue};
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::CONFIGURED_IMAGE;
use bulkhead_tests::{config, cri};

use crate::pods;

#[test]
fn containers_start_and_end_in_any_order() {
    let test = pods("order");
    let pod = test.pod("pod").run();
    let names = ["a", "b", "c"];
    let created = names.map(|name| pod.container(name, &["sleep", "1000"]).create());
    for container in &created {
        let state = ContainerState::CONTAINER_CREATED;
        assert_eq!(container.status().state, state.into());
    }
    for index in [1, 2, 0] {
        created[index].start();
    }
    assert!(created.iter().all(|container| container.is_running()));
    for index in [2, 0, 1] {
        created[index].stop(0);
        created[index].remove();
    }
    assert!(pod.containers().is_empty());
}

#[test]
fn a_container_starts_again_after_the_last_one_left() {
    let test = pods("again");
    let pod = test.pod("pod").run();
    for attempt in 0..3 {
        let script = "cat /dev/shm/count; echo x >> /dev/shm/count";
        let run = pod.container("main", &["sh", "-c", script]).attempt(attempt);
        let lines = run.finish().stdout.lines().count();
        assert_eq!(lines, attempt as usize, "the pod's memory stays");
    }
    // One that crashes and is started anew, as kubelet does.
    let crashed = pod.container("main", &["sh", "-c", "exit 3"]).attempt(3).start();
    let status = crashed.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
    let next = pod.container("main", &["sleep", "1000"]).attempt(4).start();
    crashed.remove();
    assert!(next.is_running());
}

#[test]
fn an_init_container_ends_before_the_main_one_starts() {
    let test = pods("init");
    let pod = test.pod("pod").run();
    let init = pod
        .container("init", &["sh", "-c", "echo ready > /dev/shm/ready"])
        .start();
    let status = init.wait();
    assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
    let main = pod
        .container("main", &["sh", "-c", "cat /dev/shm/ready; sleep 1000"])
        .start();
    main.wait_for_log("stdout F ready");
    assert!(main.is_running());
}

#[test]
fn commands_run_in_a_container_with_their_codes_and_limits() {
    let test = pods("exec");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    let done = main.sh("echo out; echo err >&2; exit 123");
    assert_eq!(
        (done.stdout.as_str(), done.stderr.as_str(), done.code),
        ("out\n", "err\n", 123)
    );
    let began = Instant::now();
    let late = main.try_exec(&["sleep", "4321"], Duration::from_secs(1));
    assert_eq!(late.unwrap_err().code, grpc::DEADLINE_EXCEEDED);
    assert!(began.elapsed() < config().seconds(10));
    let gone = || !main.exec(&["ps", "-o", "args"]).text().contains("sleep 4321");
    assert!(wait_until(config().seconds(5), gone), "it is killed");
    let missing = main.try_exec(&["/no/such/program"], Duration::ZERO);
    assert!(missing.is_err(), "{missing:?}");
}

#[test]
fn three_hundred_commands_run_in_a_container_at_once() {
    let test = pods("commands");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    thread::scope(|scope| {
        for number in 0..config().crowd(300) {
            let main = &main;
            scope.spawn(move || {
                let text = number.to_string();
                assert_eq!(main.exec(&["echo", &text]).text(), format!("{text}\n"));
            });
        }
    });
    let left = main.sh("ps -o args").text();
    assert!(!left.lines().any(|line| line.starts_with("echo ")), "{left}");
}

#[test]
fn logs_have_streams_order_and_partial_lines() {
    let test = pods("logs");
    let pod = test.pod("pod").run();
    let script = "echo one; echo two >&2; head -c 10485760 /dev/zero | tr '\\0' x; echo; printf end";
    let main = pod.container("main", &["sh", "-c", script]).start();
    assert_eq!(main.wait().exit_code, 0);
    let lines = main.log();
    let out: Vec<_> = lines.iter().filter(|line| line.stream == "stdout").collect();
    assert_eq!((out[0].text.as_str(), out[0].full), ("one", true));
    assert!(
        lines
            .iter()
            .any(|line| line.stream == "stderr" && line.text == "two")
    );
    // A line above 16 KiB is cut.
    assert!(!out[1].full && out[1].text.len() <= 16 << 10);
    let long: String = out[1..out.len() - 1]
        .iter()
        .map(|line| line.text.as_str())
        .collect();
    assert_eq!(long.len(), 10 << 20);
    assert_eq!(out.last().unwrap().text, "end");
    assert!(!out.last().unwrap().full, "no end of line was written");
}

#[test]
fn a_log_is_reopened_after_rotation() {
    let test = pods("rotate");
    let pod = test.pod("pod").run();
    let main = pod.probe("main", &["tick"]).start();
    main.wait_for_log("tick 1");
    let file = main.log_file();
    let rotated = file.with_extension("1");
    std::fs::rename(&file, &rotated).unwrap();
    main.reopen_log().unwrap();
    assert!(wait_until(config().seconds(10), || !main.log().is_empty()));
    let number = |line: &str| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap();
    let old = std::fs::read_to_string(&rotated).unwrap();
    let last = number(old.trim_end().lines().last().unwrap());
    assert_eq!(
        number(&main.log()[0].text),
        last + 1,
        "no line is lost or doubled"
    );
}

#[test]
fn figures_of_containers_and_pod_agree_with_the_guest() {
    let test = pods("figures");
    let pod = test.pod("pod").run();
    let idle = pod.container("idle", &["sleep", "1000"]).start();
    let busy = pod.probe("busy", &["tick"]).start();
    // What its start has taken.
    let before = idle.stats().cpu.usage_core_nano_seconds.value;
    assert_eq!(busy.exec(&["/probe", "burn", "300"]).code, 0);
    let (idle, seen) = (idle.stats(), busy.stats());
    let guest = busy.sh("cat /sys/fs/cgroup/memory.current; grep usage_usec /sys/fs/cgroup/cpu.stat");
    let guest = guest.text();
    let mut words = guest.split_whitespace();
    let memory: u64 = words.next().unwrap().parse().unwrap();
    let cpu: u64 = words.last().unwrap().parse().unwrap();
    let used = seen.memory.usage_bytes.value;
    assert!(
        used.abs_diff(memory) < 8 << 20,
        "{used} and {memory} in the guest"
    );
    let nanoseconds = seen.cpu.usage_core_nano_seconds.value;
    assert!(
        nanoseconds >= 300_000_000 && nanoseconds <= cpu * 1000,
        "{nanoseconds}, {cpu}"
    );
    assert!(idle.cpu.usage_core_nano_seconds.value - before < 300_000_000);
    assert_eq!(seen.attributes.metadata.name, "busy");

    let pod_seen = pod.stats();
    assert_eq!(pod_seen.containers.len(), 2);
    // The pod's own is the host's side: it holds the whole virtual machine.
    assert!(pod_seen.memory.working_set_bytes.value > used);
    assert!(pod_seen.cpu.usage_core_nano_seconds.value > 0);
    assert_eq!(pod_seen.network.default_interface.name, "eth0");
}

#[test]
fn what_the_image_says_is_used_and_can_be_overridden() {
    let test = pods("image");
    let pod = test.pod("pod").run();
    let main = pod.container_of(CONFIGURED_IMAGE, "main", &[]).start();
    main.wait_for_log("waiting");
    let seen = main.report();
    assert_eq!(seen["cwd"], "/var/lib/somewhere");
    assert_eq!(seen["environment"]["FROM_IMAGE"], "yes");
    assert!(seen["status"]["Uid"].as_str().unwrap().starts_with("1234\t"));
    assert!(seen["status"]["Gid"].as_str().unwrap().starts_with("2345\t"));
    let groups: BTreeSet<_> = seen["status"]["Groups"].as_str().unwrap().split(' ').collect();
    assert!(groups.contains("3456"), "{groups:?}");

    let other = pod
        .container_of(CONFIGURED_IMAGE, "other", &["/probe"])
        .with(|config| {
            config.args = vec!["tick".into()];
            config.working_dir = "/tmp".into();
            config.envs.push(KeyValue {
                key: "FROM_IMAGE".into(),
                value: "no".into(),
                ..Default::default()
            });
        })
        .security(|security| {
            security.run_as_user = Some(cri::number(4321)).into();
            security.run_as_group = Some(cri::number(5432)).into();
        })
        .start();
    let seen = other.report();
    assert_eq!(seen["cwd"], "/tmp");
    assert_eq!(seen["environment"]["FROM_IMAGE"], "no");
    assert!(seen["status"]["Uid"].as_str().unwrap().starts_with("4321\t"));
    assert!(seen["status"]["Gid"].as_str().unwrap().starts_with("5432\t"));
}

#[test]
fn a_container_gets_its_stop_signal_once_and_then_the_last_one() {
    let test = pods("stop");
    let pod = test.pod("pod").run();
    let polite = pod.probe("polite", &["trap", "0"]).start();
    polite.wait_for_log("waiting");
    polite.stop(60);
    assert_eq!(polite.status().exit_code, 7);
    let said = polite
        .log()
        .iter()
        .filter(|line| line.text.contains("SIGTERM"))
        .count();
    assert_eq!(said, 1);
    let script = "trap 'echo got it' TERM; echo set; while :; do sleep 0.1; done";
    let deaf = pod.container("deaf", &["sh", "-c", script]).start();
    deaf.wait_for_log("set");
    deaf.stop(2);
    assert_eq!(deaf.status().exit_code, 137);
    let said = deaf.log().iter().filter(|line| line.text == "got it").count();
    assert_eq!(said, 1);
}

#[test]
fn a_privileged_container_has_power_in_the_guest_and_none_of_the_hosts_devices() {
    let test = pods("privileged");
    let pod = test
        .pod("pod")
        .linux(|linux| linux.security_context.mut_or_insert_default().privileged = true)
        .run();
    let main = pod
        .probe("main", &["tick"])
        .security(|security| security.privileged = true)
        .start();
    let seen = main.report();
    let effective = u64::from_str_radix(seen["status"]["CapEff"].as_str().unwrap(), 16).unwrap();
    assert_eq!(effective & (1 << 21), 1 << 21, "CAP_SYS_ADMIN");
    assert_eq!(
        main.sh("mkdir /tmp/m && mount -t tmpfs none /tmp/m && umount /tmp/m")
            .code,
        0
    );
    let devices = seen["devices"].to_string();
    assert!(
        !devices.contains("\"kvm\"") && !devices.contains("loop-control"),
        "{devices}"
    );
    let plain = pod.probe("plain", &["tick"]).start();
    assert_ne!(plain.sh("mkdir /tmp/m && mount -t tmpfs none /tmp/m").code, 0);
}

#[test]
fn calls_can_be_repeated() {
    let test = pods("repeated");
    let pod = test.pod("pod").run();
    let main = pod.container("main", &["sleep", "1000"]).start();
    main.stop(0);
    main.stop(0);
    main.remove();
    main.remove();
    pod.stop().unwrap();
    pod.stop().unwrap();
    assert!(!pod.is_ready());
    pod.remove().unwrap();
    pod.remove().unwrap();
}
