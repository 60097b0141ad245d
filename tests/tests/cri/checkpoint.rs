//! Pods that are saved while they run, and pods that begin from there.

use std::path::Path;
use std::process::Command;

use bulkhead_tests::cri::mount;
use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::pod::{Container, Pod, PodBuilder};
use bulkhead_tests::{Fixture, Session, config};

use crate::pods;

/// Counts aloud, in a file of the volume, and in the memory that the pod's containers share.
const COUNT: &str = "exec 9>>/data/log; i=0; \
    while :; do i=$((i+1)); echo $i > /dev/shm/next; mv /dev/shm/next /dev/shm/count; echo $i >&9; echo tick $i; sleep 0.2; done";

/// Writes down what the other container has counted.
const FOLLOW: &str = "while :; do cat /dev/shm/count > /seen; sleep 0.2; done";

/// The snapshot of a test, which is gone at its end.
struct Saved(String);

impl Saved {
    fn of(pod: &Pod<'_>, name: &str) -> Self {
        shell(&format!("bulkhead snapshot {} {name}", pod.id));
        Self(name.to_owned())
    }

    fn begins<'a>(&self, pod: PodBuilder<'a>) -> PodBuilder<'a> {
        let name = self.0.clone();
        pod.with(|config| {
            config
                .annotations
                .insert("dev.bulkhead.snapshot".to_owned(), name);
        })
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(Path::new("/var/lib/bulkhead/snapshots").join(&self.0));
    }
}

fn main<'a>(pod: &'a Pod<'_>, volume: &Path) -> Container<'a> {
    let container = pod.container("main", &["sh", "-c", COUNT]);
    container.mount(mount(volume, "/data", false)).start()
}

fn side<'a>(pod: &'a Pod<'_>) -> Container<'a> {
    pod.container("side", &["sh", "-c", FOLLOW]).start()
}

fn number(container: &Container<'_>, file: &str) -> u64 {
    container
        .sh(&format!("cat {file} || echo 0"))
        .text()
        .trim()
        .parse()
        .unwrap_or(0)
}

/// Waits until a file says more than `number`.
fn beyond(container: &Container<'_>, file: &str, least: u64) -> bool {
    wait_until(config().seconds(30), || number(container, file) > least)
}

fn volume(test: &Fixture) -> std::path::PathBuf {
    let volume = test.work.join("volume");
    std::fs::create_dir_all(&volume).unwrap();
    volume
}

#[test]
fn a_pod_with_containers_and_a_network_goes_on_in_another_pod() {
    let test = pods("saved");
    let volume = volume(&test);
    let source = test.pod("source").run();
    let (counts, follows) = (main(&source, &volume), side(&source));
    assert!(beyond(&counts, "/dev/shm/count", 5) && beyond(&follows, "/seen", 5));
    let before = number(&follows, "/seen");
    let saved = Saved::of(&source, "saved");
    // The kubelet would not know them.
    for arguments in [["restore", "saved"], ["fork", &source.id]] {
        let mut command = Command::new("bulkhead");
        command.args(arguments);
        let done = Session::start(command, config().seconds(120)).finish();
        let said = done.expect_error(&["through CRI"]);
        assert!(said.contains("dev.bulkhead.snapshot"), "{said}");
    }
    let after = number(&counts, "/dev/shm/count");
    assert!(
        beyond(&counts, "/dev/shm/count", after),
        "the pod that was saved stands still"
    );

    let pod = saved.begins(test.pod("clone")).run();
    let counting = main(&pod, &volume);
    // It waits for the other one.
    assert!(counting.is_running());
    let following = side(&pod);
    counting.wait_for_log("tick ");
    let first = counting.log().into_iter().find_map(|line| {
        let number = line.text.strip_prefix("tick ")?;
        number.trim().parse::<u64>().ok()
    });
    assert!(
        first.is_some_and(|first| first >= before),
        "{first:?}, it was at {before}"
    );
    let at = number(&counting, "/dev/shm/count");
    assert!(at >= before && beyond(&following, "/seen", at));

    // It is the new pod's guest.
    let script =
        "hostname; ip -4 -o address show dev eth0 | awk '{ print $4 }'; cat /sys/class/net/eth0/address";
    let seen = following.sh(script).text();
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[0], pod.config.hostname);
    assert!(lines[1].starts_with(&pod.ip()), "{seen}");
    assert_ne!(
        follows.sh("cat /sys/class/net/eth0/address").text().trim(),
        lines[2]
    );
    let ping = following.sh(&format!("ping -c 1 -W 5 {}", source.ip()));
    assert_eq!(ping.code, 0, "{ping}");
    // Others can join, and one can leave.
    assert_eq!(
        pod.container("later", &["echo", "here"]).finish().text(),
        "here\n"
    );
    following.stop(1);
    assert!(counting.is_running());
    let at = number(&counting, "/dev/shm/count");
    assert!(beyond(&counting, "/dev/shm/count", at));
}

#[test]
fn a_pod_that_is_not_completed_can_be_removed() {
    let test = pods("incomplete");
    let volume = volume(&test);
    let source = test.pod("source").run();
    let (counts, follows) = (main(&source, &volume), side(&source));
    assert!(beyond(&counts, "/dev/shm/count", 1) && beyond(&follows, "/seen", 1));
    let saved = Saved::of(&source, "incomplete");
    let pod = saved.begins(test.pod("clone")).run();
    let waits = main(&pod, &volume);
    // containerd makes the task with the start.
    let unknown = pod
        .container("other", &["true"])
        .create()
        .try_start()
        .unwrap_err();
    assert!(
        unknown.message.contains("no container other; it has side"),
        "{unknown}"
    );
    waits.stop(1);
    assert_eq!(waits.status().exit_code, 143);
    pod.stop().unwrap();
}
