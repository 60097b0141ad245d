#![allow(clippy::unwrap_used)]
use std::fs;

use super::*;

fn directory(name: &str) -> PathBuf {
    let directory = std::env::temp_dir().join(format!("bulkhead-cli-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    directory
}

fn record(marks: &[(&str, u64)]) -> Record {
    let marks: Vec<_> = marks
        .iter()
        .map(|(phase, time)| serde_json::json!({"phase": phase, "monotonic_us": time}))
        .collect();
    serde_json::from_value(serde_json::json!({"sandbox": "p", "marks": marks})).unwrap()
}

#[test]
fn a_pod_is_found_by_the_beginning_of_its_id() {
    let root = directory("find");
    let (state, old) = (root.join("state"), root.join("old"));
    fs::create_dir_all(&old).unwrap();
    for id in [
        "abc1.00000000",
        "abc2.00000000",
        "x.y.11111111",
        "x.22222222",
        "dup.1",
        "dup.2",
    ] {
        fs::create_dir_all(state.join(id)).unwrap();
        fs::write(state.join(id).join(FILE), "").unwrap();
    }
    // A pod of a version that kept none.
    fs::create_dir_all(state.join("none.3")).unwrap();
    for id in ["gone", "abc1"] {
        fs::write(old.join(format!("{id}.json")), "").unwrap();
    }
    let find = |pod: &str| find(pod, &state, Some(&old));
    assert_eq!(find("abc1").unwrap(), state.join("abc1.00000000").join(FILE));
    assert_eq!(find("x").unwrap(), state.join("x.22222222").join(FILE));
    assert_eq!(find("x.").unwrap(), state.join("x.y.11111111").join(FILE));
    assert_eq!(find("go").unwrap(), old.join("gone.json"));
    for (pod, text) in [
        ("abc", "abc is the beginning of several"),
        ("dup", "dup is the beginning of several"),
        ("none", "has an id that begins with none"),
        ("zzz", "has an id that begins with zzz"),
    ] {
        let error = find(pod).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    fs::remove_dir_all(root).unwrap();
}

#[test]
fn phases_lie_between_marks() {
    let record = record(&[
        ("shim_start", 1_000_000),
        ("shim_ready", 1_010_000),
        ("some_new_step", 1_010_004),
        ("vm_running", 1_010_004),
        ("agent_main", 1_090_000),
        ("first_output", 1_100_000),
    ]);
    let expected = "\
pod p: 100.00 ms from shim_start to first_output

    at ms   took ms  who          what
     0.00     10.00  shim         starts its server                        ####
    10.00      0.00               some new step                                |
    10.00      0.00  vmm          enters the guest
    10.00     79.99  guest        boots its kernel                             ################################
    90.00     10.00  guest        runs the program up to its first output                                      ####

in all: shim 10.00 ms; vmm 0.00 ms; guest 89.99 ms
";
    assert_eq!(chart::text(&record), expected);
    let json: serde_json::Value = serde_json::from_str(&chart::json(&record)).unwrap();
    assert_eq!(json["phases"][3]["phase"], "agent_main");
    assert_eq!(json["phases"][3]["took_us"], 79_996);
    assert_eq!(json["phases"][0]["from_us"], 0);
}

#[test]
fn marks_out_of_order_or_missing_do_no_harm() {
    assert_eq!(chart::text(&record(&[])), "pod p: no phase has ended yet\n");
    assert!(chart::text(&record(&[("shim_start", 5)])).starts_with("pod p: 0.00 ms"));
    let text = chart::text(&record(&[("a", 50), ("b", 10), ("c", 60)]));
    assert!(text.contains("0.01 ms from a to c"), "{text}");
}
