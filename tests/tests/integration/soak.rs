//! Many cycles and many pods at once, with figures of what grows: `cargo xtask test --integration --suite soak --cycles N`.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::{Fixture, Session, config, host};
use containerd_shim_protos::api;

use crate::calls::Shim;
use crate::fixture;

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sample {
    descriptors: usize,
    /// Memory of its own, in KiB: what it shares with others is divided among them (`Pss`).
    memory: u64,
}

impl Sample {
    fn of(pid: i32) -> Self {
        let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let memory = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Pss:"))
            .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse().ok());
        Self {
            descriptors: fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
            memory: memory.unwrap_or(0),
        }
    }
}

/// Prints a tenth of the samples and the last, and returns the medians of the first and the last tenth.
fn summary(what: &str, samples: &[Sample]) -> (Sample, Sample) {
    let tenth = (samples.len() / 10).max(1);
    for (number, sample) in samples.iter().enumerate() {
        if number % tenth == 0 || number + 1 == samples.len() {
            println!(
                "soak {what} {}: {} descriptors, {} KiB",
                number + 1,
                sample.descriptors,
                sample.memory
            );
        }
    }
    let median = |part: &[Sample]| {
        let middle = |mut values: Vec<u64>| {
            values.sort_unstable();
            values[values.len() / 2]
        };
        Sample {
            descriptors: middle(part.iter().map(|sample| sample.descriptors as u64).collect()) as usize,
            memory: middle(part.iter().map(|sample| sample.memory).collect()),
        }
    };
    let first = median(&samples[..tenth]);
    let last = median(&samples[samples.len() - tenth..]);
    (first, last)
}

fn no_growth(what: &str, samples: &[Sample], slack_kib: u64) {
    let (first, last) = summary(what, samples);
    assert!(
        last.descriptors <= first.descriptors,
        "{what}: descriptors grew from {} to {}",
        first.descriptors,
        last.descriptors
    );
    assert!(
        last.memory <= first.memory + slack_kib,
        "{what}: memory grew from {} to {} KiB",
        first.memory,
        last.memory
    );
}

/// Creates, runs and deletes containers of the same id, and looks at shim and VMM while each runs. Every other one ends by
/// itself, at the end of its input; the rest are killed.
#[test]
fn cycles_leave_nothing_and_nothing_grows() {
    let test = fixture("cycles");
    let (mut shims, mut vmms, mut containerds) = (Vec::new(), Vec::new(), Vec::new());
    let begin = Instant::now();
    for number in 0..=config().cycles {
        let run = test.busybox("a", &["sh", "-c", "echo up; cat"]);
        let mut session = run.start_for(60);
        session.wait_for("up");
        let all = host::processes();
        let running: Vec<_> = all.iter().filter(|process| process.is_vmm()).collect();
        let [vmm] = running.as_slice() else {
            panic!("cycle {number}: {running:?}");
        };
        // The first one finds cold caches.
        if number > 0 {
            shims.push(Sample::of(vmm.parent));
            vmms.push(Sample::of(vmm.pid));
            containerds.push(Sample::of(test.containerd.pid()));
        }
        let code = if number % 2 == 0 {
            session.close_input();
            0
        } else {
            kill(&test, &run.id);
            137
        };
        let _ = session.finish().expect_code(code);
        // Looked at each time, so that the cycle that leaves something is known.
        if number % 10 == 0 {
            test.expect_clean();
            // For a run that is cut short.
            println!(
                "soak: {number} cycles in {:?}; shim {:?}, VMM {:?}, containerd {:?}",
                begin.elapsed(),
                shims.last(),
                vmms.last(),
                containerds.last()
            );
        } else {
            test.expect_clean_host();
        }
    }
    println!("soak: {} cycles in {:?}", config().cycles, begin.elapsed());
    no_growth("shim", &shims, 1024);
    no_growth("vmm", &vmms, 4096);
    // Go's heap comes and goes; its descriptors do not.
    let _ = summary("containerd", &containerds);
}

