//! The file server: messages of all kinds, right and wrong, about a small tree.
//!
//! Beside the tree are a secret file and a private directory. A finding is, besides a fault or a panic, an answer
//! with the secret in it or longer than its buffer, and any change outside the tree.

#![no_main]

use std::fs::File;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock};

use arbitrary::Arbitrary;
use bulkhead_vmm::virtio::fs::Inline;
use bulkhead_vmm::virtio::test_queue::{self, BUFFERS, TestQueue};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const SECRET: &[u8] = b"what no guest may see";
const INIT: u32 = 26;
/// Without it the library says so on standard error.
const SUBMOUNTS: u32 = 1 << 27;
const REPLY: u64 = 2 * test_queue::LOW;
const REPLY_SIZE: u32 = 0x4000;

#[derive(Arbitrary, Debug)]
enum Name {
    Known(u8),
    Bytes(Vec<u8>),
    Long(u8, u16),
}

#[derive(Arbitrary, Debug)]
enum Body {
    /// Fixed arguments.
    Words(Vec<u32>),
    /// A handle, then fixed arguments.
    Handle(u8, Vec<u32>),
    /// A handle, offset and size, then payload.
    Data(u8, u16, u16, Vec<u8>),
    /// So many fixed arguments, the first of which may be a node, and names.
    Names(u8, [u32; 4], Vec<Name>),
    /// Attributes to set.
    Attributes(u16, u8, [u16; 4]),
}

