//! A process of the host side is killed.

use std::fs;
use std::time::{Duration, Instant};

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::{Session, config, host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::events::{follow, of_task};
use crate::fixture;

fn kill_hard(pid: i32) -> Instant {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    Instant::now()
}

/// How long after `killed` the container's exit event came to a client, and its status.
fn exit_after(events: &Session, id: &str, killed: Instant) -> (Duration, u64) {
    let mut status = None;
    let seen = wait_until(config().seconds(10), || {
        let mut exits = of_task(events, id)
            .into_iter()
            .filter(|(topic, event)| topic == "/tasks/exit" && event["id"] == id);
        status = exits
            .next_back()
            .and_then(|(_, event)| event["exit_status"].as_u64());
        status.is_some()
    });
    assert!(seen, "containerd heard of no exit: {events}");
    (killed.elapsed(), status.unwrap())
}

#[test]
fn the_vmm_is_killed_and_containerd_hears_the_exit_within_a_second() {
    let test = fixture("kill-vmm");
    let events = follow(&test);
    let id = test.busybox("a", &["sleep", "1000"]).detach();
    let exec = test
        .containerd
        .ctr(&["tasks", "exec", "--exec-id", "second", &id, "sleep", "1000"]);
    let exec = Session::start(exec, config().seconds(30));
    assert!(
        wait_until(config().seconds(10), || of_task(&events, &id).len() >= 4),
        "{events}"
    );
    let (shim, _) = test.task(&id).unwrap();
    let vmms = host::vmms_of(shim);
    assert_eq!(vmms.len(), 1);

    let killed = kill_hard(vmms[0]);
    let (after, status) = exit_after(&events, &id, killed);
    assert_eq!(status, 137, "{events}");
    println!("the exit event came after {after:?}");
    // In the emulated host too.
    assert!(
        after <= Duration::from_secs(1),
        "the exit event came after {after:?}"
    );
    // The second process has ended as well, and its exit was told before the first one's.
    let exits: Vec<_> = of_task(&events, &id)
        .into_iter()
        .filter(|(topic, _)| topic == "/tasks/exit")
        .collect();
    assert_eq!(
        exits.iter().map(|(_, event)| &event["id"]).collect::<Vec<_>>(),
        ["second", &id],
        "{events}"
    );
    let _ = exec.finish().expect_code(137);
    test.delete(&id, 137);
    test.remove(&id);
    drop(events);
}

#[test]
fn the_shim_is_killed_and_the_vmm_dies_with_it() {
    let test = fixture("kill-shim");
    let events = follow(&test);
    let mount = format!(
        "type=bind,src={},dst=/shared,options=rbind:rw",
        test.work.display()
    );
    let id = test
        .busybox("a", &["sleep", "1000"])
        .with(&["--mount", &mount])
        .detach();
    let (shim, _) = test.task(&id).unwrap();
    let vmms = host::vmms_of(shim);
    assert_eq!(vmms.len(), 1);

    let killed = kill_hard(shim);
    let dead = wait_until(config().seconds(1), || !host::is_alive(vmms[0]));
    assert!(dead, "the VMM outlives its shim");
    let (_, status) = exit_after(&events, &id, killed);
    assert_eq!(status, 137, "{events}");
    // containerd has run the shim's delete; what is left to the client is the container.
    assert!(
        wait_until(config().seconds(5), || test.task(&id).is_none()),
        "{:?}",
        test.task(&id)
    );
    test.remove(&id);
    drop(events);
    test.expect_clean();
}

/// Both at once, so that nobody is left to say what happened, at several moments of a start.
#[test]
fn shim_and_vmm_are_killed_while_the_container_starts() {
    let test = fixture("kill-start");
    let shims = || {
        host::processes()
            .into_iter()
            .filter(|process| process.command.contains("containerd-shim-"))
    };
    for (number, delay) in [0, 300, 1000].into_iter().enumerate() {
        let run = test
            .busybox(&number.to_string(), &["sh", "-c", "echo up; sleep 1000"])
            .keep();
        let session = run.start();
        let started = wait_until(config().seconds(10), || {
            shims().any(|process| {
                process.command.contains(&run.id) && fs::metadata(test.containerd.bundle(&run.id)).is_ok()
            })
        });
        assert!(started, "{session}");
        std::thread::sleep(Duration::from_millis(delay));
        for process in host::processes().into_iter().filter(host::Process::is_runtime) {
            // It may have gone by itself.
            let _ = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
        }
        let done = session.finish();
        assert_ne!(done.status.code(), Some(0), "{done}");
        let gone = wait_until(config().seconds(10), || {
            let _ = test.ctr(&["tasks", "delete", "-f", &run.id]);
            test.task(&run.id).is_none()
        });
        assert!(gone, "{:?}", test.task(&run.id));
        test.remove(&run.id);
        test.containerd.forget_fifos(&run.id);
        test.expect_clean();
    }
}
