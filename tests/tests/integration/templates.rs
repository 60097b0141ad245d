//! VMs that begin where another was written down.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_tests::Fixture;
use serde_json::Value;

use crate::fixture;

/// A test with templates of its own, and its configuration's file.
struct Store {
    test: Fixture,
    templates: PathBuf,
    timelines: PathBuf,
}

impl Store {
    fn new(name: &'static str) -> Self {
        let test = fixture(name);
        let (templates, timelines) = (test.work.join("templates"), test.work.join("timelines"));
        fs::create_dir(&timelines).unwrap();
        Self {
            test,
            templates,
            timelines,
        }
    }

    fn settings(&self, changes: &[(&str, Value)]) -> String {
        let mut all = vec![
            ("template_dir", self.templates.to_str().into()),
            ("timeline_dir", self.timelines.to_str().into()),
            ("boot_timeout_s", 300.into()),
        ];
        all.extend_from_slice(changes);
        self.test.configuration(&all)
    }

    /// Runs a command in a VM of its own.
    fn run(&self, name: &str, settings: &str, command: &[&str]) -> String {
        let run = self
            .test
            .probe(name, command)
            .with(&["--cap-add", "CAP_NET_ADMIN"])
            .with(&["--runtime-config-path", settings]);
        run.finish().text()
    }

    /// Phases of the start of a container's VM.
    fn phases(&self, name: &str) -> Vec<String> {
        let file = self
            .timelines
            .join(format!("{}.json", self.test.probe(name, &[]).id));
        let timeline: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        timeline["marks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mark| mark["phase"].as_str().unwrap().to_owned())
            .collect()
    }

    /// Whether a container's VM booted a kernel.
    fn booted(&self, name: &str) -> bool {
        self.phases(name).contains(&"agent_main".to_owned())
    }

    fn left_a_template(&self, name: &str) -> bool {
        self.phases(name).contains(&"template_written".to_owned())
    }

    fn names(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.templates) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

#[test]
fn clones_of_one_template_have_nothing_of_their_own_in_common() {
    let store = Store::new("template-unique");
    let settings = store.settings(&[]);
    let mut reports = Vec::new();
    for name in ["a", "b", "c"] {
        let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let report: Value = serde_json::from_str(&store.run(name, &settings, &["unique"])).unwrap();
        let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        // The clock is that of the host, whatever it was when the template was written.
        let seen = Duration::from_millis(report["realtime_ms"].as_u64().unwrap());
        let slack = Duration::from_millis(500);
        assert!(
            seen + slack >= before && seen <= after + slack,
            "{before:?} {seen:?} {after:?}"
        );
        reports.push(report);
    }
    assert_eq!(
        ["a", "b", "c"].map(|name| store.booted(name)),
        [true, false, false]
    );
    assert_eq!(
        ["a", "b", "c"].map(|name| store.left_a_template(name)),
        [true, false, false]
    );
    assert_eq!(store.names().len(), 1);
    // The first that began there told which memory those after it will write.
    let list = fs::read(store.templates.join(&store.names()[0]).join("written")).unwrap();
    assert!(
        !list.is_empty() && list.len().is_multiple_of(16),
        "{} bytes",
        list.len()
    );
    for key in ["boot_id", "uuid", "urandom", "getrandom", "sequence", "hostname"] {
        let values: HashSet<String> = reports.iter().map(|report| report[key].to_string()).collect();
        assert_eq!(values.len(), 3, "{key}: {values:?}");
    }
}

#[test]
fn a_template_that_is_damaged_or_out_of_date_is_made_anew() {
    let store = Store::new("template-stale");
    let kernel = store.test.work.join("vmlinux");
    let settings = store.settings(&[]);
    let current: Value = serde_json::from_slice(&fs::read(&settings).unwrap()).unwrap();
    let original = current["kernel"]
        .as_str()
        .unwrap_or("/usr/local/share/bulkhead/vmlinux");
    fs::copy(original, &kernel).unwrap();
    let settings = store.settings(&[("kernel", kernel.to_str().into())]);
    let run = |name: &str| store.run(name, &settings, &["emit", "1"]);
    let _ = run("a");
    let first = store.names();
    assert_eq!(first.len(), 1);

    // Not a template any more.
    let state = store.templates.join(&first[0]).join("state");
    let mut bytes = fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, &bytes).unwrap();
    let _ = run("b");
    assert!(store.booted("b") && store.left_a_template("b"));
    assert_eq!(store.names(), first);
    let _ = run("c");
    assert!(!store.booted("c"));

    // Another kernel.
    let next = store.test.work.join("next");
    fs::copy(original, &next).unwrap();
    fs::rename(&next, &kernel).unwrap();
    let _ = run("d");
    assert!(store.booted("d") && store.left_a_template("d"));
    assert_eq!(store.names().len(), 1);
    assert_ne!(store.names(), first);
    let _ = run("e");
    assert!(!store.booted("e"));
}

#[test]
fn many_first_pods_leave_one_template() {
    let store = Store::new("template-race");
    let settings = store.settings(&[]);
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let (store, settings) = (&store, &settings);
            scope.spawn(move || {
                let run = store
                    .test
                    .probe(name, &["emit", "1"])
                    .with(&["--runtime-config-path", settings]);
                let _ = run.start_for(60).finish().expect_code(0);
            });
        }
    });
    assert_eq!(store.names().len(), 1);
    let written = ["a", "b", "c", "d"]
        .iter()
        .filter(|name| store.left_a_template(name))
        .count();
    assert_eq!(written, 1);
    let _ = store.run("e", &settings, &["emit", "1"]);
    assert!(!store.booted("e"));
}

#[test]
fn templates_are_off_when_they_are_and_kept_apart_when_they_are() {
    let store = Store::new("template-off");
    let off = store.settings(&[("templates", "off".into())]);
    let _ = store.run("a", &off, &["emit", "1"]);
    let _ = store.run("b", &off, &["emit", "1"]);
    assert!(store.booted("b") && !store.left_a_template("b"));
    assert!(store.names().is_empty());
    let apart = store.settings(&[("templates", "namespace".into())]);
    let _ = store.run("c", &apart, &["emit", "1"]);
    assert!(store.left_a_template("c"));
    let shape = store.templates.join(&store.names()[0]).join("shape.json");
    let shape: Value = serde_json::from_slice(&fs::read(shape).unwrap()).unwrap();
    assert_eq!(shape["scope"].as_str(), Some(store.test.containerd.namespace));
    let shared = store.settings(&[]);
    let _ = store.run("d", &shared, &["emit", "1"]);
    assert!(store.left_a_template("d"));
    assert_eq!(store.names().len(), 2);
}

#[test]
fn a_clone_grows_to_the_size_of_its_pod() {
    let store = Store::new("template-size");
    let settings = store.settings(&[("max_vcpus", 2.into())]);
    let _ = store.run("a", &settings, &["emit", "1"]);
    let run = store
        .test
        .busybox(
            "b",
            &["sh", "-c", "nproc; awk '/MemTotal/ { print $2 }' /proc/meminfo"],
        )
        .with(&["--memory-limit", "536870912", "--cpus", "2"])
        .with(&["--runtime-config-path", &settings]);
    let text = run.start_for(60).finish().text();
    assert!(!store.booted("b"));
    let numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(numbers[0], 2, "{text}");
    assert!(numbers[1] > 500 << 10, "{text}");
}
