//! Running pods that are written down, and pods that begin from there.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use bulkhead_tests::fixture::{Run, wait_until};
use bulkhead_tests::{Fixture, config};
use containerd_shim_protos::api;
use ttrpc::proto::Code;

use crate::calls::{Answer, Shim};
use crate::fixture;

/// Counts, in a file and aloud, with a file held open all along.
pub const COUNT: &str = "echo kept > /kept; exec 9>>/open; i=0; \
    while :; do i=$((i+1)); echo $i > /next; mv /next /count; echo $i >&9; echo tick $i; sleep 0.1; done";

/// A test with snapshots of its own.
pub struct Store {
    pub test: Fixture,
    pub snapshots: PathBuf,
    /// The configuration that names them.
    pub settings: String,
}

impl Store {
    pub fn new(name: &'static str) -> Self {
        let test = fixture(name);
        let snapshots = test.work.join("snapshots");
        let settings = test.configuration(&[("snapshot_dir", snapshots.to_str().into())]);
        Self {
            test,
            snapshots,
            settings,
        }
    }

    /// A `ctr run` of a command, or of what snapshot `from` had run.
    pub fn run(&self, name: &str, from: Option<&str>, command: &[&str]) -> Run<'_> {
        let annotation = from.map(|from| format!("dev.bulkhead.snapshot={from}"));
        let mut options = vec!["--runtime-config-path", &self.settings];
        if let Some(annotation) = &annotation {
            options.extend(["--annotation", annotation]);
        }
        self.test.busybox(name, command).with(&options)
    }

    pub fn save(&self, id: &str, name: &str) -> Answer<api::Empty> {
        Shim::of(&self.test, id).checkpoint(&self.snapshots.join(name))
    }

    pub fn exec(&self, id: &str, line: &str) -> String {
        let name = format!("exec-{}", line.len());
        let command = ["tasks", "exec", "--exec-id", &name, id, "sh", "-c", line];
        self.test.ctr(&command).text()
    }

    pub fn count(&self, id: &str) -> u64 {
        self.exec(id, "cat /count").trim().parse().unwrap()
    }

    /// Waits until the container has counted beyond a number.
    pub fn counts_beyond(&self, id: &str, number: u64) {
        let beyond = wait_until(config().seconds(30), || self.count(id) > number);
        assert!(beyond, "{id} stands still at {}", self.count(id));
    }
}

#[test]
fn a_container_goes_on_from_its_snapshot_and_so_do_its_forks() {
    let store = Store::new("checkpoint");
    let source = store.run("source", None, &["sh", "-c", COUNT]);
    let aloud = source.start_for(120);
    aloud.wait_for("tick 5");
    let before = store.count(&source.id);
    store.save(&source.id, "one").unwrap();
    // It went on itself.
    let after = store.count(&source.id);
    store.counts_beyond(&source.id, after);

    let attached = store.run("a", Some("one"), &["ignored"]);
    let heard = attached.start_for(120);
    heard.wait_for("tick ");
    let first: u64 = heard.stdout().lines().next().unwrap()["tick ".len()..]
        .parse()
        .unwrap();
    assert!(first >= before, "{first}, the source was at {before}");
    let detached = ["b", "c"].map(|name| store.run(name, Some("one"), &["ignored"]).detach());
    let forks = [&attached.id, &detached[0], &detached[1]];
    let (mut names, mut random) = (HashSet::new(), HashSet::new());
    for fork in forks {
        let at = store.count(fork);
        assert!(at >= before, "{fork}: {at}, the source was at {before}");
        store.counts_beyond(fork, at);
        assert_eq!(store.exec(fork, "cat /kept").trim(), "kept");
        // The file that was open is the one that is there.
        let last = store.exec(fork, "tail -n 1 /open");
        assert!(last.trim().parse::<u64>().unwrap() >= at, "{last}");
        assert!(names.insert(store.exec(fork, "hostname")), "{names:?}");
        let bytes = store.exec(fork, "head -c 16 /dev/urandom | md5sum");
        assert!(random.insert(bytes), "{fork} draws what another one has drawn");
    }
    // What one writes is its own.
    let _ = store.exec(forks[0], "echo changed > /kept; echo new > /new");
    for other in [forks[1], &source.id] {
        let seen = store.exec(other, "cat /kept; ls /new 2>/dev/null; true");
        assert_eq!(seen.trim(), "kept");
    }
    for id in [&source.id, forks[0]] {
        let _ = store.test.ctr(&["tasks", "kill", "-s", "SIGKILL", id]).text();
    }
    for run in [aloud, heard] {
        let _ = run.finish().expect_code(137);
    }
    for id in &detached {
        store.test.kill_and_remove(id);
    }
}

