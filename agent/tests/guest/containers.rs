use std::fs;

use bulkhead_protocol::agent as proto;
use serde_json::{Value, json};
use ttrpc::Code;

use crate::harness::{Guest, Outcome, context, message};
use crate::specs::{script, spec};

pub async fn hello_refuses_another_version(guest: &Guest) {
    let hello = async |version| {
        guest
            .client()
            .hello(
                context(),
                &proto::HelloRequest {
                    version,
                    ..Default::default()
                },
            )
            .await
    };
    let answer = hello(proto::VERSION).await.unwrap();
    assert!(answer.ready_uptime_us >= answer.main_uptime_us && answer.main_uptime_us > 0);
    assert!(!answer.kernel_release.is_empty());
    println!(
        "        ready {} us after main",
        answer.ready_uptime_us - answer.main_uptime_us
    );
    let (code, text) = message(hello(99).await);
    assert_eq!(
        (code, text),
        (
            Code::FAILED_PRECONDITION,
            format!(
                "protocol version 99 is not supported, this agent speaks {}",
                proto::VERSION
            )
        )
    );
    let again = guest
        .client()
        .setup_sandbox(context(), &proto::SetupSandboxRequest::new())
        .await;
    assert_eq!(message(again).0, Code::FAILED_PRECONDITION);
}

pub async fn output_and_status(guest: &Guest) {
    for status in [0, 1, 123] {
        let outcome = guest
            .run(
                "c",
                &script(&format!("echo out; echo err >&2; exit {status}")),
                None,
            )
            .await;
        assert_eq!(
            outcome.unwrap(),
            Outcome {
                status,
                stdout: "out\n".into(),
                stderr: "err\n".into()
            }
        );
    }
    // Nothing wanted: all three are /dev/null.
    guest
        .create(
            "quiet",
            &script("echo lost; read x; exit 5"),
            &proto::Streams::new(),
        )
        .await
        .unwrap();
    guest.start("quiet").await.unwrap();
    assert_eq!(guest.wait("quiet", "").await, 5);
}

pub async fn ten_mebibytes_arrive_in_order(guest: &Guest) {
    let outcome = guest.run("c", &script("seq 1 1600000"), None).await.unwrap();
    assert!(outcome.stdout.len() > 10 << 20);
    assert!(
        outcome
            .stdout
            .lines()
            .enumerate()
            .all(|(index, line)| line.parse() == Ok(index + 1))
    );
    assert_eq!(outcome.stdout.lines().count(), 1_600_000);
}

pub async fn stdin_until_close(guest: &Guest) {
    let input: Vec<u8> = (0..3_000_000u32).map(|n| b'a' + (n % 26) as u8).collect();
    let outcome = guest.run("c", &spec(&["cat"]), Some(&input)).await.unwrap();
    assert_eq!(outcome.stdout.as_bytes(), input);
    // A program that does not read its input does not hold up the rest.
    let outcome = guest.run("d", &spec(&["true"]), Some(b"")).await.unwrap();
    assert_eq!(outcome.status, 0);
}

pub async fn failed_creations_leave_nothing(guest: &Guest) {
    guest.run("warm-up", &spec(&["true"]), None).await.unwrap();
    let before = guest.traces();
    let with = |pointer: &str, value: Value| {
        let mut spec = spec(&["true"]);
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        match spec.pointer_mut(parent).unwrap() {
            Value::Array(list) => list.push(value),
            object => object[key] = value,
        }
        spec
    };
    let cases = [
        (
            spec(&["nosuch"]),
            Code::INVALID_ARGUMENT,
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            spec(&["/bin/nosuch"]),
            Code::INVALID_ARGUMENT,
            "stat /bin/nosuch: no such file or directory",
        ),
        (
            spec(&["/etc/passwd"]),
            Code::INVALID_ARGUMENT,
            "exec: \"/etc/passwd\": permission denied",
        ),
        (with("/process/cwd", json!("/nosuch")), Code::INTERNAL, "ENOENT"),
        (
            with(
                "/mounts/-",
                json!({"destination": "/data", "type": "bind", "source": "/nosuch", "options": ["rbind"]}),
            ),
            Code::INTERNAL,
            "No such file",
        ),
        (
            with("/linux/resources/unified", json!({"nosuch.max": "1"})),
            Code::INVALID_ARGUMENT,
            "cannot set nosuch.max to \"1\": No such file",
        ),
        (
            with("/linux/sysctl", json!({"net.nosuch": "1"})),
            Code::INVALID_ARGUMENT,
            "cannot set net.nosuch",
        ),
        (
            with("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"})),
            Code::INVALID_ARGUMENT,
            "seccomp notification",
        ),
        (
            json!({"ociVersion": "1.0.2"}),
            Code::INVALID_ARGUMENT,
            "process is missing",
        ),
    ];
    for (spec, code, text) in cases {
        let wanted = guest.streams(true, true, false);
        let (got, error) = message(guest.create("c", &spec, &wanted.message).await);
        assert!(error.contains(text), "{error:?} does not say {text:?}");
        assert!(error.starts_with("cannot create container \"c\": "), "{error}");
        assert_eq!(got, code, "{error}");
    }
    for (id, code) in [("", Code::INVALID_ARGUMENT), ("../x", Code::INVALID_ARGUMENT)] {
        assert_eq!(
            message(guest.create(id, &spec(&["true"]), &proto::Streams::new()).await).0,
            code
        );
    }
    // A port nobody listens on.
    let streams = proto::Streams {
        stdout_port: 9,
        ..Default::default()
    };
    let (_, error) = message(guest.create("c", &spec(&["true"]), &streams).await);
    assert!(error.contains("cannot connect to host port 9"), "{error}");
    settle(guest, &before).await;
}

