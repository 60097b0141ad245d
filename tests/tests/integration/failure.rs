//! What fails while pods run is told at once, with its reason, and nothing hangs.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_tests::fixture::{shell, wait_until};
use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::{Fixture, Session, config, host};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::events::{follow, of_task, parse};
use crate::fixture;

/// How soon an end is told, in the emulated host too.
const SOON: Duration = Duration::from_secs(1);

/// What containerd's clients and log are told of a container's end.
struct End {
    status: u64,
    reason: String,
    topics: Vec<String>,
}

/// Waits for the end of a container whose VMM ends; checks that it is told within a second of that.
fn end_of(test: &Fixture, events: &Session, id: &str, vmm: i32) -> End {
    assert!(
        wait_until(config().seconds(30), || !host::is_alive(vmm)),
        "the VMM lives: {events}"
    );
    let dead = Instant::now();
    let exit = || {
        of_task(events, id)
            .into_iter()
            .find(|(topic, event)| topic == "/tasks/exit" && event["id"] == id)
    };
    assert!(
        wait_until(config().seconds(5), || exit().is_some()),
        "no exit is told: {events}"
    );
    let took = dead.elapsed();
    println!("told {took:?} after the end of the VMM");
    assert!(
        took <= SOON,
        "the exit was told {took:?} after the end of the VMM"
    );
    let told = of_task(events, id);
    let text = events.stdout();
    let reason = text
        .lines()
        .filter_map(parse)
        .filter(|(topic, _)| *topic == "/tasks/vm-ended")
        .find_map(|(_, event)| {
            Some(
                event["message"]
                    .as_str()?
                    .strip_prefix(&format!("{id}: "))?
                    .to_owned(),
            )
        })
        .unwrap_or_else(|| panic!("no reason is told: {events}"));
    println!("reason: {reason}");
    assert!(
        test.logs().contains("the virtual machine has ended"),
        "{}",
        test.logs()
    );
    End {
        status: exit().unwrap().1["exit_status"].as_u64().unwrap(),
        reason,
        topics: told.into_iter().map(|(topic, _)| topic).collect(),
    }
}

fn vmm_of(test: &Fixture, id: &str) -> i32 {
    let (shim, _) = test.task(id).unwrap();
    let vmms = host::vmms_of(shim);
    assert_eq!(vmms.len(), 1);
    vmms[0]
}

#[test]
fn a_panic_of_the_guests_kernel_is_told_with_its_reason() {
    let test = fixture("panic");
    let events = follow(&test);
    // The guest's kernel has no way to panic on request; it may be told to when memory runs out.
    let script = "sleep 2; echo 2 > /proc/sys/vm/panic_on_oom && exec /probe allocate 100000";
    let id = test
        .run("a", PROBE_IMAGE, &["sh", "-c", script])
        .with(&["--privileged", "--privileged-without-host-devices"])
        .detach();
    let end = end_of(&test, &events, &id, vmm_of(&test, &id));
    assert_eq!(end.status, 137);
    assert!(
        end.reason.contains("guest kernel panicked") && end.reason.contains("Out of memory"),
        "{}",
        end.reason
    );
    test.delete(&id, 137);
    test.remove(&id);
    drop(events);
}

#[test]
fn an_agent_that_is_killed_in_the_guest_is_told_with_its_reason() {
    let test = fixture("agent-killed");
    let events = follow(&test);
    // The guest's kernel gives out no more memory: the agent aborts when it needs some, and it is the guest's init.
    let script = "cd /proc/sys/vm; echo 0 > admin_reserve_kbytes; echo 0 > user_reserve_kbytes; \
        echo 1 > overcommit_kbytes; echo 2 > overcommit_memory";
    let id = test
        .busybox("a", &["sleep", "1000"])
        .with(&["--privileged", "--privileged-without-host-devices"])
        .detach();
    let vmm = vmm_of(&test, &id);
    let long = "x".repeat(100_000);
    let arguments: Vec<&str> = std::iter::repeat_n(long.as_str(), 16).collect();
    // It may need some as soon as the first process ends, or else for the second one's arguments.
    for (exec, command) in [("limit", &["sh", "-c", script][..]), ("long", &arguments)] {
        let _ = test.ctr(&[&["tasks", "exec", "--exec-id", exec, &id], command].concat());
    }
    let end = end_of(&test, &events, &id, vmm);
    assert_eq!(end.status, 137);
    assert!(
        end.reason.contains("guest kernel panicked") && end.reason.contains("Attempted to kill init"),
        "{}",
        end.reason
    );
    test.delete(&id, 137);
    test.remove(&id);
    drop(events);
}

