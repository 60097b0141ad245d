#![allow(clippy::unwrap_used)]

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::storage::RootPlan;

fn container(events: &Events) -> Arc<Container> {
    let directory = PathBuf::from("/nonexistent");
    let plan = Plan {
        directory: directory.clone(),
        root: RootPlan::Directory("/".into()),
        volumes: Vec::new(),
        block_devices: Vec::new(),
    };
    // An id that has no cgroup.
    Arc::new(Container::new(
        "test-no-such-container",
        directory,
        plan,
        events.clone(),
    ))
}

fn exit(status: u32) -> Exit {
    Exit {
        status,
        at: Duration::ZERO,
    }
}

fn drain(events: &Events) -> Vec<(String, u32)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let subscription = events.subscribe();
        let mut seen = Vec::new();
        while let Ok(Some(event)) = tokio::time::timeout(Duration::ZERO, subscription.next()).await {
            if let Event::Exited { exec, exit, .. } = event {
                seen.push((exec, exit.status));
            }
            subscription.sent();
        }
        seen
    })
}

fn add_exec(container: &Container, exec: &str) {
    let mut state = container.state();
    state.execs.insert(exec.into(), Process::new());
    state.live += 1;
}

#[test]
fn init_exit_is_reported_last() {
    let events = Events::default();
    let container = container(&events);
    for exec in ["a", "b"] {
        add_exec(&container, exec);
    }
    container.init_exited(exit(0));
    assert_eq!(container.status(), Status::Creating);
    container.exec_exited("b", exit(137));
    container.exec_exited("a", exit(1));
    assert_eq!(container.status(), Status::Stopped);
    assert_eq!(
        drain(&events),
        [("b".into(), 137), ("a".into(), 1), (String::new(), 0)]
    );
}

#[test]
fn exited_processes_are_forgotten_in_the_end() {
    let events = Events::default();
    let container = container(&events);
    for n in 0..MAX_EXITED + 10 {
        let exec = format!("e{n}");
        add_exec(&container, &exec);
        container.exec_exited(&exec, exit(0));
    }
    let state = container.state();
    assert_eq!((state.execs.len(), state.live), (MAX_EXITED, 0));
    assert!(!state.execs.contains_key("e9") && state.execs.contains_key("e10"));
}

#[test]
fn waiters_of_running_and_of_exited_processes_are_answered() {
    let events = Events::default();
    let container = container(&events);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        let waiter = tokio::spawn({
            let container = Arc::clone(&container);
            async move { container.wait("").await }
        });
        tokio::task::yield_now().await;
        container.init_exited(exit(3));
        assert_eq!(waiter.await.unwrap().unwrap(), exit(3));
        assert_eq!(container.wait("").await.unwrap(), exit(3));
        assert!(matches!(container.wait("x").await, Err(Error::NoProcess(..))));
    });
}

#[test]
fn signals_are_checked() {
    let container = container(&Events::default());
    for signal in [0, 65, u32::MAX] {
        assert!(matches!(
            container.signal("", signal, false),
            Err(Error::Invalid { field: "signal", .. })
        ));
    }
    // No process yet.
    assert!(matches!(
        container.signal("", 9, false),
        Err(Error::NoProcess(..))
    ));
}

proptest! {
    /// Whatever the order of exits: every process is reported once and the init process last.
    #[test]
    fn every_exit_is_reported_once(order in Just((0..7usize).collect::<Vec<_>>()).prop_shuffle()) {
        let events = Events::default();
        let container = container(&events);
        for n in 1..7 {
            add_exec(&container, &format!("e{n}"));
        }
        for n in &order {
            match n {
                0 => container.init_exited(exit(0)),
                n => container.exec_exited(&format!("e{n}"), exit(*n as u32)),
            }
        }
        let seen = drain(&events);
        prop_assert_eq!(seen.len(), 7);
        prop_assert_eq!(&seen[6].0, "");
        let expected: Vec<u32> = order.iter().filter(|n| **n != 0).map(|n| *n as u32).collect();
        let got: Vec<u32> = seen[..6].iter().map(|(_, status)| *status).collect();
        prop_assert_eq!(got, expected);
    }
}
