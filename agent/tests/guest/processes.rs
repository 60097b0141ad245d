use bulkhead_protocol::agent as proto;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use ttrpc::Code;

use crate::harness::{Guest, Outcome, context, message, within};
use crate::specs::{process, script, spec};

pub async fn signals(guest: &Guest) {
    guest.sleeper("c").await;
    for (exec, signal, status) in [
        ("term", libc::SIGTERM, 143),
        ("kill", libc::SIGKILL, 137),
        ("rt", 40, 168),
    ] {
        guest
            .exec("c", exec, &process(&["sleep", "1000"]), &proto::Streams::new())
            .await
            .unwrap();
        guest.signal("c", exec, signal, false).await.unwrap();
        assert_eq!(guest.wait("c", exec).await, status);
        assert_eq!(
            message(guest.signal("c", exec, signal, false).await).0,
            Code::NOT_FOUND
        );
    }
    assert_eq!(
        message(guest.signal("c", "", 0, false).await).0,
        Code::INVALID_ARGUMENT
    );
    assert_eq!(
        message(guest.signal("c", "nosuch", 9, false).await).0,
        Code::NOT_FOUND
    );
    guest
        .exec("c", "other", &process(&["sleep", "1000"]), &proto::Streams::new())
        .await
        .unwrap();
    guest.signal("c", "", libc::SIGKILL, true).await.unwrap();
    assert_eq!(guest.wait("c", "other").await, 137);
    assert_eq!(guest.wait("c", "").await, 137);

    // A handler of the init process, and all processes at once.
    let trap = script("trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done");
    let wanted = guest.streams(false, true, false);
    guest.create("d", &trap, &wanted.message).await.unwrap();
    let [_, mut stdout, _] = wanted.accept().await;
    guest.start("d").await.unwrap();
    expect(stdout.as_mut().unwrap(), "up").await;
    guest.signal("d", "", libc::SIGTERM, true).await.unwrap();
    assert_eq!(guest.wait("d", "").await, 9);
}

pub async fn exec_sees_the_container(guest: &Guest) {
    guest.sleeper("c").await;
    let mut process = process(&[
        "sh",
        "-c",
        "pwd; id -u; id -g; echo $A; cat /proc/1/comm; ulimit -n; exit 7",
    ]);
    process["cwd"] = json!("/tmp");
    process["user"] = json!({"uid": 1000, "gid": 1000});
    process["env"] = json!(["PATH=/bin", "A=b=c"]);
    let outcome = guest.run_exec("c", "e", &process).await.unwrap();
    let stdout = "/tmp\n1000\n1000\nb=c\nsleep\n1024\n".to_owned();
    assert_eq!(
        outcome,
        Outcome {
            status: 7,
            stdout,
            stderr: String::new()
        }
    );

    let request = proto::ListProcessesRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let pid = guest
        .exec(
            "c",
            "s",
            &crate::specs::process(&["sleep", "1000"]),
            &proto::Streams::new(),
        )
        .await
        .unwrap();
    let list = guest
        .client()
        .list_processes(context(), &request)
        .await
        .unwrap()
        .processes;
    let execs: Vec<_> = list
        .iter()
        .map(|process| (process.pid == pid, process.exec_id.as_str()))
        .collect();
    assert_eq!(execs, [(false, ""), (true, "s")]);
    let (code, _) = message(
        guest
            .exec(
                "c",
                "s",
                &crate::specs::process(&["true"]),
                &proto::Streams::new(),
            )
            .await,
    );
    assert_eq!(code, Code::ALREADY_EXISTS);
    // The id is free again after the exit.
    assert_eq!(
        guest
            .run_exec("c", "e", &crate::specs::process(&["echo", "again"]))
            .await
            .unwrap()
            .stdout,
        "again\n"
    );
}

pub async fn exec_errors_name_the_program(guest: &Guest) {
    guest.sleeper("c").await;
    let start = "cannot start process \"e\" in container \"c\": ";
    let mut relative = process(&["true"]);
    relative["cwd"] = json!("x");
    let cases = [
        (
            process(&["nosuch"]),
            Code::INVALID_ARGUMENT,
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            process(&["/etc/group"]),
            Code::INVALID_ARGUMENT,
            "exec: \"/etc/group\": permission denied",
        ),
        (
            relative,
            Code::INVALID_ARGUMENT,
            "unsupported specification: process.cwd is invalid: \"x\"",
        ),
        (json!(5), Code::INVALID_ARGUMENT, "invalid process_json: "),
    ];
    for (process, code, text) in cases {
        let (got, error) = message(
            guest
                .exec("c", "e", &process, &guest.streams(true, true, false).message)
                .await,
        );
        assert!(error.starts_with(&format!("{start}{text}")), "{error}");
        assert_eq!(got, code, "{error}");
    }
    let exec = guest
        .exec("nosuch", "e", &process(&["true"]), &proto::Streams::new())
        .await;
    assert_eq!(message(exec).0, Code::NOT_FOUND);
    // None of it has hurt the container.
    assert_eq!(
        guest
            .run_exec("c", "e", &process(&["echo", "fine"]))
            .await
            .unwrap()
            .stdout,
        "fine\n"
    );
}

