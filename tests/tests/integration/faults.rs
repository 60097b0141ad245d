//! A fault at every step of a container's life: it fails, the shim is killed, the VMM is killed, or it hangs. Needs a shim
//! built with faults: `cargo xtask test --integration --suite faults`.

use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::leak::Snapshot;
use bulkhead_tests::{Fixture, Session, config};
use containerd_shim_protos::api;
use serde_json::json;

use crate::calls::Shim;
use crate::events::{follow_for, of_task};
use crate::fixture;

/// Where the shim looks which fault to have, and at which step. Gone once it was had.
const CONTROL: &str = "/run/bulkhead-fault";

/// How long an answer may take, here and in the emulated host.
const ANSWER: Duration = Duration::from_secs(1);

/// More failures than this, and the rest is not tried.
const MOST_FAILED: usize = 12;

/// A step of the shim's list.
#[derive(Clone, Debug)]
struct Step {
    name: String,
    operation: String,
    when: String,
}

/// What happens at the step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Error,
    KillShim,
    KillVmm,
}

impl Fault {
    const ALL: [Self; 3] = [Self::Error, Self::KillShim, Self::KillVmm];

    fn mode(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::KillShim => "kill-shim",
            Self::KillVmm => "kill-vmm",
        }
    }
}

/// The steps, as the shim lists them.
fn steps() -> Vec<Step> {
    let mut command = Command::new("containerd-shim-kata-v2");
    command.arg("fault-steps");
    let done = Session::start(command, config().seconds(10)).finish();
    assert!(
        done.status.success(),
        "the shim was not built with faults, use `cargo xtask test --integration --suite faults`: {done}"
    );
    let text = done.text();
    let steps: Vec<_> = text
        .lines()
        .map(|line| match line.split(' ').collect::<Vec<_>>().as_slice() {
            [name, operation, when] => Step {
                name: (*name).into(),
                operation: (*operation).into(),
                when: (*when).into(),
            },
            _ => panic!("not a step: {line}"),
        })
        .collect();
    assert!(steps.len() > 30, "{steps:?}");
    steps
}

fn arm(step: &str, mode: &str) {
    fs::write(CONTROL, format!("{step} {mode}\n")).unwrap();
}

fn had() -> bool {
    !Path::new(CONTROL).exists()
}

/// One container, with an interface and a volume, whose task is made again and again with the same id.
struct Walk {
    test: Fixture,
    id: String,
    namespace: String,
    directory_is_ours: bool,
    baseline: Snapshot,
    execs: Cell<u32>,
}

impl Walk {
    fn new(name: &'static str, more: &[&str]) -> Self {
        let test = fixture(name);
        let namespace = test.id("net");
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        shell(&format!(
            "ip netns add {namespace} && \
             ip link add bhwalk type veth peer name eth0 netns {namespace} && \
             ip -n {namespace} address add 10.214.0.2/24 dev eth0 && \
             ip -n {namespace} link set eth0 up && ip link set bhwalk up"
        ));
        let network = format!("network:/run/netns/{namespace}");
        let volume = test.work.join("volume");
        fs::create_dir(&volume).unwrap();
        let volume = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.display());
        let id = test
            .busybox("a", &["sleep", "1000"])
            .with(&["--with-ns", &network, "--mount", &volume])
            .with(more)
            .create();
        let baseline = Snapshot::take(test.containerd.pid(), &test.containerd.directory.join("state"));
        Self {
            id,
            namespace,
            directory_is_ours: !mounts.contains(" /run/netns "),
            baseline,
            execs: Cell::new(0),
            test,
        }
    }

    /// What is there now is not what a case leaves.
    fn take_baseline(&mut self) {
        let containerd = self.test.containerd;
        self.baseline = Snapshot::take(containerd.pid(), &containerd.directory.join("state"));
    }

    fn start(&self) -> Session {
        let command = ["tasks", "start", "--detach", "--null-io", &self.id];
        Session::start(self.test.containerd.ctr(&command), config().seconds(60))
    }

    /// Goes through the container's life up to the operation; what the client was told of the operation.
    fn live(&self, operation: &str) -> Result<(), String> {
        let started = self.start().finish();
        if ["create", "start"].contains(&operation) {
            return told(started);
        }
        assert!(started.status.success(), "before {operation}: {started}");
        match operation {
            "exec" => {
                self.execs.set(self.execs.get() + 1);
                let exec = format!("exec{}", self.execs.get());
                told(
                    self.test
                        .ctr(&["tasks", "exec", "--exec-id", &exec, &self.id, "true"]),
                )
            }
            "update" => {
                let shim = Shim::of(&self.test, &self.id);
                let request = api::UpdateTaskRequest {
                    id: self.id.clone(),
                    resources: Some(containerd_shim_protos::protobuf::well_known_types::any::Any {
                        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                        value: json!({ "pids": { "limit": 33 } }).to_string().into_bytes(),
                        ..Default::default()
                    })
                    .into(),
                    ..api::UpdateTaskRequest::default()
                };
                shim.attempt(async |client, context| client.update(context, &request).await)
                    .map(drop)
                    .map_err(|error| error.to_string())
            }
            _ => {
                let _ = self
                    .test
                    .ctr(&["tasks", "kill", "-s", "SIGKILL", &self.id])
                    .text();
                self.test.wait_status(&self.id, "STOPPED");
                told(self.test.ctr(&["tasks", "delete", &self.id]))
            }
        }
    }

    /// Removes the task as a client does that knows of nothing, and checks that nothing is left.
    fn clean(&self, after: &str) {
        let gone = wait_until(config().seconds(15), || {
            if self.test.task(&self.id).is_none() {
                return true;
            }
            let _ = self.test.ctr(&["tasks", "kill", "-s", "SIGKILL", &self.id]);
            let _ = self.test.ctr(&["tasks", "delete", "-f", &self.id]);
            false
        });
        assert!(gone, "after {after}: {:?}", self.test.task(&self.id));
        let containerd = self.test.containerd;
        let state = containerd.directory.join("state");
        if let Err(left) = self
            .baseline
            .wait_clean(containerd.pid(), &state, config().seconds(5))
        {
            panic!("left after {after}:\n{left}");
        }
        let mut command = Command::new("ip");
        command.args([
            "netns",
            "exec",
            &self.namespace,
            "sh",
            "-c",
            "tc filter show dev eth0 ingress; tc qdisc show dev eth0 ingress; ip -o link | grep -v -e ' lo:' -e ' eth0@'",
        ]);
        let done = Session::start(command, config().seconds(10)).finish();
        let left = String::from_utf8_lossy(&done.stdout);
        assert!(left.is_empty(), "left in the namespace after {after}: {left}");
    }

    fn end(self) {
        let _ = fs::remove_file(CONTROL);
        self.test.remove(&self.id);
        shell(&format!("ip netns del {}", self.namespace));
        let _ = wait_until(config().seconds(5), || {
            !Path::new("/sys/class/net/bhwalk").exists()
        });
        if self.directory_is_ours {
            shell("umount /run/netns && rmdir /run/netns");
        }
    }
}