/// Memory that the process has in use.
fn resident_mib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}

#[test]
fn an_out_of_memory_kill_of_the_vmm_by_the_host_is_told_as_one() {
    let test = fixture("host-oom");
    let events = follow(&test);
    let id = test
        .run("a", PROBE_IMAGE, &["/probe", "allocate", "100"])
        .detach();
    let vmm = vmm_of(&test, &id);
    let cgroup = fs::read_to_string(format!("/proc/{vmm}/cgroup")).unwrap();
    let cgroup = Path::new("/sys/fs/cgroup").join(cgroup.trim().trim_start_matches("0::/"));
    // Less than the VMM has, and more than the shim.
    assert!(
        wait_until(config().seconds(20), || resident_mib(vmm) > 130),
        "{}",
        resident_mib(vmm)
    );
    shell(&format!("echo 80M > {}/memory.max", cgroup.display()));
    let end = end_of(&test, &events, &id, vmm);
    assert_eq!(end.status, 137);
    assert!(
        end.reason.contains("killed by the host") && end.reason.contains("out of memory"),
        "{}",
        end.reason
    );
    // Kubernetes shows OOMKilled for this event.
    assert!(
        end.topics.iter().any(|topic| topic == "/tasks/oom"),
        "{:?}",
        end.topics
    );
    test.delete(&id, 137);
    test.remove(&id);
    drop(events);
}

#[test]
fn a_root_image_that_is_truncated_under_a_running_guest_ends_it_with_a_reason() {
    let test = fixture("truncated");
    let events = follow(&test);
    let image = test.work.join("root.erofs");
    fs::copy("/usr/local/share/bulkhead/root.erofs", &image).unwrap();
    let settings = test.configuration(&[("image", json!(image))]);
    let id = test
        .busybox("a", &["sleep", "1000"])
        .with(&["--runtime-config-path", &settings])
        .detach();
    let vmm = vmm_of(&test, &id);
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(0)
        .unwrap();
    let exec = test.ctr(&["tasks", "exec", "--exec-id", "look", &id, "true"]);
    assert!(!exec.status.success(), "{exec}");
    let end = end_of(&test, &events, &id, vmm);
    assert_eq!(end.status, 137);
    assert!(end.reason.contains("truncated"), "{}", end.reason);
    test.delete(&id, 137);
    test.remove(&id);
    drop(events);
}

#[test]
fn a_guest_that_stands_still_cannot_hold_up_a_kill() {
    let test = fixture("still");
    // Enough for the start.
    let limit = config().seconds(2).as_secs();
    let settings = test.configuration(&[("request_timeout_s", limit.into())]);
    let id = test
        .busybox("a", &["sleep", "1000"])
        .with(&["--runtime-config-path", &settings])
        .detach();
    let vmm = vmm_of(&test, &id);
    kill(Pid::from_raw(vmm), Signal::SIGSTOP).unwrap();
    let begin = Instant::now();
    let _ = test.ctr(&["tasks", "kill", "-s", "SIGKILL", &id]).text();
    // `ctr` itself takes its time in the emulated host.
    assert!(
        begin.elapsed() < config().seconds(1) + SOON,
        "{:?}",
        begin.elapsed()
    );
    test.wait_status(&id, "STOPPED");
    test.delete(&id, 137);
    test.remove(&id);
}

#[test]
fn a_network_namespace_that_disappears_is_a_clear_error_or_none() {
    let test = fixture("no-netns");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let name = test.id("net");
    shell(&format!(
        "ip netns add {name} && ip link add bhgone type veth peer name eth0 netns {name} && \
         ip -n {name} address add 10.214.1.2/24 dev eth0 && ip -n {name} link set eth0 up && ip link set bhgone up"
    ));
    let path = format!("/run/netns/{name}");
    let network = format!("network:{path}");
    let run = test
        .busybox("a", &["sleep", "1000"])
        .with(&["--with-ns", &network]);
    let id = run.detach();
    // The name goes; the namespace lives as long as the pod is in it.
    shell(&format!("ip netns del {name}"));
    let exec = ["tasks", "exec", "--exec-id", "look", &id, "ip", "-o", "link"];
    assert!(test.ctr(&exec).text().contains("eth0"));
    // Its only interface goes.
    shell("ip link del bhgone");
    let exec = ["tasks", "exec", "--exec-id", "still", &id, "echo", "still here"];
    assert_eq!(test.ctr(&exec).text(), "still here\n");
    test.kill_and_remove(&id);
    // And a pod that is made after it has gone is refused.
    let run = test.busybox("b", &["true"]).with(&["--with-ns", &network]);
    let _ = run
        .finish()
        .expect_error(&[&format!("Cannot open the network namespace {path}")]);
    if !mounts.contains(" /run/netns ") {
        shell("umount /run/netns && rmdir /run/netns");
    }
}

