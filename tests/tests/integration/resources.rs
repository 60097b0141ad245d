//! Limits hold inside the guest.

use bulkhead_tests::config;
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::PROBE_IMAGE;

use crate::events::{follow, of_task};
use crate::fixture;

#[test]
fn going_over_the_memory_limit_is_an_out_of_memory_kill() {
    let test = fixture("oom");
    let events = follow(&test);
    let limit = (48 << 20).to_string();
    let run = test
        .probe("a", &["allocate", "200"])
        .with(&["--memory-limit", &limit]);
    let done = run.finish().expect_code(137);
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(text.contains("16 MiB") && !text.contains("64 MiB"), "{done}");
    let topics = || {
        of_task(&events, &run.id)
            .into_iter()
            .map(|(topic, _)| topic)
            .collect::<Vec<_>>()
    };
    let complete = wait_until(config().seconds(10), || {
        topics().last().is_some_and(|topic| topic == "/tasks/delete")
    });
    let expected = ["create", "start", "oom", "exit", "delete"].map(|topic| format!("/tasks/{topic}"));
    assert!(complete && topics() == expected, "{events}");
    drop(events);
}

/// The kernel kills in the container's cgroup, and neither the container nor its guest is lost with it.
#[test]
fn a_second_process_over_the_memory_limit_is_killed_alone() {
    let test = fixture("oom-exec");
    let events = follow(&test);
    let limit = (48 << 20).to_string();
    let id = test
        .run("a", PROBE_IMAGE, &["sleep", "1000"])
        .with(&["--memory-limit", &limit])
        .detach();
    let exec = |name: &str, command: &[&str]| {
        test.ctr(&[&["tasks", "exec", "--exec-id", name, &id], command].concat())
    };
    let done = exec("greedy", &["/probe", "allocate", "200"]).expect_code(137);
    assert!(String::from_utf8_lossy(&done.stdout).contains("16 MiB"), "{done}");
    assert_eq!(exec("modest", &["echo", "still here"]).text(), "still here\n");
    assert_eq!(test.task(&id).unwrap().1, "RUNNING");
    let order = || -> Vec<_> {
        let told = of_task(&events, &id).into_iter();
        told.filter(|(topic, event)| topic == "/tasks/oom" || event["id"] == "greedy")
            .map(|(topic, _)| topic)
            .collect()
    };
    let told = wait_until(config().seconds(10), || order() == ["/tasks/oom", "/tasks/exit"]);
    assert!(told, "{events}");
    test.kill_and_remove(&id);
    drop(events);
}

#[test]
fn limits_of_the_specification_are_in_the_containers_cgroup() {
    let test = fixture("limits");
    let script = "cd /sys/fs/cgroup; cat pids.max memory.max cpu.max; i=0; while [ $i -lt 40 ]; do sleep 5 & i=$((i+1)); done";
    let run = test.spec("a", &["/bin/sh", "-c", script], |spec| {
        let resources = serde_json::json!({
            "pids": { "limit": 20 },
            "memory": { "limit": 67_108_864 },
            "cpu": { "quota": 50_000, "period": 100_000 },
        });
        let cgroup = ["ro", "nosuid", "noexec", "nodev"];
        let mut spec =
            spec.set("/linux/resources", resources)
                .mount("cgroup", "cgroup", "/sys/fs/cgroup", &cgroup);
        let namespaces = spec.0["linux"]["namespaces"].as_array_mut().unwrap();
        if !namespaces.iter().any(|namespace| namespace["type"] == "cgroup") {
            namespaces.push(serde_json::json!({ "type": "cgroup" }));
        }
        spec
    });
    let done = run.finish();
    assert!(done.stdout.starts_with(b"20\n67108864\n50000 100000\n"), "{done}");
    assert!(
        String::from_utf8_lossy(&done.stderr).contains("can't fork"),
        "{done}"
    );
}