/// Kills a container by a call of its shim, as containerd does it.
fn kill(test: &Fixture, id: &str) {
    let request = api::KillRequest {
        id: id.into(),
        signal: 9,
        ..api::KillRequest::default()
    };
    Shim::of(test, id)
        .call(async |client, context| client.kill(context, &request).await)
        .unwrap();
}

/// Processes come and go in one container: its shim and VMM stay as they are.
#[test]
fn processes_of_a_container_come_and_go_and_nothing_grows() {
    let test = fixture("execs");
    let id = test.busybox("a", &["sleep", "1000"]).detach();
    let (shim, _) = test.task(&id).unwrap();
    let vmm = host::vmms_of(shim)[0];
    let (mut shims, mut vmms) = (Vec::new(), Vec::new());
    let begin = Instant::now();
    for number in 0..config().cycles + 5 {
        let exec = format!("e{number}");
        let _ = test
            .ctr(&["tasks", "exec", "--exec-id", &exec, &id, "echo", "x"])
            .text();
        if number >= 5 {
            shims.push(Sample::of(shim));
            vmms.push(Sample::of(vmm));
        }
    }
    println!("soak: {} processes in {:?}", config().cycles, begin.elapsed());
    no_growth("shim-of-execs", &shims, 256);
    // The guest touches memory that it had not: 256 MiB at most.
    let (first, last) = summary("vmm-of-execs", &vmms);
    assert!(last.descriptors <= first.descriptors, "{first:?} {last:?}");
    test.kill_and_remove(&id);
}

/// As many pods as the host holds, up to 50, all at once.
#[test]
fn fifty_pods_run_at_once() {
    let test = fixture("fifty");
    let limit = config().seconds(60).as_secs().min(600);
    let patient = test.configuration(&[
        ("boot_timeout_s", limit.into()),
        ("request_timeout_s", limit.into()),
        ("memory_mib", 64.into()),
    ]);
    let begin = Instant::now();
    let mut ids = Vec::new();
    for number in 0..config().crowd(50) {
        let run = test
            .busybox(&number.to_string(), &["sleep", "100000"])
            .with(&["--runtime-config-path", &patient]);
        ids.push(run.detach());
    }
    println!("soak: {} pods in {:?}", ids.len(), begin.elapsed());
    let list = test.ctr(&["tasks", "ls"]).text();
    assert_eq!(list.matches("RUNNING").count(), ids.len(), "{list}");
    thread::sleep(Duration::from_secs(2));
    let (mut shims, mut vmms) = (Vec::new(), Vec::new());
    for process in host::processes() {
        if process.is_vmm() {
            vmms.push(Sample::of(process.pid));
        } else if process.command.contains("containerd-shim-") {
            shims.push(Sample::of(process.pid));
        }
    }
    assert_eq!((shims.len(), vmms.len()), (ids.len(), ids.len()));
    let _ = (summary("shim-of-pods", &shims), summary("vmm-of-pods", &vmms));
    let total: u64 = shims.iter().chain(&vmms).map(|sample| sample.memory).sum();
    println!(
        "soak: {} KiB for each pod",
        total / u64::try_from(ids.len()).unwrap()
    );
    // Each answers.
    for id in [&ids[0], &ids[ids.len() - 1]] {
        let exec = ["tasks", "exec", "--exec-id", "look", id, "echo", "here"];
        let done = Session::start(test.containerd.ctr(&exec), config().seconds(60)).finish();
        assert_eq!(done.text(), "here\n");
    }
    // Without a list of tasks, for which containerd would ask each of the others every time.
    for id in &ids {
        let delete = test.containerd.ctr(&["tasks", "delete", "--force", id]);
        let _ = Session::start(delete, config().seconds(60))
            .finish()
            .expect_code(0);
        test.remove(id);
    }
}
