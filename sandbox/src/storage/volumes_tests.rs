#![allow(clippy::unwrap_used)]

use std::os::unix::fs::symlink;

use super::*;
use crate::mount::parse_options;

const POD: &str = "/var/lib/kubelet/pods/6d8a/volumes";

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("bulkhead-volumes-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

fn key(inode: u64) -> Key {
    Key::Host {
        device: 1,
        inode,
        mount: None,
        recursive: true,
        follows: false,
        recursive_read_only: false,
        fixed: false,
    }
}

fn entry(state: &mut State, inode: u64, read_only: bool, user: &str) -> String {
    if let Some(entry) = state.find(&key(inode), read_only) {
        entry.users.insert(user.into());
        return entry.volume.name.clone();
    }
    let name = state.name(None);
    state.entries.push(Entry {
        key: key(inode),
        read_only,
        users: BTreeSet::from([user.to_owned()]),
        volume: Arc::new(PodVolume {
            name: name.clone(),
            kind: VolumeKind::Shared,
            directory: None,
            shown: tokio::sync::Mutex::default(),
        }),
    });
    name
}

#[test]
fn kinds_are_told_by_the_kubelets_paths() {
    for (path, is_it) in [
        (format!("{POD}/kubernetes.io~configmap/c"), true),
        (format!("{POD}/kubernetes.io~secret/c/sub"), true),
        (format!("{POD}/kubernetes.io~configmap"), false),
        (format!("{POD}/kubernetes.io~empty-dir/c"), false),
        ("/srv/kubernetes.io~configmap/c".into(), false),
        ("/srv/volumes/kubernetes.io~configmap/c".into(), false),
    ] {
        assert_eq!(of_kind(Path::new(&path), &WRITTEN_AT_ONCE), is_it, "{path}");
    }
    assert!(is_volume(Path::new(&format!("{POD}/{EMPTY}/e")), &[EMPTY]));
    assert!(!is_volume(Path::new(&format!("{POD}/{EMPTY}/e/sub")), &[EMPTY]));
}

#[test]
fn the_kubelets_layout_is_known_and_no_other() {
    let directory = scratch("layout");
    assert!(!is_laid_out(&directory));
    fs::create_dir(directory.join("..2026_11_21")).unwrap();
    symlink("..2026_11_21", directory.join(DATA)).unwrap();
    symlink("..data/a", directory.join("a")).unwrap();
    assert!(is_laid_out(&directory));
    fs::write(directory.join("own"), "").unwrap();
    assert!(!is_laid_out(&directory));
    fs::remove_file(directory.join("own")).unwrap();
    symlink("/etc/passwd", directory.join("b")).unwrap();
    assert!(!is_laid_out(&directory));
    fs::remove_dir_all(directory).unwrap();
}

#[test]
fn versions_are_names_beside_the_link() {
    for name in ["..2026_11_21", "..a"] {
        assert!(is_version(name), "{name}");
    }
    for name in ["", "..", "..data", "a", "../a", "..a/b", "/a"] {
        assert!(!is_version(name), "{name}");
    }
}

#[test]
fn one_directory_is_one_volume_until_its_last_user_is_gone() {
    let pool = Pool::default();
    let mut state = pool.lock();
    let first = entry(&mut state, 7, false, "a");
    assert_eq!(entry(&mut state, 7, false, "b"), first);
    // Who only reads shares what others write.
    assert_eq!(entry(&mut state, 7, true, "c"), first);
    assert_ne!(entry(&mut state, 8, false, "a"), first);
    drop(state);
    let names = |id| -> Vec<String> {
        pool.release(id)
            .iter()
            .map(|volume| volume.name.clone())
            .collect()
    };
    assert_eq!(names("a"), ["2"]);
    assert!(names("b").is_empty());
    assert_eq!(names("c"), [first]);
    assert!(names("c").is_empty());
}

#[test]
fn a_volume_mounted_read_only_serves_no_writer() {
    let pool = Pool::default();
    let mut state = pool.lock();
    let read_only = entry(&mut state, 7, true, "a");
    let writable = entry(&mut state, 7, false, "b");
    assert_ne!(read_only, writable);
}

#[test]
fn a_source_that_was_replaced_is_refused() {
    let directory = scratch("replaced");
    fs::write(directory.join("file"), "").unwrap();
    symlink("/dev/null", directory.join("device")).unwrap();
    let pool = Pool::default();
    for (name, is_directory) in [("file", true), ("device", false), ("", false)] {
        let wanted = Volume {
            source: directory.join(name),
            directory: is_directory,
            options: parse_options(&["rbind"]).unwrap(),
            mount: 0,
        };
        let taken = pool.take("c", &directory, &directory, &wanted, None);
        assert!(matches!(taken, Err(StorageError::Changed(_))), "{name}");
    }
    fs::remove_dir_all(directory).unwrap();
}

/// In a mount namespace of this thread's own.
#[test]
#[ignore = "needs root"]
fn the_tree_holds_volumes_once_and_is_read_only() {
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
    let work = scratch("tree");
    mount(Some("w"), &work, Some("tmpfs"), MsFlags::empty(), none).unwrap();
    mount(none, &work, none, MsFlags::MS_SHARED, none).unwrap();
    let tree = SharedTree::create(&work.join("shared")).unwrap();
    assert!(fs::create_dir(tree.root().join("x")).is_err());
    let root = work.join("root");
    fs::create_dir_all(root.join("inner")).unwrap();
    let data = work.join("data");
    fs::create_dir_all(data.join("below")).unwrap();
    let plan = RootPlan::Mounts(vec![Mount {
        kind: "bind".into(),
        source: root.to_str().unwrap().into(),
        options: vec!["rbind".into(), "rw".into()],
        ..Mount::default()
    }]);
    let wanted = |options: &[&str]| Volume {
        source: data.clone(),
        directory: true,
        options: parse_options(options).unwrap(),
        mount: 0,
    };
    let volumes = [
        wanted(&["rbind", "rw"]),
        wanted(&["rbind", "ro"]),
        wanted(&["rbind", "rw", "rslave"]),
    ];
    let (_, first) = tree.prepare("a", &plan, &volumes).unwrap();
    let names: Vec<_> = first.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["1", "1", "2"]);
    fs::write(tree.root().join(".volumes/1/file"), "x").unwrap();
    assert!(data.join("file").exists());
    fs::write(tree.root().join("a/rootfs/file"), "x").unwrap();
    // A mount that the host makes later appears where that was asked for.
    mount(
        Some("l"),
        &data.join("below"),
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )
    .unwrap();
    fs::write(data.join("below/late"), "").unwrap();
    assert!(tree.root().join(".volumes/2/below/late").exists());
    assert!(!tree.root().join(".volumes/1/below/late").exists());
    let (_, second) = tree.prepare("b", &plan, &[wanted(&["rbind", "rro"])]).unwrap();
    assert_eq!(second[0].name, "3");
    assert!(fs::write(tree.root().join(".volumes/3/below/x"), "").is_err());

    let released = tree.release("a");
    assert_eq!(released.len(), 2);
    for volume in released.iter().chain(&tree.release("b")) {
        tree.remove_volume(volume);
    }
    tree.remove("a");
    tree.remove("b");
    let left: Vec<_> = fs::read_dir(tree.root().join(".volumes")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    tree.unmount().unwrap();
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    assert!(mounts.contains(work.to_str().unwrap()));
    assert!(!mounts.contains(tree.root().to_str().unwrap()));
}
