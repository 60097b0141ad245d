//! The events that containerd's clients get.

use std::time::UNIX_EPOCH;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::{Fixture, Session, config};
use serde_json::Value;

use crate::fixture;

/// A line of `ctr events`: topic and content.
pub fn parse(line: &str) -> Option<(&str, Value)> {
    let topic = &line[line.find(" /")? + 1..];
    let (topic, content) = topic.split_once(' ')?;
    Some((topic, serde_json::from_str(content).ok()?))
}

/// Starts to follow the events, and waits until it does.
pub fn follow(test: &Fixture) -> Session {
    follow_for(test, 120)
}

/// The same with a longer limit, in seconds on hardware.
pub fn follow_for(test: &Fixture, seconds: u32) -> Session {
    let session = Session::start(test.containerd.ctr(&["events"]), config().seconds(seconds));
    let label = test.id("subscribed");
    // The subscription is known to stand when an event that comes after it is seen.
    let seen = wait_until(config().seconds(10), || {
        let create = [
            "containers",
            "create",
            "--runtime",
            "io.containerd.runc.v2",
            &test.containerd.busybox,
            &label,
        ];
        let _ = test.ctr(&create).text();
        test.remove(&label);
        session.stdout().contains(&label)
    });
    assert!(seen, "no events come: {session}");
    session
}

/// Topics and contents of a container's task events so far.
pub fn of_task(session: &Session, id: &str) -> Vec<(String, Value)> {
    let text = session.stdout();
    let events = text
        .lines()
        .filter_map(parse)
        .filter(|(topic, event)| topic.starts_with("/tasks/") && event["container_id"] == id);
    events.map(|(topic, event)| (topic.to_owned(), event)).collect()
}

#[test]
fn events_come_in_order() {
    let test = fixture("events");
    let events = follow(&test);
    let id = test.busybox("a", &["sleep", "1000"]).detach();
    let exec = ["tasks", "exec", "--exec-id", "second", &id, "sh", "-c", "exit 9"];
    let _ = test.ctr(&exec).expect_code(9);
    let _ = test.ctr(&["tasks", "pause", &id]).text();
    let _ = test.ctr(&["tasks", "resume", &id]).text();
    test.kill_and_remove(&id);
    let complete = wait_until(config().seconds(10), || {
        of_task(&events, &id)
            .last()
            .is_some_and(|(topic, _)| topic == "/tasks/delete")
    });
    assert!(complete, "{events}");

    let seen = of_task(&events, &id);
    let topics: Vec<_> = seen
        .iter()
        .map(|(topic, _)| topic.trim_start_matches("/tasks/"))
        .collect();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    assert_eq!(topics, expected, "{events}");
    let event = |index: usize| &seen[index].1;
    assert_eq!(event(0)["bundle"], test.containerd.bundle(&id).to_str().unwrap());
    assert!(event(0)["pid"].as_u64().is_some_and(|pid| pid > 0));
    assert_eq!(
        (&event(3)["exec_id"], &event(4)["id"]),
        (&"second".into(), &"second".into())
    );
    assert_eq!(event(4)["exit_status"], 9);
    assert_eq!(
        (&event(7)["id"], &event(7)["exit_status"]),
        (&Value::from(id.as_str()), &137.into())
    );
    assert_eq!(event(8)["exit_status"], 137);
    assert_eq!(event(7)["exited_at"], event(8)["exited_at"]);
    let exited_at = &event(7)["exited_at"];
    let seconds = exited_at["seconds"]
        .as_u64()
        .unwrap_or_else(|| panic!("no time of exit: {exited_at}"));
    assert!(
        UNIX_EPOCH.elapsed().unwrap().as_secs().abs_diff(seconds) < 60,
        "{exited_at}"
    );
    // Dropped only now: containerd closes the stream's descriptors when its client goes.
    drop(events);
}
