//! Pods as `ctr` can make them: containers with the annotations of containerd's CRI plugin.

use std::fs;
use std::time::Duration;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::{Finished, Fixture, Session, config, host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fixture;

/// A pod's sandbox and its containers, removed when it is dropped.
struct Pod<'a> {
    test: &'a Fixture,
    sandbox: String,
    annotation: String,
    containers: Vec<String>,
}

impl<'a> Pod<'a> {
    fn new(test: &'a Fixture) -> Self {
        let annotation = format!("io.kubernetes.cri.sandbox-id={}", test.id("pod"));
        let sandbox = test
            .busybox("pod", &["/pause"])
            .with(&["--annotation", "io.kubernetes.cri.container-type=sandbox"])
            .with(&["--annotation", &annotation])
            .detach();
        Self {
            test,
            sandbox,
            annotation,
            containers: Vec::new(),
        }
    }

    /// Starts a container. `sharing` names the container, or the sandbox, whose processes it sees.
    fn start(&mut self, name: &str, command: &[&str], sharing: Option<&str>) -> String {
        let mut run = self
            .test
            .busybox(name, command)
            .with(&["--annotation", "io.kubernetes.cri.container-type=container"])
            .with(&["--annotation", &self.annotation]);
        if let Some(other) = sharing {
            let (pid, _) = self.test.task(other).unwrap();
            run = run.with(&["--with-ns", &format!("pid:/proc/{pid}/ns/pid")]);
        }
        let id = run.detach();
        self.containers.push(id.clone());
        id
    }

    fn exec(&self, id: &str, exec: &str, command: &[&str]) -> Finished {
        let arguments = [&["tasks", "exec", "--exec-id", exec, id], command].concat();
        self.test.ctr(&arguments)
    }

    /// What `ps` in a container shows, without itself.
    fn processes(&self, id: &str, exec: &str) -> Vec<String> {
        let listing = self.exec(id, exec, &["ps", "-o", "args"]).expect_code(0).text();
        let lines = listing.lines().skip(1).filter(|line| !line.starts_with("ps "));
        lines.map(str::to_owned).collect()
    }

    fn kill_and_remove(&mut self, id: &str) {
        self.containers.retain(|other| other != id);
        self.test.kill_and_remove(id);
    }

    fn remove(mut self) {
        // The last first: it may be in the process namespace of one before it.
        for id in std::mem::take(&mut self.containers).into_iter().rev() {
            self.test.kill_and_remove(&id);
        }
        self.test.kill_and_remove(&self.sandbox);
    }
}

#[test]
fn containers_of_a_pod_share_a_vm_and_its_processes_when_asked() {
    let test = fixture("pod-processes");
    let mut pod = Pod::new(&test);
    let sandbox = pod.sandbox.clone();
    let a = pod.start("a", &["sleep", "1111"], Some(&sandbox));
    let b = pod.start("b", &["sleep", "2222"], Some(&sandbox));
    let own = pod.start("own", &["sleep", "3333"], None);
    let (shim, _) = test.task(&sandbox).unwrap();
    assert_eq!(host::vmms_of(shim).len(), 1);

    assert_eq!(pod.processes(&a, "x1"), ["/pause", "sleep 1111", "sleep 2222"]);
    assert_eq!(pod.processes(&own, "x2"), ["sleep 3333"]);
    // Every container has a process id of its own, in the pod's network namespace.
    let pids: Vec<i32> = [&sandbox, &a, &b, &own].map(|id| test.task(id).unwrap().0).into();
    let network = |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert!(pids.iter().all(|pid| network(pid) == network(&shim)));
    assert_eq!(
        pids.iter().collect::<std::collections::BTreeSet<_>>().len(),
        4,
        "{pids:?}"
    );

    // By that id another container can join exactly one, as kubectl debug does.
    let debug = pod.start("debug", &["sleep", "4444"], Some(&own));
    assert_eq!(pod.processes(&debug, "x3"), ["sleep 3333", "sleep 4444"]);
    // The end of one container leaves the others alone.
    pod.kill_and_remove(&b);
    assert_eq!(pod.processes(&a, "x4"), ["/pause", "sleep 1111"]);
    pod.remove();
}

