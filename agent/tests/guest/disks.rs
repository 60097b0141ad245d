//! Filesystems on disks. They need virtio-blk disks that a VM has and this machine has not; a script that boots the
//! guest's kernel with them sets `BULKHEAD_TEST_LAYERS` to the ranges (`offset+length,…`, bytes) of two EROFS
//! layers on slot 0, busybox in the lower one and `/etc/top` in both, and puts an ext4 filesystem on slot 1.

use bulkhead_protocol::agent as proto;
use serde_json::json;

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