/// Reads until the text appears.
async fn expect(stream: &mut UnixStream, text: &str) -> String {
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    while !seen.contains(text) {
        let n = within(stream.read(&mut buffer)).await.unwrap();
        assert!(n > 0, "ended before {text:?}: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    seen
}

pub async fn terminal_and_resize(guest: &Guest) {
    let wanted = guest.streams(true, true, true);
    guest.create("c", &spec(&["sh"]), &wanted.message).await.unwrap();
    let [stdin, stdout, _] = wanted.accept().await;
    let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
    guest.start("c").await.unwrap();
    stdin
        .write_all(b"stty size; tty; test -t 2 && echo is-a-tty\n")
        .await
        .unwrap();
    let seen = expect(&mut stdout, "\nis-a-tty").await;
    assert!(seen.contains("30 100") && seen.contains("/dev/"), "{seen}");
    let resize = |id: &str| proto::ResizeTerminalRequest {
        container_id: id.into(),
        width: 132,
        height: 50,
        ..Default::default()
    };
    guest
        .client()
        .resize_terminal(context(), &resize("c"))
        .await
        .unwrap();
    stdin.write_all(b"stty size; exit 3\n").await.unwrap();
    expect(&mut stdout, "50 132").await;
    let mut rest = Vec::new();
    within(stdout.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(guest.wait("c", "").await, 3);
    guest.sleeper("d").await;
    assert_eq!(
        message(guest.client().resize_terminal(context(), &resize("d")).await).0,
        Code::FAILED_PRECONDITION
    );
}

pub async fn terminal_of_an_exec(guest: &Guest) {
    guest.sleeper("c").await;
    let wanted = guest.streams(true, true, true);
    let mut process = process(&[
        "sh",
        "-c",
        "stty size; read x; echo got-$x; echo open > $(tty); exit 4",
    ]);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    guest.exec("c", "e", &process, &wanted.message).await.unwrap();
    let [stdin, stdout, _] = wanted.accept().await;
    let (mut stdin, mut stdout) = (stdin.unwrap(), stdout.unwrap());
    expect(&mut stdout, "30 100").await;
    stdin.write_all(b"word\n").await.unwrap();
    let seen = expect(&mut stdout, "open").await;
    assert!(seen.contains("got-word"), "{seen}");
    assert_eq!(guest.wait("c", "e").await, 4);
}

pub async fn exits_come_in_order(guest: &Guest) {
    guest.sleeper("c").await;
    for exec in ["a", "b"] {
        guest
            .exec("c", exec, &process(&["sleep", "1000"]), &proto::Streams::new())
            .await
            .unwrap();
    }
    guest.run_exec("c", "quick", &process(&["true"])).await.unwrap();
    guest.signal("c", "", libc::SIGKILL, false).await.unwrap();
    guest.wait("c", "").await;
    let events: Vec<_> = guest
        .events(4)
        .await
        .iter()
        .map(|event| event.exited().clone())
        .collect();
    assert_eq!((events[0].exec_id.as_str(), events[0].exit_status), ("quick", 0));
    let mut middle: Vec<_> = events[1..3]
        .iter()
        .map(|event| (event.exec_id.as_str(), event.exit_status))
        .collect();
    middle.sort_unstable();
    assert_eq!(middle, [("a", 137), ("b", 137)]);
    assert_eq!((events[3].exec_id.as_str(), events[3].exit_status), ("", 137));
    assert!(
        events
            .iter()
            .all(|event| event.pid > 0 && event.exited_at_ns > 1_600_000_000_000_000_000)
    );
}

pub async fn an_orphan_does_not_hold_the_exit(guest: &Guest) {
    guest.sleeper("c").await;
    // The grandchild keeps the pipe; what it writes soon after still arrives.
    let process = process(&["sh", "-c", "(sleep 0.3; echo late; exec sleep 1000) & echo early"]);
    let wanted = guest.streams(false, true, false);
    guest.exec("c", "e", &process, &wanted.message).await.unwrap();
    let [_, mut stdout, _] = wanted.accept().await;
    assert_eq!(guest.wait("c", "e").await, 0);
    expect(stdout.as_mut().unwrap(), "late").await;
    let start = std::time::Instant::now();
    let mut rest = Vec::new();
    within(stdout.as_mut().unwrap().read_to_end(&mut rest))
        .await
        .unwrap();
    assert!(start.elapsed().as_secs() < 12);
}

/// Neither the processes that make another one, nor dead ones, are the container's.
pub async fn listing_during_starts_and_ends(guest: &Guest) {
    guest.sleeper("c").await;
    let request = proto::ListProcessesRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    let starts = async {
        for number in 0..20 {
            let outcome = guest
                .run_exec("c", &format!("e{number}"), &process(&["true"]))
                .await;
            assert_eq!(outcome.unwrap().status, 0);
        }
    };
    let mut starts = std::pin::pin!(starts);
    let mut listings = 0;
    loop {
        let list = async {
            let list = guest.client().list_processes(context(), &request).await;
            list.unwrap().processes
        };
        tokio::select! {
            biased;
            list = list => {
                assert!((1..=2).contains(&list.len()), "{list:?}");
                assert_eq!(list[0].exec_id, "");
                listings += 1;
            }
            () = &mut starts => break,
        }
    }
    assert!(listings > 20, "{listings}");
}
