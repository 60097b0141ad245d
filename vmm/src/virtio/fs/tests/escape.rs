//! A guest that tries to reach what lies beside the shared tree.
//!
//! A [`Fence`] is a directory with the tree, a secret file and a private directory in it. Whatever the guest
//! asks, nothing outside the tree may be read, changed, made or removed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use nix::fcntl::{RenameFlags, renameat2};
use nix::sys::stat::{Mode, makedev};

use super::*;
use crate::virtio::test_queue::meanwhile;

const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const STATFS: u32 = 17;
const FSYNC: u32 = 20;
const SETXATTR: u32 = 21;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const FLUSH: u32 = 25;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const ACCESS: u32 = 34;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;
const SYNCFS: u32 = 50;

const FATTR_MODE: u32 = 1;
const FATTR_OWNER: u32 = 1 << 1 | 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_TIMES: u32 = 1 << 4 | 1 << 5;
const FATTR_HANDLE: u32 = 1 << 6;

/// `FUSE_EXPORT_SUPPORT` and `FUSE_SETXATTR_EXT`.
const EXPORT_SUPPORT: u32 = 1 << 4;
const SETXATTR_EXT: u32 = 1 << 29;

const SECRET: &[u8] = b"what no guest may see";

/// Everything outside the tree that a guest could change.
#[derive(Debug, PartialEq)]
struct Outside {
    names: Vec<PathBuf>,
    /// Of the secret and the private directory: number, time of the last change of any kind, links.
    nodes: Vec<(u64, i64, i64, u64)>,
    contents: Vec<Vec<u8>>,
}

struct Fence {
    guest: Guest,
    outer: PathBuf,
    before: Outside,
    setxattr_ext: bool,
}

impl Fence {
    /// The tree holds the directory `dir` with `file` in it and the file `file`.
    fn new() -> Self {
        Self::with(|_| ())
    }

    /// As `new`, with what `fill` puts into the tree.
    fn with(fill: impl FnOnce(&Path)) -> Self {
        let outer = TempDir::new().unwrap();
        let path = outer.as_path().to_owned();
        let share = path.join("share");
        std::fs::create_dir_all(share.join("dir")).unwrap();
        std::fs::create_dir(path.join("private")).unwrap();
        for file in ["file", "dir/file"] {
            std::fs::write(share.join(file), "inside").unwrap();
        }
        for file in ["secret", "private/file"] {
            std::fs::write(path.join(file), SECRET).unwrap();
        }
        fill(&share);
        let before = outside(&path);
        let mut guest = guest_of(outer, &share);
        let flags = u32_at(&guest.init(), 12);
        Self {
            guest,
            outer: path,
            before,
            setxattr_ext: flags & SETXATTR_EXT != 0,
        }
    }

    fn share(&self) -> PathBuf {
        self.outer.join("share")
    }

    /// Asks; whatever the answer is, nothing outside was touched and nothing of it is in the answer.
    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let (error, reply) = self.guest.exchange(opcode, node, body, 0x8000, 0x4000);
        self.assert_untouched(&described(opcode, body));
        assert!(
            !reply.windows(SECRET.len()).any(|bytes| bytes == SECRET),
            "opcode {opcode} tells the secret"
        );
        match error {
            0 => Ok(reply),
            error => Err(-error),
        }
    }

    /// Asks what the device is to stop at.
    fn refuse(mut self, opcode: u32, node: u64, body: &[u8]) {
        let message = self.guest.message(opcode, node, body);
        let request = (BUFFERS, message.len() as u32, false);
        self.guest
            .memory
            .write_slice(&message, GuestAddress(BUFFERS))
            .unwrap();
        self.guest.queues[1].add(&[request, (REPLY, 0x4000, true)]);
        self.guest.kicks[1].write(1).unwrap();
        let what = described(opcode, body);
        assert!(matches!(self.guest.failure(), DeviceError::Protocol(_)), "{what}");
        self.assert_untouched(&what);
    }

    fn assert_untouched(&self, what: &str) {
        assert_eq!(outside(&self.outer), self.before, "{what}");
    }

    /// Node and type of an entry.
    fn find(&mut self, parent: u64, name: &[u8]) -> (u64, u32) {
        let entry = self.ask(LOOKUP, parent, &terminated(name)).unwrap();
        (u64_at(&entry, 0), u32_at(&entry, 40 + 60) & libc::S_IFMT)
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = words(&[flags as u32, 0]);
        self.ask(OPEN, node, &body).map(|answer| u64_at(&answer, 0))
    }

    /// Every request about the content and attributes of an open file.
    fn use_handle(&mut self, node: u64, handle: u64) -> Vec<(u32, Result<Vec<u8>, i32>)> {
        let mut copy = handle_body(handle, &[0, 0]);
        copy.extend(node.to_le_bytes());
        copy.extend(handle_body(handle, &[0, 0, 16, 0, 0, 0]));
        let requests = [
            (READ, handle_body(handle, &[0, 0, 64, 0, 0, 0, 0, 0])),
            (
                WRITE,
                [handle_body(handle, &[0, 0, 4, 0, 0, 0, 0, 0]), b"over".to_vec()].concat(),
            ),
            (FLUSH, handle_body(handle, &[0, 0, 0, 0])),
            (FSYNC, handle_body(handle, &[0, 0])),
            (FSYNCDIR, handle_body(handle, &[0, 0])),
            (READDIR, handle_body(handle, &[0, 0, 512, 0, 0, 0, 0, 0])),
            (READDIRPLUS, handle_body(handle, &[0, 0, 512, 0, 0, 0, 0, 0])),
            (FALLOCATE, handle_body(handle, &[0, 0, 64, 0, 0, 0])),
            (LSEEK, handle_body(handle, &[0, 0, 0, 0])),
            (COPY_FILE_RANGE, copy),
            (SETATTR, attributes(FATTR_HANDLE | FATTR_MODE, handle)),
            (SETATTR, attributes(FATTR_HANDLE | FATTR_SIZE, handle)),
            (SETATTR, attributes(FATTR_HANDLE | FATTR_TIMES, handle)),
        ];
        requests
            .into_iter()
            .map(|(opcode, body)| (opcode, self.ask(opcode, node, &body)))
            .collect()
    }

    fn setxattr(&mut self, node: u64, name: &[u8], value: &[u8]) -> Result<Vec<u8>, i32> {
        let mut body = words(&[value.len() as u32, 0, 0, 0]);
        body.truncate(if self.setxattr_ext { 16 } else { 8 });
        body.extend(terminated(name));
        body.extend(value);
        self.ask(SETXATTR, node, &body)
    }
}

