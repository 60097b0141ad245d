//! Root file systems from each snapshotter that containerd has.

use std::fs;

use bulkhead_tests::image::{MARKER, PROBE_IMAGE};
use serde_json::Value;

use crate::fixture;

/// Runs a container on the snapshotter, checks what it wrote, and returns how it sees its root.
fn run_on(name: &'static str, snapshotter: &str) -> Option<Value> {
    let test = fixture(name);
    if !test
        .containerd
        .snapshotters()
        .iter()
        .any(|has| has == snapshotter)
    {
        // The other containerd of the suite has it; this one must be too old to.
        assert!(
            test.containerd.version.starts_with('1'),
            "{snapshotter} is missing"
        );
        println!(
            "containerd {} has no {snapshotter} snapshotter: nothing to test with it",
            test.containerd.version
        );
        return None;
    }
    test.containerd.unpack_probe(snapshotter);
    let script = format!(
        "set -e; cat {}; echo written > /etc/new; rm /etc/group; /probe report",
        MARKER.0
    );
    let run = test
        .run("a", PROBE_IMAGE, &["sh", "-c", &script])
        .with(&["--snapshotter", snapshotter])
        .keep();
    let text = run.finish().text();
    let report = text.strip_prefix(MARKER.1).unwrap();
    test.with_snapshot(snapshotter, &run.id, |root| {
        assert_eq!(fs::read_to_string(root.join("etc/new")).unwrap(), "written\n");
        assert!(!root.join("etc/group").exists() && root.join("etc/passwd").exists());
    });
    test.remove(&run.id);
    if snapshotter != "overlayfs" {
        test.containerd.remove_snapshots(snapshotter);
    }

    let report: Value = serde_json::from_str(report).unwrap();
    let mounts = report["mounts"].as_array().unwrap();
    Some(
        mounts
            .iter()
            .rfind(|mount| mount["point"] == "/")
            .unwrap()
            .clone(),
    )
}

#[test]
fn overlayfs() {
    let root = run_on("overlayfs", "overlayfs").unwrap();
    assert_eq!(root["type"], "virtiofs");
}

#[test]
fn native() {
    let root = run_on("native", "native").unwrap();
    assert_eq!(root["type"], "virtiofs");
}

#[test]
fn blockfile_is_a_disk_of_the_guest() {
    let root = run_on("blockfile", "blockfile").unwrap();
    assert_eq!(root["type"], "ext4");
    assert!(root["source"].as_str().unwrap().starts_with("/dev/vd"), "{root}");
}

#[test]
fn erofs() {
    // containerd 2.1 mounts the layers itself and hands over an overlay of them.
    if let Some(root) = run_on("erofs", "erofs") {
        assert!(
            ["virtiofs", "overlay"].contains(&root["type"].as_str().unwrap()),
            "{root}"
        );
    }
}
