use std::time::{Duration, Instant};

use super::*;

#[test]
fn absence_is_explained_by_the_processor() {
    let (reason, remedy) = explain_absence("vendor_id\t: GenuineIntel\nflags\t\t: fpu vmx sse2\n");
    assert!(reason.contains("kvm_intel"), "{reason}");
    assert_eq!(remedy, "modprobe kvm_intel");
    let (_, remedy) = explain_absence("flags\t\t: fpu svm sse2\n");
    assert_eq!(remedy, "modprobe kvm_amd");
    // A flag that only contains the name is not the flag.
    let (reason, remedy) = explain_absence("flags\t\t: fpu svm_lock sse2\n");
    assert!(reason.contains("neither VMX nor SVM"), "{reason}");
    assert!(remedy.contains("firmware"), "{remedy}");
}

#[test]
fn group_is_found_by_number() {
    let groups = "root:x:0:\nkvm:x:104:alice\n";
    assert_eq!(find_group(groups, 104).as_deref(), Some("kvm"));
    assert_eq!(find_group(groups, 1), None);
}

fn result(outcomes: &[Outcome], failure: Option<probe::Failure>) -> probe::Report {
    let steps = Step::ALL
        .into_iter()
        .enumerate()
        .map(|(index, step)| (step, outcomes.get(index).copied().unwrap_or(Outcome::NotReached)))
        .collect();
    probe::Report {
        steps,
        failure,
        elapsed: Duration::ZERO,
    }
}

#[test]
fn a_guest_that_passes_or_is_not_offered_is_enough() {
    let mut outcomes = [Outcome::Passed; Step::ALL.len()];
    outcomes[Step::Cmpxchg16b as usize] = Outcome::NotOffered;
    let mut report = Report::default();
    check_guest(&mut report, &result(&outcomes, None));
    assert!(report.ready(), "{}", report.text());
    assert!(
        report.text().contains("not offered  cmpxchg16b"),
        "{}",
        report.text()
    );
}

#[test]
fn the_failed_step_carries_the_reason() {
    let failure = probe::Failure::Emulation {
        suberror: 1,
        offset: 16,
        code: "0f 01 57 10".into(),
    };
    let mut report = Report::default();
    check_guest(
        &mut report,
        &result(&[Outcome::Passed, Outcome::Failed], Some(failure)),
    );
    let failed = report.failed();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].name, Step::PortIo.description());
    assert!(failed[0].reason.contains("0f 01 57 10"), "{}", failed[0].reason);
    assert!(!failed[0].remedy.is_empty());
}

#[test]
fn a_failure_before_the_first_step_is_reported_too() {
    let mut report = Report::default();
    check_guest(&mut report, &result(&[], Some(probe::Failure::TripleFault)));
    assert_eq!(report.failed().len(), 1);
    assert!(!report.ready());
}

#[test]
fn a_missing_device_is_a_failed_requirement() {
    let mut report = Report::default();
    check(&mut report, Path::new("/nonexistent/kvm"), Duration::from_secs(1));
    assert!(!report.ready());
    assert_eq!(report.failed()[0].name, "/nonexistent/kvm");
}

#[test]
fn a_device_that_is_not_kvm_is_found_out() {
    let mut report = Report::default();
    check(&mut report, Path::new("/dev/null"), Duration::from_secs(1));
    assert!(!report.ready());
    assert_eq!(report.failed()[0].name, "API version");
}

/// Whatever `/dev/kvm` is here, the check ends in time and says something about every step.
#[test]
fn the_real_device_is_judged_in_time() {
    let start = Instant::now();
    let mut report = Report::default();
    check(&mut report, Path::new("/dev/kvm"), Duration::from_secs(20));
    assert!(
        start.elapsed() < Duration::from_secs(25),
        "took {:?}",
        start.elapsed()
    );
    assert_eq!(
        report.ready(),
        report.text().contains("A pod can run"),
        "{}",
        report.text()
    );
}
