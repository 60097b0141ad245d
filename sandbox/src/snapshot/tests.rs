#![allow(clippy::unwrap_used)]

use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;

use super::*;
use crate::template::Identity;

/// A directory that is gone at the end of the test.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bulkhead-snapshot-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::DirBuilder::new().mode(0o700).create(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn machine() -> Machine {
    Machine {
        boot_vcpus: 1,
        vcpus: 2,
        online: 2,
        max_vcpus: 4,
        memory_mib: 256,
        added_mib: 128,
        hotplug_mib: 1024,
        console: true,
        balloon: true,
        disk_slots: 2,
        net_slots: 2,
    }
}

fn origin() -> Origin {
    Origin {
        manager: "/run/manager.sock".into(),
        namespace: "spaces".to_owned(),
        pod: "p".to_owned(),
    }
}

fn container(id: &str, name: Option<&str>) -> SavedContainer {
    SavedContainer {
        id: id.to_owned(),
        container: format!("{id}-1"),
        name: name.map(str::to_owned),
        terminal: false,
        streams: [false, true, true],
        execs: vec!["e1".to_owned()],
        root: SavedRoot::Overlay {
            lower: "/l/2:/l/1".to_owned(),
            upper: "0.upper".into(),
        },
        volumes: vec![SavedVolume {
            destination: "/data".into(),
            name: "7".to_owned(),
            whole: None,
            kind: SavedVolumeKind::Written,
            shown: Some("..2026".into()),
        }],
    }
}

/// A complete snapshot with its root image.
fn make(directory: &Directory, name: &str) -> (PathBuf, PathBuf) {
    let (image, store) = (directory.0.join("image"), directory.0.join("store"));
    fs::write(&image, "root").unwrap();
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&store)
        .unwrap();
    let making = Making::begin(&store.join(name)).unwrap();
    making.files().unwrap();
    let containers = vec![container("a", None)];
    let manifest = Manifest::new(
        origin(),
        "default".to_owned(),
        Identity::of(&image).unwrap(),
        machine(),
        containers,
    );
    making.finish(&manifest).unwrap();
    (store, image)
}

#[test]
fn what_was_saved_is_found_again() {
    let directory = Directory::new("found");
    let (store, image) = make(&directory, "one");
    let snapshot = Snapshot::open(&store, "one", "default", &image).unwrap();
    assert_eq!(snapshot.manifest.machine, machine());
    assert_eq!(snapshot.manifest.origin, origin());
    let manifest = Manifest::read(&store, &store.join("one")).unwrap();
    assert_eq!(manifest, snapshot.manifest);
    assert_eq!(snapshot.manifest.containers, [container("a", None)]);
    assert_eq!(
        snapshot.path("0.upper".as_ref()).unwrap(),
        store.join("one/0.upper")
    );
    for outside in ["../x", "/etc", "a/../b"] {
        assert!(snapshot.path(outside.as_ref()).is_err(), "{outside}");
    }
}

#[test]
fn a_snapshot_is_for_its_namespace_image_and_version() {
    let directory = Directory::new("fits");
    let (store, image) = make(&directory, "one");
    let open = |name: &str, namespace: &str| Snapshot::open(&store, name, namespace, &image);
    assert!(matches!(open("two", "default"), Err(SnapshotError::None(_))));
    let other = open("one", "other").unwrap_err();
    assert_eq!(
        other.to_string(),
        "Namespace of the snapshot was default and is other"
    );
    let file = store.join("one").join(MANIFEST);
    let whole = fs::read_to_string(&file).unwrap();
    for (from, to) in [
        ("\"version\": 2", "\"version\": 3"),
        ("\"vcpus\"", "\"cpus\""),
        ("}", ""),
    ] {
        fs::write(&file, whole.replacen(from, to, 1)).unwrap();
        assert!(open("one", "default").is_err(), "{to}");
    }
    fs::write(&file, &whole).unwrap();
    fs::set_permissions(store.join("one"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(open("one", "default"), Err(SnapshotError::Open(_))));
    fs::set_permissions(store.join("one"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(&image, "another root").unwrap();
    assert!(matches!(
        open("one", "default"),
        Err(SnapshotError::Changed { .. })
    ));
}

#[test]
fn what_is_not_finished_leaves_nothing_and_takes_no_place() {
    let directory = Directory::new("unfinished");
    let making = Making::begin(&directory.0).unwrap();
    making.files().unwrap();
    fs::create_dir(directory.0.join("0.upper")).unwrap();
    assert!(matches!(
        Making::begin(&directory.0),
        Err(SnapshotError::NotEmpty(_))
    ));
    drop(making);
    assert_eq!(fs::read_dir(&directory.0).unwrap().count(), 0);
}

#[tokio::test]
async fn copies_are_whole() {
    let directory = Directory::new("copies");
    let (from, to) = (directory.0.join("from"), directory.0.join("to"));
    fs::create_dir_all(from.join("sub")).unwrap();
    fs::set_permissions(&from, fs::Permissions::from_mode(0o751)).unwrap();
    fs::write(from.join("sub/file"), "content").unwrap();
    fs::hard_link(from.join("sub/file"), from.join("link")).unwrap();
    symlink("sub/file", from.join("symbolic")).unwrap();
    copy_tree(&from, &to).await.unwrap();
    assert_eq!(fs::metadata(&to).unwrap().mode() & 0o7777, 0o751);
    assert_eq!(fs::read(to.join("link")).unwrap(), b"content");
    assert_eq!(fs::metadata(to.join("link")).unwrap().nlink(), 2);
    assert_eq!(fs::read_link(to.join("symbolic")).unwrap(), Path::new("sub/file"));

    let (disk, copy) = (directory.0.join("disk"), directory.0.join("copy"));
    let file = File::create(&disk).unwrap();
    file.set_len(8 << 20).unwrap();
    copy_disk(&disk, &copy).await.unwrap();
    let copied = fs::metadata(&copy).unwrap();
    assert_eq!((copied.len(), copied.blocks()), (8 << 20, 0));
    let missing = copy_disk(&directory.0.join("nothing"), &copy).await.unwrap_err();
    assert!(missing.to_string().contains("No such file"), "{missing}");
}

proptest! {
    /// A name is one file below the store.
    #[test]
    fn names_stay_in_the_store(name in "\\PC{0,12}|[a-z0-9._-]{0,140}") {
        let is_name = check_name(&name).is_ok();
        let path = Path::new("/store").join(&name);
        let is_below = path.parent() == Some(Path::new("/store")) && path.file_name() == Some(name.as_ref());
        prop_assert!(!is_name || is_below, "{}", name);
    }

    #[test]
    fn a_manifest_survives_its_file(vcpus in 1u8..32, name in proptest::option::of("\\PC{0,20}"), streams in any::<[bool; 3]>()) {
        let saved = SavedContainer { streams, ..container("a", name.as_deref()) };
        let machine = Machine { vcpus, ..machine() };
        let image = Identity::of("/".as_ref()).unwrap();
        let manifest = Manifest::new(origin(), "n".to_owned(), image, machine, vec![saved]);
        let json = serde_json::to_vec(&manifest).unwrap();
        prop_assert_eq!(serde_json::from_slice::<Manifest>(&json).unwrap(), manifest);
    }
}
