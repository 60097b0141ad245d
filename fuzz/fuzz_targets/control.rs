//! Control messages, as the VMM receives them with their descriptors, and as the sandbox receives them from a VMM
//! that was taken over.
//!
//! A finding is also a message that is not the same when it is sent on, a descriptor that stays open, and more
//! memory on the device's side than a request may take.

#![no_main]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use bulkhead_protocol::control::{Channel, Received, Request, RequestMessage, VmmMessage};
use bulkhead_vmm::machine::{attach_net, open_disk, take_fd};
use bulkhead_vmm::virtio::VirtioDevice;
use bulkhead_vmm::virtio::balloon::Balloon;
use bulkhead_vmm::virtio::block::Block;
use bulkhead_vmm::virtio::mem::Mem;
use bulkhead_vmm::virtio::net::Net;
use bulkhead_vmm::virtio::vsock::Vsock;
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{MsgFlags, send};

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Descriptor {
    Stream,
    PipeIn,
    PipeOut,
    Memory(u16),
    Directory,
    Event,
    Null,
}

#[derive(Arbitrary, Debug)]
enum Packet {
    /// A request with descriptors.
    Request(Vec<Descriptor>, Text),
    /// What a VMM sends.
    Vmm(Text),
}

#[derive(Arbitrary, Debug)]
enum Text {
    Bytes(Vec<u8>),
    Words(Vec<Word>),
}

/// Pieces of messages.
#[derive(Arbitrary, Debug)]
enum Word {
    Known(u8),
    Number(i64),
    Text(String),
}

const WORDS: [&str; 41] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "null",
    "true",
    "false",
    "\"id\"",
    "\"request\"",
    "\"pause\"",
    "\"resume\"",
    "\"inspect\"",
    "\"vsock_listen\"",
    "\"vsock_unlisten\"",
    "\"vsock_connect\"",
    "\"attach_disk\"",
    "\"detach_disk\"",
    "\"attach_net\"",
    "\"detach_net\"",
    "\"set_balloon\"",
    "\"add_vcpus\"",
    "\"set_memory\"",
    "\"port\"",
    "\"far_end\"",
    "\"slot\"",
    "\"disk\"",
    "\"files\"",
    "\"read_only\"",
    "\"net\"",
    "\"taps\"",
    "\"vhosts\"",
    "\"mac\"",
    "\"mtu\"",
    "\"mib\"",
    "\"count\"",
    "\"reply\"",
    "\"result\"",
    "\"event\"",
    "{\"id\":1,\"request\":",
];

impl Text {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Words(words) => {
                let word = |word: &Word| match word {
                    Word::Known(index) => WORDS[usize::from(*index) % WORDS.len()].to_owned(),
                    Word::Number(number) => number.to_string(),
                    Word::Text(text) => format!("{text:?}"),
                };
                words.iter().map(word).collect::<String>().into_bytes()
            }
        }
    }
}

fn open(kind: Descriptor) -> OwnedFd {
    const REASON: &str = "there are descriptors";
    match kind {
        Descriptor::Stream => UnixStream::pair().expect(REASON).0.into(),
        Descriptor::PipeIn => std::io::pipe().expect(REASON).0.into(),
        Descriptor::PipeOut => std::io::pipe().expect(REASON).1.into(),
        Descriptor::Memory(len) => {
            // SAFETY: the name is terminated, and the descriptor is new.
            let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
            file.set_len(len.into()).expect("there is memory");
            file.into()
        }
        Descriptor::Directory => File::open("/").expect(REASON).into(),
        Descriptor::Event => {
            let event = vmm_sys_util::eventfd::EventFd::new(0).expect(REASON);
            // SAFETY: the descriptor is nobody else's from here on.
            unsafe { OwnedFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(event)) }
        }
        Descriptor::Null => File::open("/dev/null").expect(REASON).into(),
    }
}

/// The devices that requests are about.
struct Devices {
    disk: Block,
    net: Net,
    balloon: Balloon,
    mem: Mem,
    vsock: Vsock,
}

impl Devices {
    fn new() -> Self {
        const REASON: &str = "there are descriptors";
        Self {
            disk: Block::new(0, None),
            net: Net::new(0, 2).expect(REASON),
            balloon: Balloon::new(),
            mem: Mem::new(1 << 32, 1 << 30),
            vsock: Vsock::new(3).expect(REASON),
        }
    }

