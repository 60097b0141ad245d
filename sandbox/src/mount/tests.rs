#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

#[test]
fn overlay_options_are_data() {
    let parsed = parse_options(&["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"]).unwrap();
    assert_eq!(parsed.flags, MsFlags::empty());
    assert_eq!(
        parsed.data_string(),
        "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b"
    );
    assert!(!parsed.read_only());
}

#[test]
fn flags_propagation_and_loop_are_told_apart() {
    let parsed = parse_options(&[
        "rbind",
        "ro",
        "nosuid",
        "rprivate",
        "loop",
        "X-containerd.mkfs.fs=ext4",
    ])
    .unwrap();
    assert_eq!(
        parsed.flags,
        MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID
    );
    assert_eq!(parsed.propagation, MsFlags::MS_PRIVATE | MsFlags::MS_REC);
    assert!(parsed.is_loop && parsed.read_only());
    assert!(parsed.data.is_empty());
}

#[test]
fn the_last_of_two_opposites_wins() {
    assert!(!parse_options(&["ro", "rw"]).unwrap().read_only());
    assert!(parse_options(&["rw", "ro"]).unwrap().read_only());
}

#[test]
fn id_mapped_mounts_are_refused() {
    for option in ["idmap", "ridmap", "uidmap=0:1000:1", "gidmap=0:1000:1"] {
        assert!(
            matches!(parse_options(&[option]), Err(MountError::Option(_))),
            "{option}"
        );
    }
}

#[test]
fn long_lower_dirs_become_relative() {
    let data = vec!["workdir=/x/w".to_owned(), "lowerdir=/s/1/fs:/s/20/fs".to_owned()];
    let (parent, data) = shorten_lower_dirs(&data).unwrap();
    assert_eq!(parent, Path::new("/s"));
    assert_eq!(data, "workdir=/x/w,lowerdir=1/fs:20/fs");
}

proptest! {
    /// Every option ends up exactly once: as a flag, or, unchanged and in order, as data.
    #[test]
    fn unknown_options_are_kept_in_order(names in proptest::collection::vec("[a-w]{3}=[a-z0-9/]{1,8}", 0..8)) {
        let parsed = parse_options(&names).unwrap();
        prop_assert_eq!(parsed.data, names);
        prop_assert_eq!(parsed.flags, MsFlags::empty());
    }

    #[test]
    fn parsing_never_panics(options in proptest::collection::vec(".{0,20}", 0..8)) {
        let _ = parse_options(&options);
    }

    #[test]
    fn shortened_paths_join_to_the_originals(ids in proptest::collection::vec(0u32..1000, 1..6)) {
        let dirs: Vec<String> = ids.iter().map(|id| format!("/var/lib/snapshots/{id}/fs")).collect();
        let (parent, data) = shorten_lower_dirs(&[format!("lowerdir={}", dirs.join(":"))]).unwrap();
        let joined: Vec<String> = data["lowerdir=".len()..]
            .split(':')
            .map(|dir| parent.join(dir).to_str().unwrap().trim_end_matches('/').to_owned())
            .collect();
        prop_assert_eq!(joined, dirs);
    }
}
