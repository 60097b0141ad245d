#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn filesystem(slot: u32, offset: u64, length: u64) -> proto::Filesystem {
    let range = proto::DiskRange {
        slot,
        offset,
        length,
        ..Default::default()
    };
    proto::Filesystem {
        range: Some(range).into(),
        type_: "erofs".into(),
        ..Default::default()
    }
}

fn root(kind: Kind) -> proto::RootFilesystem {
    proto::RootFilesystem {
        kind: Some(kind),
        ..Default::default()
    }
}

fn plan(root: &proto::RootFilesystem, partitions: &mut Partitions) -> Result<Plan, String> {
    Plan::new(
        Path::new("/run/bulkhead/containers/c"),
        root,
        &[],
        &[],
        partitions,
    )
    .map_err(|error| error.to_string())
}

fn used(partitions: &Partitions) -> usize {
    partitions.0.values().map(BTreeSet::len).sum()
}

#[test]
fn layers_of_one_disk_get_a_partition_each() {
    let layers = proto::Layers {
        lower: vec![filesystem(0, 0, 4096), filesystem(0, 4096, 8192)],
        upper: Some(filesystem(1, 0, 0)).into(),
        ..Default::default()
    };
    let mut partitions = Partitions::default();
    let first = plan(&root(Kind::Layers(layers.clone())), &mut partitions).unwrap();
    let numbers = |plan: &Plan| {
        plan.all()
            .filter_map(|v| v.partition.as_ref())
            .map(|p| p.number)
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers(&first), [1, 2]);
    assert_eq!(first.root(), Path::new("/run/bulkhead/containers/c/rootfs"));
    let second = plan(&root(Kind::Layers(layers)), &mut partitions).unwrap();
    assert_eq!(numbers(&second), [3, 4]);
    partitions.release(&first);
    partitions.release(&second);
    assert_eq!(used(&partitions), 0);
}

#[test]
fn a_refused_plan_keeps_no_partition() {
    let mut bad = filesystem(0, 512, 512);
    bad.type_ = "ntfs".into();
    let layers = proto::Layers {
        lower: vec![filesystem(0, 0, 512), bad],
        ..Default::default()
    };
    let mut partitions = Partitions::default();
    let error = plan(&root(Kind::Layers(layers)), &mut partitions).unwrap_err();
    assert_eq!(error, "invalid root.layers.lower: \"ntfs\"");
    assert_eq!(used(&partitions), 0);
}

#[test]
fn nonsense_is_refused() {
    let disk = |offset, length| Kind::Disk(filesystem(0, offset, length));
    let shared = |path: &str| Kind::SharedPath(path.into());
    let cases = [
        (disk(1, 512), "invalid root.disk: \"range 1+512\""),
        (
            disk(512, u64::MAX - 511),
            "invalid root.disk: \"range 512+18446744073709551104\"",
        ),
        (shared("etc"), "invalid root.shared_path: \"etc\""),
        (
            shared("/run/bulkhead/shared/../.."),
            "invalid root.shared_path: \"/run/bulkhead/shared/../..\"",
        ),
        (shared("/proc"), "invalid root.shared_path: \"/proc\""),
        (
            Kind::Layers(proto::Layers::new()),
            "invalid root.layers.lower: \"0\"",
        ),
    ];
    for (kind, error) in cases {
        assert_eq!(plan(&root(kind), &mut Partitions::default()), Err(error.into()));
    }
    assert!(plan(&proto::RootFilesystem::new(), &mut Partitions::default()).is_err());
}

#[test]
fn volumes_stay_below_the_agents_directory() {
    for point in [
        "/etc",
        "/run/bulkhead",
        "/run/bulkhead/../x",
        "run/bulkhead/v",
        "/run/bulkheads/x",
    ] {
        let mount = proto::DiskMount {
            filesystem: Some(filesystem(0, 0, 0)).into(),
            mount_point: point.into(),
            ..Default::default()
        };
        let root = root(Kind::SharedPath(SHARED.into()));
        let result = Plan::new(
            Path::new("/run/bulkhead/containers/c"),
            &root,
            &[mount],
            &[],
            &mut Partitions::default(),
        );
        assert!(result.is_err(), "{point}");
    }
}

proptest! {
    #[test]
    fn any_range_is_planned_or_refused(slot in any::<u32>(), offset in any::<u64>(), length in any::<u64>()) {
        let mut partitions = Partitions::default();
        match plan(&root(Kind::Disk(filesystem(slot, offset, length))), &mut partitions) {
            Ok(plan) => {
                prop_assert_eq!(used(&partitions), usize::from(offset != 0 || length != 0));
                partitions.release(&plan);
            }
            Err(_) => prop_assert!(offset % 512 != 0 || length % 512 != 0 || offset.checked_add(length).is_none_or(|e| e > i64::MAX as u64)),
        }
        prop_assert_eq!(used(&partitions), 0);
    }
}

