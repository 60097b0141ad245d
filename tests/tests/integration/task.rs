//! What `ctr tasks` says and does.

use std::thread;
use std::time::Duration;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::{Fixture, Session, config, host};
use serde_json::Value;

use crate::fixture;

fn metrics(test: &Fixture, id: &str) -> Value {
    serde_json::from_str(&test.ctr(&["tasks", "metrics", "--format", "json", id]).text()).unwrap()
}

/// Processor time used in nanoseconds, whichever version of the statistics it is.
fn cpu_ns(metrics: &Value) -> u64 {
    let of_v2 = metrics["cpu"]["usage_usec"]
        .as_u64()
        .map(|microseconds| microseconds * 1000);
    of_v2
        .or(metrics["cpu"]["usage"]["total"].as_u64())
        .unwrap_or_else(|| panic!("no cpu usage: {metrics}"))
}

fn memory(metrics: &Value) -> u64 {
    let memory = &metrics["memory"]["usage"];
    memory
        .as_u64()
        .or(memory["usage"].as_u64())
        .unwrap_or_else(|| panic!("no memory usage: {metrics}"))
}

#[test]
fn listing_and_metrics_tell_the_truth() {
    let test = fixture("listing");
    let id = test.run("a", PROBE_IMAGE, &["sleep", "1000"]).detach();
    let (pid, status) = test.task(&id).unwrap();
    assert_eq!(status, "RUNNING");
    // containerd, CNI and others look at /proc/<pid>: it is the shim.
    assert!(
        host::Process::read(pid)
            .unwrap()
            .command
            .contains("containerd-shim"),
        "{pid}"
    );

    let processes = || test.ctr(&["tasks", "ps", &id]).text();
    assert_eq!(processes().lines().count(), 2, "{}", processes());
    // Not detached: ctr would leave its FIFOs.
    let exec = test
        .containerd
        .ctr(&["tasks", "exec", "--exec-id", "second", &id, "sleep", "1000"]);
    let second = Session::start(exec, config().seconds(60));
    let started = wait_until(config().seconds(10), || {
        let list = processes();
        // Those that make it are not the container's.
        assert!(list.lines().count() <= 3, "{list}");
        list.contains("second")
    });
    assert!(started, "{second}");
    assert_eq!(processes().lines().count(), 3, "{}", processes());

    let before = metrics(&test, &id);
    let burn = ["tasks", "exec", "--exec-id", "burn", &id, "/probe", "burn", "300"];
    let _ = test.ctr(&burn).expect_code(0);
    let after = metrics(&test, &id);
    let used = cpu_ns(&after) - cpu_ns(&before);
    assert!(
        (200_000_000..30_000_000_000).contains(&used),
        "{used} ns of processor time for 300 ms"
    );
    assert!((1..256 << 20).contains(&memory(&after)), "{after}");
    assert_eq!(after["pids"]["current"], 2, "{after}");

    let _ = test
        .ctr(&["tasks", "kill", "-s", "SIGKILL", "--exec-id", "second", &id])
        .text();
    assert!(
        wait_until(config().seconds(5), || processes().lines().count() == 2),
        "{}",
        processes()
    );
    let _ = second.finish().expect_code(137);
    test.kill_and_remove(&id);
}

#[test]
fn a_paused_container_stands_still() {
    let test = fixture("pause");
    let run = test.run("a", PROBE_IMAGE, &["/probe", "tick"]);
    let session = run.start();
    session.wait_for("tick 3\n");
    let _ = test.ctr(&["tasks", "pause", &run.id]).text();
    assert_eq!(test.task(&run.id).unwrap().1, "PAUSED");
    // What was in the pipes may still arrive.
    thread::sleep(Duration::from_millis(500));
    let paused = session.stdout();
    thread::sleep(Duration::from_secs(1));
    assert_eq!(session.stdout(), paused, "it goes on while paused");
    let exec = ["tasks", "exec", "--exec-id", "x", &run.id, "true"];
    let _ = test.ctr(&exec).expect_error(&["paused"]);
    let _ = test
        .ctr(&["tasks", "pause", &run.id])
        .expect_error(&["paused", "not running", "precondition"]);
    let _ = test.ctr(&["tasks", "resume", &run.id]).text();
    assert_eq!(test.task(&run.id).unwrap().1, "RUNNING");
    let next = paused.lines().count() + 5;
    session.wait_for(&format!("tick {next}\n"));
    let _ = test.ctr(&["tasks", "kill", "-s", "SIGKILL", &run.id]).text();
    let _ = session.finish().expect_code(137);
}

