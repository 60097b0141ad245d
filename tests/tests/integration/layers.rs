//! EROFS layers as containerd 2.2 and newer name them: the shim makes them disks of the guest.
//!
//! The tests' containerds mount such layers themselves, so the shim is called here as those would call it.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::image::MARKER;
use bulkhead_tests::spec::Spec;
use bulkhead_tests::{Fixture, Session, config};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message};
use containerd_shim_protos::types::mount::Mount;
use serde_json::{Value, json};
use ttrpc::proto::Code;

use crate::calls::{Answer, Shim};
use crate::checkpoint::{COUNT, Store};

/// A file in each layer that nobody reads before the signal of [`on_signal`], so that no guest has it in memory.
const LATE: [&str; 2] = ["late-top", "late-base"];

/// Size of a writable disk in bytes.
const DISK: u64 = 32 << 20;

/// A container with a shim of its own.
struct Container<'a> {
    store: &'a Store,
    id: String,
    bundle: PathBuf,
    /// What it says.
    output: PathBuf,
    shim: Shim,
}

impl<'a> Container<'a> {
    /// Writes the bundle of a container that runs a line of shell, or goes on from snapshot `from`, and starts its shim.
    fn new(store: &'a Store, suffix: &str, line: &str, from: Option<&str>) -> Self {
        let test = &store.test;
        let id = test.id(suffix);
        let bundle = test.work.join("bundles").join(suffix);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let default: Value = serde_json::from_str(&test.ctr(&["oci", "spec"]).text()).unwrap();
        let spec = Spec::new(default, Path::new("rootfs"), &id, &["/bin/sh", "-c", line]);
        let mut spec = spec.set("/root/readonly", json!(false));
        if let Some(from) = from {
            spec = spec.set("/annotations", json!({ "dev.bulkhead.snapshot": from }));
        }
        fs::write(bundle.join("config.json"), spec.0.to_string()).unwrap();

        let answer = runtime(test, &id, &bundle, "start", &options(&store.settings));
        let address = &answer[answer.find("unix://").unwrap()..];
        let address = address.split(['"', '\n']).next().unwrap();
        let shim = Shim::at(address, &id);
        Self {
            store,
            output: test.work.join(format!("{suffix}.log")),
            id,
            bundle,
            shim,
        }
    }

    fn create(&self, root: Vec<Mount>) -> Answer<api::CreateTaskResponse> {
        let output = format!("file://{}", self.output.display());
        let request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.to_str().unwrap().into(),
            rootfs: root,
            stdout: output.clone(),
            stderr: output,
            ..api::CreateTaskRequest::default()
        };
        self.shim
            .call(async |client, context| client.create(context, &request).await)
    }

    /// Creates and starts it.
    #[track_caller]
    fn start(&self, root: Vec<Mount>) {
        assert!(self.create(root).unwrap().pid > 0);
        let request = api::StartRequest {
            id: self.id.clone(),
            ..api::StartRequest::default()
        };
        self.shim
            .call(async |client, context| client.start(context, &request).await)
            .unwrap();
    }

    #[track_caller]
    fn kill(&self, signal: libc::c_int) {
        let request = api::KillRequest {
            id: self.id.clone(),
            signal: signal.unsigned_abs(),
            ..api::KillRequest::default()
        };
        self.shim
            .call(async |client, context| client.kill(context, &request).await)
            .unwrap();
    }

    /// Waits for its end and deletes it; returns its exit status.
    #[track_caller]
    fn finish(&self) -> u32 {
        let wait = api::WaitRequest {
            id: self.id.clone(),
            ..api::WaitRequest::default()
        };
        let ended = self
            .shim
            .call(async |client, context| client.wait(context, &wait).await);
        let status = ended.unwrap().exit_status;
        let delete = api::DeleteRequest {
            id: self.id.clone(),
            ..api::DeleteRequest::default()
        };
        let deleted = self
            .shim
            .call(async |client, context| client.delete(context, &delete).await);
        assert_eq!(deleted.unwrap().exit_status, status);
        status
    }

    /// Ends the shim of a container that is gone, or was never made.
    fn leave(self) {
        let request = api::ShutdownRequest {
            id: self.id.clone(),
            ..api::ShutdownRequest::default()
        };
        // The server may end before it has answered.
        let _ = self
            .shim
            .attempt(async |client, context| client.shutdown(context, &request).await);
        drop(self.shim);
        let _ = runtime(&self.store.test, &self.id, &self.bundle, "delete", &[]);
    }

    /// Kills and removes it.
    #[track_caller]
    fn remove(self) {
        self.kill(libc::SIGKILL);
        assert_eq!(self.finish(), 137, "{}", self.said());
        self.leave();
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// The numbers that it has said.
    fn ticks(&self) -> Vec<u64> {
        let said = self.said();
        let whole = said.split_inclusive('\n');
        let number = |line: &str| line.strip_prefix("tick ")?.strip_suffix('\n')?.parse().ok();
        whole.filter_map(number).collect()
    }

    /// Waits until it has counted beyond a number; returns where it is.
    #[track_caller]
    fn counts_beyond(&self, number: u64) -> u64 {
        let mut last = None;
        let beyond = wait_until(config().seconds(30), || {
            last = self.ticks().last().copied();
            last > Some(number)
        });
        assert!(beyond, "{} is not beyond {number}: {}", self.id, self.said());
        last.unwrap()
    }
}