fn told(done: bulkhead_tests::Finished) -> Result<(), String> {
    if done.status.success() {
        Ok(())
    } else {
        Err(done.to_string())
    }
}

/// The cases of this run: every fault that a step can have, or one of several.
fn cases(steps: &[Step]) -> Vec<(Step, Fault)> {
    let divisor = usize::try_from(config().fault_divisor).unwrap();
    let mut cases = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        for (index, fault) in Fault::ALL.into_iter().enumerate() {
            let possible = fault != Fault::KillVmm || step.when == "running";
            if possible && (number + index) % divisor == 0 {
                cases.push((step.clone(), fault));
            }
        }
    }
    cases
}

/// Takes turns between faults of a creation and later ones: a later one shows that the creation before it left nothing in
/// the way of another one with the same id.
fn interleave(cases: Vec<(Step, Fault)>) -> Vec<(Step, Fault)> {
    let (creations, others): (Vec<_>, Vec<_>) = cases
        .into_iter()
        .partition(|(step, _)| step.operation == "create");
    let (mut creations, mut others) = (creations.into_iter(), others.into_iter());
    let mut order = Vec::new();
    loop {
        let (creation, other) = (creations.next(), others.next());
        if creation.is_none() && other.is_none() {
            return order;
        }
        order.extend(creation);
        order.extend(other);
    }
}

/// Runs each case; one that fails does not keep the others from being tried.
fn each<T>(walk: &mut Walk, cases: &[T], name: impl Fn(&T) -> String, run: impl Fn(&Walk, usize, &T)) {
    let containerd = walk.test.containerd;
    let begin = Instant::now();
    let mut failed = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let name = name(case);
        println!("{:>4} s: {name}", begin.elapsed().as_secs());
        let log = containerd.log_size();
        let ran = catch_unwind(AssertUnwindSafe(|| run(walk, number, case)));
        if ran.is_err() {
            eprintln!("{name} failed:\n{}", containerd.log_tail(log));
            failed.push(name);
            assert!(failed.len() < MOST_FAILED, "failed: {failed:#?}");
            let _ = fs::remove_file(CONTROL);
            let _ = catch_unwind(AssertUnwindSafe(|| walk.clean("a failure")));
            // What is left now is not the next one's.
            walk.take_baseline();
        }
    }
    assert!(failed.is_empty(), "failed: {failed:#?}");
    println!("{} cases in {:?}", cases.len(), begin.elapsed());
}

