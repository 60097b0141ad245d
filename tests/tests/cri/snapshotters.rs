//! A runtime handler of its own for each snapshotter that containerd has.

use bulkhead_tests::config;
use bulkhead_tests::image::MARKER;

use crate::pods;

/// Runs two containers on the snapshotter; type and source of the root that the first one sees.
fn root_on(name: &'static str, snapshotter: &str) -> Option<(String, String)> {
    let test = pods(name);
    let has = test.containerd.snapshotters();
    if !has.iter().any(|has| has == snapshotter) {
        assert!(
            test.containerd.version.starts_with("1."),
            "{snapshotter} is missing"
        );
        println!(
            "containerd {} has no {snapshotter}: nothing to test",
            test.containerd.version
        );
        return None;
    }
    let handler = format!("{}-{snapshotter}", config().handler);
    let pod = test.pod("pod").handler(&handler).run();
    let [first, second] = ["first", "second"].map(|name| pod.probe(name, &["tick"]).start());
    let script = format!("cat {}; echo written > /etc/new; rm /etc/group", MARKER.0);
    assert_eq!(first.sh(&script).text(), MARKER.1);
    assert_eq!(
        first.sh("cat /etc/new; ls /etc/group || true").text(),
        "written\n"
    );
    // Each has a root of its own.
    assert_eq!(
        second.sh("ls /etc/group; test ! -e /etc/new").text(),
        "/etc/group\n"
    );
    let snapshots = test
        .ctr(&["snapshots", "--snapshotter", snapshotter, "ls"])
        .text();
    assert!(snapshots.contains(&first.id), "{snapshots}");
    let seen = first.report();
    let mounts = seen["mounts"].as_array().unwrap();
    let root = mounts.iter().rfind(|mount| mount["point"] == "/").unwrap();
    let text = |key: &str| root[key].as_str().unwrap().to_owned();
    let root = (text("type"), text("source"));
    drop(pod);
    if snapshotter != "overlayfs" {
        test.containerd.remove_snapshots(snapshotter);
    }
    Some(root)
}

#[test]
fn pods_run_on_overlayfs() {
    assert_eq!(root_on("on-overlayfs", "overlayfs").unwrap().0, "virtiofs");
}

#[test]
fn pods_run_on_native() {
    assert_eq!(root_on("on-native", "native").unwrap().0, "virtiofs");
}

#[test]
fn pods_run_on_blockfile() {
    let (kind, source) = root_on("on-blockfile", "blockfile").unwrap();
    assert_eq!(kind, "ext4");
    assert!(source.starts_with("/dev/vd"), "{source}");
}

#[test]
fn pods_run_on_erofs() {
    if let Some((kind, _)) = root_on("on-erofs", "erofs") {
        assert!(["virtiofs", "overlay"].contains(&kind.as_str()), "{kind}");
    }
}
