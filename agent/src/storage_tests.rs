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
