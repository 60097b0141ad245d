use std::time::Duration;

use bulkhead_protocol::agent as proto;
use bulkhead_protocol::agent::pid_namespace::Kind;
use serde_json::{Value, json};

use crate::harness::{Guest, message, within};
use crate::specs::{process, script, spec};

fn pod() -> Option<Kind> {
    Some(Kind::Pod(proto::PodPidNamespace::new()))
}

async fn start_in(guest: &Guest, id: &str, spec: &Value, namespace: Option<Kind>) {
    let none = proto::Streams::new();
    guest.create_sharing(id, spec, &none, namespace).await.unwrap();
    guest.start(id).await.unwrap();
}

/// Shell functions: `list` the command lines of all processes but shells, `pids` of those with the given one.
const TOOLS: &str = r#"
    list() { for p in /proc/[0-9]*; do (tr '\0' ' ' < $p/cmdline; echo) 2>/dev/null; done | grep -v '^sh '; }
    pids() { for p in /proc/[0-9]*; do
        [ "$(tr '\0' ' ' 2>/dev/null < $p/cmdline)" = "$1 " ] && echo ${p#/proc/}
    done 2>/dev/null; }
"#;

async fn shell(guest: &Guest, id: &str, exec: &str, command: &str) -> String {
    let outcome = guest
        .run_exec(id, exec, &process(&["sh", "-c", &format!("{TOOLS}{command}")]))
        .await
        .unwrap();
    assert_eq!(outcome.stderr, "", "{command}");
    outcome.stdout
}

pub async fn shared_pid_namespace(guest: &Guest) {
    start_in(guest, "a", &spec(&["sleep", "1111"]), pod()).await;
    start_in(guest, "b", &spec(&["sleep", "2222"]), pod()).await;
    guest.sleeper("own").await;
    let seen = shell(guest, "a", "list", "list").await;
    assert!(seen.contains("/pause \n"), "{seen}");
    assert!(
        seen.contains("sleep 1111 \n") && seen.contains("sleep 2222 \n"),
        "{seen}"
    );
    assert!(!seen.contains("sleep 1000"), "{seen}");
    assert_eq!(
        shell(guest, "b", "one", "tr -d '\\0' < /proc/1/cmdline").await,
        "/pause"
    );
    assert_eq!(shell(guest, "own", "one", "cat /proc/1/comm").await, "sleep\n");

    // One container's processes can signal another's, not process 1. Orphans leave no zombies.
    let orphan = "(sleep 0.1 & exit 0); kill -9 1; kill -TERM $(pids 'sleep 2222'); sleep 0.5";
    shell(guest, "a", "signal", orphan).await;
    assert_eq!(within(guest.wait("b", "")).await, 143);
    let zombies = "grep -h '^State' /proc/[0-9]*/status | grep -c Z; true";
    assert_eq!(shell(guest, "a", "zombies", zombies).await, "0\n");

    // The end of a container takes its own processes along, and no others.
    let family = script("sleep 3333 & sleep 3333 & exec sleep 4444");
    start_in(guest, "c", &family, pod()).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(
        shell(guest, "a", "before", "pids 'sleep 3333' | wc -l").await,
        "2\n"
    );
    guest.signal("c", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(within(guest.wait("c", "")).await, 137);
    let gone = "for i in 1 2 3 4 5; do [ -z \"$(pids 'sleep 3333')\" ] && exit 0; sleep 0.2; done; list";
    assert_eq!(shell(guest, "a", "after", gone).await, "");
    for id in ["a", "b", "c", "own"] {
        guest.remove(id).await.unwrap();
    }
    // It outlives its containers.
    start_in(guest, "d", &spec(&["sleep", "5555"]), pod()).await;
    assert_eq!(
        shell(guest, "d", "one", "tr -d '\\0' < /proc/1/cmdline").await,
        "/pause"
    );
    guest.remove("d").await.unwrap();
}

pub async fn pid_namespace_of_another_container(guest: &Guest) {
    let none = proto::Streams::new();
    let target = || Some(Kind::Container("target".into()));
    let missing = guest
        .create_sharing("debug", &spec(&["true"]), &none, target())
        .await;
    assert_eq!(message(missing).0, ttrpc::Code::NOT_FOUND);

    start_in(guest, "target", &spec(&["sleep", "1111"]), None).await;
    start_in(guest, "debug", &spec(&["sleep", "2222"]), target()).await;
    let seen = shell(
        guest,
        "debug",
        "x",
        "cat /proc/1/comm; tr '\\0' ' ' < /proc/1/cmdline",
    )
    .await;
    assert_eq!(seen, "sleep\nsleep 1111 ");
    // Its process 1 ends, and everything in the namespace.
    guest.signal("target", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(within(guest.wait("target", "")).await, 137);
    assert_eq!(within(guest.wait("debug", "")).await, 137);
    let stopped = guest
        .create_sharing("late", &spec(&["true"]), &none, target())
        .await;
    assert_eq!(message(stopped).0, ttrpc::Code::FAILED_PRECONDITION);
    guest.remove("target").await.unwrap();
    guest.remove("debug").await.unwrap();
}

pub async fn process_one_is_out_of_reach(guest: &Guest) {
    let mut privileged = spec(&["sleep", "1000"]);
    let all = json!([
        "CAP_SYS_PTRACE",
        "CAP_SYS_ADMIN",
        "CAP_SYS_CHROOT",
        "CAP_DAC_OVERRIDE",
        "CAP_KILL"
    ]);
    privileged["process"]["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
    start_in(guest, "p", &privileged, pod()).await;
    let mut tool = process(&[
        "sh",
        "-c",
        "ls -A /proc/1/root/; ls -A /proc/1/cwd/; cat /proc/1/environ; grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/1/status; grep -c . /proc/1/mountinfo",
    ]);
    tool["capabilities"] = privileged["process"]["capabilities"].clone();
    let outcome = guest.run_exec("p", "look", &tool).await.unwrap();
    assert_eq!(outcome.stderr, "");
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines.len(), 5, "{lines:?}");
    assert_eq!(lines[0], "Uid:\t65535\t65535\t65535\t65535");
    assert_eq!(lines[1], "CapEff:\t0000000000000000");
    assert_eq!(lines[3..], ["NoNewPrivs:\t1", "1"]);
    // Without that capability not even the empty root can be seen.
    let denied = guest
        .run_exec("p", "denied", &process(&["ls", "/proc/1/root/"]))
        .await
        .unwrap();
    assert!(denied.stderr.contains("Permission denied"), "{denied:?}");
    guest.remove("p").await.unwrap();
}

pub async fn files_for_containers(guest: &Guest) {
    let mut spec = script("cat /etc/resolv.conf; stat -c %a /etc/resolv.conf");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({
        "destination": "/etc/resolv.conf",
        "type": "bind",
        "source": "/run/bulkhead/etc/resolv.conf",
        "options": ["rbind", "rprivate"],
    }));
    let outcome = guest.run("c", &spec, None).await.unwrap();
    assert_eq!(
        outcome.stdout, "nameserver 192.0.2.1\n644\n",
        "{}",
        outcome.stderr
    );
}