#[derive(Arbitrary, Debug)]
struct Request {
    opcode: u8,
    node: u8,
    body: Body,
    /// Added to the length that the header tells.
    wrong_len: Option<i16>,
    wrong_node: Option<u64>,
    user: Option<(u16, u16)>,
    /// Lengths of the readable buffers.
    cuts: Vec<u8>,
    /// Bytes of the writable buffers.
    room: Option<(u8, u16)>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Ask(Request),
    /// Somebody on the host changes the tree.
    Swap,
    Remove(u8),
    Write(u8, Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Case {
    /// Features of the first word; that of an extended header is in the high byte of the other.
    features: u32,
    steps: Vec<Step>,
}

const NAMES: [&str; 16] = [
    "file",
    "dir",
    "link",
    "absolute",
    "new",
    "other",
    "fifo",
    "inner",
    ".",
    "..",
    "../secret",
    "dir/inner",
    "",
    "user.name",
    "security.capability",
    "system.posix_acl_access",
];

fn name(name: &Name) -> Vec<u8> {
    let mut bytes = match name {
        Name::Known(index) => NAMES[usize::from(*index) % NAMES.len()].into(),
        Name::Bytes(bytes) => bytes.clone(),
        Name::Long(byte, len) => vec![*byte; usize::from(*len) % 5000],
    };
    bytes.push(0);
    bytes
}

fn body(body: &Body) -> Vec<u8> {
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    match body {
        Body::Words(fixed) => words(fixed),
        Body::Handle(handle, fixed) => [u64::from(*handle).to_le_bytes().to_vec(), words(fixed)].concat(),
        Body::Data(handle, offset, size, data) => {
            let fixed = [(*offset).into(), 0, (*size).into(), 0, 0, 0, 0, 0];
            [
                u64::from(*handle).to_le_bytes().to_vec(),
                words(&fixed),
                data.clone(),
            ]
            .concat()
        }
        Body::Names(count, fixed, list) => {
            let mut bytes = words(&fixed[..usize::from(*count) % 5]);
            list.iter().for_each(|one| bytes.extend(name(one)));
            bytes
        }
        Body::Attributes(valid, handle, values) => {
            let [size, time, mode, owner] = values.map(u32::from);
            let mut bytes = words(&[(*valid).into(), 0, (*handle).into(), 0, size, 0, 0, 0]);
            bytes.extend(words(&[
                time, 0, time, 0, time, 0, time, time, time, mode, 0, owner, owner, 0,
            ]));
            bytes
        }
    }
}

/// What is beside the tree: names, and number, time of the last change and links of what must not change.
type Outside = (Vec<PathBuf>, Vec<(u64, i64, i64, u64)>);

fn outside(base: &Path) -> Outside {
    let mut names: Vec<_> = [base, &base.join("private")]
        .iter()
        .flat_map(|directory| std::fs::read_dir(directory).expect("it is there"))
        .map(|entry| entry.expect("it is there").path())
        .collect();
    names.sort();
    let stat = |name: &&str| {
        let metadata = base.join(name).symlink_metadata().expect("it is there");
        (
            metadata.ino(),
            metadata.ctime(),
            metadata.ctime_nsec(),
            metadata.nlink(),
        )
    };
    (
        names,
        ["secret", "private", "private/file"].iter().map(stat).collect(),
    )
}

/// A directory in memory, so that nothing waits for a disk. What dead processes left there goes.
fn base() -> PathBuf {
    const PREFIX: &str = "bulkhead-fuzz-fs-";
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() {
        memory.to_owned()
    } else {
        std::env::temp_dir()
    };
    for entry in std::fs::read_dir(&parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let base = parent.join(format!("{PREFIX}{}", std::process::id()));
    std::fs::create_dir_all(base.join("share")).expect("there is room");
    std::fs::create_dir_all(base.join("private")).expect("there is room");
    std::fs::write(base.join("secret"), SECRET).expect("there is room");
    std::fs::write(base.join("private/file"), SECRET).expect("there is room");
    base
}

fn fill(base: &Path, share: &Path) {
    let _ = std::fs::remove_dir_all(share);
    std::fs::create_dir_all(share.join("dir")).expect("there is room");
    std::fs::write(share.join("file"), "content").expect("there is room");
    std::fs::write(share.join("dir/inner"), "inner content").expect("there is room");
    symlink("../secret", share.join("link")).expect("there is room");
    symlink(base.join("private"), share.join("absolute")).expect("there is room");
    nix::unistd::mkfifo(&share.join("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("there is room");
}

struct Guest {
    memory: bulkhead_vmm::memory::GuestMemory,
    queue: TestQueue,
    server: Inline,
    unique: u64,
}

impl Guest {
    fn new(share: &Path, descriptors: &File) -> Self {
        let memory = test_queue::memory();
        let queues = [TestQueue::new(&memory, 0, 128), TestQueue::new(&memory, 1, 512)];
        let server = Inline::new(
            File::open(share).expect("it is there"),
            descriptors.try_clone().expect("there are descriptors"),
            200,
            queues.iter().map(TestQueue::device_queue).collect(),
        );
        let [_, queue] = queues;
        Self {
            memory,
            queue,
            server: server.expect("the tree can be served"),
            unique: 0,
        }
    }

    /// Sends a message; whether the device goes on.
    fn ask(&mut self, opcode: u32, request: &Request) -> bool {
        self.unique += 1;
        let body = body(&request.body);
        let len = 40 + body.len() as u32;
        let (uid, gid) = request.user.unwrap_or_default();
        let node = request.wrong_node.unwrap_or(request.node.into());
        let mut message = len
            .wrapping_add_signed(request.wrong_len.unwrap_or(0).into())
            .to_le_bytes()
            .to_vec();
        message.extend(opcode.to_le_bytes());
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        for word in [uid.into(), gid.into(), 77, 0u32] {
            message.extend(word.to_le_bytes());
        }
        message.extend(body);
        message.truncate(64 << 10);
        self.memory
            .write_slice(&message, GuestAddress(BUFFERS))
            .expect("messages are short");
        let mut buffers = Vec::new();
        let mut at = 0;
        for cut in request.cuts.iter().take(400) {
            let part = usize::from(*cut).clamp(1, message.len() - at);
            if at + part == message.len() {
                break;
            }
            buffers.push((BUFFERS + at as u64, part as u32, false));
            at += part;
        }
        buffers.push((BUFFERS + at as u64, (message.len() - at) as u32, false));
        let (first, room) = request.room.unwrap_or((16, REPLY_SIZE as u16 - 16));
        let (first, room) = (u32::from(first), u32::from(room) % (REPLY_SIZE - 256));
        if first > 0 {
            buffers.push((REPLY, first, true));
        }
        if room > 0 {
            buffers.push((REPLY + u64::from(first), room, true));
        }
        self.queue.add(&buffers);
        let result = self.server.serve(1);
        for (_, len) in self.queue.take_used() {
            assert!(len <= first + room, "{len} bytes in a buffer of {}", first + room);
            let mut reply = vec![0; len as usize];
            self.memory
                .read_slice(&mut reply, GuestAddress(REPLY))
                .expect("it is RAM");
            assert!(!tells_secret(&reply), "opcode {opcode} tells the secret");
        }
        result.is_ok()
    }
}

fn tells_secret(reply: &[u8]) -> bool {
    // SAFETY: both ranges are valid for reads.
    let found = unsafe {
        libc::memmem(
            reply.as_ptr().cast(),
            reply.len(),
            SECRET.as_ptr().cast(),
            SECRET.len(),
        )
    };
    !found.is_null()
}

fn run(case: &Case, base: &Path, descriptors: &File, before: &Outside) {
    let share = base.join("share");
    fill(base, &share);
    let mut guest = Guest::new(&share, descriptors);
    let init = Request {
        opcode: 0,
        node: 0,
        body: Body::Words(vec![
            7,
            38,
            0x2_0000,
            case.features | SUBMOUNTS,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ]),
        wrong_len: None,
        wrong_node: None,
        user: None,
        cuts: Vec::new(),
        room: None,
    };
    if !guest.ask(INIT, &init) {
        return;
    }
    for step in &case.steps {
        match step {
            Step::Ask(request) => {
                if !guest.ask((request.opcode % 53).into(), request) {
                    break;
                }
            }
            Step::Swap => {
                let paths = (share.join("dir"), share.join("absolute"));
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                let _ = nix::fcntl::renameat2(None, &paths.0, None, &paths.1, flags);
            }
            Step::Remove(index) => {
                let _ = std::fs::remove_file(share.join(NAMES[usize::from(*index) % 8]));
            }
            Step::Write(index, data) => {
                // What the guest made may lead anywhere: for the host that is so.
                let path = share.join(NAMES[usize::from(*index) % 8]);
                if path.symlink_metadata().is_ok_and(|metadata| metadata.is_file()) {
                    let _ = std::fs::write(path, data);
                }
            }
        }
    }
    drop(guest);
    assert_eq!(outside(base), *before);
}

type Job = (SyncSender<Case>, Receiver<()>);

/// The thread that serves. Its root is the directory with the tree in it: what leads out of the tree must not
/// harm the machine.
fn server() -> &'static Mutex<Job> {
    static SERVER: OnceLock<Mutex<Job>> = OnceLock::new();
    SERVER.get_or_init(|| {
        // SAFETY: both calls only change settings of this process.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit {
                rlim_cur: 8 << 20,
                rlim_max: libc::RLIM_INFINITY,
            };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
        }
        let (jobs, incoming) = sync_channel::<Case>(0);
        let (outgoing, results) = sync_channel(0);
        std::thread::spawn(move || {
            let mut base = base();
            let descriptors = File::open("/proc/self/fd").expect("it is there");
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).expect("it needs no right");
            // Others have no right to harm the machine.
            if nix::unistd::Uid::effective().is_root() {
                nix::unistd::chroot(&base).expect("root may do it");
                base = "/".into();
            }
            let before = outside(&base);
            for case in incoming {
                run(&case, &base, &descriptors, &before);
                if outgoing.send(()).is_err() {
                    return;
                }
            }
        });
        Mutex::new((jobs, results))
    })
}

fuzz_target!(|case: Case| {
    let server = server().lock().expect("nobody panicked");
    server.0.send(case).expect("the thread runs");
    server.1.recv().expect("the thread runs");
});