#[test]
fn nothing_is_left_whatever_step_fails() {
    let steps = steps();
    let mut walk = Walk::new("walk", &[]);
    let events = follow_for(&walk.test, 1000);
    // The first one makes what containerd keeps.
    walk.live("delete").unwrap();
    walk.take_baseline();
    let id = walk.id.clone();
    let exits = || {
        of_task(&events, &id)
            .iter()
            .filter(|(topic, _)| topic == "/tasks/exit")
            .count()
    };
    let cases = interleave(cases(&steps));
    let name = |(step, fault): &(Step, Fault)| format!("{} {} ({})", step.name, fault.mode(), step.operation);
    each(&mut walk, &cases, name, |walk, number, (step, fault)| {
        let before = exits();
        arm(&step.name, fault.mode());
        let answer = walk.live(&step.operation);
        assert!(
            wait_until(config().seconds(5), had),
            "the step was not taken; the answer was {answer:?}"
        );
        // What ends may end in spite of an error.
        let must_tell = step.operation != "delete";
        if must_tell && answer.is_ok() {
            let exit = wait_until(config().seconds(5), || exits() > before);
            assert!(exit, "nobody was told");
        }
        // Nobody knows yet of what `start` has made when it is killed: the next start undoes it.
        let unknown = step.operation == "create" && step.when == "alone" && *fault == Fault::KillShim;
        if !unknown {
            walk.clean("the fault");
        }
        let next_creates = cases
            .get(number + 1)
            .is_some_and(|(step, _)| step.operation != "create");
        if step.operation == "create" && !next_creates {
            walk.live("delete")
                .unwrap_or_else(|error| panic!("a second creation: {error}"));
            walk.clean("a second creation");
        }
    });
    drop(events);
    walk.end();
}

/// How long a call of the shim took.
fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let begin = Instant::now();
    (call(), begin.elapsed())
}

#[test]
fn calls_are_answered_while_a_creation_hangs() {
    let steps = steps();
    let mut walk = Walk::new("hang", &[]);
    let hanging: Vec<_> = steps
        .into_iter()
        .filter(|step| step.operation == "create" && step.when != "alone")
        .collect();
    let slowest = Cell::new(Duration::ZERO);
    let name = |step: &Step| format!("{} hangs", step.name);
    each(&mut walk, &hanging, name, |walk, number, step| {
        hang(walk, step, number % 2 == 0, &slowest);
    });
    println!("the slowest answer took {:?}", slowest.get());
    walk.end();
}

/// Asks a shim whose creation hangs at `step`, and ends the creation by `Kill` or by `Delete`.
fn hang(walk: &Walk, step: &Step, by_kill: bool, slowest: &Cell<Duration>) {
    arm(&step.name, "hang");
    let creating = walk.start();
    assert!(wait_until(config().seconds(20), had), "{creating}");
    let shim = Shim::of(&walk.test, &walk.id);
    let id = &walk.id;
    let check = |what: &str, took: Duration| {
        slowest.set(slowest.get().max(took));
        assert!(took <= ANSWER, "{what} took {took:?}");
    };
    let request = api::StateRequest {
        id: id.clone(),
        ..api::StateRequest::default()
    };
    let (_, took) = timed(|| shim.call(async |client, context| client.state(context, &request).await));
    check("State", took);
    let request = api::StatsRequest {
        id: id.clone(),
        ..api::StatsRequest::default()
    };
    let (_, took) = timed(|| shim.call(async |client, context| client.stats(context, &request).await));
    check("Stats", took);
    let kill = |signal: u32| {
        let request = api::KillRequest {
            id: id.clone(),
            signal,
            ..api::KillRequest::default()
        };
        timed(|| shim.call(async |client, context| client.kill(context, &request).await))
    };
    check("Kill by SIGTERM", kill(15).1);
    if by_kill {
        check("Kill by SIGKILL", kill(9).1);
    } else {
        let request = api::DeleteRequest {
            id: id.clone(),
            ..api::DeleteRequest::default()
        };
        let (_, took) = timed(|| shim.call(async |client, context| client.delete(context, &request).await));
        check("Delete", took);
    }
    drop(shim);
    if step.name == "StreamsOpened" {
        // Nothing is being made yet: its client ends it.
        drop(creating);
    } else {
        let _ = creating.finish().expect_error(&["was ended in phase"]);
    }
    walk.clean("the end of the creation");
}

#[test]
fn a_creation_has_a_deadline_that_names_its_phase_and_shows_the_console() {
    let test = fixture("deadline");
    let _ = steps();
    // The guest has to boot in this time.
    let boot = config().seconds(5).as_secs();
    let settings = test.configuration(&[
        ("boot_timeout_s", boot.into()),
        ("request_timeout_s", 1.into()),
        // The console of a VM from a template begins empty.
        ("templates", "off".into()),
    ]);
    for (step, phase) in [
        ("GuestContainer", "container creation"),
        ("RootMounted", "mounts of root file system and volumes"),
    ] {
        arm(step, "hang");
        let run = test.busybox(step, &["true"]).with(&[
            "--runtime-config-path",
            &settings,
            "--annotation",
            "io.katacontainers.config.hypervisor.kernel_params=loglevel=7",
        ]);
        let (done, took) = timed(|| run.start_for(60).finish());
        let said = done.expect_error(&[&format!("in phase \"{phase}\"")]);
        assert!(
            said.contains("; console: ") && said.contains("Timed out after"),
            "{said}"
        );
        println!("after {took:?}: {said}");
        assert!(
            took < Duration::from_secs(boot + 1) + config().seconds(5),
            "{took:?}"
        );
    }
}
