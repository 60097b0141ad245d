//! EROFS layers as containerd 2.2 and newer name them: the shim makes them disks of the guest.
//!
//! The tests' containerds mount such layers themselves, so the shim is called here as those would call it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use bulkhead_tests::image::MARKER;
use bulkhead_tests::spec::Spec;
use bulkhead_tests::{Fixture, Session, config};
use containerd_shim_protos::api;
use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};

use crate::calls::Shim;
use crate::fixture;

/// Runs the runtime's program with a verb, as containerd does.
fn runtime(test: &Fixture, id: &str, bundle: &Path, verb: &str) -> String {
    let socket = test.containerd.directory.join("containerd.sock");
    let mut command = Command::new("containerd-shim-kata-v2");
    command
        .args([
            "-namespace",
            "bulkhead-tests",
            "-publish-binary",
            "/bin/false",
            "-address",
        ])
        .arg(&socket)
        .args(["-id", id, "-bundle"])
        .arg(bundle)
        .arg(verb)
        .current_dir(bundle)
        .env("TTRPC_ADDRESS", socket.with_extension("sock.ttrpc"));
    let mut session = Session::start(command, config().seconds(20));
    session.close_input();
    String::from_utf8_lossy(&session.finish().expect_code(0).stdout).into_owned()
}

fn layer(directory: &Path) -> String {
    let file = directory.with_extension("erofs");
    let mut command = Command::new("mkfs.erofs");
    command.arg("--quiet").arg(&file).arg(directory);
    let _ = Session::start(command, config().seconds(60))
        .finish()
        .expect_code(0);
    file.to_str().unwrap().to_owned()
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    }
}

#[test]
fn erofs_layers_are_one_disk_of_the_guest() {
    let test = fixture("layers");
    let id = test.id("a");
    let bundle = test.work.join("bundle");
    let upper = test.work.join("upper");
    fs::create_dir_all(bundle.join("rootfs")).unwrap();
    fs::create_dir_all(upper.join("etc")).unwrap();
    fs::write(upper.join("etc/added"), "of the upper layer\n").unwrap();
    symlink("added", upper.join("etc/group")).unwrap();
    let (base, upper) = (layer(&test.rootfs()), layer(&upper));

    let script = format!(
        "set -e; cat {} /etc/added /etc/group; echo mine > /etc/added; rm /etc/group; cat /etc/added; /probe report",
        MARKER.0
    );
    let default: Value = serde_json::from_str(&test.ctr(&["oci", "spec"]).text()).unwrap();
    let spec = Spec::new(default, Path::new("rootfs"), &id, &["/bin/sh", "-c", &script]);
    let spec = spec.set("/root/readonly", json!(false));
    fs::write(bundle.join("config.json"), spec.0.to_string()).unwrap();

    let answer = runtime(&test, &id, &bundle, "start");
    let address = &answer[answer.find("unix://").unwrap()..];
    let address = address.split(['"', '\n']).next().unwrap();
    let shim = Shim::at(address, &id);
    let output = test.work.join("output");
    let create = api::CreateTaskRequest {
        id: id.clone(),
        bundle: bundle.to_str().unwrap().into(),
        rootfs: vec![
            mount("erofs", &upper, &["ro", "loop"]),
            mount("erofs", &base, &["ro", "loop"]),
            mount("format/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}"]),
        ],
        stdout: format!("file://{}", output.display()),
        stderr: format!("file://{}", output.display()),
        ..api::CreateTaskRequest::default()
    };
    let created = shim.call(async |client, context| client.create(context, &create).await);
    assert!(created.unwrap().pid > 0);
    let start = api::StartRequest {
        id: id.clone(),
        ..api::StartRequest::default()
    };
    shim.call(async |client, context| client.start(context, &start).await)
        .unwrap();
    let wait = api::WaitRequest {
        id: id.clone(),
        ..api::WaitRequest::default()
    };
    let ended = shim.call(async |client, context| client.wait(context, &wait).await);
    let status = ended.unwrap().exit_status;
    let delete = api::DeleteRequest {
        id: id.clone(),
        ..api::DeleteRequest::default()
    };
    let deleted = shim.call(async |client, context| client.delete(context, &delete).await);
    assert_eq!(deleted.unwrap().exit_status, status);
    let text = fs::read_to_string(&output).unwrap();
    assert_eq!(status, 0, "{text}");

    let expected = format!("{}of the upper layer\nof the upper layer\nmine\n", MARKER.1);
    let report: Value =
        serde_json::from_str(text.strip_prefix(&expected).unwrap_or_else(|| panic!("{text}"))).unwrap();
    let mounts = report["mounts"].as_array().unwrap();
    let root = mounts.iter().rfind(|mount| mount["point"] == "/").unwrap();
    assert_eq!(root["type"], "overlay", "{root}");

    let shutdown = api::ShutdownRequest {
        id: id.clone(),
        ..api::ShutdownRequest::default()
    };
    // The server may end before it has answered.
    let _ = shim.attempt(async |client, context| client.shutdown(context, &shutdown).await);
    drop(shim);
    let _ = runtime(&test, &id, &bundle, "delete");
}