/// Waits until nothing but what was there before is left.
async fn settle(guest: &Guest, before: &std::collections::BTreeSet<String>) {
    for _ in 0..200 {
        if guest.traces() == *before {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    let after = guest.traces();
    panic!("left: {:?}", after.difference(before).collect::<Vec<_>>());
}

pub async fn removal_in_every_state(guest: &Guest) {
    guest.run("warm-up", &spec(&["true"]), None).await.unwrap();
    let before = guest.traces();
    assert_eq!(message(guest.remove("nosuch").await).0, Code::NOT_FOUND);

    guest
        .create(
            "created",
            &spec(&["true"]),
            &guest.streams(true, true, false).message,
        )
        .await
        .unwrap();
    assert_eq!(
        message(
            guest
                .create("created", &spec(&["true"]), &proto::Streams::new())
                .await
        )
        .0,
        Code::ALREADY_EXISTS
    );
    guest.remove("created").await.unwrap();

    guest.sleeper("running").await;
    assert_eq!(message(guest.start("running").await).0, Code::FAILED_PRECONDITION);
    guest.remove("running").await.unwrap();

    guest.sleeper("paused").await;
    let pause = proto::PauseContainerRequest {
        container_id: "paused".into(),
        ..Default::default()
    };
    guest.client().pause_container(context(), &pause).await.unwrap();
    guest.remove("paused").await.unwrap();

    guest
        .create("killed", &spec(&["true"]), &proto::Streams::new())
        .await
        .unwrap();
    guest.signal("killed", "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(guest.wait("killed", "").await, 137);
    guest.remove("killed").await.unwrap();
    settle(guest, &before).await;
}

pub async fn twenty_at_once_leave_nothing(guest: &Guest) {
    guest.run("warm-up", &spec(&["true"]), None).await.unwrap();
    let before = guest.traces();
    let ids: Vec<String> = (0..20).map(|n| format!("c{n}")).collect();
    let runs = ids.iter().enumerate().map(|(n, id)| async move {
        let outcome = guest
            .run(id, &script(&format!("cat; exit {n}")), Some(id.as_bytes()))
            .await
            .unwrap();
        assert_eq!(
            outcome,
            Outcome {
                status: n as u32,
                stdout: id.clone(),
                stderr: String::new()
            }
        );
    });
    futures::future::join_all(runs).await;
    let exits: Vec<u32> = guest
        .events(21)
        .await
        .iter()
        .map(|event| event.exited().exit_status)
        .collect();
    assert_eq!(exits.len(), 21);
    settle(guest, &before).await;
}

pub async fn pause_and_resume(guest: &Guest) {
    guest.sleeper("c").await;
    let pause = proto::PauseContainerRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let resume = proto::ResumeContainerRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    assert_eq!(
        message(guest.client().resume_container(context(), &resume).await).0,
        Code::FAILED_PRECONDITION
    );
    guest.client().pause_container(context(), &pause).await.unwrap();
    let events = fs::read_to_string(guest.guest_file("/sys/fs/cgroup/bulkhead/c/cgroup.events")).unwrap();
    assert!(events.contains("frozen 1"), "{events}");
    let (code, error) = message(
        guest
            .exec(
                "c",
                "e",
                &crate::specs::process(&["true"]),
                &proto::Streams::new(),
            )
            .await,
    );
    assert_eq!(
        (code, error.as_str()),
        (
            Code::FAILED_PRECONDITION,
            "container \"c\" is paused, not running"
        )
    );
    guest.client().resume_container(context(), &resume).await.unwrap();
    let outcome = guest
        .run_exec("c", "e", &crate::specs::process(&["echo", "awake"]))
        .await
        .unwrap();
    assert_eq!(outcome.stdout, "awake\n");
}

/// Whether the machine gives the controller to the tests. Guests have all of them.
fn has_controller(guest: &Guest, name: &str) -> bool {
    let controllers =
        fs::read_to_string(guest.guest_file("/sys/fs/cgroup/bulkhead/cgroup.controllers")).unwrap();
    let found = controllers
        .split_whitespace()
        .any(|controller| controller == name);
    if !found {
        println!("        without the {name} controller, which this machine does not have");
    }
    found
}

pub async fn limits_and_counters(guest: &Guest) {
    let mut spec = spec(&["sleep", "1000"]);
    let all = ["cpu", "memory", "pids"].map(|name| has_controller(guest, name));
    if all == [true; 3] {
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        spec["linux"]["resources"]["pids"] = json!({"limit": 50});
        spec["linux"]["resources"]["cpu"] = json!({"shares": 512, "quota": 50000, "period": 100_000});
    }
    // Not in every kernel, and then ignored.
    spec["linux"]["resources"]["blockIO"] = json!({"weight": 100});
    guest.create("c", &spec, &proto::Streams::new()).await.unwrap();
    guest.start("c").await.unwrap();
    let request = proto::ContainerStatsRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let stats = guest.client().container_stats(context(), &request).await.unwrap();
    assert!(stats.cpu.contains_key("usage_usec"), "{stats:?}");
    let update = |json: Value| proto::UpdateContainerRequest {
        container_id: "c".into(),
        resources_json: serde_json::to_vec(&json).unwrap(),
        ..Default::default()
    };
    let (code, error) = message(
        guest
            .client()
            .update_container(context(), &update(json!({"memory": {"swap": 5}})))
            .await,
    );
    assert_eq!(
        (code, error.as_str()),
        (
            Code::INVALID_ARGUMENT,
            "invalid memory.swap: 5 without memory.limit"
        )
    );
    let refused = guest
        .client()
        .update_container(context(), &update(json!({"unified": {"nosuch.max": "1"}})))
        .await;
    assert_eq!(message(refused).0, Code::INVALID_ARGUMENT);
    if all != [true; 3] {
        return;
    }
    assert_eq!(
        (stats.memory_max, stats.pids_max, stats.pids_current),
        (64 << 20, 50, 1)
    );
    assert!(stats.memory_current > 0 && stats.memory_stat.contains_key("anon"));
    let file = |name: &str| {
        fs::read_to_string(guest.guest_file(&format!("/sys/fs/cgroup/bulkhead/c/{name}"))).unwrap()
    };
    assert_eq!(
        (file("cpu.weight").trim(), file("cpu.max").trim()),
        ("20", "50000 100000")
    );
    guest
        .client()
        .update_container(
            context(),
            &update(json!({"pids": {"limit": 77}, "memory": {"limit": 100 << 20}})),
        )
        .await
        .unwrap();
    let stats = guest.client().container_stats(context(), &request).await.unwrap();
    assert_eq!((stats.memory_max, stats.pids_max), (100 << 20, 77));
    assert_eq!(file("cpu.max").trim(), "50000 100000");
}

pub async fn out_of_memory_is_told_before_the_exit(guest: &Guest) {
    if !has_controller(guest, "memory") {
        return;
    }
    let mut spec = script("x=a; while true; do x=$x$x; done");
    spec["linux"]["resources"]["memory"] = json!({"limit": 16 << 20, "swap": 16 << 20});
    guest.create("c", &spec, &proto::Streams::new()).await.unwrap();
    guest.start("c").await.unwrap();
    assert_eq!(guest.wait("c", "").await, 137);
    let events = guest.events(2).await;
    assert!(
        events[0].has_oom() && events[0].oom().container_id == "c",
        "{events:?}"
    );
    assert!(
        events[1].has_exited() && events[1].exited().exit_status == 137,
        "{events:?}"
    );
}
