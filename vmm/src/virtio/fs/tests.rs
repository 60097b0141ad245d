mod escape;
mod restored;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::memory::GuestMemory;
use crate::virtio::test_queue::{self, BUFFERS, GAP, TestQueue};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;

const ROOT: u64 = 1;
const REPLY: u64 = BUFFERS + 0x1_0000;

struct Guest {
    memory: GuestMemory,
    queues: [TestQueue; 2],
    kicks: Vec<EventFd>,
    fs: Fs,
    directory: TempDir,
    unique: u64,
}

fn guest() -> Guest {
    let directory = TempDir::new().unwrap();
    let root = directory.as_path().to_owned();
    guest_of(directory, &root)
}

/// A guest that is served `root`; `directory` lives as long as it does.
fn guest_of(directory: TempDir, root: &Path) -> Guest {
    guest_with(directory, root, None)
}

/// As `guest_of`, with the state of another device.
fn guest_with(directory: TempDir, root: &Path, state: Option<&DeviceState>) -> Guest {
    guest_made_by(directory, root, state, |fs| fs.start_thread(true).unwrap())
}

/// As `guest_with`; `start_thread` starts the server's thread.
fn guest_made_by(
    directory: TempDir,
    root: &Path,
    state: Option<&DeviceState>,
    start_thread: impl FnOnce(&mut Fs),
) -> Guest {
    let root = File::open(root).unwrap();
    let mut fs = Fs::new(0, "share", root, File::open("/proc/self/fd").unwrap()).unwrap();
    let kicks: Vec<_> = (0..2).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
    fs.set_queue_events(kicks.iter().map(|kick| kick.try_clone().unwrap()).collect());
    let memory = test_queue::memory();
    let queues = [TestQueue::new(&memory, 0, 128), TestQueue::new(&memory, 1, 512)];
    let activation = test_queue::activation(&memory, &[&queues[0], &queues[1]], fs.features());
    // As in a VMM: a call that the server's filter does not have kills the test.
    // SAFETY: prctl with these constants takes no pointers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    start_thread(&mut fs);
    if let Some(state) = state {
        fs.restore_state(state).unwrap();
    }
    fs.activate(activation).unwrap();
    Guest {
        memory,
        queues,
        kicks,
        fs,
        directory,
        unique: 0,
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(data[at..at + 4].try_into().unwrap())
}

fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(data[at..at + 8].try_into().unwrap())
}

impl Guest {
    fn message(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let metadata = self.directory.as_path().metadata().unwrap();
        let mut message = words(&[40 + body.len() as u32, opcode]);
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend(words(&[metadata.uid(), metadata.gid(), 77, 0]));
        message.extend(body);
        message
    }

    fn kick(&mut self, queue: usize) -> Vec<(u32, u32)> {
        self.kicks[queue].write(1).unwrap();
        let start = Instant::now();
        loop {
            let used = self.queues[queue].take_used();
            if !used.is_empty() {
                return used;
            }
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "no answer: {:?}",
                self.fs.process_event()
            );
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// Sends a message, cut into pieces of `pieces` bytes, and returns error and body of the answer.
    fn ask_in_pieces(&mut self, opcode: u32, node: u64, body: &[u8], pieces: usize) -> (i32, Vec<u8>) {
        self.exchange(opcode, node, body, pieces, 0x8000)
    }

    /// As `ask_in_pieces`, with room for `room` bytes behind the header of the answer.
    fn exchange(&mut self, opcode: u32, node: u64, body: &[u8], pieces: usize, room: u32) -> (i32, Vec<u8>) {
        let message = self.message(opcode, node, body);
        self.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
        let mut buffers: Vec<_> = (0..message.len())
            .step_by(pieces)
            .map(|at| (BUFFERS + at as u64, pieces.min(message.len() - at) as u32, false))
            .collect();
        buffers.extend([(REPLY, 16, true), (REPLY + 16, room, true)]);
        self.queues[1].add(&buffers);
        let used = self.kick(1);
        let len = used[0].1 as usize;
        let mut reply = vec![0; len];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        assert_eq!(
            (u32_at(&reply, 0) as usize, u64_at(&reply, 8)),
            (len, self.unique)
        );
        (u32_at(&reply, 4) as i32, reply.split_off(16))
    }

    fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let (error, reply) = self.ask_in_pieces(opcode, node, body, 4096);
        assert_eq!(error, 0, "opcode {opcode}");
        reply
    }