    /// As the server does.
    fn perform(&mut self, received: &mut Received<RequestMessage>) {
        let id = received.message.id;
        match received.message.request.clone() {
            Request::Boot(config) => {
                let _ = bulkhead_vmm::config::validate(&config);
                for (slot, disk) in &config.disks {
                    let _ = open_disk(disk, *slot, |what, fd| take_fd(received, what, fd));
                }
                for (port, fd) in &config.vsock_listeners {
                    if let Ok(far_end) = take_fd(received, "vsock_listeners", *fd) {
                        let _ = self.vsock.listen(*port, far_end);
                    }
                }
            }
            Request::VsockListen { port, far_end } => {
                if let Ok(far_end) = take_fd(received, "far_end", far_end) {
                    let _ = self.vsock.listen(port, far_end);
                }
            }
            Request::VsockUnlisten { port } => drop(self.vsock.unlisten(port)),
            Request::VsockConnect { port, far_end } => {
                if let Ok(far_end) = take_fd(received, "far_end", far_end) {
                    let _ = self.vsock.connect(port, far_end, id);
                }
            }
            Request::AttachDisk { slot, disk } => {
                if let Ok(image) = open_disk(&disk, slot, |what, fd| take_fd(received, what, fd)) {
                    let sectors = image.sectors();
                    if self.disk.attach(image).is_ok() {
                        let mut capacity = [0; 8];
                        self.disk.read_config(0, &mut capacity);
                        assert_eq!(u64::from_le_bytes(capacity), sectors);
                    }
                }
            }
            Request::DetachDisk { .. } => drop(self.disk.detach()),
            Request::AttachNet { net, .. } => {
                let _ = attach_net(&mut self.net, &net, |what, fd| take_fd(received, what, fd));
            }
            Request::DetachNet { .. } => drop(self.net.detach()),
            Request::SetBalloon { mib } => drop(self.balloon.set_target_mib(mib)),
            Request::SetMemory { mib } => {
                let bytes = u64::from(mib) << 20;
                let _ = self.mem.request(bytes, bytes);
                assert!(self.mem.requested() <= self.mem.size());
            }
            Request::Pause
            | Request::Resume
            | Request::AddVcpus { .. }
            | Request::Snapshot { .. }
            | Request::ListWritten { .. }
            | Request::Inspect => {}
        }
        self.vsock.process_event().expect("the device is not active");
        self.vsock.take_events();
    }
}

/// Open descriptors of this process.
fn count() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("it is there").count()
}

fn run(packets: Vec<Packet>) {
    let (ours, theirs) = Channel::pair().expect("there are descriptors");
    let mut devices = Devices::new();
    for packet in packets {
        match packet {
            Packet::Request(kinds, text) => {
                let text = text.bytes();
                let fds: Vec<OwnedFd> = kinds.iter().take(8).map(|kind| open(*kind)).collect();
                let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
                if !transmit(&ours, &text, &borrowed) {
                    continue;
                }
                let Ok(mut received) = theirs.receive::<RequestMessage>() else {
                    continue;
                };
                devices.perform(&mut received);
                let message = received.message;
                let again = serde_json::to_vec(&message).expect("it was decoded");
                let decoded: RequestMessage = serde_json::from_slice(&again).expect("it was encoded");
                assert_eq!(decoded, message);
            }
            Packet::Vmm(text) => {
                if !transmit(&theirs, &text.bytes(), &[]) {
                    continue;
                }
                if let Ok(received) = ours.receive::<VmmMessage>() {
                    let again = serde_json::to_vec(&received.message).expect("it was decoded");
                    let decoded: VmmMessage = serde_json::from_slice(&again).expect("it was encoded");
                    assert_eq!(decoded, received.message);
                }
            }
        }
    }
}

/// Sends a packet as it is; whether there is one to receive.
fn transmit(channel: &Channel, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    if bytes.is_empty() || bytes.len() > 256 << 10 {
        return false;
    }
    if fds.is_empty() {
        return send(channel.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT).is_ok();
    }
    let raw: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    nix::sys::socket::sendmsg::<()>(
        channel.as_raw_fd(),
        &[std::io::IoSlice::new(bytes)],
        &[nix::sys::socket::ControlMessage::ScmRights(&raw)],
        MsgFlags::MSG_DONTWAIT,
        None,
    )
    .is_ok()
}

fuzz_target!(|packets: Vec<Packet>| {
    let before = count();
    run(packets);
    assert_eq!(count(), before, "descriptors stay open");
});