#[test]
fn a_full_disk_for_the_runtimes_state_is_a_clear_error() {
    let test = fixture("full-state");
    let state = test.work.join("state");
    fs::create_dir(&state).unwrap();
    let settings = test.configuration(&[("state_dir", json!(state))]);
    // From no room for the directory to no room for the last line of the journal.
    for (name, options) in [
        ("a", "nr_inodes=1"),
        ("b", "nr_inodes=2"),
        ("c", "size=4k"),
        ("d", "nr_inodes=3"),
    ] {
        shell(&format!("mount -t tmpfs -o {options} none {}", state.display()));
        if name == "c" {
            let full = File::create(state.join("full")).and_then(|mut file| file.write_all(&[1; 4096]));
            full.unwrap();
        }
        let run = test
            .busybox(name, &["true"])
            .with(&["--runtime-config-path", &settings]);
        let said = run.finish().expect_error(&["No space left on device"]);
        assert!(said.contains(state.to_str().unwrap()), "{said}");
        // A server that was there already ends after its answer.
        let mut left = Vec::new();
        let gone = wait_until(config().seconds(5), || {
            let entries = fs::read_dir(&state).unwrap();
            left = entries.map(|entry| entry.unwrap().file_name()).collect();
            left.retain(|left| left != "full");
            left.is_empty()
        });
        assert!(gone, "{left:?}");
        shell(&format!("umount {}", state.display()));
    }
}

#[test]
fn a_full_snapshot_is_an_error_of_the_program_that_writes() {
    let test = fixture("full-snapshot");
    let root = test.work.join("small");
    fs::create_dir(&root).unwrap();
    shell(&format!("mount -t tmpfs -o size=24m none {}", root.display()));
    shell(&format!("cp -a {}/. {}", test.rootfs().display(), root.display()));
    let script =
        "dd if=/dev/zero of=/big bs=1M count=64; echo code $?; rm /big; echo small > /small && cat /small";
    let run = test.spec("a", &["/bin/sh", "-c", script], |spec| {
        spec.set("/root/path", json!(root))
            .set("/root/readonly", json!(false))
    });
    let done = run.finish().expect_code(0);
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert_eq!(text, "code 1\nsmall\n", "{done}");
    assert!(
        String::from_utf8_lossy(&done.stderr).contains("No space left on device"),
        "{done}"
    );
    shell(&format!("umount {}", root.display()));
}

#[test]
fn containers_outlive_a_containerd_that_is_killed() {
    let test = fixture("containerd-killed");
    let log = |name: &str| test.work.join(name);
    let uri = |name: &str| format!("file://{}", log(name).display());
    let script = "echo before; while [ ! -e /shared/go ]; do sleep 0.2; done; echo after; exit 7";
    let mount = format!(
        "type=bind,src={},dst=/shared,options=rbind:rw",
        test.work.display()
    );
    let short = test
        .busybox("short", &["sh", "-c", script])
        .with(&["--log-uri", &uri("short.log"), "--mount", &mount])
        .detach();
    let long = test
        .busybox("long", &["sh", "-c", "while :; do date +%s; sleep 0.5; done"])
        .with(&["--log-uri", &uri("long.log")])
        .detach();
    let text = |name: &str| fs::read_to_string(log(name)).unwrap_or_default();
    assert!(wait_until(config().seconds(10), || text("short.log") == "before\n"));
    test.without_containerd(|| {
        File::create(test.work.join("go")).unwrap();
        assert!(wait_until(config().seconds(10), || text("short.log") == "before\nafter\n"));
    });
    let status = |id: &str| test.task(id).map(|(_, status)| status);
    assert_eq!(status(&short).as_deref(), Some("STOPPED"));
    assert_eq!(status(&long).as_deref(), Some("RUNNING"));
    let lines = text("long.log").lines().count();
    assert!(
        wait_until(config().seconds(5), || text("long.log").lines().count() > lines),
        "the log has stopped"
    );
    test.delete(&short, 7);
    test.remove(&short);
    let exec = ["tasks", "exec", "--exec-id", "look", &long, "echo", "still here"];
    assert_eq!(test.ctr(&exec).text(), "still here\n");
    test.kill_and_remove(&long);
}
