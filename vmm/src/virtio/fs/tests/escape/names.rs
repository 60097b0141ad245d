//! Names that lead out of the tree, and names of every kind.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::*;

#[test]
fn paths_are_refused_wherever_a_name_is_expected() {
    let names = [
        "..",
        "../secret",
        "../private/file",
        "../made",
        "dir/../../secret",
        "/etc/passwd",
        ".",
        "",
    ];
    for name in names {
        for (opcode, body) in about_entry(name.as_bytes(), ROOT, ROOT) {
            Fence::new().refuse(opcode, ROOT, &body);
        }
    }
}

#[test]
fn names_of_every_byte_stay_inside() {
    let mut fence = Fence::new();
    let (directory, _) = fence.find(ROOT, b"dir");
    for byte in (1..=u8::MAX).filter(|byte| *byte != b'/') {
        for name in [vec![byte, b'a'], vec![b'.', byte, b'.'], vec![byte; 200]] {
            let create = [words(&[libc::O_RDWR as u32, 0o600, 0, 0]), terminated(&name)].concat();
            fence.ask(CREATE, directory, &create).unwrap();
            let path = fence.share().join("dir").join(OsStr::from_bytes(&name));
            assert!(path.symlink_metadata().unwrap().is_file());
            let (_, kind) = fence.find(directory, &name);
            assert_eq!(kind, libc::S_IFREG);
            fence.ask(UNLINK, directory, &terminated(&name)).unwrap();
            assert!(path.symlink_metadata().is_err());
        }
    }
    // What is behind a zero is no part of a name.
    let name = b"made\0/../../secret\0";
    let create = [words(&[libc::O_RDWR as u32, 0o600, 0, 0]), name.to_vec()].concat();
    fence.ask(CREATE, directory, &create).unwrap();
    assert!(fence.share().join("dir/made").is_file());
}

#[test]
fn names_of_every_length_are_answered() {
    let mut fence = Fence::new();
    let (node, _) = fence.find(ROOT, b"file");
    for length in [1, 255, 256, 1023, 1024, 1025, 4000, 4095, 4096] {
        let name = vec![b'n'; length];
        for (opcode, body) in about_entry(&name, ROOT, node) {
            let error = fence.ask(opcode, ROOT, &body).err();
            assert_eq!(
                error == Some(libc::ENAMETOOLONG),
                length > 255,
                "opcode {opcode}: {error:?}"
            );
        }
        // What the requests left of `file` and the name.
        for name in [&b"taken"[..], &name] {
            let _ = fence.ask(UNLINK, ROOT, &terminated(name));
        }
        std::fs::write(fence.share().join("file"), "inside").unwrap();
    }
    let both = [
        &ROOT.to_le_bytes()[..],
        &terminated(&[b'a'; 4096]),
        &terminated(&[b'b'; 4096]),
    ]
    .concat();
    assert_eq!(fence.ask(RENAME, ROOT, &both), Err(libc::ENAMETOOLONG));
    // A name is never cut: one without an end is none.
    fence.refuse(LOOKUP, ROOT, &[b'n'; 0x4000]);
}

#[test]
fn a_listing_has_no_node_for_the_parent() {
    let mut fence = Fence::new();
    let handle = u64_at(&fence.ask(OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
    let body = handle_body(handle, &[0, 0, 0x2000, 0, 0, 0, 0, 0]);
    let listing = fence.ask(READDIRPLUS, ROOT, &body).unwrap();
    let mut names = Vec::new();
    let mut rest = &listing[..];
    while !rest.is_empty() {
        // `struct fuse_entry_out`, then `struct fuse_dirent`.
        let length = u32_at(rest, 128 + 16) as usize;
        let name = rest[128 + 24..][..length].to_vec();
        if name.starts_with(b".") {
            assert_eq!(u64_at(rest, 0), 0, "a node for {}", name.escape_ascii());
        }
        names.push(name);
        rest = &rest[128 + (24 + length).next_multiple_of(8)..];
    }
    names.sort();
    assert_eq!(names, [&b"."[..], b"..", b"dir", b"file"]);
}
