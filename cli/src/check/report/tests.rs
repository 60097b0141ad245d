use super::*;

fn report(verdicts: &[Verdict]) -> Report {
    let mut report = Report::default();
    for (index, verdict) in verdicts.iter().enumerate() {
        report.add("Group", format!("item {index}"), *verdict, "a reason", "");
    }
    report
}

#[test]
fn only_met_and_dispensable_requirements_make_a_machine_ready() {
    assert!(report(&[Verdict::Yes, Verdict::Missing, Verdict::NotOffered]).ready());
    assert!(!report(&[Verdict::Yes, Verdict::No]).ready());
    assert!(!report(&[Verdict::Yes, Verdict::Unknown]).ready());
    assert!(!report(&[]).ready(), "nothing examined proves nothing");
}

#[test]
fn text_names_what_failed_and_its_remedy() {
    let mut report = report(&[Verdict::Yes]);
    report.add(
        "KVM",
        "/dev/kvm",
        Verdict::No,
        "it does not exist",
        "modprobe kvm_intel",
    );
    let text = report.text();
    assert!(
        text.contains("no           /dev/kvm  it does not exist\n"),
        "{text}"
    );
    assert!(text.contains("-> modprobe kvm_intel\n"), "{text}");
    assert!(
        text.ends_with("No pod can run on this machine: /dev/kvm.\n"),
        "{text}"
    );
}

#[test]
fn text_of_a_ready_machine_says_so_and_has_each_group_once() {
    let text = report(&[Verdict::Yes, Verdict::NotOffered]).text();
    assert!(text.ends_with("A pod can run on this machine.\n"), "{text}");
    assert_eq!(text.matches("Group\n").count(), 1, "{text}");
    assert!(text.contains("not offered  item 1"), "{text}");
}

#[test]
fn an_unexamined_requirement_is_never_called_ready_in_text() {
    assert!(!report(&[Verdict::Unknown]).text().contains("A pod can run"));
}

#[test]
fn json_has_every_field() {
    let mut report = report(&[Verdict::Yes]);
    report.add("KVM", "quoted \"name\"", Verdict::No, "reason", "remedy");
    let value: serde_json::Value = serde_json::from_str(&report.json()).unwrap();
    assert_eq!(value["ready"], false);
    assert_eq!(value["requirements"][0]["verdict"], "yes");
    assert_eq!(
        value["requirements"][1],
        serde_json::json!({
            "group": "KVM", "name": "quoted \"name\"", "verdict": "no", "reason": "reason", "remedy": "remedy",
        })
    );
}