#[test]
fn a_pod_outlives_its_last_container() {
    let test = fixture("pod-empty");
    let mut pod = Pod::new(&test);
    let (shim, _) = test.task(&pod.sandbox).unwrap();
    for name in ["first", "second", "third"] {
        let id = pod.start(name, &["sleep", "1000"], None);
        assert_eq!(pod.processes(&id, "x"), ["sleep 1000"]);
        pod.kill_and_remove(&id);
    }
    assert_eq!(test.task(&pod.sandbox).unwrap().0, shim);
    assert_eq!(host::vmms_of(shim).len(), 1);
    pod.remove();
}

#[test]
fn a_killed_shim_takes_the_pod_along_and_leaves_nothing() {
    let test = fixture("pod-crash");
    let mut pod = Pod::new(&test);
    let ids = ["a", "b"].map(|name| pod.start(name, &["sleep", "1000"], None));
    let (shim, _) = test.task(&pod.sandbox).unwrap();
    let vmm = host::vmms_of(shim)[0];
    kill(Pid::from_raw(shim), Signal::SIGKILL).unwrap();
    assert!(wait_until(config().seconds(5), || !host::is_alive(vmm)));
    for id in ids.iter().chain([&pod.sandbox]) {
        // containerd has cleaned up by itself: only the containers are left.
        assert!(
            wait_until(config().seconds(10), || test.task(id).is_none()),
            "{id}"
        );
        let _ = test.ctr(&["containers", "rm", id]).expect_code(0);
    }
    pod.containers.clear();
}

#[test]
fn probes_run_one_after_the_other() {
    let test = fixture("pod-probes");
    let mut pod = Pod::new(&test);
    let id = pod.start("a", &["sleep", "1000"], None);
    for number in 0..100_i32 {
        let code = number % 7;
        let _ = pod
            .exec(
                &id,
                &format!("probe{number}"),
                &["sh", "-c", &format!("exit {code}")],
            )
            .expect_code(code);
    }
    // A probe that takes too long is killed; the container is not.
    let mut stuck = test.containerd.ctr(&["tasks", "exec", "--exec-id", "stuck", &id]);
    stuck.args(["sleep", "1000"]);
    let stuck = Session::start(stuck, config().seconds(30));
    assert!(wait_until(config().seconds(10), || {
        pod.processes(&id, "look").len() == 2
    }));
    let killed = test.ctr(&["tasks", "kill", "--exec-id", "stuck", "-s", "SIGKILL", &id]);
    let _ = killed.expect_code(0);
    let _ = stuck.finish().expect_code(137);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(pod.processes(&id, "after"), ["sleep 1000"]);
    pod.remove();
}

#[test]
fn what_a_pod_cannot_have_is_refused_by_its_field() {
    let test = fixture("pod-refused");
    let socket = test.work.display();
    let shared = format!("type=bind,src={socket},dst=/x,options=rbind:rshared");
    for (name, option, value, field) in [
        ("pid", "--with-ns", "pid:/proc/1/ns/pid", "linux.namespaces"),
        ("ipc", "--with-ns", "ipc:/proc/1/ns/ipc", "linux.namespaces"),
        ("mount", "--mount", shared.as_str(), "mounts.options"),
        ("device", "--device", "/dev/kmsg", "linux.devices"),
    ] {
        let refused = test.busybox(name, &["true"]).with(&[option, value]).finish();
        let _ = refused.expect_error(&[field]);
    }
    for (name, kind, what) in [
        ("host-pid", "pid", "hostPID"),
        ("host-ipc", "ipc", "hostIPC"),
        ("host-uts", "uts", "uts"),
    ] {
        let run = test.spec(name, &["/bin/true"], |mut spec| {
            let namespaces = spec.0["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != kind);
            spec
        });
        let _ = run.finish().expect_error(&["linux.namespaces", what]);
    }
    let user = test.spec("user", &["/bin/true"], |mut spec| {
        let namespaces = spec.0["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.push(serde_json::json!({"type": "user"}));
        spec
    });
    let _ = user.finish().expect_error(&["hostUsers"]);
}
