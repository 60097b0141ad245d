#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::*;

/// A directory that is removed with everything in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bulkhead-template-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        for file in ["kernel", "image", "vmm"] {
            fs::write(path.join(file), file).unwrap();
        }
        Self(path)
    }

    fn shape(&self) -> Shape {
        Shape {
            scope: None,
            files: ["kernel", "image", "vmm"].map(|file| Identity::of(&self.0.join(file)).unwrap()),
            command_line: String::new(),
            vcpus: 1,
            max_vcpus: 4,
            memory_mib: 256,
            hotplug_mib: 1024,
            console: true,
            balloon: true,
            disk_slots: 2,
            net_slots: 3,
            host_boot: host_boot().unwrap(),
            versions: VERSIONS,
        }
    }

    fn store(&self, change: impl FnOnce(&mut Shape)) -> Store {
        let mut shape = self.shape();
        change(&mut shape);
        Store::new(&self.0.join("templates"), shape)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.0.join("templates"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn make(store: &Store) {
    let mut making = store.begin().unwrap().unwrap();
    let files = making.take_files().unwrap();
    (&files.state).write_all(b"state").unwrap();
    (&files.memory).write_all(b"memory").unwrap();
    making.finish().unwrap();
}

fn read(mut file: File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn what_was_written_is_found_by_its_shape_alone() {
    let scratch = Scratch::new("find");
    let store = scratch.store(|_| {});
    assert!(store.find().unwrap().is_none());
    make(&store);
    let found = store.find().unwrap().unwrap();
    assert_eq!(read(found.state), "state");
    assert_eq!(read(found.memory), "memory");
    assert!(store.begin().unwrap().is_none(), "made twice");
    type Change = fn(&mut Shape);
    let changes: [Change; 12] = [
        |shape| shape.scope = Some("a".into()),
        |shape| shape.files[0].inode += 1,
        |shape| shape.files[1].modified.1 += 1,
        |shape| shape.command_line = "quiet".into(),
        |shape| shape.vcpus = 2,
        |shape| shape.max_vcpus = 8,
        |shape| shape.memory_mib = 64,
        |shape| shape.hotplug_mib = 0,
        |shape| shape.console = false,
        |shape| shape.balloon = false,
        |shape| shape.disk_slots = 3,
        |shape| shape.net_slots = 2,
    ];
    for (index, change) in changes.into_iter().enumerate() {
        assert!(scratch.store(change).find().unwrap().is_none(), "{index}");
    }
    store.discard();
    assert!(store.find().unwrap().is_none());
    assert!(scratch.names().is_empty());
}

#[test]
fn lists_of_written_memory_are_added_and_go_with_their_template() {
    let scratch = Scratch::new("written");
    let store = scratch.store(|_| {});
    // Of a template that is gone meanwhile.
    let lists = |byte| Written {
        first: vec![byte; 16],
        later: vec![byte; 32],
    };
    assert!(store.keep_written(&lists(1)).is_err());
    make(&store);
    assert!(store.find().unwrap().unwrap().written.is_none());
    for byte in [1, 2] {
        store.keep_written(&lists(byte)).unwrap();
        let found = store.find().unwrap().unwrap().written.unwrap();
        assert_eq!(read(found.first).as_bytes(), [byte; 16]);
        assert_eq!(read(found.later).as_bytes(), [byte; 32]);
    }
    assert_eq!(fs::read_dir(store.path()).unwrap().count(), 5);
    store.discard();
    assert!(!store.path().exists());
}

#[test]
fn one_is_made_at_a_time_and_an_unfinished_one_is_not_seen() {
    let scratch = Scratch::new("race");
    let (store, other) = (scratch.store(|_| {}), scratch.store(|shape| shape.vcpus = 2));
    let making = store.begin().unwrap().unwrap();
    assert!(store.begin().unwrap().is_none());
    assert!(other.begin().unwrap().is_none());
    assert!(store.find().unwrap().is_none());
    drop(making);
    assert!(scratch.names().is_empty());
    make(&store);
    make(&other);
    assert_eq!(scratch.names().len(), 2);
}

#[test]
fn many_makers_leave_one_template() {
    let scratch = Scratch::new("many");
    let made = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let store = scratch.store(|_| {});
                if let Some(mut making) = store.begin().unwrap() {
                    let files = making.take_files().unwrap();
                    (&files.state).write_all(b"state").unwrap();
                    std::thread::sleep(Duration::from_millis(20));
                    making.finish().unwrap();
                    made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                }
            });
        }
    });
    assert_eq!(made.into_inner(), 1);
    assert_eq!(scratch.names().len(), 1);
    assert_eq!(
        read(scratch.store(|_| {}).find().unwrap().unwrap().state),
        "state"
    );
}

#[test]
fn what_a_crash_left_and_what_is_out_of_date_goes() {
    let scratch = Scratch::new("sweep");
    let stale = scratch.store(|_| {});
    make(&stale);
    let old_boot = scratch.store(|shape| shape.host_boot = "another".into());
    make(&old_boot);
    let templates = scratch.0.join("templates");
    // The first was removed when the second was made: for that one it was another start of the host.
    assert_eq!(scratch.names().len(), 1);
    fs::create_dir(templates.join("0123.new")).unwrap();
    fs::write(templates.join("0123.new/memory"), b"x").unwrap();
    fs::create_dir(templates.join("4567")).unwrap();
    fs::write(scratch.0.join("kernel"), "another kernel").unwrap();
    let fresh = scratch.store(|_| {});
    make(&fresh);
    assert_eq!(scratch.names(), [fresh.shape.name()]);
    assert!(stale.find().unwrap().is_none());
}

#[test]
fn the_one_that_was_not_used_for_longest_makes_room() {
    let scratch = Scratch::new("room");
    let stores: Vec<Store> = (0..MOST as u32 + 1)
        .map(|slots| scratch.store(|shape| shape.disk_slots = slots))
        .collect();
    for store in &stores[..MOST] {
        make(store);
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = stores[0].find().unwrap().unwrap();
    make(&stores[MOST]);
    let found: Vec<bool> = stores
        .iter()
        .map(|store| store.find().unwrap().is_some())
        .collect();
    assert_eq!(found.iter().filter(|found| **found).count(), MOST);
    assert!(found[0] && !found[1] && found[MOST], "{found:?}");
}

#[test]
fn a_store_that_others_can_write_to_is_refused() {
    let scratch = Scratch::new("owner");
    let store = scratch.store(|_| {});
    make(&store);
    let templates = scratch.0.join("templates");
    assert_eq!(fs::metadata(&templates).unwrap().mode() & 0o777, 0o700);
    fs::set_permissions(&templates, fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(store.find(), Err(TemplateError::Open(_))));
    let other = scratch.store(|shape| shape.vcpus = 2);
    assert!(matches!(other.begin(), Err(TemplateError::Open(_))));
}
