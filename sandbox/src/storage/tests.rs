#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::plan::template_numbers;
use super::*;

fn m(kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        kind: kind.into(),
        source: source.into(),
        target: String::new(),
        options: options.iter().map(|option| (*option).into()).collect(),
    }
}

fn plan(mounts: &[Mount]) -> Result<RootPlan, StorageError> {
    plan_root(mounts, Path::new("/bundle/rootfs"))
}

#[test]
fn no_mounts_share_the_root_path() {
    let RootPlan::Mounts(mounts) = plan(&[]).unwrap() else {
        panic!("not shared")
    };
    assert_eq!(mounts, [m("bind", "/bundle/rootfs", &["rbind", "rw"])]);
}

#[test]
fn mounted_snapshots_are_shared() {
    for mount in [
        m(
            "overlay",
            "overlay",
            &["lowerdir=/a", "upperdir=/u", "workdir=/w"],
        ),
        m("bind", "/s", &["rbind", "rw"]),
    ] {
        assert_eq!(
            plan(std::slice::from_ref(&mount)).unwrap(),
            RootPlan::Mounts(vec![mount])
        );
    }
}

#[test]
fn block_snapshots_become_disks() {
    let got = plan(&[m("ext4", "/b/3", &["loop", "rw"])]).unwrap();
    let disk = DiskPlan {
        source: "/b/3".into(),
        kind: "ext4".into(),
        options: vec![],
        read_only: false,
    };
    assert_eq!(got, RootPlan::Disk(disk));
    let got = plan(&[m("xfs", "/b/3", &["loop", "ro"])]).unwrap();
    let disk = DiskPlan {
        source: "/b/3".into(),
        kind: "xfs".into(),
        options: vec!["nouuid".into()],
        read_only: true,
    };
    assert_eq!(got, RootPlan::Disk(disk));
}

#[test]
fn erofs_layers_keep_the_overlays_order() {
    let mounts = [
        m(
            "mkfs/ext4",
            "/s/rw.img",
            &["X-containerd.mkfs.fs=ext4", "rw", "loop"],
        ),
        m("erofs", "/s/top", &["ro"]),
        m("erofs", "/s/base", &["ro"]),
        m(
            "format/mkdir/overlay",
            "overlay",
            &[
                "upperdir={{ mount 0 }}/upper",
                "workdir={{ mount 0 }}/work",
                "lowerdir={{ overlay 1 2 }}",
            ],
        ),
    ];
    let RootPlan::Layers { lower, upper } = plan(&mounts).unwrap() else {
        panic!("no layers")
    };
    assert_eq!(lower, [PathBuf::from("/s/top"), PathBuf::from("/s/base")]);
    assert_eq!(upper.unwrap().source, Path::new("/s/rw.img"));
}

#[test]
fn a_view_of_one_layer_has_no_upper_disk() {
    let got = plan(&[m("erofs", "/s/layer.erofs", &["ro", "loop"])]).unwrap();
    assert_eq!(
        got,
        RootPlan::Layers {
            lower: vec!["/s/layer.erofs".into()],
            upper: None
        }
    );
}

#[test]
fn layers_that_make_no_sense_are_refused() {
    let layer = m("erofs", "/s/1", &["ro"]);
    for top in [
        m("overlay", "overlay", &[]),
        m("overlay", "overlay", &["lowerdir={{ mount 7 }}"]),
        m("overlay", "overlay", &["lowerdir=/a"]),
        m("ext4", "/x", &[]),
        m(
            "format/overlay",
            "overlay",
            &["lowerdir={{ mount 0 }}", "upperdir=/host/fs"],
        ),
    ] {
        assert!(matches!(plan(&[layer.clone(), top]), Err(StorageError::Root(_))));
    }
}

#[test]
fn templates_count_both_ways() {
    assert_eq!(template_numbers("{{ overlay 1 3 }}"), Some(vec![1, 2, 3]));
    assert_eq!(template_numbers("{{ overlay 3 1 }}"), Some(vec![3, 2, 1]));
    assert_eq!(template_numbers("{{ mount 2 }}/upper"), Some(vec![2]));
    assert_eq!(template_numbers("{{ overlay 0 99999999 }}"), None);
    assert_eq!(template_numbers("/plain"), None);
}

#[test]
fn container_ids_cannot_leave_the_tree() {
    let tree = SharedTree {
        root: "/tree".into(),
        writable: Arc::new(File::open("/").unwrap().into()),
        volumes: volumes::Pool::default(),
    };
    for id in ["..", ".", "", "a/b", "/a", "a/", ".volumes"] {
        assert!(matches!(tree.folder(id), Err(StorageError::Id(_))), "{id}");
    }
    assert_eq!(tree.folder("a.b-c").unwrap(), "a.b-c");
}

#[test]
fn targets_stay_in_the_root() {
    let root = std::env::temp_dir().join(format!("bulkhead-inside-{}", std::process::id()));
    fs::create_dir_all(root.join("a/b")).unwrap();
    std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
    std::os::unix::fs::symlink("b", root.join("a/inner")).unwrap();
    for target in ["", "/a", "a/b"] {
        let (path, _) = inside(&root, target).unwrap().place().unwrap();
        assert_eq!(
            path,
            root.join(target.trim_start_matches('/')).canonicalize().unwrap()
        );
    }
    for target in ["..", "a/../..", "link", "link/passwd", "a/inner", "none"] {
        assert!(inside(&root, target).is_err(), "{target}");
    }
    fs::remove_dir_all(root).unwrap();
}

proptest! {
    #[test]
    fn parts_are_adjacent_and_aligned(sectors in proptest::collection::vec(1u64..100_000, 1..20)) {
        let sizes: Vec<u64> = sectors.iter().map(|n| n * SECTOR).collect();
        let parts = layers::parts(&sizes);
        let mut end = 0;
        for (part, size) in parts.iter().zip(&sizes) {
            prop_assert_eq!(part.offset, end);
            prop_assert_eq!(part.length, *size);
            prop_assert_eq!(part.offset % SECTOR, 0);
            end += size;
        }
    }
}