/// Runs the runtime's program with a verb, as containerd does, and returns what it prints.
fn runtime(test: &Fixture, id: &str, bundle: &Path, verb: &str, input: &[u8]) -> String {
    let socket = test.containerd.directory.join("containerd.sock");
    let mut command = Command::new("containerd-shim-kata-v2");
    command
        .args([
            "-namespace",
            test.containerd.namespace,
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
    session.send_bytes(input);
    session.close_input();
    String::from_utf8_lossy(&session.finish().expect_code(0).stdout).into_owned()
}

/// The runtime's options as containerd passes them: the second field of this message is the configuration's file.
fn options(settings: &str) -> Vec<u8> {
    let mut value = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut value);
    stream.write_string(2, settings).unwrap();
    stream.flush().unwrap();
    drop(stream);
    let options = Any {
        type_url: "runtimeoptions.v1.Options".into(),
        value,
        ..Any::default()
    };
    options.write_to_bytes().unwrap()
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

/// Many lines, the last of which is `name`.
fn lines(name: &str) -> String {
    let blocks = "far more than a block of the file system\n".repeat(4096);
    format!("{blocks}{name}\n")
}

/// A layer with changes and the probe's root below it.
fn layers(test: &Fixture) -> [String; 2] {
    let (base, top) = (test.rootfs(), test.work.join("top"));
    fs::create_dir_all(top.join("etc")).unwrap();
    fs::write(top.join("etc/added"), "of the upper layer\n").unwrap();
    symlink("added", top.join("etc/group")).unwrap();
    for (directory, late) in [&top, &base].into_iter().zip(LATE) {
        fs::write(directory.join(late), lines(late)).unwrap();
    }
    [layer(&top), layer(&base)]
}

/// An empty file system on a disk, with a journal as containerd makes it.
fn disk(file: &Path) -> String {
    File::create(file).unwrap().set_len(DISK).unwrap();
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4"]).arg(file);
    let _ = Session::start(command, config().seconds(60))
        .finish()
        .expect_code(0);
    file.to_str().unwrap().to_owned()
}

/// What a disk that nobody uses has: the answer to a request of debugfs(8).
fn look(disk: &str, request: &str) -> String {
    let mut command = Command::new("debugfs");
    command.args(["-R", request, disk]);
    Session::start(command, config().seconds(20)).finish().text()
}

/// What a container has written to a file of its root, by what is on its disk.
fn written(disk: &str, name: &str) -> String {
    look(disk, &format!("cat /upper/{name}"))
}

fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.into(),
        options: options.iter().map(ToString::to_string).collect(),
        ..Mount::default()
    }
}

/// The layers, the topmost first, and what is written on a disk or nowhere in particular.
fn root(layers: &[String], disk: Option<&str>) -> Vec<Mount> {
    let mut mounts: Vec<_> = disk
        .map(|disk| mount("ext4", disk, &["rw", "loop"]))
        .into_iter()
        .collect();
    let first = mounts.len();
    mounts.extend(layers.iter().map(|layer| mount("erofs", layer, &["ro", "loop"])));
    let lower = format!("lowerdir={{{{ overlay {first} {} }}}}", mounts.len() - 1);
    mounts.push(match disk {
        None => mount("format/overlay", "overlay", &[&lower]),
        Some(_) => mount(
            "format/mkdir/overlay",
            "overlay",
            &[
                "X-containerd.mkdir.path={{ mount 0 }}/upper:0755",
                "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
                "workdir={{ mount 0 }}/work",
                "upperdir={{ mount 0 }}/upper",
                &lower,
            ],
        ),
    });
    mounts
}

