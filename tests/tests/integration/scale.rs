//! Many containers at once.

use std::collections::BTreeSet;
use std::thread;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::{Session, config, host};

use crate::fixture;

const COUNT: usize = 20;

#[test]
fn twenty_containers_started_at_once_all_run() {
    let test = fixture("twenty");
    let script = "echo up; read line; echo $line $(cat /proc/sys/kernel/random/boot_id)";
    // Twenty kernels share the processors of one small machine.
    let limit = config().seconds(60).as_secs().min(600);
    let patient = test.configuration(&[
        ("boot_timeout_s", limit.into()),
        ("request_timeout_s", limit.into()),
    ]);
    let runs: Vec<_> = (0..COUNT)
        .map(|number| test.busybox(&number.to_string(), &["sh", "-c", script]))
        .map(|run| run.with(&["--runtime-config-path", &patient]))
        .collect();
    let mut sessions: Vec<Session> = thread::scope(|scope| {
        let starting: Vec<_> = runs
            .iter()
            .map(|run| scope.spawn(|| run.start_for(180)))
            .collect();
        starting
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for session in &sessions {
        session.wait_for("up\n");
    }
    // All of them at the same time.
    let list = test.ctr(&["tasks", "ls"]).text();
    assert_eq!(list.matches("RUNNING").count(), COUNT, "{list}");
    assert_eq!(
        host::processes()
            .iter()
            .filter(|process| process.is_vmm())
            .count(),
        COUNT
    );
    for (number, session) in sessions.iter_mut().enumerate() {
        session.send(&format!("{number}\n"));
    }
    let mut boots = BTreeSet::new();
    for (number, session) in sessions.into_iter().enumerate() {
        let text = session.finish().text();
        let (_, answer) = text.split_once('\n').unwrap();
        let (echoed, boot) = answer.trim().split_once(' ').unwrap();
        assert_eq!(echoed, number.to_string());
        boots.insert(boot.to_owned());
    }
    assert_eq!(boots.len(), COUNT, "two containers were in one VM");
    assert!(wait_until(config().seconds(5), || !host::processes()
        .iter()
        .any(host::Process::is_vmm)));
}
