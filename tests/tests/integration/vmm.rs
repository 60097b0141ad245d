//! The virtual machine itself: its size, and the whole of it paused.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use bulkhead_protocol::control::{Fd, Request};
use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::vm::{Snapshot, Vm};
use bulkhead_tests::{Finished, Fixture, config, host};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};

use crate::fixture;

/// Annotation for the size of a VM.
const HYPERVISOR: &str = "io.katacontainers.config.hypervisor.";

/// Runs a line of shell in a VM whose `key` is `value`.
fn sized(test: &Fixture, key: &str, value: u32, script: &str) -> Finished {
    let annotation = format!("{HYPERVISOR}{key}={value}");
    // Each vCPU takes its time to come up where the host is emulated.
    let settings = test.configuration(&[("boot_timeout_s", 600.into())]);
    test.busybox("a", &["sh", "-c", script])
        .with(&["--annotation", &annotation, "--runtime-config-path", &settings])
        .start_for(60)
        .finish()
}

/// How long the vCPUs run in the next half second.
fn runs(vm: &Vm) -> Duration {
    let before = vm.vcpu_time();
    thread::sleep(Duration::from_millis(500));
    vm.vcpu_time() - before
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    let _test = fixture("vm-pause");
    // An idle guest would stand still by itself.
    let mut vm = Vm::boot(1, 128, "idle=poll");
    vm.ask_agent();
    assert!(vm.answers(config().seconds(10)), "{:?}", vm.inspect());
    let busy = runs(&vm);
    assert!(busy > Duration::from_millis(50), "ran for {busy:?} only");

    vm.tell(Request::Pause);
    // The thread has left the guest, and goes to sleep next.
    let rest = runs(&vm);
    assert!(rest < Duration::from_millis(5), "ran for {rest:?}");
    vm.ask_agent();
    assert!(
        !vm.answers(Duration::from_secs(2)),
        "the agent answers in a pause"
    );
    let state = vm.inspect();
    assert!(state.paused, "{state:?}");
    assert_eq!(runs(&vm), Duration::ZERO);

    vm.tell(Request::Resume);
    assert!(vm.answers(config().seconds(5)), "{:?}", vm.inspect());
    vm.ask_agent();
    assert!(vm.answers(config().seconds(5)), "{:?}", vm.inspect());
    let busy = runs(&vm);
    assert!(busy > Duration::from_millis(50), "ran for {busy:?} only");
    let state = vm.inspect();
    assert!(!state.paused && !state.console.contains("lockup"), "{state:?}");
}

#[test]
fn a_connection_to_a_port_nobody_listens_on_is_answered() {
    let _test = fixture("vm-connect");
    let mut vm = Vm::boot(1, 128, "");
    vm.ask_agent();
    assert!(vm.answers(config().seconds(10)), "{:?}", vm.inspect());
    let (_near, far) = UnixStream::pair().unwrap();
    let request = Request::VsockConnect {
        port: 99,
        far_end: Fd(0),
    };
    let refused = vm.request(request, vec![far.into()]).unwrap_err();
    assert!(refused.contains("refused"), "{refused}");
}

#[test]
fn four_vcpus_are_four_processors() {
    let test = fixture("vm-vcpus");
    let done = sized(
        &test,
        "default_vcpus",
        4,
        "nproc; grep -c ^processor /proc/cpuinfo",
    );
    assert_eq!(done.text(), "4\n4\n");
}

#[test]
fn the_most_vcpus_a_machine_can_have_all_run() {
    let test = fixture("vm-32-vcpus");
    let done = sized(&test, "default_vcpus", 32, "nproc");
    assert_eq!(done.text(), "32\n");
}

#[test]
fn memory_goes_on_above_the_devices_below_four_gibibytes() {
    let test = fixture("vm-memory");
    // Pages of the guest's zone from 4 GiB on. What is not touched takes nothing of the host's memory.
    let zone = "awk '/zone +Normal/ { here = 1 } here && /present/ { print $2; exit }' /proc/zoneinfo";
    let script = format!("{zone}; awk '/MemTotal/ {{ print $2 }}' /proc/meminfo");
    let done = sized(&test, "default_memory", 5120, &script).text();
    let numbers: Vec<u64> = done.lines().map(|line| line.parse().unwrap()).collect();
    let [above, total] = numbers[..] else {
        panic!("{done}")
    };
    // 3 GiB lie below the devices.
    assert_eq!(above, (5120 - 3072) << 8, "{done}");
    assert!((4_800 << 10..5_120 << 10).contains(&total), "{done}");
}

/// Memory of the host that a VM of this shim takes, in MiB: now, and at most so far.
fn memory_of(shim: i32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{}/status", host::vmms_of(shim)[0])).unwrap();
    let value = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().unwrap();
        kibibytes >> 10
    };
    (value("VmRSS:"), value("VmHWM:"))
}

