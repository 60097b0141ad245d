//! Symbolic links out of the tree, and links that take the place of a directory.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use nix::fcntl::{RenameFlags, renameat2};

use super::*;
use crate::virtio::test_queue::meanwhile;

#[test]
fn links_out_of_the_tree_are_not_followed() {
    let targets: &[fn(&Path) -> PathBuf] = &[
        |_| "../secret".into(),
        |outer| outer.join("secret"),
        |_| "../private".into(),
        |outer| outer.join("private"),
        |_| "../made".into(),
        |outer| {
            Path::new("/proc/self/root")
                .join(outer.strip_prefix("/").unwrap())
                .join("secret")
        },
        |_| "first".into(),
    ];
    for target in targets {
        let mut fence = Fence::with(|share| {
            symlink("../secret", share.join("first")).unwrap();
            symlink(target(share.parent().unwrap()), share.join("link")).unwrap();
        });
        let target = target(&fence.outer);
        let (node, kind) = fence.find(ROOT, b"link");
        assert_eq!(kind, libc::S_IFLNK);
        // The text of the link is the guest's to know.
        assert_eq!(
            fence.ask(READLINK, node, &[]).unwrap(),
            target.as_os_str().as_bytes()
        );

        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_TRUNC,
            libc::O_RDWR | libc::O_CREAT,
            libc::O_RDWR | libc::O_APPEND | libc::O_NONBLOCK,
            libc::O_DIRECTORY,
            libc::O_TMPFILE | libc::O_RDWR,
            libc::O_PATH,
            libc::O_PATH | libc::O_NOFOLLOW,
            libc::O_PATH | libc::O_DIRECTORY,
        ] {
            assert_eq!(fence.open(node, flags), Err(libc::EBADF), "flags {flags:#o}");
        }
        assert_eq!(fence.ask(OPENDIR, node, &[0; 8]), Err(libc::EBADF));
        // The link is no directory.
        for (opcode, body) in about_entry(b"file", node, node) {
            assert!(fence.ask(opcode, node, &body).is_err(), "opcode {opcode}");
        }
        // Entries of its own directory: the link is renamed, made again, linked and removed itself.
        for (opcode, body) in about_entry(b"link", ROOT, node) {
            let _ = fence.ask(opcode, ROOT, &body);
        }
        for valid in [FATTR_MODE, FATTR_OWNER, FATTR_SIZE, FATTR_TIMES] {
            let _ = fence.ask(SETATTR, node, &attributes(valid, 0));
        }
        for name in [
            "user.made",
            "trusted.made",
            "security.capability",
            "system.posix_acl_access",
        ] {
            let _ = fence.setxattr(node, name.as_bytes(), b"value");
            let read = [words(&[64, 0]), terminated(name.as_bytes())].concat();
            let _ = fence.ask(GETXATTR, node, &read);
            let _ = fence.ask(REMOVEXATTR, node, &terminated(name.as_bytes()));
        }
        let _ = fence.ask(LISTXATTR, node, &words(&[64, 0]));
        let _ = fence.ask(STATFS, node, &[]);
        let _ = fence.ask(ACCESS, node, &[0; 8]);
        assert_eq!(fence.ask(SYNCFS, node, &[0; 8]), Err(libc::EBADF));
    }
}

#[test]
fn a_directory_swapped_for_a_link_during_a_walk_changes_nothing_outside() {
    let mut fence = Fence::with(|share| symlink("../private", share.join("link")).unwrap());
    let (directory, link) = (fence.share().join("dir"), fence.share().join("link"));
    let swap = || renameat2(None, &directory, None, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
    let (mut directories, mut links) = (0, 0);
    meanwhile(swap, || {
        let start = Instant::now();
        while directories < 100 || links < 100 {
            assert!(start.elapsed() < Duration::from_secs(60), "{directories} {links}");
            let (node, kind) = fence.find(ROOT, b"dir");
            if kind == libc::S_IFLNK {
                links += 1;
                assert!(fence.ask(LOOKUP, node, b"file\0").is_err());
                continue;
            }
            directories += 1;
            // The node is the directory itself, wherever its name leads meanwhile.
            let (file, _) = fence.find(node, b"file");
            let handle = fence.open(file, libc::O_RDWR).unwrap();
            let read = handle_body(handle, &[0, 0, 64, 0, 0, 0, 0, 0]);
            assert_eq!(fence.ask(READ, file, &read).unwrap(), b"inside");
            let create = [words(&[libc::O_RDWR as u32, 0o644, 0, 0]), b"new\0".to_vec()].concat();
            fence.ask(CREATE, node, &create).unwrap();
            fence.ask(UNLINK, node, b"new\0").unwrap();
        }
    });
}