#[test]
fn erofs_layers_are_one_disk_of_the_guest() {
    let store = Store::new("layers");
    let layers = layers(&store.test);
    let line = format!(
        "set -e; cat {} /etc/added /etc/group; echo mine > /etc/added; rm /etc/group; cat /etc/added; /probe report",
        MARKER.0
    );
    let container = Container::new(&store, "a", &line, None);
    container.start(root(&layers, None));
    let status = container.finish();
    let text = container.said();
    assert_eq!(status, 0, "{text}");

    let expected = format!("{}of the upper layer\nof the upper layer\nmine\n", MARKER.1);
    let report: Value =
        serde_json::from_str(text.strip_prefix(&expected).unwrap_or_else(|| panic!("{text}"))).unwrap();
    let mounts = report["mounts"].as_array().unwrap();
    let root = mounts.iter().rfind(|mount| mount["point"] == "/").unwrap();
    assert_eq!(root["type"], "overlay", "{root}");
    container.leave();
}

/// Counts, and at a signal writes a file of its own and says what was kept and what ends the layers' late files.
fn on_signal() -> String {
    let [top, base] = LATE;
    format!("trap 'echo own > /own; cat /kept; tail -n 1 /{top}; tail -n 1 /{base}' USR1; {COUNT}")
}

/// Saves a container while it counts; it goes on itself until it is removed. Returns a number that it had reached before.
#[track_caller]
fn save(store: &Store, root: Vec<Mount>) -> u64 {
    let source = Container::new(store, "source", &on_signal(), None);
    source.start(root);
    let before = source.counts_beyond(4);
    source.shim.checkpoint(&store.snapshots.join("one")).unwrap();
    let after = source.ticks().last().copied().unwrap();
    let _ = source.counts_beyond(after);
    source.remove();
    before
}

/// Has a container go on from where another one was, which was beyond `before`; returns how far this one comes.
#[track_caller]
fn goes_on(store: &Store, root: Vec<Mount>, before: u64) -> u64 {
    let clone = Container::new(store, "clone", "ignored", Some("one"));
    clone.start(root);
    let at = clone.counts_beyond(before);
    let first = clone.ticks()[0];
    assert!(first >= before, "{first}, the source was at {before}");
    clone.kill(libc::SIGUSR1);
    let expected = format!("kept\n{}\n{}\n", LATE[0], LATE[1]);
    let answered = wait_until(config().seconds(30), || clone.said().contains(&expected));
    assert!(answered, "{}", clone.said());
    let last = clone.counts_beyond(at);
    clone.remove();
    last
}

#[test]
fn a_container_on_layers_goes_on_with_what_is_on_its_disk() {
    let store = Store::new("layers-disk");
    let layers = layers(&store.test);
    let [first, second] = ["first", "second"].map(|name| disk(&store.test.work.join(name)));
    let count = |disk: &str| written(disk, "count").trim().parse::<u64>().unwrap();

    let before = save(&store, root(&layers, Some(&first)));
    let left_at = count(&first);
    assert!(left_at > before, "{left_at}");
    let last = goes_on(&store, root(&layers, Some(&second)), before);
    assert!(count(&second) >= last, "{} on the disk", count(&second));
    assert_eq!(written(&second, "kept"), "kept\n");
    assert_eq!(written(&second, "own"), "own\n");
    // The source's disk is not written any more.
    assert_eq!(count(&first), left_at);
    assert_eq!(written(&first, "kept"), "kept\n");
    let names = look(&first, "ls -p /upper");
    assert!(names.contains("/kept/") && !names.contains("/own/"), "{names}");
}

#[test]
fn a_container_on_layers_goes_on_with_what_is_in_memory() {
    let store = Store::new("layers-memory");
    let [top, base] = layers(&store.test);
    let same = [top.clone(), base.clone()];
    let before = save(&store, root(&same, None));
    let _ = goes_on(&store, root(&same, None), before);

    let refused = |suffix: &str, root: Vec<Mount>, words: &str| {
        let other = Container::new(&store, suffix, "ignored", Some("one"));
        let (code, message) = other.create(root).unwrap_err();
        assert_eq!(code, Code::FAILED_PRECONDITION, "{message}");
        assert!(message.contains(words), "{message}");
        other.leave();
    };
    refused("order", root(&[base, top], None), "Image layers");
    let disk = disk(&store.test.work.join("disk"));
    refused(
        "disk",
        root(&same, Some(&disk)),
        "was in memory and would be on a disk",
    );
}
