//! Filesystems on disks. They need virtio-blk disks that a VM has and this machine has not; a script that boots the
//! guest's kernel with them sets `BULKHEAD_TEST_LAYERS` to the ranges (`offset+length,…`, bytes) of two EROFS
//! layers on slot 0, busybox in the lower one and `/etc/top` in both, and puts an ext4 filesystem on slot 1.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use serde_json::json;
use ttrpc::Code;

use crate::harness::{Guest, context, message};
use crate::specs::script;

fn filesystem(slot: u32, range: Option<(u64, u64)>, kind: &str) -> proto::Filesystem {
    let (offset, length) = range.unwrap_or_default();
    let range = proto::DiskRange {
        slot,
        offset,
        length,
        ..Default::default()
    };
    proto::Filesystem {
        range: Some(range).into(),
        type_: kind.into(),
        ..Default::default()
    }
}

fn layers() -> Option<Vec<(u64, u64)>> {
    let text = std::env::var("BULKHEAD_TEST_LAYERS").ok()?;
    let range = |text: &str| {
        let (offset, length) = text.split_once('+').unwrap();
        (offset.parse().unwrap(), length.parse().unwrap())
    };
    Some(text.split(',').map(range).collect())
}

pub async fn layers_and_volumes(guest: &Guest) {
    let Some(ranges) = layers() else {
        println!("        without disks, which this machine does not have");
        return;
    };
    guest.run("warm-up", &script("true"), None).await.unwrap();
    let before = guest.traces();
    let lower: Vec<_> = ranges
        .iter()
        .map(|range| filesystem(0, Some(*range), "erofs"))
        .collect();
    let mut spec = script(
        "cat /etc/top; cat /data/count 2>/dev/null; echo again >> /data/count; echo w > /written; cat /written",
    );
    spec["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/data", "type": "bind", "source": "/run/bulkhead/volumes/v", "options": ["rbind", "rw"]
    }));
    for (id, expected) in [("a", "upper layer\nw\n"), ("b", "upper layer\nagain\nw\n")] {
        let mut root = proto::RootFilesystem::new();
        root.set_layers(proto::Layers {
            lower: lower.clone(),
            ..Default::default()
        });
        let wanted = guest.streams(false, true, false);
        let request = proto::CreateContainerRequest {
            container_id: id.into(),
            spec_json: serde_json::to_vec(&spec).unwrap(),
            root: Some(root).into(),
            streams: Some(wanted.message.clone()).into(),
            disk_mounts: vec![proto::DiskMount {
                filesystem: Some(filesystem(1, None, "ext4")).into(),
                mount_point: "/run/bulkhead/volumes/v".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        guest
            .client()
            .create_container(context(), &request)
            .await
            .unwrap();
        guest.start(id).await.unwrap();
        let outcome = guest.outcome(id, wanted).await;
        assert_eq!(
            (outcome.stdout.as_str(), outcome.stderr.as_str(), outcome.status),
            (expected, "", 0)
        );
        guest.remove(id).await.unwrap();
        assert!(!std::path::Path::new("/dev/vda1").exists(), "a partition is left");
    }
    let _ = std::fs::remove_dir("/run/bulkhead/volumes");
    let gone: Vec<_> = guest
        .traces()
        .difference(&before)
        .filter(|trace| !trace.contains("volumes"))
        .cloned()
        .collect();
    assert_eq!(gone, [] as [String; 0]);

    // A range beyond the disk, and a filesystem that is another.
    let ten_gib = 10 << 30;
    for (filesystem, text) in [
        (filesystem(0, Some((0, ten_gib)), "erofs"), "disk slot 0 has"),
        (filesystem(1, None, "erofs"), "as erofs: EINVAL"),
    ] {
        let mut root = proto::RootFilesystem::new();
        root.set_disk(filesystem);
        let request = proto::CreateContainerRequest {
            container_id: "c".into(),
            spec_json: serde_json::to_vec(&script("true")).unwrap(),
            root: Some(root).into(),
            ..Default::default()
        };
        let (_, error) = message(guest.client().create_container(context(), &request).await);
        assert!(error.contains(text), "{error}");
    }
}

/// Runs a command in the mount namespace of a process.
fn within_mounts(process: &Path, command: &[&str]) -> Command {
    let mut nsenter = Command::new("nsenter");
    nsenter
        .arg(format!("--mount={}", process.join("ns/mnt").display()))
        .arg("--")
        .args(command);
    nsenter
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device with an ext4 filesystem; it goes when it is unmounted.
fn loop_device(image: &Path) -> String {
    std::fs::write(image, []).unwrap();
    std::fs::File::options()
        .write(true)
        .open(image)
        .unwrap()
        .set_len(16 << 20)
        .unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image));
    run(Command::new("losetup").args(["--find", "--show"]).arg(image))
}

async fn freeze(guest: &Guest, limit_ms: u32) -> ttrpc::Result<Vec<String>> {
    let request = proto::FreezeRequest {
        limit_ms,
        ..Default::default()
    };
    Ok(guest.client().freeze(context(), &request).await?.frozen)
}

async fn thaw(guest: &Guest) -> bool {
    let thawed = guest.client().thaw(context(), &proto::ThawRequest::new()).await;
    thawed.unwrap().expired
}

pub async fn freeze_and_thaw(guest: &mut Guest) {
    const VOLUME: &str = "/run/bulkhead/volumes/1";
    guest.sleeper("c").await;
    let pid = guest.processes("c").await[0].pid;
    // As the agent numbers it.
    let container = &guest.guest_file(&format!("/proc/{pid}"));
    // One volume of the pod, and a filesystem that only the container has mounted.
    let directory = guest.directory().to_owned();
    let device = loop_device(&directory.join("volume"));
    let agent = &guest.guest_file("/proc/1");
    run(&mut within_mounts(agent, &["mkdir", "-p", VOLUME]));
    run(&mut within_mounts(
        agent,
        &["mount", "-t", "ext4", &device, VOLUME],
    ));
    run(Command::new("losetup").args(["--detach", &device]));
    let own = loop_device(&directory.join("own"));
    let minor = own.trim_start_matches("/dev/loop").to_owned();
    for command in [
        ["mknod", "/dev/own", "b", "7", &minor].as_slice(),
        &["mkdir", "/tmp/own"],
        &["mount", "-t", "ext4", "/dev/own", "/tmp/own"],
    ] {
        run(&mut within_mounts(
            container,
            &[&["/bin/busybox"], command].concat(),
        ));
    }
    run(Command::new("losetup").args(["--detach", &own]));
    let write = |file: &str| {
        let script = format!("echo text > {file}");
        within_mounts(agent, &["sh", "-c", &script])
    };
    let own_file = container.join("root/tmp/own/file").display().to_string();

    // 30 s, and in between the guest goes on in another life.
    for limit in [0, 600_001] {
        assert_eq!(message(freeze(guest, limit).await).0, Code::INVALID_ARGUMENT);
    }
    let all = [VOLUME, "/tmp/own"];
    assert_eq!(freeze(guest, 30_000).await.unwrap(), all);
    assert_eq!(freeze(guest, 30_000).await.unwrap(), all);
    let mut writers = [
        write(&format!("{VOLUME}/file")).spawn().unwrap(),
        Command::new("sh")
            .args(["-c", &format!("echo text > {own_file}")])
            .spawn()
            .unwrap(),
    ];
    tokio::time::sleep(Duration::from_millis(300)).await;
    for writer in &mut writers {
        assert_eq!(
            writer.try_wait().unwrap(),
            None,
            "a frozen filesystem was written to"
        );
    }
    let (code, text) = message(guest.create("d", &script("true"), &proto::Streams::new()).await);
    assert_eq!(
        (code, text.as_str()),
        (Code::FAILED_PRECONDITION, "the guest is frozen for a checkpoint")
    );
    assert_eq!(guest.processes("c").await.len(), 1);
    guest.reconnect().await;
    let resume = proto::ResumeRequest {
        version: proto::VERSION,
        entropy: vec![1; 32],
        fork: true,
        ..Default::default()
    };
    assert!(guest.client().resume(context(), &resume).await.unwrap().frozen);
    assert!(!thaw(guest).await);
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    assert!(!thaw(guest).await);
    guest.run("d", &script("true"), None).await.unwrap();

    // Nobody thaws it.
    assert_eq!(freeze(guest, 200).await.unwrap(), all);
    assert!(run(&mut write(&format!("{VOLUME}/later"))).is_empty());
    assert!(thaw(guest).await);

    // Somebody else has frozen one: none stays frozen.
    run(&mut within_mounts(agent, &["fsfreeze", "--freeze", VOLUME]));
    let (_, text) = message(freeze(guest, 30_000).await);
    let wanted = format!("cannot freeze {VOLUME} ({device}): it is frozen already, not by this agent");
    assert_eq!(text, wanted);
    run(Command::new("sh").args(["-c", &format!("echo text > {own_file}")]));
    guest.run("d", &script("true"), None).await.unwrap();
    run(&mut within_mounts(agent, &["fsfreeze", "--unfreeze", VOLUME]));
    guest.remove("c").await.unwrap();
}