#[test]
fn kill_reaches_one_process_or_all() {
    let test = fixture("kill-all");
    let run = test.run("all", PROBE_IMAGE, &["/probe", "trap", "3"]);
    let session = run.start();
    session.wait_for_count("waiting", 4);
    let _ = test
        .ctr(&["tasks", "kill", "-s", "SIGTERM", "-a", &run.id])
        .text();
    let done = session.finish().expect_code(7);
    let text = String::from_utf8_lossy(&done.stdout);
    assert_eq!(text.matches("child got SIGTERM").count(), 3, "{done}");
    assert!(text.ends_with("init got SIGTERM\n"), "{done}");

    let run = test.run("one", PROBE_IMAGE, &["/probe", "trap", "0"]);
    let session = run.start();
    session.wait_for("waiting");
    let _ = test.ctr(&["tasks", "kill", "-s", "SIGTERM", &run.id]).text();
    let _ = session.finish().expect_code(7);
}

#[test]
fn errors_have_the_right_code() {
    let test = fixture("errors");
    let id = test
        .busybox(
            "a",
            &["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"],
        )
        .detach();
    let exec = |name: &str| {
        let script = "echo up; exec sleep 1000";
        test.containerd
            .ctr(&["tasks", "exec", "--exec-id", name, &id, "sh", "-c", script])
    };
    let refused = |name: &str| Session::start(exec(name), config().seconds(30)).finish();
    let same = Session::start(exec("same"), config().seconds(60));
    same.wait_for("up");
    let _ = refused("same").expect_error(&["already exists"]);
    let _ = test
        .ctr(&["tasks", "delete", &id])
        .expect_error(&["precondition", "running"]);
    let missing = ["tasks", "exec", "--exec-id", "missing", &id, "/no/such/program"];
    let said = test.ctr(&missing).expect_error(&["no such file", "not found"]);
    assert!(said.contains("/no/such/program"), "{said}");
    let _ = test.ctr(&["tasks", "kill", "-s", "SIGTERM", &id]).text();
    test.wait_status(&id, "STOPPED");
    let _ = test
        .ctr(&["tasks", "kill", &id])
        .expect_error(&["not found", "already finished"]);
    let _ = same.finish().expect_code(137);
    let _ = refused("late").expect_error(&["precondition", "not running", "stopped", "not found"]);
    test.delete(&id, 3);
    let _ = test.ctr(&["tasks", "kill", &id]).expect_error(&["not found"]);
    test.remove(&id);
}

#[test]
fn a_container_starts_again_after_its_task_is_deleted() {
    let test = fixture("again");
    let script = "test -e /mark && echo second || echo first; touch /mark";
    let id = test.busybox("a", &["sh", "-c", script]).create();
    assert!(test.task(&id).is_none());
    assert_eq!(test.ctr(&["tasks", "start", &id]).text(), "first\n");
    assert_eq!(test.ctr(&["tasks", "start", &id]).text(), "second\n");
    test.remove(&id);
}

#[test]
fn a_second_process_has_its_own_user_directory_and_terminal() {
    let test = fixture("exec-options");
    let id = test.run("a", PROBE_IMAGE, &["sleep", "1000"]).detach();
    let exec = [
        "tasks",
        "exec",
        "--exec-id",
        "x",
        "--user",
        "1234:2345",
        "--cwd",
        "/etc",
        &id,
        "/probe",
        "report",
    ];
    let seen: Value = serde_json::from_str(&test.ctr(&exec).text()).unwrap();
    assert_eq!(seen["status"]["Uid"], "1234\t1234\t1234\t1234");
    assert_eq!(seen["status"]["Gid"], "2345\t2345\t2345\t2345");
    assert_eq!(seen["cwd"], "/etc");
    let mut command = test
        .containerd
        .ctr(&["tasks", "exec", "--tty", "--exec-id", "t", &id]);
    let size = "until stty size 2>/dev/null | grep -v ^0; do sleep 0.1; done";
    command.args([
        "sh",
        "-c",
        &format!("tty; read line; echo got $line; {size}; exit 4"),
    ]);
    let mut session = Session::start_on_terminal(command, 40, 120, config().seconds(30));
    session.wait_for("/dev/pts/");
    session.send("typed\n");
    session.wait_for("got typed");
    session.wait_for("40 120");
    let _ = session.finish().expect_code(4);
    test.kill_and_remove(&id);
}