/// A file system of a disk as the host describes it, with a range that the kernel can address.
fn any_filesystem() -> impl Strategy<Value = proto::Filesystem> {
    let whole = Just((0u64, 0u64));
    let part = (0u64..1 << 40, 1u64..1 << 40).prop_map(|(offset, length)| (offset * 512, length * 512));
    (
        0u32..4,
        any::<u64>(),
        prop_oneof![whole, part],
        prop::sample::select(&TYPES[..]),
        prop::collection::vec("[a-z]{1,8}(=[a-z0-9]{1,8})?", 0..3),
        any::<bool>(),
    )
        .prop_map(|(slot, capacity, (offset, length), kind, options, read_only)| {
            let range = proto::DiskRange {
                slot,
                capacity,
                offset,
                length,
                ..Default::default()
            };
            proto::Filesystem {
                range: Some(range).into(),
                type_: kind.into(),
                options,
                read_only,
                ..Default::default()
            }
        })
}

/// The description that a planned volume would have had; layers below are read-only whatever was asked.
fn described(volume: &Volume) -> proto::Filesystem {
    let (offset, length) = volume
        .partition
        .as_ref()
        .map_or((0, 0), |partition| (partition.offset, partition.length));
    let range = proto::DiskRange {
        slot: volume.slot,
        capacity: volume.capacity,
        offset,
        length,
        ..Default::default()
    };
    proto::Filesystem {
        range: Some(range).into(),
        type_: volume.kind.clone(),
        options: volume.options.clone(),
        read_only: volume.read_only,
        ..Default::default()
    }
}

proptest! {
    /// What the host describes is what is planned, from its bytes on; every part has a number of its own on its disk, and
    /// every volume a place of its own.
    #[test]
    fn what_is_described_is_planned(
        lower in prop::collection::vec(any_filesystem(), 1..6),
        upper in prop::option::of(any_filesystem()),
        mounts in prop::collection::btree_map("[a-z]{1,6}", any_filesystem(), 0..4),
        devices in prop::collection::vec((0u32..16, any::<u64>(), "/dev/[a-z]{1,8}", any::<bool>()), 0..3),
    ) {
        let layers = proto::Layers { lower, upper: upper.into(), ..Default::default() };
        let request = proto::CreateContainerRequest {
            root: Some(root(Kind::Layers(layers.clone()))).into(),
            disk_mounts: mounts.into_iter().map(|(name, filesystem)| proto::DiskMount {
                filesystem: Some(filesystem).into(),
                mount_point: format!("{RUN}/volumes/{name}"),
                ..Default::default()
            }).collect(),
            block_devices: devices.into_iter().map(|(slot, capacity, path, read_only)| proto::BlockDevice {
                disk: Some(proto::DiskRange { slot, capacity, ..Default::default() }).into(),
                path,
                read_only,
                ..Default::default()
            }).collect(),
            ..Default::default()
        };
        let bytes = protobuf::Message::write_to_bytes(&request).unwrap();
        let arrived = <proto::CreateContainerRequest as protobuf::Message>::parse_from_bytes(&bytes).unwrap();
        let mut partitions = Partitions::default();
        let directory = Path::new("/run/bulkhead/containers/c");
        let plan = Plan::new(
            directory, &arrived.root, &arrived.disk_mounts, &arrived.block_devices, &mut partitions,
        ).unwrap();

        let RootPlan::Overlay { lower, upper } = &plan.root else { panic!("{plan:?}") };
        let below: Vec<_> = lower.iter().map(described).collect();
        let expected: Vec<_> = layers.lower.iter().cloned().map(|mut layer| {
            layer.read_only = true;
            layer
        }).collect();
        prop_assert_eq!(below, expected);
        prop_assert_eq!(upper.as_deref().map(described), layers.upper.as_ref().cloned());
        prop_assert_eq!(plan.volumes.len(), request.disk_mounts.len());
        for (volume, mount) in plan.volumes.iter().zip(&request.disk_mounts) {
            prop_assert_eq!(&described(volume), mount.filesystem.as_ref().unwrap());
            prop_assert_eq!(&volume.mount_point, Path::new(&mount.mount_point));
        }
        for (device, sent) in plan.block_devices.iter().zip(&request.block_devices) {
            let disk = sent.disk.as_ref().unwrap();
            prop_assert_eq!((device.slot, device.capacity), (disk.slot, disk.capacity));
            prop_assert_eq!((&device.path, device.read_only), (&PathBuf::from(&sent.path), sent.read_only));
        }
        let parts: Vec<_> = plan.all()
            .filter_map(|volume| Some((volume.slot, volume.partition.as_ref()?.number)))
            .collect();
        prop_assert_eq!(parts.iter().collect::<BTreeSet<_>>().len(), parts.len());
        prop_assert_eq!(used(&partitions), parts.len());
        let places: BTreeSet<_> = plan.all().map(|volume| &volume.mount_point).collect();
        prop_assert_eq!(places.len(), plan.all().count());
        prop_assert!(places.iter().all(|place| place.starts_with(RUN)));
        partitions.release(&plan);
        prop_assert_eq!(used(&partitions), 0);
    }
}
