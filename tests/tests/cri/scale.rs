//! Many pods, many containers, and containerd started anew.

use std::io::{self, Write};
use std::thread;

use bulkhead_tests::cri::api::{ContainerState, VersionRequest};
use bulkhead_tests::{Fixture, config};

use crate::pods;

/// Says how far a test of many pods is. Not by `eprintln`, whose output is shown only when the test has ended.
fn progress(number: u32, what: &str) {
    let _ = writeln!(io::stderr(), "pod {number}: {what}");
}

fn one_pod(test: &Fixture, number: u32) {
    let pod = test.pod(&number.to_string()).run();
    progress(number, "runs");
    let containers = ["a", "b", "c"].map(|name| pod.container(name, &["sleep", "1000"]).start());
    progress(number, "containers run");
    for container in &containers {
        let text = container.sh("hostname").text();
        assert_eq!(text.trim(), pod.config.hostname);
    }
    progress(number, "containers answer");
    containers[1].stop(0);
    containers[1].remove();
    assert_eq!(pod.containers().len(), 2);
    drop(containers);
    drop(pod);
    progress(number, "is gone");
}

#[test]
fn thirty_pods_of_three_containers_come_and_go_in_parallel() {
    let test = pods("parallel");
    // Leaves the template from which a node's pods start.
    drop(test.pod("first").run());
    thread::scope(|scope| {
        for number in 0..config().crowd(30) {
            let test = &test;
            scope.spawn(move || one_pod(test, number));
        }
    });
}

#[test]
fn twenty_containers_run_in_a_pod() {
    let test = pods("twenty");
    let pod = test.pod("pod").run();
    let names: Vec<String> = (0..20).map(|number| format!("c{number}")).collect();
    let containers: Vec<_> = names
        .iter()
        .map(|name| {
            pod.container(name, &["sh", "-c", "echo $0; sleep 1000", name])
                .start()
        })
        .collect();
    for (name, container) in names.iter().zip(&containers) {
        container.wait_for_log(&format!("stdout F {name}"));
        assert!(container.is_running());
    }
    assert_eq!(pod.containers().len(), 20);
}

#[test]
fn pods_outlive_a_restart_of_containerd() {
    let test = pods("restart");
    let pod = test.pod("pod").run();
    let main = pod.probe("main", &["tick"]).start();
    let other = pod.container("other", &["sh", "-c", "exit 5"]).start();
    let _ = other.wait();
    main.wait_for_log("tick 1");
    test.restart_containerd();
    let version = test.cri().version(&VersionRequest::default()).unwrap();
    assert_eq!(version.runtime_name, "containerd");
    assert!(pod.is_ready() && main.is_running());
    assert_eq!(other.status().exit_code, 5);
    assert_eq!(main.sh("echo still here").text(), "still here\n");
    let next = pod.container("next", &["echo", "new"]).finish();
    assert_eq!(next.text(), "new\n");
    main.stop(0);
    assert_eq!(main.status().state, ContainerState::CONTAINER_EXITED.into());
}
