#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn ok(path: &str) -> String {
    translate(Some(path), "id").unwrap().to_str().unwrap().to_owned()
}

#[test]
fn plain_paths_are_relative_to_the_root() {
    assert_eq!(ok("/default/a"), "default/a");
    assert_eq!(ok("default/a"), "default/a");
    assert_eq!(ok("/kubepods/burstable/pod1/abc"), "kubepods/burstable/pod1/abc");
}

#[test]
fn an_absent_path_is_made_from_the_id() {
    assert_eq!(translate(None, "x").unwrap(), Path::new("bulkhead/x"));
    assert_eq!(translate(Some(""), "x").unwrap(), Path::new("bulkhead/x"));
}

#[test]
fn systemd_paths_become_directories() {
    assert_eq!(
        ok("kubepods-burstable-podx.slice:cri-containerd:abc"),
        "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/cri-containerd-abc.scope"
    );
    assert_eq!(ok(":docker:abc"), "system.slice/docker-abc.scope");
    assert_eq!(ok("-.slice::abc"), "abc.scope");
    assert_eq!(ok("user.slice:x:a.slice"), "user.slice/a.slice");
}

#[test]
fn paths_that_leave_the_hierarchy_are_refused() {
    for path in [
        "/",
        "..",
        "/a/../b",
        "../x",
        "a:b",
        "a:b:c:d",
        "x.slice:p:",
        "nodot:p:n",
        "a--b.slice:p:n",
        "x.slice:p:../n",
    ] {
        assert!(
            matches!(translate(Some(path), "id"), Err(CgroupError::Path(_))),
            "{path}"
        );
    }
}

proptest! {
    #[test]
    fn the_result_never_leaves_the_root(path in ".{0,40}") {
        if let Ok(relative) = translate(Some(&path), "id") {
            prop_assert!(relative.is_relative());
            prop_assert!(relative.components().all(|part| matches!(part, Component::Normal(_))));
            prop_assert!(relative.components().count() > 0);
        }
    }
}

#[test]
fn directories_are_made_and_removed_in_a_plain_tree() {
    let root = std::env::temp_dir().join(format!("bulkhead-cgroup-{}", std::process::id()));
    fs::create_dir(&root).unwrap();
    let cgroup = Cgroup {
        root: root.clone(),
        relative: "a/b/c".into(),
    };
    cgroup.create().unwrap();
    cgroup.create().unwrap();
    assert!(cgroup.path().is_dir());
    assert_eq!(cgroup.oom_kills(), 0);
    fs::write(cgroup.path().join("memory.events"), "low 0\noom 2\noom_kill 1\n").unwrap();
    assert_eq!(cgroup.oom_kills(), 1);
    // A cgroup holds no real files; outside of one the directory is not empty and stays.
    assert!(matches!(cgroup.remove(), Err(CgroupError::Remove(..))));
    fs::remove_dir_all(&root).unwrap();
    cgroup.remove().unwrap();
}

fn value(limits: &HostLimits, file: &str) -> String {
    let settings = limits.settings();
    let (_, value) = settings.iter().find(|(name, _)| *name == file).unwrap();
    value.clone()
}

#[test]
fn limits_become_the_files_of_version_2() {
    let limits = HostLimits {
        memory_max: Some(1 << 30),
        cpu_milli: Some(1600),
        cpu_shares: Some(1024),
        cpus: Some("1,3".into()),
        mems: Some("0".into()),
        io_weight: Some(1000),
    };
    let files = [
        "memory.max",
        "cpu.max",
        "cpu.weight",
        "cpuset.cpus",
        "cpuset.mems",
        "io.weight",
    ];
    assert_eq!(
        files.map(|file| value(&limits, file)),
        ["1073741824", "160000 100000", "39", "1,3", "0", "default 10000"]
    );
    let none = HostLimits::default();
    assert_eq!(
        files.map(|file| value(&none, file)),
        ["max", "max 100000", "100", "", "", "default 100"]
    );
}

#[test]
fn the_kernels_bounds_are_kept() {
    let of = |milli, shares, weight| {
        let limits = HostLimits {
            cpu_milli: Some(milli),
            cpu_shares: Some(shares),
            io_weight: Some(weight),
            ..HostLimits::default()
        };
        ["cpu.max", "cpu.weight", "io.weight"].map(|file| value(&limits, file))
    };
    assert_eq!(of(1, 0, 0), ["1000 100000", "1", "default 1"]);
    let largest = of(u64::MAX, u64::MAX, u16::MAX);
    assert_eq!(
        (largest[1].as_str(), largest[2].as_str()),
        ("10000", "default 10000")
    );
}

#[test]
fn only_what_changes_is_written_and_what_is_missing_is_left_out() {
    let root = std::env::temp_dir().join(format!("bulkhead-limits-{}", std::process::id()));
    let cgroup = Cgroup {
        root: root.clone(),
        relative: "pod".into(),
    };
    fs::create_dir_all(cgroup.path()).unwrap();
    for (file, text) in [
        ("memory.max", "max\n"),
        ("cpu.max", "max 100000\n"),
        ("cpuset.cpus", "1\n"),
        ("cpuset.mems", "\n"),
    ] {
        fs::write(cgroup.path().join(file), text).unwrap();
    }
    fs::write(root.join("cpuset.cpus.effective"), "0-3\n").unwrap();
    let read = |file: &str| fs::read_to_string(cgroup.path().join(file)).unwrap();
    cgroup.limit(&HostLimits {
        memory_max: Some(4096),
        ..HostLimits::default()
    });
    assert!(read("memory.max").starts_with("4096"), "{}", read("memory.max"));
    assert_eq!(read("cpu.max"), "max 100000\n");
    assert_eq!(read("cpuset.cpus"), "0-3\n");
    assert_eq!(read("cpuset.mems"), "\n");
    assert!(!cgroup.path().join("cpu.weight").exists());
    fs::remove_dir_all(root).unwrap();
}
