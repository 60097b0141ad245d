#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::overlay::shorten_lower_dirs;
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

#[test]
fn mounts_are_listed_with_their_places() {
    let text = b"22 1 259:0 / / ro,relatime shared:1 - ext4 /dev/root ro\n\
        30 22 0:25 /sub\\040dir /mnt/a\\040b rw - tmpfs tmpfs rw\nbroken\n";
    let mounts = info::parse(text);
    assert_eq!(mounts.len(), 2);
    assert_eq!((mounts[1].id, mounts[1].parent), (30, 22));
    assert_eq!(mounts[1].device, "0:25");
    assert_eq!(mounts[1].root, Path::new("/sub dir"));
    assert_eq!(mounts[1].point, Path::new("/mnt/a b"));
    assert!(info::has_below(&mounts, 22, Path::new("/mnt")));
    assert!(!info::has_below(&mounts, 22, Path::new("/mnt/a b")));
    assert!(!info::has_below(&mounts, 30, Path::new("/")));
}

#[test]
fn a_source_knows_its_place() {
    let (path, mount) = Source::open(Path::new("/proc/self/../self/status"))
        .unwrap()
        .place()
        .unwrap();
    assert!(path.ends_with("status") && path.starts_with("/proc"));
    assert!(info::list().unwrap().iter().any(|info| info.id == mount));
}

proptest! {
    #[test]
    fn any_list_of_mounts_parses(text in "[\\\\0-9a: /\n-]{0,80}") {
        info::parse(text.as_bytes());
    }

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
