//! `bulkhead snapshot`, `restore` and `fork`, for containers that `ctr` has made.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::{Finished, Session, config};
use serde_json::json;

use crate::checkpoint::{COUNT, Store};

impl Store {
    /// Runs the command line to its end.
    #[track_caller]
    fn bulkhead(&self, arguments: &[&str]) -> Finished {
        let mut command = Command::new("bulkhead");
        command.args(arguments).args(["--config", &self.settings]);
        Session::start(command, config().seconds(120)).finish()
    }

    /// Ids that a command has printed.
    #[track_caller]
    fn ids(&self, arguments: &[&str]) -> Vec<String> {
        let text = self.bulkhead(arguments).text();
        text.lines().map(str::to_owned).collect()
    }

    /// A container that counts, with the options of `ctr run`. Its output goes to a file.
    fn counting(&self, name: &str, options: &[&str]) -> String {
        let log = format!("file://{}", self.log(name).display());
        let run = self.run(name, None, &["sh", "-c", COUNT]).with(options);
        let id = run.with(&["--log-uri", &log]).detach();
        let counts = || self.exec(&id, "cat /count || echo 0").trim() != "0";
        assert!(wait_until(config().seconds(30), counts), "{id} does not count");
        id
    }

    fn log(&self, name: &str) -> PathBuf {
        self.test.work.join(format!("logs/{name}.log"))
    }

    /// Checks that a container goes on from `number`, with the files that it had.
    #[track_caller]
    fn goes_on(&self, id: &str, number: u64) {
        let at = self.count(id);
        assert!(at >= number, "{id} is at {at}, its source was at {number}");
        self.counts_beyond(id, at);
        assert_eq!(self.exec(id, "cat /kept").trim(), "kept");
        let last = self.exec(id, "tail -n 1 /open");
        assert!(last.trim().parse::<u64>().unwrap() >= at, "{id}: {last}");
    }

    /// Keys of the root file systems that containerd has.
    fn roots(&self) -> HashSet<String> {
        let rows = self.test.ctr(&["snapshots", "ls"]).text();
        let keys = rows
            .lines()
            .skip(1)
            .filter_map(|row| row.split_whitespace().next());
        keys.map(str::to_owned).collect()
    }
}

#[test]
fn a_pod_is_restored_after_the_one_that_was_saved_is_gone() {
    let store = Store::new("restore");
    let before = store.roots();
    let source = store.counting("source", &["--env", "KEPT=yes"]);
    let saved_at = store.count(&source);
    let said = store.bulkhead(&["snapshot", &source, "warm"]).text();
    assert!(said.contains("`bulkhead restore warm`"), "{said}");
    store.test.kill_and_remove(&source);
    assert_eq!(store.roots(), before);

    let logs = store.test.work.join("restored");
    let named = store.test.id("named");
    let ids = store.ids(&["restore", "warm", "--id", &named, "--log", logs.to_str().unwrap()]);
    assert_eq!(ids, [named.as_str()]);
    let others = store.ids(&["restore", "warm"]);
    let [other] = others.as_slice() else {
        panic!("{others:?}")
    };
    assert!(other.starts_with(&format!("{source}-")), "{other}");
    for id in [&named, other] {
        store.goes_on(id, saved_at);
        assert_eq!(store.exec(id, "hostname").trim(), id);
    }
    // What it prints goes to its file, from where it went on.
    let log = logs.join(format!("{named}.log"));
    let printed = || fs::read_to_string(&log).unwrap_or_default().contains("\ntick ");
    assert!(wait_until(config().seconds(30), printed), "{}", log.display());
    let text = fs::read_to_string(&log).unwrap();
    let first = text.lines().find_map(|line| line.strip_prefix("tick ")).unwrap();
    assert!(first.parse::<u64>().unwrap() >= saved_at, "{first}");
    // containerd knows it as the one that was saved, but for what is its own.
    let info = store.test.ctr(&["containers", "info", &named]).text();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["Image"], store.test.containerd.busybox);
    assert_eq!(info["SnapshotKey"], named.as_str());
    let spec = &info["Spec"];
    assert_eq!(spec["annotations"]["dev.bulkhead.snapshot"], "warm");
    let environment = spec["process"]["env"].as_array().unwrap();
    assert!(environment.contains(&json!("KEPT=yes")), "{environment:?}");
    for id in [&named, other] {
        store.test.kill_and_remove(id);
    }
    assert_eq!(store.roots(), before);
}

#[test]
fn a_running_pod_is_forked_and_its_forks_are_pods_of_their_own() {
    let store = Store::new("fork");
    let source = store.counting("source", &[]);
    let at = store.count(&source);
    let forks = store.ids(&["fork", &source, "3"]);
    assert_eq!(forks.len(), 3, "{forks:?}");
    // The snapshot was for them alone.
    assert_eq!(fs::read_dir(&store.snapshots).unwrap().count(), 0);
    let all = [std::slice::from_ref(&source), forks.as_slice()].concat();
    let (mut names, mut random) = (HashSet::new(), HashSet::new());
    for id in &all {
        store.goes_on(id, at);
        assert!(names.insert(store.exec(id, "hostname")), "{names:?}");
        let bytes = store.exec(id, "head -c 16 /dev/urandom | md5sum");
        assert!(random.insert(bytes), "{id} draws what another one has drawn");
    }
    // What one writes is its own.
    let _ = store.exec(&forks[0], "echo changed > /kept; echo new > /new");
    for other in [&forks[1], &source] {
        let seen = store.exec(other, "cat /kept; ls /new 2>/dev/null; true");
        assert_eq!(seen.trim(), "kept");
    }
    // Also one of them, whose guest knows the container by another id than containerd does.
    let again = store.ids(&["fork", &forks[1]]);
    assert_eq!(again.len(), 1, "{again:?}");
    store.goes_on(&again[0], at);
    assert_eq!(store.exec(&again[0], "hostname").trim(), again[0]);
    for id in all.iter().chain(&again) {
        store.test.kill_and_remove(id);
    }
}

