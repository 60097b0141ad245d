//! What an open file, a device or a number of another share gives access to.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;

use nix::sys::stat::{Mode, makedev};

use super::*;

#[test]
fn flags_of_an_open_do_not_lead_elsewhere() {
    let mut fence = Fence::new();
    for name in ["file", "dir"] {
        let (node, _) = fence.find(ROOT, name.as_bytes());
        for flags in [
            libc::O_PATH,
            // Opens the link below /proc/self/fd instead of what it leads to.
            libc::O_PATH | libc::O_NOFOLLOW,
            libc::O_NOFOLLOW,
            libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
            libc::O_TMPFILE | libc::O_RDWR,
            libc::O_ASYNC | libc::O_RDWR | libc::O_SYNC,
            -1,
        ] {
            let Ok(handle) = fence.open(node, flags) else {
                continue;
            };
            for (opcode, result) in fence.use_handle(node, handle) {
                // A descriptor of a path carries out nothing; the library flushes a copy of it.
                if flags & libc::O_PATH != 0 && opcode != FLUSH {
                    assert_eq!(result, Err(libc::EBADF), "opcode {opcode} with flags {flags:#o}");
                }
            }
        }
    }
    // It can be used as usual.
    let (node, _) = fence.find(ROOT, b"file");
    let handle = fence.open(node, libc::O_RDWR).unwrap();
    let used = fence.use_handle(node, handle);
    assert!(
        used.iter()
            .any(|(opcode, result)| *opcode == WRITE && result.is_ok())
    );
}

#[test]
fn devices_fifos_and_sockets_are_not_opened() {
    let mut fence = Fence::with(|share| {
        nix::unistd::mkfifo(&share.join("fifo"), Mode::S_IRWXU).unwrap();
        drop(UnixListener::bind(share.join("socket")).unwrap());
    });
    // The jail refuses to make devices; here it depends on who runs the test.
    let device = makedev(1, 3) as u32;
    for (name, kind) in [
        ("null", libc::S_IFCHR),
        ("disk", libc::S_IFBLK),
        ("pipe", libc::S_IFIFO),
    ] {
        let rest = words(&[kind | 0o666, device, 0, 0]);
        let made = fence.ask(MKNOD, ROOT, &[rest, terminated(name.as_bytes())].concat());
        assert!(matches!(made, Ok(_) | Err(libc::EPERM)), "{name}: {made:?}");
    }
    for entry in std::fs::read_dir(fence.share()).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_file() || kind.is_dir() {
            continue;
        }
        let (node, _) = fence.find(ROOT, entry.file_name().as_bytes());
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_NONBLOCK,
            libc::O_PATH,
        ] {
            assert_eq!(fence.open(node, flags), Err(libc::EBADF), "{entry:?}");
        }
        assert_eq!(
            fence.ask(SETATTR, node, &attributes(FATTR_SIZE, 0)),
            Err(libc::EBADF)
        );
    }
}

#[test]
fn the_hosts_own_devices_are_not_opened() {
    let mut guest = guest_of(TempDir::new().unwrap(), Path::new("/dev"));
    guest.init();
    let mut seen = 0;
    for name in ["null", "zero", "full", "random", "tty", "kvm"] {
        let Ok(metadata) = Path::new("/dev").join(name).metadata() else {
            continue;
        };
        assert!(metadata.file_type().is_char_device());
        let node = guest.node(ROOT, name);
        for flags in [libc::O_RDONLY, libc::O_RDWR] {
            let (error, _) = guest.ask_in_pieces(OPEN, node, &words(&[flags as u32, 0]), 4096);
            assert_eq!(error, -libc::EBADF, "{name}");
        }
        seen += 1;
    }
    assert!(seen >= 2, "every host has null and zero");
}

#[test]
fn nodes_and_handles_of_another_share_mean_nothing() {
    let mut other = guest();
    std::fs::write(other.directory.as_path().join("secret"), SECRET).unwrap();
    other.init();
    // Numbers the first share gives out only later.
    let mut foreign = Vec::new();
    for _ in 0..8 {
        let node = other.node(ROOT, "secret");
        foreign.push((node, u64_at(&other.ask(OPEN, node, &[0; 8]), 0)));
    }
    let mut fence = Fence::new();
    let own = fence.find(ROOT, b"file").0;
    let handle = fence.open(own, libc::O_RDWR).unwrap();
    for number in [0, 3, 1000, 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX] {
        foreign.extend([(number, number), (number, handle), (own, number)]);
    }
    // The handle of one node with another.
    foreign.extend([(ROOT, handle), (fence.find(ROOT, b"dir").0, handle)]);
    foreign.retain(|pair| *pair != (own, handle));
    for (node, handle) in foreign {
        for (opcode, result) in fence.use_handle(node, handle) {
            assert_eq!(
                result,
                Err(libc::EBADF),
                "opcode {opcode}, node {node}, handle {handle}"
            );
        }
        for opcode in [RELEASE, RELEASEDIR] {
            let body = handle_body(handle, &[0; 4]);
            assert_eq!(
                fence.ask(opcode, node, &body),
                Err(libc::EBADF),
                "opcode {opcode}"
            );
        }
    }
    for node in [0, 1000, 1 << 63, u64::MAX] {
        for (opcode, body) in about_entry(b"name", node, node) {
            assert_eq!(
                fence.ask(opcode, node, &body),
                Err(libc::EBADF),
                "opcode {opcode}"
            );
        }
        for opcode in [GETATTR, READLINK, STATFS, OPEN, OPENDIR, ACCESS, SYNCFS] {
            assert_eq!(
                fence.ask(opcode, node, &[0; 16]),
                Err(libc::EBADF),
                "opcode {opcode}"
            );
        }
    }
    // Without it a guest cannot have `open_by_handle_at` served (Linux `fuse_encode_fh`).
    let flags = u32_at(&guest().init(), 12);
    assert_eq!(flags & EXPORT_SUPPORT, 0);
}
