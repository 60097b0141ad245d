//! How a process ends, seen by the client.

use crate::fixture;

#[test]
fn exit_codes_of_a_container() {
    let test = fixture("exit-codes");
    for code in [0, 1, 123] {
        let done = test
            .busybox(
                &code.to_string(),
                &["sh", "-c", &format!("echo out; exit {code}")],
            )
            .finish();
        assert_eq!(done.expect_code(code).stdout, b"out\n");
    }
}

#[test]
fn a_killed_container_exits_with_137() {
    let test = fixture("killed");
    let run = test.busybox("a", &["sh", "-c", "echo up; exec sleep 1000"]);
    let session = run.start();
    session.wait_for("up");
    let _ = test.ctr(&["tasks", "kill", "-s", "SIGKILL", &run.id]).text();
    let _ = session.finish().expect_code(137);
}

#[test]
fn a_terminated_container_exits_with_143() {
    let test = fixture("terminated");
    // The first process of a pid namespace gets no signal that it has no handler for.
    let script = "trap 'echo caught; exit 143' TERM; echo up; while :; do sleep 0.1; done";
    let run = test.busybox("a", &["sh", "-c", script]);
    let session = run.start();
    session.wait_for("up");
    let _ = test.ctr(&["tasks", "kill", "-s", "SIGTERM", &run.id]).text();
    let done = session.finish().expect_code(143);
    assert_eq!(done.stdout, b"up\ncaught\n");
}

#[test]
fn exit_codes_of_second_processes() {
    let test = fixture("exec-codes");
    let id = test.busybox("a", &["sleep", "1000"]).detach();
    let exec =
        |name: &str, script: &str| test.ctr(&["tasks", "exec", "--exec-id", name, &id, "sh", "-c", script]);
    for code in [0, 1, 123] {
        let done = exec(
            &format!("e{code}"),
            &format!("echo out; echo err >&2; exit {code}"),
        )
        .expect_code(code);
        assert_eq!(
            (done.stdout.as_slice(), done.stderr.as_slice()),
            (&b"out\n"[..], &b"err\n"[..])
        );
    }
    let _ = exec("killed", "kill -KILL $$").expect_code(137);
    let _ = exec("terminated", "kill -TERM $$").expect_code(143);
    // The same id again: the first one was deleted.
    let _ = exec("killed", "exit 0").expect_code(0);
    test.kill_and_remove(&id);
}
