//! What cannot work gives the client one clear error, and leaves nothing.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::leak::Snapshot;
use bulkhead_tests::{Run, Session, config, host};
use serde_json::{Value, json};

use crate::fixture;

/// Checks that a run fails with one line that names the cause, before the clean-up check of the fixture.
fn refused(run: &Run<'_>, reasons: &[&str]) {
    let said = run.finish().expect_error(reasons);
    let lines = said.lines().filter(|line| line.contains("ctr: ")).count();
    assert_eq!(lines, 1, "more than one error: {said}");
    assert!(
        said.len() < 3000,
        "the error is {} characters long: {said}",
        said.len()
    );
}

#[test]
fn a_program_that_is_missing() {
    let test = fixture("no-program");
    refused(&test.busybox("a", &["/no/such/program"]), &["/no/such/program"]);
    refused(&test.busybox("b", &["no-such-program"]), &["no-such-program"]);
}

#[test]
fn a_program_that_cannot_be_executed() {
    let test = fixture("not-executable");
    refused(
        &test.busybox("a", &["/etc"]),
        &["permission denied", "is a directory"],
    );
}

#[test]
fn a_root_that_is_missing_or_no_directory() {
    let test = fixture("no-root");
    let file = test.work.join("file");
    fs::write(&file, "").unwrap();
    for (name, root) in [("missing", PathBuf::from("/no/such/root")), ("file", file)] {
        let run = test.spec(name, &["/bin/true"], |spec| spec.set("/root/path", json!(root)));
        refused(&run, &[root.to_str().unwrap()]);
    }
}

#[test]
fn a_user_that_the_image_does_not_have() {
    let test = fixture("no-user");
    let run = test.probe("a", &["report"]).with(&["--user", "nosuchuser"]);
    let _ = run.finish().expect_error(&["no users found", "nosuchuser"]);
}

#[test]
fn a_kernel_that_is_not_elf() {
    let test = fixture("bad-kernel");
    let kernel = test.work.join("not-elf");
    fs::write(&kernel, "this is no kernel\n".repeat(100)).unwrap();
    let file = test.configuration(&[("kernel", json!(kernel))]);
    let run = test
        .busybox("a", &["true"])
        .with(&["--runtime-config-path", &file]);
    refused(&run, &["elf"]);

    let file = test.configuration(&[("kernel", json!("/no/such/kernel"))]);
    let run = test
        .busybox("b", &["true"])
        .with(&["--runtime-config-path", &file]);
    refused(&run, &["/no/such/kernel"]);
}

#[test]
fn sizes_out_of_range() {
    let test = fixture("bad-size");
    for (name, key, value) in [("a", "vcpus", 0), ("b", "memory_mib", 32)] {
        let file = test.configuration(&[(key, json!(value))]);
        let run = test
            .busybox(name, &["true"])
            .with(&["--runtime-config-path", &file]);
        refused(&run, &[key]);
    }
    for (name, key, value) in [
        ("c", "default_vcpus", "0"),
        ("d", "default_memory", "32"),
        ("e", "path", "/bin/qemu"),
        // A pod cannot name a kernel at all, so neither one that is not ELF.
        ("f", "kernel", "/etc/passwd"),
    ] {
        let annotation = format!("io.katacontainers.config.hypervisor.{key}={value}");
        refused(
            &test.busybox(name, &["true"]).with(&["--annotation", &annotation]),
            &[key],
        );
    }
}

#[test]
fn a_configuration_file_that_is_wrong() {
    let test = fixture("bad-config");
    let file = test.configuration(&[("no_such_key", json!(1))]);
    refused(
        &test
            .busybox("a", &["true"])
            .with(&["--runtime-config-path", &file]),
        &["no_such_key"],
    );
    refused(
        &test
            .busybox("b", &["true"])
            .with(&["--runtime-config-path", "/no/such/file"]),
        &["/no/such/file"],
    );
}

#[test]
fn a_specification_that_containerd_accepts_and_nobody_can_run() {
    let test = fixture("bad-spec");
    refused(
        &test.spec("a", &["/bin/true"], |spec| spec.set("/process/args", json!([]))),
        &["args"],
    );
    let refuse = |name, pointer: &str, value: Value, reasons: &[&str]| {
        refused(
            &test.spec(name, &["/bin/true"], |spec| spec.set(pointer, value)),
            reasons,
        );
    };
    refuse("b", "/process/cwd", json!("relative"), &["cwd"]);
    let limit = json!([{ "type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1 }]);
    refuse("c", "/process/rlimits", limit, &["RLIMIT_NONSENSE", "rlimit"]);
    let mount =
        json!([{ "type": "bind", "source": "/no/such/source", "destination": "/x", "options": ["bind"] }]);
    refuse("d", "/mounts", mount, &["/no/such/source"]);
}

/// containerd writes `config.json` itself, so a broken one is handed to the shim as containerd would.
#[test]
fn a_bundle_with_a_broken_config_json() {
    let test = fixture("broken-bundle");
    let state = test.containerd.directory.join("state");
    for (name, content) in [
        ("text", "{ this is not JSON"),
        ("type", r#"{"process": 7}"#),
        ("empty", ""),
    ] {
        let bundle = test.work.join(name);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("config.json"), content).unwrap();
        let before = Snapshot::take(test.containerd.pid(), &state);
        let id = test.id(name);
        let shim = |action: &str| {
            let mut command = Command::new("containerd-shim-kata-v2");
            let socket = test.containerd.directory.join("containerd.sock");
            command
                .args(["-namespace", "bulkhead-tests", "-address"])
                .arg(&socket);
            command
                .args(["-publish-binary", "/bin/false", "-id", &id, "-bundle"])
                .arg(&bundle)
                .arg(action);
            command
                .current_dir(&bundle)
                .env("TTRPC_ADDRESS", socket.with_extension("sock.ttrpc"));
            let mut session = Session::start(command, config().seconds(20));
            session.close_input();
            session.finish()
        };
        let said = shim("start").expect_error(&["config.json"]);
        assert_eq!(said.trim().lines().count(), 1, "more than one line: {said}");
        let _ = shim("delete").expect_code(0);
        let clean = before.wait_clean(test.containerd.pid(), &state, config().seconds(5));
        assert_eq!(clean, Ok(()), "{name}");
    }
    assert!(wait_until(config().seconds(2), || !host::processes()
        .iter()
        .any(host::Process::is_vmm)));
}