#[test]
fn a_sandbox_is_restored_with_its_containers() {
    let store = Store::new("restore-pod");
    let pod = store.test.id("pod");
    let of = |kind: &str, name: &str| {
        [
            format!("io.kubernetes.cri.container-type={kind}"),
            format!("io.kubernetes.cri.sandbox-id={pod}"),
            format!("io.kubernetes.cri.container-name={name}"),
        ]
    };
    let sandbox = of("sandbox", "");
    let options: Vec<_> = sandbox[..2]
        .iter()
        .flat_map(|text| ["--annotation", text])
        .collect();
    let _ = store.run("pod", None, &["/pause"]).with(&options).detach();
    let members = ["one", "two"].map(|name| {
        let annotations = of("container", name);
        let options: Vec<_> = annotations
            .iter()
            .flat_map(|text| ["--annotation", text.as_str()])
            .collect();
        store.counting(name, &options)
    });
    let at = members.each_ref().map(|id| store.count(id));
    let _ = store.bulkhead(&["snapshot", &pod, "warm"]).text();
    for id in members.iter().rev().chain([&pod]) {
        store.test.kill_and_remove(id);
    }

    let new = store.test.id("new");
    let ids = store.ids(&["restore", "warm", "--id", &new]);
    let expected = [new.clone(), format!("{new}-one"), format!("{new}-two")];
    assert_eq!(ids, expected);
    for (id, at) in ids[1..].iter().zip(at) {
        store.goes_on(id, at);
        assert_eq!(store.exec(id, "hostname").trim(), new);
    }
    for id in ids.iter().rev() {
        store.test.kill_and_remove(id);
    }
}

#[test]
fn a_restore_that_fails_leaves_nothing_and_says_what_failed() {
    let store = Store::new("restore-fails");
    let source = store.counting("source", &[]);
    let at = store.count(&source);
    // As containerd's own client does it: without records.
    store.save(&source, "one").unwrap();
    let roots = store.roots();
    let refused = |arguments: &[&str], words: &[&str]| {
        let said = store.bulkhead(arguments).expect_error(&words[..1]);
        for word in words {
            assert!(said.contains(word), "{said}");
        }
        assert_eq!(store.roots(), roots);
        assert_eq!(store.test.ctr(&["containers", "ls", "-q"]).text().trim(), source);
    };
    refused(&["restore", "none"], &["no snapshot", "none"]);
    refused(&["restore", "../one"], &["not valid"]);
    // Whoever had the id keeps it.
    refused(
        &["restore", "one", "--id", &source],
        &["does not take container", &source],
    );
    store.counts_beyond(&source, store.count(&source));
    let state = store.snapshots.join("one/state");
    let whole = fs::read(&state).unwrap();
    fs::write(&state, &whole[..whole.len() / 2]).unwrap();
    let id = store.test.id("cut");
    let task = format!("Cannot create the task of container {id}");
    refused(&["restore", "one", "--id", &id], &[&task, "State file"]);
    fs::write(&state, &whole).unwrap();
    refused(&["fork", "nobody"], &["No pod of", "nobody"]);

    // containerd still knows the original.
    let ids = store.ids(&["restore", "one"]);
    store.goes_on(&ids[0], at);
    for id in [&ids[0], &source] {
        store.test.kill_and_remove(id);
    }
    let said = store.bulkhead(&["restore", "one"]).expect_error(&["no longer"]);
    assert!(said.contains(&source) && said.contains("no record"), "{said}");
}

#[test]
fn a_network_namespace_is_not_taken_from_the_pod_that_has_it() {
    let store = Store::new("restore-netns");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let namespaces = ["a", "b"].map(|name| store.test.id(name));
    for (number, name) in namespaces.iter().enumerate() {
        shell(&format!(
            "ip netns add {name} && ip link add bhrest{number} type veth peer name eth0 netns {name} && \
             ip -n {name} address add 10.214.{number}.2/24 dev eth0 && ip -n {name} link set eth0 up && \
             ip link set bhrest{number} up"
        ));
    }
    let [old, new] = namespaces.each_ref().map(|name| format!("/run/netns/{name}"));
    let source = store.counting("source", &["--with-ns", &format!("network:{old}")]);
    let at = store.count(&source);
    let said = store.bulkhead(&["fork", &source]).expect_error(&["--netns"]);
    assert!(said.contains(&old), "{said}");
    // It was refused before anything was saved.
    assert!(!store.snapshots.exists());
    let _ = store.bulkhead(&["snapshot", &source, "warm"]).text();
    let said = store.bulkhead(&["restore", "warm"]).expect_error(&["--netns"]);
    assert!(
        said.contains(&old) && said.contains("dev.bulkhead.snapshot"),
        "{said}"
    );

    let ids = store.ids(&["restore", "warm", "--netns", &new]);
    store.goes_on(&ids[0], at);
    let address = |id: &str| store.exec(id, "ip -4 -o address show dev eth0");
    let moved = || address(&ids[0]).contains("10.214.1.2/24");
    assert!(wait_until(config().seconds(30), moved), "{}", address(&ids[0]));
    assert!(address(&source).contains("10.214.0.2/24"));
    for id in [&ids[0], &source] {
        store.test.kill_and_remove(id);
    }
    for (number, name) in namespaces.iter().enumerate() {
        shell(&format!("ip link del bhrest{number} && ip netns del {name}"));
    }
    if !mounts.contains(" /run/netns ") {
        shell("umount /run/netns && rmdir /run/netns");
    }
}