#[test]
fn memory_that_the_guest_no_longer_uses_goes_back_to_the_host() {
    let test = fixture("vm-reporting");
    let id = test.run("a", PROBE_IMAGE, &["sleep", "1000"]).detach();
    let (shim, _) = test.task(&id).unwrap();
    let (before, _) = memory_of(shim);
    let allocate = [
        "tasks",
        "exec",
        "--exec-id",
        "x",
        &id,
        "/probe",
        "allocate",
        "100",
    ];
    let _ = test.ctr(&allocate).text();
    let (_, most) = memory_of(shim);
    assert!(most >= before + 90, "{before} MiB, at most {most}");
    // The guest reports free pages about two seconds after they became free.
    let given_back = wait_until(config().seconds(10), || memory_of(shim).0 < before + 40);
    assert!(given_back, "{before} MiB before, {:?} after", memory_of(shim));
    test.kill_and_remove(&id);
}

#[test]
fn the_smallest_machine_runs_a_container() {
    let test = fixture("vm-smallest");
    let done = sized(&test, "default_memory", 64, "echo it runs");
    assert_eq!(done.text(), "it runs\n");
}

#[test]
fn a_snapshot_is_of_a_paused_machine_and_leaves_it_as_it_is() {
    let _test = fixture("vm-snapshot");
    let mut vm = Vm::boot(2, 128, "");
    vm.ask_agent();
    assert!(vm.answers(config().seconds(10)), "{:?}", vm.inspect());
    let request = Request::Snapshot {
        state: Fd(0),
        memory: Fd(1),
        pagemap: Fd(2),
    };
    let files = vec![tempfile(), tempfile(), vm.pagemap().into()];
    let refused = vm.request(request, files).unwrap_err();
    assert!(refused.contains("paused"), "{refused}");
    vm.tell(Request::Pause);
    let snapshot = vm.snapshot();
    assert_eq!(snapshot.memory.metadata().unwrap().len(), 128 << 20);
    vm.tell(Request::Resume);
    vm.ask_agent();
    assert!(vm.answers(config().seconds(5)), "{:?}", vm.inspect());

    // Others like it live beside it.
    let mut clones: Vec<_> = (0..3)
        .map(|number| Vm::restore(2, 128, 100 + number, &snapshot).unwrap())
        .collect();
    for clone in &mut clones {
        clone.resume_agent([7; 32]);
        assert!(clone.answers(config().seconds(5)), "{:?}", clone.inspect());
        let state = clone.inspect();
        assert!(
            state.devices.iter().all(|device| device.status & 64 == 0),
            "{state:?}"
        );
    }
    // Each wrote to its own memory only.
    let mut late = Vm::restore(2, 128, 200, &snapshot).unwrap();
    late.resume_agent([8; 32]);
    assert!(late.answers(config().seconds(5)), "{:?}", late.inspect());
    vm.ask_agent();
    assert!(vm.answers(config().seconds(5)), "{:?}", vm.inspect());
}

#[test]
fn a_snapshot_that_is_damaged_or_foreign_makes_no_machine() {
    let _test = fixture("vm-snapshot-bad");
    let mut vm = Vm::boot(1, 128, "");
    vm.ask_agent();
    assert!(vm.answers(config().seconds(10)), "{:?}", vm.inspect());
    vm.tell(Request::Pause);
    let good = vm.snapshot();
    drop(vm);
    let refusal = |vcpus, memory_mib, snapshot: &Snapshot| {
        Vm::restore(vcpus, memory_mib, 3, snapshot).expect_err("a refusal")
    };
    assert!(refusal(2, 128, &good).contains("vcpus was 1 and is 2"));
    assert!(refusal(1, 64, &good).contains("memory_mib was 128 and is 64"));
    let mut state = Vec::new();
    (&good.state).rewind().unwrap();
    (&good.state).read_to_end(&mut state).unwrap();
    let with = |bytes: &[u8]| {
        let file = File::from(tempfile());
        (&file).write_all(bytes).unwrap();
        Snapshot {
            state: file,
            memory: good.memory.try_clone().unwrap(),
        }
    };
    assert!(refusal(1, 128, &with(&state[..state.len() - 1])).contains("bytes after its header"));
    let mut altered = state.clone();
    altered[100] ^= 1;
    assert!(refusal(1, 128, &with(&altered)).contains("checksum"));
    let mut newer = state.clone();
    newer[8] += 1;
    assert!(refusal(1, 128, &with(&newer)).contains("version"));
    assert!(refusal(1, 128, &with(b"something else")).contains("does not begin as one"));
    let short = with(&state);
    let short = Snapshot {
        memory: File::from(tempfile()),
        ..short
    };
    let words = refusal(1, 128, &short);
    assert!(words.contains("Memory file has 0 bytes"), "{words}");
    // The files themselves are as good as before.
    let mut vm = Vm::restore(1, 128, 3, &good).unwrap();
    vm.resume_agent([9; 32]);
    assert!(vm.answers(config().seconds(5)), "{:?}", vm.inspect());
}

/// An empty file.
fn tempfile() -> OwnedFd {
    memfd_create(c"empty", MemFdCreateFlag::MFD_CLOEXEC).unwrap()
}
