#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

const EXIT: Exit = Exit { status: 0, at_ns: 1 };

fn told(list: &[ToldExit]) -> Vec<(&str, u32)> {
    list.iter()
        .map(|exit| (exit.exec.as_str(), exit.exit.status))
        .collect()
}

fn running() -> Container {
    let mut container = Container::new("c");
    container.created();
    container.begin_start("").unwrap();
    assert!(container.started("").is_empty());
    container
}

fn running_with_exec() -> Container {
    let mut container = running();
    container.add_exec("e").unwrap();
    container.begin_start("e").unwrap();
    assert!(container.started("e").is_empty());
    container
}

#[test]
fn the_ordinary_life() {
    let mut container = Container::new("c");
    assert!(container.check_delete("").is_err());
    container.created();
    assert_eq!(container.status("").unwrap(), Status::Created);
    assert!(container.check_delete("").is_ok());
    container.begin_start("").unwrap();
    assert!(container.begin_start("").is_err());
    assert!(container.started("").is_empty());
    assert_eq!(container.status("").unwrap(), Status::Running);
    assert!(container.check_delete("").is_err());
    assert_eq!(told(&container.exited("", EXIT)), [("", 0)]);
    assert_eq!(container.status("").unwrap(), Status::Stopped);
    assert!(container.exited("", EXIT).is_empty());
    assert!(matches!(container.check_signal(""), Err(Error::Finished)));
    assert!(container.check_delete("").is_ok());
}

#[test]
fn an_exit_before_the_answer_to_start_is_told_after_it() {
    let mut container = Container::new("c");
    container.created();
    container.begin_start("").unwrap();
    assert!(container.exited("", EXIT).is_empty());
    assert_eq!(told(&container.started("")), [("", 0)]);
}

#[test]
fn init_exits_last() {
    let mut container = running_with_exec();
    assert!(container.exited("", EXIT).is_empty());
    assert!(container.is_holding());
    assert!(matches!(container.check_signal(""), Err(Error::Finished)));
    assert_eq!(
        told(&container.exited(
            "e",
            Exit {
                status: 137,
                at_ns: 2
            }
        )),
        [("e", 137), ("", 0)]
    );
}

#[test]
fn a_missing_exec_exit_does_not_hold_init_for_ever() {
    let mut container = running_with_exec();
    container.exited("", EXIT);
    assert_eq!(told(&container.force_release()), [("e", 137), ("", 0)]);
    assert!(container.force_release().is_empty());
}

#[test]
fn the_end_of_the_machine_ends_everything_once() {
    let mut container = running_with_exec();
    let lost = Exit {
        status: 137,
        at_ns: 9,
    };
    assert_eq!(told(&container.lost(lost)), [("e", 137), ("", 137)]);
    assert!(container.lost(lost).is_empty());
    assert!(container.check_delete("").is_ok() && container.check_delete("e").is_ok());
}

#[test]
fn the_end_of_the_machine_while_starting_is_told_once() {
    let mut container = Container::new("c");
    container.created();
    container.begin_start("").unwrap();
    assert_eq!(told(&container.lost(EXIT)), [("", 0)]);
    assert!(container.start_failed("").is_empty());
    assert!(container.started("").is_empty());
    assert_eq!(container.status("").unwrap(), Status::Stopped);
}

#[test]
fn pausing_refuses_what_needs_a_running_container() {
    let mut container = running();
    container.begin_pause().unwrap();
    assert_eq!(container.status("").unwrap(), Status::Pausing);
    assert!(container.begin_pause().is_err() && container.begin_resume().is_err());
    assert!(container.pause_done(true));
    assert_eq!(container.status("").unwrap(), Status::Paused);
    assert!(matches!(container.add_exec("e"), Err(Error::State { .. })));
    container.begin_resume().unwrap();
    assert!(container.resume_done(true));
    assert_eq!(container.status("").unwrap(), Status::Running);
    container.begin_pause().unwrap();
    assert!(!container.pause_done(false));
    assert_eq!(container.status("").unwrap(), Status::Running);
}

#[test]
fn execs_need_unique_names_and_a_start_before_a_signal() {
    let mut container = running();
    container.add_exec("e").unwrap();
    assert!(matches!(container.add_exec("e"), Err(Error::Exists(_))));
    assert!(matches!(container.check_signal("e"), Err(Error::State { .. })));
    assert!(matches!(
        container.check_signal("x"),
        Err(Error::NoProcess { .. })
    ));
    assert!(container.check_delete("e").is_ok());
    container.forget_exec("e");
    container.add_exec("e").unwrap();
}

#[derive(Clone, Debug)]
enum Step {
    Created,
    AddExec(u8),
    Begin(u8),
    Started(u8),
    StartFailed(u8),
    Exited(u8),
    Pause,
    Resume,
    Lost,
    Force,
    Forget(u8),
}

fn steps() -> impl Strategy<Value = Step> {
    let process = 0u8..3;
    prop_oneof![
        Just(Step::Created),
        (1u8..3).prop_map(Step::AddExec),
        process.clone().prop_map(Step::Begin),
        process.clone().prop_map(Step::Started),
        process.clone().prop_map(Step::StartFailed),
        process.prop_map(Step::Exited),
        Just(Step::Pause),
        Just(Step::Resume),
        Just(Step::Lost),
        Just(Step::Force),
        (1u8..3).prop_map(Step::Forget),
    ]
}

fn name(process: u8) -> String {
    if process == 0 {
        String::new()
    } else {
        format!("e{process}")
    }
}

proptest! {
    /// Whatever happens in whatever order: no process's exit is told twice, init's is the last told of
    /// those alive, and a stopped process stays stopped.
    #[test]
    fn exits_are_told_once_and_init_last(list in proptest::collection::vec(steps(), 0..60)) {
        let mut container = Container::new("c");
        let mut gone: Vec<String> = Vec::new();
        for step in list {
            let told = match step {
                Step::Created => { container.created(); vec![] }
                Step::AddExec(n) => {
                    if container.add_exec(&name(n)).is_ok() {
                        gone.retain(|exec| *exec != name(n));
                    }
                    vec![]
                }
                Step::Begin(n) => { let _ = container.begin_start(&name(n)); vec![] }
                Step::Started(n) => container.started(&name(n)),
                Step::StartFailed(n) => container.start_failed(&name(n)),
                Step::Exited(n) => container.exited(&name(n), EXIT),
                Step::Pause => {
                    if container.begin_pause().is_ok() { container.pause_done(true); }
                    vec![]
                }
                Step::Resume => {
                    if container.begin_resume().is_ok() { container.resume_done(true); }
                    vec![]
                }
                Step::Lost => container.lost(EXIT),
                Step::Force => container.force_release(),
                Step::Forget(n) => {
                    if container.check_delete(&name(n)).is_ok() { container.forget_exec(&name(n)); }
                    vec![]
                }
            };
            for exit in told {
                prop_assert!(!gone.contains(&exit.exec), "{} told twice", exit.exec);
                prop_assert!(!gone.contains(&String::new()), "{} told after init", exit.exec);
                prop_assert!(container.process(&exit.exec).is_ok_and(|p| p.exit().is_some()));
                gone.push(exit.exec);
            }
        }
    }
}
