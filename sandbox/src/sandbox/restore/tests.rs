#![allow(clippy::unwrap_used)]

use super::*;
use crate::snapshot::{Machine, Making, Manifest, Origin};
use crate::storage::Part;
use crate::template::Identity;

fn restore(test: &str, names: &[Option<&str>]) -> Restore {
    let machine = Machine {
        boot_vcpus: 1,
        vcpus: 1,
        online: 1,
        max_vcpus: 1,
        memory_mib: 128,
        added_mib: 0,
        hotplug_mib: 0,
        console: true,
        balloon: true,
        disk_slots: 0,
        net_slots: 0,
    };
    let containers = names.iter().enumerate().map(|(number, name)| SavedContainer {
        id: format!("guest{number}"),
        container: format!("old{number}"),
        name: name.map(str::to_owned),
        terminal: false,
        streams: [false; 3],
        execs: Vec::new(),
        root: SavedRoot::Overlay {
            lower: String::new(),
            upper: PathBuf::new(),
        },
        volumes: Vec::new(),
    });
    let store = std::env::temp_dir().join(format!("bulkhead-restore-{test}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&store);
    let making = Making::begin(&store.join("one")).unwrap();
    making.files().unwrap();
    let image = Identity::of("/".as_ref()).unwrap();
    making
        .finish(&Manifest::new(
            Origin::default(),
            "n".to_owned(),
            image,
            machine,
            containers.collect(),
        ))
        .unwrap();
    let snapshot = Snapshot::open(&store, "one", "n", "/".as_ref()).unwrap();
    std::fs::remove_dir_all(&store).unwrap();
    Restore::new(snapshot)
}

fn ready(restore: &Restore, number: usize, id: &str) {
    restore.ready(
        number,
        Ready {
            id: id.to_owned(),
            stdio: Stdio::default(),
            disks: Vec::new(),
        },
    );
}

#[test]
fn a_pod_is_complete_when_each_container_has_its_place() {
    let restore = restore("places", &[Some("a"), Some("b")]);
    assert_eq!(restore.take("1", Some("b")).unwrap(), 1);
    let unknown = restore.take("2", Some("b")).unwrap_err().to_string();
    assert_eq!(unknown, "The snapshot has no container b; it has a");
    assert!(restore.take("2", None).is_err());
    ready(&restore, 1, "1");
    // It is removed, and another one comes.
    restore.leave("1");
    assert_eq!(restore.take("3", Some("b")).unwrap(), 1);
    ready(&restore, 1, "3");
    assert_eq!(restore.take("2", Some("a")).unwrap(), 0);
    assert!(!restore.is_complete());
    ready(&restore, 0, "2");
    assert!(restore.is_complete());
    // From now on the guest knows who has which place.
    restore.leave("2");
    let pairs = restore
        .pairs()
        .into_iter()
        .map(|(saved, id)| (saved.id.clone(), id));
    let expected = [("guest0", "2"), ("guest1", "3")].map(|(guest, id)| (guest.to_owned(), id.to_owned()));
    assert_eq!(pairs.collect::<Vec<_>>(), expected);
}

#[test]
fn a_container_alone_takes_the_only_place_whatever_it_is_called() {
    let alone = restore("alone", &[None]);
    assert_eq!(alone.take("anything", None).unwrap(), 0);
    assert!(restore("empty", &[]).is_complete());
}

fn prepared(parts: usize, read_only: bool) -> PreparedDisk {
    let part = Part {
        offset: 0,
        length: 0,
        kind: String::new(),
        options: Vec::new(),
    };
    PreparedDisk {
        files: Vec::new(),
        read_only,
        parts: vec![part; parts],
    }
}

#[test]
fn layers_and_what_is_above_them_come_back_to_their_slots() {
    let restore = restore("layers", &[None]);
    let mut saved = restore.containers()[0].clone();
    let layers = |upper: Option<u32>| SavedRoot::Layers {
        lower: vec!["/top".into(), "/base".into()],
        slot: 3,
        upper: upper.map(|slot| SavedDisk {
            slot,
            copy: Some("0.disk".into()),
        }),
    };
    let places = |saved: &SavedContainer, root| {
        let disks = disks(saved, root)?.into_iter();
        Ok::<_, Error>(
            disks
                .map(|(slot, disk)| (slot, disk.parts.len(), disk.read_only))
                .collect::<Vec<_>>(),
        )
    };
    let again = |upper| PreparedRoot::Layers {
        lower: prepared(2, true),
        upper,
    };
    // The writable disk had the lower slot: another container has left it free.
    saved.root = layers(Some(1));
    let found = places(&saved, again(Some(prepared(1, false)))).unwrap();
    assert_eq!(found, [(3, 2, true), (1, 1, false)]);
    saved.root = layers(None);
    assert_eq!(places(&saved, again(None)).unwrap(), [(3, 2, true)]);
    let refused = places(&saved, PreparedRoot::Disk(prepared(1, false))).unwrap_err();
    assert!(
        chain(&refused).contains("cannot go on from the snapshot"),
        "{}",
        chain(&refused)
    );
}
