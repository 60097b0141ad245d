//! Output that goes to a file or a logging program instead of the client.

use std::fs;

use bulkhead_tests::config;
use bulkhead_tests::fixture::wait_until;

use crate::{fixture, probe};

const SCRIPT: &str = "echo one; echo two >&2; sleep 0.2; echo three";

#[test]
fn output_goes_to_a_file() {
    let test = fixture("log-file");
    let log = test.work.join("made/on/demand.log");
    let uri = format!("file://{}", log.display());
    let id = test
        .busybox("a", &["sh", "-c", SCRIPT])
        .with(&["--log-uri", &uri])
        .detach();
    test.wait_status(&id, "STOPPED");
    test.delete(&id, 0);
    let text = fs::read_to_string(&log).unwrap();
    let mut lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.last(), Some(&"three"));
    // Two streams: their order among each other is not fixed.
    lines.sort_unstable();
    assert_eq!(lines, ["one", "three", "two"]);
    test.remove(&id);
}

#[test]
fn output_goes_to_a_program() {
    let test = fixture("log-program");
    let (program, log) = (test.work.join("logger"), test.work.join("log"));
    fs::copy(probe(), &program).unwrap();
    let uri = format!("binary://{}?out={}", program.display(), log.display());
    let id = test
        .busybox("a", &["sh", "-c", SCRIPT])
        .with(&["--log-uri", &uri])
        .detach();
    test.wait_status(&id, "STOPPED");
    test.delete(&id, 0);
    // The shim's own score, which keeps it alive, is not the program's.
    let expected = format!("bulkhead-tests {id}\nout:one\nthree\nerr:two\noom_score_adj:0\n");
    let written = || fs::read_to_string(&log).unwrap();
    assert!(
        wait_until(config().seconds(5), || written() == expected),
        "{}",
        written()
    );
    test.remove(&id);
}

#[test]
fn a_logging_program_that_is_missing_is_an_error() {
    let test = fixture("log-missing");
    let refused = test
        .busybox("a", &["true"])
        .with(&["--log-uri", "binary:///no/such/logger"])
        .finish();
    let _ = refused.expect_error(&["/no/such/logger"]);
}