    fn init(&mut self) -> Vec<u8> {
        // Version 7.38, read-ahead, all features of the first word but the extension.
        self.ask(INIT, 0, &words(&[7, 38, 0x2_0000, !(1 << 30)]))
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Vec<u8> {
        self.ask(LOOKUP, parent, &[name.as_bytes(), b"\0"].concat())
    }

    /// Node of an entry.
    fn node(&mut self, parent: u64, name: &str) -> u64 {
        u64_at(&self.lookup(parent, name), 0)
    }

    /// Takes one lookup of a node back, by the other queue: its used entries.
    fn forget(&mut self, node: u64) -> Vec<(u32, u32)> {
        let message = self.message(FORGET, node, &1u64.to_le_bytes());
        self.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
        self.queues[0].add(&[(BUFFERS, message.len() as u32, false)]);
        self.kick(0)
    }

    fn open(&mut self, node: u64) -> u64 {
        u64_at(&self.ask(OPEN, node, &[0; 8]), 0)
    }

    /// Error and bytes of a read.
    fn read(&mut self, node: u64, handle: u64, offset: u64, length: u32) -> (i32, Vec<u8>) {
        let mut read = handle.to_le_bytes().to_vec();
        read.extend(offset.to_le_bytes());
        read.extend(words(&[length, 0, 0, 0, 0, 0]));
        // As Linux does: the buffer is as long as the read.
        self.exchange(READ, node, &read, 4096, length)
    }

    fn failure(&mut self) -> DeviceError {
        let start = Instant::now();
        loop {
            if let Err(error) = self.fs.process_event() {
                return error;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "the worker goes on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_file_is_looked_up_opened_and_read() {
    let mut guest = guest();
    let path = guest.directory.as_path().join("hello");
    std::fs::write(&path, "hello from the host").unwrap();
    let metadata = path.metadata().unwrap();

    let init = guest.init();
    assert_eq!((u32_at(&init, 0), u32_at(&init, 20)), (7, 1 << 20));

    let entry = guest.lookup(ROOT, "hello");
    let node = u64_at(&entry, 0);
    assert_ne!(node, 0);
    assert_eq!((u64_at(&entry, 40), u64_at(&entry, 48)), (metadata.ino(), 19));

    let attributes = guest.ask(GETATTR, node, &[0; 16]);
    assert_eq!(
        (u64_at(&attributes, 16), u64_at(&attributes, 24)),
        (metadata.ino(), 19)
    );
    assert_eq!(
        (u32_at(&attributes, 76), u32_at(&attributes, 84)),
        (metadata.mode(), metadata.uid())
    );

    let handle = guest.open(node);
    assert_eq!(guest.read(node, handle, 6, 8), (0, b"from the".to_vec()));
    let release = [&handle.to_le_bytes()[..], &[0; 16]].concat();
    assert!(guest.ask(RELEASE, node, &release).is_empty());
    assert_eq!(guest.read(node, handle, 6, 8).0, -libc::EBADF);
}

#[test]
fn pages_of_an_unchanged_file_are_kept() {
    let mut guest = guest();
    let path = guest.directory.as_path().join("file");
    std::fs::write(&path, "one").unwrap();
    guest.init();
    let node = guest.node(ROOT, "file");
    let mut keeps = || {
        let answer = guest.ask(OPEN, node, &[0; 8]);
        assert_eq!(answer.len(), 16);
        u32_at(&answer, 8)
    };
    assert_eq!([keeps(), keeps(), keeps()], [0, 2, 2]);
    // The same length: only the times tell. Their grain is that of the host's tick.
    std::thread::sleep(Duration::from_millis(20));
    std::fs::write(&path, "two").unwrap();
    assert_eq!([keeps(), keeps()], [0, 2]);
    // Times that were set back are told by the time of change.
    std::thread::sleep(Duration::from_millis(20));
    let before = path.metadata().unwrap().modified().unwrap();
    std::fs::write(&path, "six").unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(before)
        .unwrap();
    assert_eq!([keeps(), keeps()], [0, 2]);
}

#[test]
fn messages_may_be_cut_anywhere() {
    let mut guest = guest();
    guest.init();
    let data: Vec<u8> = (0..3000u32).map(|index| (index * 7) as u8).collect();
    for pieces in [1, 7, 39, 40, 41, 127, 128, 129, 1000] {
        let name = format!("file{pieces}");
        let mut create = words(&[
            libc::O_RDWR as u32 | libc::O_CREAT as u32,
            libc::S_IFREG | 0o640,
            0,
            0,
        ]);
        create.extend(name.as_bytes());
        create.push(0);
        let (error, entry) = guest.ask_in_pieces(CREATE, ROOT, &create, pieces);
        assert_eq!(error, 0);
        let (node, handle) = (u64_at(&entry, 0), u64_at(&entry, 128));
        // A chain has at most 512 descriptors.
        let size = data.len().min(400 * pieces);
        let mut write = handle.to_le_bytes().to_vec();
        write.extend(0u64.to_le_bytes());
        write.extend(words(&[size as u32, 0, 0, 0, 0, 0]));
        write.extend(&data[..size]);
        let (error, written) = guest.ask_in_pieces(WRITE, node, &write, pieces);
        assert_eq!((error, u32_at(&written, 0) as usize), (0, size));
        let path = guest.directory.as_path().join(name);
        assert_eq!(std::fs::read(&path).unwrap(), data[..size]);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    }
}

#[test]
fn forgotten_nodes_are_gone_and_forget_has_no_answer() {
    let mut guest = guest();
    guest.init();
    std::fs::write(guest.directory.as_path().join("file"), "").unwrap();
    let node = guest.node(ROOT, "file");
    assert_eq!(guest.forget(node), [(0, 0)]);
    assert_eq!(guest.ask_in_pieces(GETATTR, node, &[0; 16], 4096).0, -libc::EBADF);
}

#[test]
fn the_configuration_has_tag_and_queues() {
    let guest = guest();
    let mut data = [0xff; 44];
    guest.fs.read_config(0, &mut data);
    assert_eq!(&data[..6], b"share\0");
    assert_eq!(data[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    let root = File::open("/").unwrap();
    for tag in [String::new(), "x".repeat(37)] {
        assert!(matches!(
            Fs::new(0, &tag, root.try_clone().unwrap(), root.try_clone().unwrap()),
            Err(FsError::Tag)
        ));
    }
}

#[test]
fn a_pause_holds_requests_back_and_saves_the_queues() {
    let mut guest = guest();
    guest.init();
    guest.fs.pause().unwrap();
    assert_eq!(guest.fs.save_state().queues()[1].next_available, 1);
    let message = guest.message(GETATTR, ROOT, &[0; 16]);
    guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
    guest.queues[1].add(&[(BUFFERS, message.len() as u32, false), (REPLY, 0x1000, true)]);
    guest.kicks[1].write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.queues[1].take_used().is_empty());
    guest.fs.resume();
    assert_eq!(guest.kick(1).len(), 1);
    assert!(guest.fs.save_state().queues().is_empty());
}

#[test]
fn a_reset_stops_the_worker_and_the_device_starts_again() {
    let mut guest = guest();
    guest.init();
    guest.fs.reset();
    assert!(guest.fs.worker.is_none());
    guest.queues = [
        TestQueue::new(&guest.memory, 0, 128),
        TestQueue::new(&guest.memory, 1, 512),
    ];
    let [first, second] = &guest.queues;
    let activation = test_queue::activation(&guest.memory, &[first, second], guest.fs.features());
    guest.fs.activate(activation).unwrap();
    guest.init();
    let message = guest.message(DESTROY, 0, &[]);
    guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
    guest.queues[1].add(&[(BUFFERS, message.len() as u32, false), (REPLY, 16, true)]);
    assert_eq!(guest.kick(1).len(), 1);
}

#[test]
fn malformed_messages_stop_the_device() {
    for (opcode, body, reply) in [
        // No room for an answer, which the library would panic on; less room; an absurd size.
        (READ, vec![0; 40], 0),
        (READ, vec![0; 40], 15),
        (LOOKUP, b"name\0".to_vec(), 8),
        (GETXATTR, words(&[u32::MAX, 0]), 16),
        // A name without its end, arguments cut short.
        (LOOKUP, b"name".to_vec(), 200),
        (OPEN, vec![0; 4], 200),
    ] {
        let mut guest = guest();
        guest.init();
        let message = guest.message(opcode, ROOT, &body);
        guest.memory.write_slice(&message, GuestAddress(BUFFERS)).unwrap();
        let mut buffers = vec![(BUFFERS, message.len() as u32, false)];
        if reply > 0 {
            buffers.push((REPLY, reply, true));
        }
        guest.queues[1].add(&buffers);
        guest.kicks[1].write(1).unwrap();
        guest.failure();
    }
}

#[test]
fn malformed_chains_stop_the_device() {
    for buffers in [
        &[(BUFFERS, 39, false), (REPLY, 200, true)][..],
        &[(REPLY, 200, true)],
        &[(BUFFERS, 40, false), (GAP - 8, 16, true)],
        &[(BUFFERS, 0, false), (REPLY, 200, true)],
        &[(REPLY, 200, true), (BUFFERS, 40, false)],
    ] {
        let mut guest = guest();
        guest.queues[1].add(buffers);
        guest.kicks[1].write(1).unwrap();
        guest.failure();
        // The worker has ended; a reset revives the device.
        guest.fs.reset();
        assert!(guest.fs.process_event().is_ok());
    }
    let mut guest = guest();
    guest.queues[0].set_available_index(129);
    guest.kicks[0].write(1).unwrap();
    assert!(matches!(guest.failure(), DeviceError::Queue(_)));
}