fn outside(outer: &Path) -> Outside {
    let mut names: Vec<_> = [outer, &outer.join("private")]
        .iter()
        .flat_map(|directory| std::fs::read_dir(directory).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect();
    names.sort();
    let stat = |name: &&str| {
        let metadata = outer.join(name).symlink_metadata().unwrap();
        (
            metadata.ino(),
            metadata.ctime(),
            metadata.ctime_nsec(),
            metadata.nlink(),
        )
    };
    Outside {
        names,
        nodes: ["secret", "private", "private/file"].iter().map(stat).collect(),
        contents: ["secret", "private/file"]
            .iter()
            .map(|name| std::fs::read(outer.join(name)).unwrap())
            .collect(),
    }
}

fn described(opcode: u32, body: &[u8]) -> String {
    format!(
        "opcode {opcode} with {}",
        body[..body.len().min(64)].escape_ascii()
    )
}

fn terminated(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

fn handle_body(handle: u64, rest: &[u32]) -> Vec<u8> {
    [handle.to_le_bytes().to_vec(), words(rest)].concat()
}

/// `struct fuse_setattr_in` that sets what `valid` says to values of no file here.
fn attributes(valid: u32, handle: u64) -> Vec<u8> {
    let mut body = words(&[valid, 0]);
    body.extend(handle.to_le_bytes());
    // Size, lock owner, times, nanoseconds.
    for value in [3u64, 0, 1000, 1000, 1000] {
        body.extend(value.to_le_bytes());
    }
    body.extend(words(&[0, 0, 0, 0o777, 0, 12345, 12345, 0]));
    body
}

/// Requests about the entry `name` of a directory, in every place a name can have.
fn about_entry(name: &[u8], directory: u64, node: u64) -> Vec<(u32, Vec<u8>)> {
    let name = terminated(name);
    let create = libc::O_RDWR as u32 | libc::O_CREAT as u32 | libc::O_TRUNC as u32;
    let with = |fixed: &[u8], names: &[&[u8]]| [fixed, &names.concat()].concat();
    let rename = directory.to_le_bytes();
    let rename2 = [&rename[..], &[0; 8]].concat();
    vec![
        (LOOKUP, name.clone()),
        (SYMLINK, with(&name, &[b"file\0"])),
        (MKNOD, with(&words(&[libc::S_IFREG | 0o644, 0, 0, 0]), &[&name])),
        (MKDIR, with(&words(&[0o755, 0]), &[&name])),
        (UNLINK, name.clone()),
        (RMDIR, name.clone()),
        (RENAME, with(&rename, &[&name, b"taken\0"])),
        (RENAME, with(&rename, &[b"file\0", &name])),
        (RENAME2, with(&rename2, &[&name, b"taken\0"])),
        (RENAME2, with(&rename2, &[b"file\0", &name])),
        (LINK, with(&node.to_le_bytes(), &[&name])),
        (CREATE, with(&words(&[create, 0o644, 0, 0]), &[&name])),
    ]
}

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
        let node = u64_at(&guest.lookup(ROOT, name), 0);
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
        let node = u64_at(&other.lookup(ROOT, "secret"), 0);
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
