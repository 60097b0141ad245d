use std::fs::{File, OpenOptions};
use std::time::{Duration, Instant};

use super::guest::code;
use super::runner::run_program;
use super::*;

/// Bound of the run plus the second `run` may take on top, plus slack for a busy machine.
const LIMIT: Duration = Duration::from_secs(20);
const BOUND: Duration = Duration::from_secs(25);

fn open_kvm() -> Option<File> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").ok()
}

#[test]
fn steps_are_numbered_in_order() {
    for (index, step) in Step::ALL.into_iter().enumerate() {
        assert_eq!(step as usize, index);
        assert_eq!(Step::from_number(index as u8), Some(step));
    }
    assert_eq!(Step::from_number(Step::ALL.len() as u8), None);
}

#[test]
fn program_fits_between_its_address_and_the_window() {
    assert!(!code().is_empty());
    assert!(machine::CODE + (code().len() as u64) < machine::WINDOW);
    // mov r15d, DATA: the section was assembled for 64-bit mode and begins at its first instruction.
    assert_eq!(code()[..2], [0x41, 0xbf]);
}

/// Whatever `/dev/kvm` is, the probe ends in time and its report agrees with itself.
#[test]
fn run_ends_in_time_with_a_consistent_report() {
    let Some(kvm) = open_kvm() else {
        // Nothing to run on: the other tests still hold, and `bulkhead check` reports the missing device.
        return;
    };
    let start = Instant::now();
    let report = run(kvm, LIMIT);
    assert!(start.elapsed() < BOUND, "took {:?}", start.elapsed());
    assert_eq!(report.steps.len(), Step::ALL.len());
    let ended = report
        .steps
        .iter()
        .all(|(_, outcome)| matches!(outcome, Outcome::Passed | Outcome::NotOffered));
    assert_eq!(ended, report.failure.is_none(), "{report:?}");
    let failed = report
        .steps
        .iter()
        .filter(|(_, outcome)| *outcome == Outcome::Failed)
        .count();
    assert!(failed <= 1, "one step at most is the last: {report:?}");
}

#[test]
fn a_file_that_is_not_kvm_fails_at_once() {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .expect("/dev/null");
    let report = run(file, LIMIT);
    assert!(
        matches!(report.failure, Some(Failure::Setup(SetupError::CreateVm(_)))),
        "{report:?}"
    );
    assert!(
        report
            .steps
            .iter()
            .all(|(_, outcome)| *outcome == Outcome::NotReached)
    );
}

#[test]
fn a_file_that_is_not_kvm_has_no_capabilities() {
    let found = capabilities(File::open("/dev/null").expect("/dev/null"));
    assert_ne!(found.api_version, API_VERSION);
    assert!(found.list.is_empty());
}

/// Guests that never report: one spins, one halts with interrupts off.
#[test]
fn a_guest_that_hangs_is_stopped() {
    const SPIN: &[u8] = &[0xeb, 0xfe]; // jmp .
    const HALT: &[u8] = &[0xfa, 0xf4]; // cli; hlt
    for program in [SPIN, HALT] {
        let Some(kvm) = open_kvm() else { return };
        let start = Instant::now();
        let report = run_program(kvm, Duration::from_millis(200), program);
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "took {:?}",
            start.elapsed()
        );
        assert!(report.failure.is_some(), "{report:?}");
        assert!(
            report
                .steps
                .iter()
                .all(|(_, outcome)| *outcome == Outcome::NotReached)
        );
    }
}