#[test]
fn containerds_client_saves_a_container_and_ends_it() {
    let store = Store::new("checkpoint-ctr");
    // The client reads the container's file system after its end, when another one would remove it.
    let source = store.run("source", None, &["sh", "-c", COUNT]).keep();
    let aloud = source.start_for(120);
    aloud.wait_for("tick 5");
    let before = store.count(&source.id);
    let directory = store.snapshots.join("one");
    // The client pauses the task before it asks.
    let command = [
        "tasks",
        "checkpoint",
        "--exit",
        "--image-path",
        directory.to_str().unwrap(),
        &source.id,
    ];
    let _ = store.test.ctr(&command).text();
    let _ = aloud.finish().expect_code(137);
    store.test.remove(&source.id);
    let clone = store.run("clone", Some("one"), &["ignored"]).detach();
    let at = store.count(&clone);
    assert!(at >= before, "{at}, the source was at {before}");
    store.counts_beyond(&clone, at);
    store.test.kill_and_remove(&clone);
}

#[test]
fn what_is_on_a_disk_is_carried_as_well() {
    let store = Store::new("checkpoint-disk");
    let on_disk = |name: &str, from: Option<&str>| {
        let run = store.run(name, from, &["sh", "-c", COUNT]);
        run.with(&["--snapshotter", "blockfile"]).detach()
    };
    let source = on_disk("source", None);
    let counts = || store.exec(&source, "cat /count || echo 0").trim() != "0";
    assert!(wait_until(config().seconds(30), counts));
    let before = store.count(&source);
    store.save(&source, "one").unwrap();
    let clone = on_disk("clone", Some("one"));
    let at = store.count(&clone);
    assert!(at >= before, "{at}, the source was at {before}");
    store.counts_beyond(&clone, at);
    assert_eq!(store.exec(&clone, "cat /kept; sync; echo $?").trim(), "kept\n0");
    for id in [&source, &clone] {
        store.test.kill_and_remove(id);
    }
    store.test.containerd.remove_snapshots("blockfile");
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_by_what_does_not() {
    let store = Store::new("checkpoint-refused");
    let source = store.run("source", None, &["sh", "-c", COUNT]).detach();
    let counts = || store.exec(&source, "cat /count || echo 0").trim() != "0";
    assert!(wait_until(config().seconds(30), counts));
    store.save(&source, "one").unwrap();
    let (code, message) = store.save(&source, "one").unwrap_err();
    assert_eq!(code, Code::ALREADY_EXISTS, "{message}");
    store.test.kill_and_remove(&source);

    let refused = |name: &str, from: &str, words: &[&str]| {
        let said = store
            .run(name, Some(from), &["true"])
            .finish()
            .expect_error(&["snapshot"]);
        for word in words {
            assert!(said.contains(word), "{said}");
        }
    };
    refused("none", "two", &["no snapshot"]);
    refused("path", "../one", &["../one", "not valid"]);
    let state = store.snapshots.join("one/state");
    let whole = fs::read(&state).unwrap();
    fs::write(&state, &whole[..whole.len() / 2]).unwrap();
    refused("cut", "one", &["State file"]);
    fs::write(&state, &whole).unwrap();
    // Another image has other layers.
    let annotated = ["--annotation", "dev.bulkhead.snapshot=one"];
    let other = store.test.probe("image", &["emit", "1"]).with(&annotated);
    let other = other.with(&["--runtime-config-path", &store.settings]);
    let said = other.finish().expect_error(&["Image"]);
    assert!(said.contains("lowerdir"), "{said}");
}
