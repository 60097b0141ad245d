//! A guest that tries to reach what lies beside the shared tree.
//!
//! A [`Fence`] is a directory with the tree, a secret file and a private directory in it. Whatever the guest
//! asks, nothing outside the tree may be read, changed, made or removed.

mod links;
mod names;
mod opens;

use std::path::PathBuf;

use super::*;

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
