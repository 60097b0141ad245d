#![allow(clippy::unwrap_used)]

use super::*;
use crate::fake::{self, not_found, refusal};

fn planned(id: &str, writable: bool) -> Planned {
    Planned {
        container: Container {
            id: id.to_owned(),
            ..Container::default()
        },
        root: Some(Root {
            request: NewSnapshot {
                snapshotter: "overlayfs".to_owned(),
                key: id.to_owned(),
                parent: "image".to_owned(),
                ..NewSnapshot::default()
            },
            writable,
        }),
        terminal: false,
        output: String::new(),
    }
}

/// A pod with a sandbox that has no snapshot, and two containers.
fn pod() -> Vec<Planned> {
    let mut sandbox = planned("pod", true);
    sandbox.root = None;
    vec![sandbox, planned("a", true), planned("b", false)]
}

/// What is removed of a container that has been made, in its order.
fn removal(id: &str) -> Vec<String> {
    let calls = ["Tasks/Kill", "Tasks/Wait", "Tasks/Delete", "Containers/Delete"];
    let mut calls: Vec<_> = calls.iter().map(|call| format!("{call} {id}")).collect();
    if id != "pod" {
        calls.push(format!("Snapshots/Remove {id}"));
    }
    calls
}

#[test]
fn a_sandbox_runs_before_its_containers_and_they_go_on_when_all_are_there() {
    let (client, calls) = fake::client(|_| Ok(None));
    begin(&client, &pod()).unwrap();
    assert_eq!(
        calls.take(),
        [
            "Containers/Create pod",
            "Tasks/Create pod on ",
            "Tasks/Start pod",
            "Containers/Create a",
            "Snapshots/Prepare a of image",
            "Tasks/Create a on a",
            "Containers/Create b",
            "Snapshots/View b of image",
            "Tasks/Create b on b",
            "Tasks/Start a",
            "Tasks/Start b",
        ]
    );
    begin(&client, &[planned("alone", true)]).unwrap();
    assert_eq!(calls.take().last().unwrap(), "Tasks/Start alone");
}

#[test]
fn what_was_made_is_removed_when_a_step_fails_the_last_first() {
    let everything = [removal("b"), removal("a"), removal("pod")].concat();
    let before_b = [removal("a"), removal("pod")].concat();
    for (failing, words, undone) in [
        ("Containers/Create pod", "does not take container pod", vec![]),
        (
            "Tasks/Create pod",
            "create the task of container pod",
            removal("pod"),
        ),
        (
            "Containers/Create b",
            "does not take container b",
            before_b.clone(),
        ),
        (
            "Snapshots/View b",
            "root file system of container b",
            [vec!["Containers/Delete b".to_owned()], before_b].concat(),
        ),
        (
            "Tasks/Create b",
            "create the task of container b",
            everything.clone(),
        ),
        ("Tasks/Start b", "start the task of container b", everything),
    ] {
        let (client, calls) = fake::client(move |note| match note.starts_with(failing) {
            true => Err(refusal("no such luck")),
            false => Ok(None),
        });
        let error = format!("{:#}", begin(&client, &pod()).unwrap_err());
        assert!(
            error.contains(words) && error.ends_with("no such luck"),
            "{error}"
        );
        let calls = calls.take();
        let failed = calls.iter().position(|call| call.starts_with(failing)).unwrap();
        assert_eq!(calls[failed + 1..], undone, "{failing}");
    }
}

#[test]
fn a_container_that_was_there_before_is_left_alone() {
    let (client, calls) = fake::client(|note| match note.starts_with("Containers/Create") {
        true => Err(refusal("already exists")),
        false => Ok(None),
    });
    assert!(begin(&client, &[planned("theirs", true)]).is_err());
    assert_eq!(calls.take(), ["Containers/Create theirs"]);
}

#[test]
fn what_cannot_be_removed_is_named_and_what_is_gone_is_not() {
    let (client, _) = fake::client(|note| match note.split(' ').next().unwrap() {
        "Tasks/Start" => Err(refusal("it has ended")),
        "Tasks/Kill" | "Tasks/Wait" | "Tasks/Delete" => Err(not_found()),
        "Snapshots/Remove" => Err(refusal("busy")),
        _ => Ok(None),
    });
    let error = format!("{:#}", begin(&client, &[planned("a", true)]).unwrap_err());
    assert_eq!(
        error,
        "Cannot start the task of container a: code 9: it has ended; not all could be removed again: \
         root file system a (code 9: busy)"
    );
}
