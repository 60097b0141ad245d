//! Standard streams and terminals.

use bulkhead_tests::pattern;

use crate::fixture;

const MIB: u64 = 1 << 20;

#[test]
fn input_reaches_the_process_until_it_is_closed() {
    let test = fixture("stdin");
    let mut session = test
        .busybox("a", &["sh", "-c", "echo ready; cat; echo end of input"])
        .start();
    session.wait_for("ready\n");
    session.send("first\n");
    session.wait_for("first\n");
    session.send("second\n");
    session.wait_for("second\n");
    assert!(!session.stdout().contains("end"), "{session}");
    session.close_input();
    let done = session.finish().expect_code(0);
    assert_eq!(done.stdout, b"ready\nfirst\nsecond\nend of input\n");
}

#[test]
fn ten_mebibytes_go_in_and_come_out_whole_and_in_order() {
    let test = fixture("ten-mebibytes");
    let output = test
        .probe("out", &["emit", &(10 * MIB).to_string()])
        .finish()
        .expect_code(0);
    assert_eq!(
        pattern::check(1, &mut output.stdout.as_slice()).unwrap(),
        10 * MIB
    );
    assert_eq!(output.stderr, b"");

    let command = ["sh", "-c", "echo ready; exec /probe check"];
    let mut session = test
        .run("in", bulkhead_tests::image::PROBE_IMAGE, &command)
        .start();
    session.wait_for("ready\n");
    session.send_bytes(&output.stdout);
    session.close_input();
    let done = session.finish().expect_code(0);
    assert_eq!(
        String::from_utf8(done.stdout).unwrap(),
        format!("ready\n{} bytes\n", 10 * MIB)
    );
}

#[test]
fn errors_come_apart_from_output() {
    let test = fixture("stderr");
    let done = test
        .probe("a", &["emit-both", &MIB.to_string()])
        .finish()
        .expect_code(0);
    assert_eq!(pattern::check(1, &mut done.stdout.as_slice()).unwrap(), MIB);
    assert_eq!(pattern::check(2, &mut done.stderr.as_slice()).unwrap(), MIB);
}

#[test]
fn a_terminal_has_the_clients_size_and_follows_it() {
    let test = fixture("terminal");
    // ctr sets the size after it has started the process: the first answers may still be "no size".
    // A shell gives /dev/null to what it runs in the background, hence descriptor 3.
    let script = "exec 3<&0; tty; (while sleep 0.1; do stty size <&3; done 2>/dev/null) & read line; echo got $line; exit 5";
    let mut session = test.busybox("a", &["sh", "-c", script]).start_on_terminal(31, 97);
    session.wait_for("/dev/pts/0");
    session.wait_for("31 97");

    session.resize(50, 132);
    session.wait_for("50 132");
    session.send("hello\n");
    // The terminal echoes what is typed, so this is the second "hello".
    session.wait_for("got hello");
    let _ = session.finish().expect_code(5);
}

#[test]
fn the_interrupt_key_of_a_terminal_reaches_the_foreground_process() {
    let test = fixture("interrupt");
    let script = "trap 'echo interrupted; exit 6' INT; echo up; while :; do sleep 0.1; done";
    let mut session = test.busybox("a", &["sh", "-c", script]).start_on_terminal(24, 80);
    session.wait_for("up");
    session.send("\x03");
    let done = session.finish().expect_code(6);
    assert!(
        String::from_utf8_lossy(&done.stdout).contains("interrupted"),
        "{done}"
    );
}
