//! Every virtqueue handler behind its registers, which are read and written in any order.
//!
//! A fault or a panic is a finding, and so is a device that, with a driver that keeps the rules, writes
//! where it may not, returns a chain twice or with more bytes than there is room for; and a device that
//! changes its disk's size or a disk it may only read.

#![no_main]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use bulkhead_fuzz::driver::{Action, Driver};
use bulkhead_fuzz::memory::{HIGH, PLUG, PLUG_SIZE, Ram};
use bulkhead_vmm::virtio::VirtioDevice;
use bulkhead_vmm::virtio::balloon::Balloon;
use bulkhead_vmm::virtio::block::{Block, DiskImage};
use bulkhead_vmm::virtio::mem::Mem;
use bulkhead_vmm::virtio::net::Net;
use bulkhead_vmm::virtio::pmem::Pmem;
use bulkhead_vmm::virtio::rng::Rng;
use bulkhead_vmm::virtio::vsock::Vsock;
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// Bytes of a disk's file.
const DISK: u64 = 32 << 10;

/// Pairs of queues of the network device: with its control queue it has as many queues as the driver knows.
const PAIRS: u8 = 2;

#[derive(Arbitrary, Debug)]
enum Kind {
    Block { files: u8, odd: u16, read_only: bool },
    Net,
    Rng,
    Balloon,
    Mem,
    Pmem,
    Vsock,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Driver(Action),
    /// Something happens on the host's side.
    Host(u8, u32),
}

#[derive(Arbitrary, Debug)]
struct Case {
    kind: Kind,
    steps: Vec<Step>,
}

/// The device as the host holds it.
enum Host {
    Block(Arc<Mutex<Block>>, Vec<File>, bool),
    Net(Arc<Mutex<Net>>, Vec<File>),
    Balloon(Arc<Mutex<Balloon>>),
    Mem(Arc<Mutex<Mem>>),
    Vsock(Arc<Mutex<Vsock>>, Vec<UnixStream>),
    Nothing,
}

fn shared<T: VirtioDevice + 'static>(device: T) -> (Arc<Mutex<T>>, Arc<Mutex<dyn VirtioDevice>>) {
    let device = Arc::new(Mutex::new(device));
    (device.clone(), device)
}

/// A file of memory with known content.
fn file(len: u64) -> File {
    // SAFETY: the name is terminated, and the descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(len).expect("there is memory");
    file.write_all_at(b"content", 512).expect("there is memory");
    file
}

/// A wire: the device's end and ours.
fn wire() -> (std::os::fd::OwnedFd, File) {
    let (far, near) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
    )
    .expect("there are descriptors");
    (far, near.into())
}

/// Wires for all pairs: the device's ends and ours.
fn wires() -> (Vec<std::os::fd::OwnedFd>, Vec<File>) {
    (0..PAIRS).map(|_| wire()).unzip()
}

impl Host {
    fn new(kind: &Kind) -> (Self, Arc<Mutex<dyn VirtioDevice>>) {
        match *kind {
            Kind::Block {
                files,
                odd,
                read_only,
            } => {
                let count = if read_only { 1 + files % 3 } else { 1 };
                let files: Vec<File> = (0..count).map(|_| file(DISK - u64::from(odd) % DISK)).collect();
                let clones = files
                    .iter()
                    .map(|file| file.try_clone().expect("there are descriptors"));
                let disk = DiskImage::new(clones.collect(), read_only).expect("it is a file");
                let (block, device) = shared(Block::new(0, Some(disk)));
                (Self::Block(block, files, read_only), device)
            }
            Kind::Net => {
                let mut net = Net::new(0, PAIRS).expect("there are descriptors");
                let (fars, nears) = wires();
                net.attach(fars, [2, 0, 0, 0, 0, 1], 1500)
                    .expect("they are wires");
                let (net, device) = shared(net);
                (Self::Net(net, nears), device)
            }
            Kind::Rng => (Self::Nothing, shared(Rng::new()).1),
            Kind::Balloon => {
                let (balloon, device) = shared(Balloon::new());
                (Self::Balloon(balloon), device)
            }
            Kind::Mem => {
                let (mem, device) = shared(Mem::new(PLUG, PLUG_SIZE));
                (Self::Mem(mem), device)
            }
            Kind::Pmem => (Self::Nothing, shared(Pmem::new(0, HIGH * 16, 2 << 20)).1),
            Kind::Vsock => {
                let mut vsock = Vsock::new(3).expect("there are descriptors");
                let mut nears = Vec::new();
                for port in 1..=2 {
                    let (near, far) = UnixStream::pair().expect("there are descriptors");
                    near.set_nonblocking(true).expect("it is a socket");
                    vsock.listen(port, far.into()).expect("the port is free");
                    nears.push(near);
                }
                let (vsock, device) = shared(vsock);
                (Self::Vsock(vsock, nears), device)
            }
        }
    }

    fn act(&mut self, what: u8, value: u32) {
        match self {
            Self::Block(block, files, read_only) => {
                let mut block = block.lock().expect("nobody panicked");
                if what % 2 == 0 {
                    let _ = block.detach();
                } else {
                    let clones = files
                        .iter()
                        .map(|file| file.try_clone().expect("there are descriptors"));
                    let disk = DiskImage::new(clones.collect(), *read_only).expect("it is a file");
                    let _ = block.attach(disk);
                }
            }
            Self::Net(net, nears) => match what % 8 {
                0 => {
                    nears.clear();
                    let _ = net.lock().expect("nobody panicked").detach();
                }
                1 => {
                    let (fars, ours) = wires();
                    if net
                        .lock()
                        .expect("nobody panicked")
                        .attach(fars, [2, 0, 0, 0, 0, 1], 68 + value as u16 % 9000)
                        .is_ok()
                    {
                        *nears = ours;
                    }
                }
                2 => nears.clear(),
                3 => {
                    let mut frame = [0; 70_000];
                    for near in nears {
                        let _ = near.read(&mut frame);
                    }
                }
                _ => {
                    let frame = vec![what; value as usize % 66_000];
                    let _ = nears.get_mut(value as usize % 2).map(|near| near.write(&frame));
                }
            },
            Self::Balloon(balloon) => {
                let _ = balloon.lock().expect("nobody panicked").set_target_mib(value);
            }
            Self::Mem(mem) => {
                let (requested, usable) = (u64::from(value) << 12, u64::from(what) << 20);
                let _ = mem.lock().expect("nobody panicked").request(requested, usable);
            }
            Self::Vsock(vsock, nears) => {
                let stream = usize::from(what) % 2;
                match what / 2 % 4 {
                    0 => drop(nears[stream].read(&mut [0; 4096])),
                    1 => drop(nears[stream].write(&vec![what; value as usize % 70_000])),
                    2 => drop(nears[stream].shutdown(std::net::Shutdown::Both)),
                    _ => {
                        let _ = vsock.lock().expect("nobody panicked").unlisten(1 + stream as u32);
                    }
                }
                vsock.lock().expect("nobody panicked").take_events();
            }
            Self::Nothing => {}
        }
    }

    fn check(&self) {
        match self {
            Self::Block(_, files, read_only) => {
                for file in files {
                    let len = file.metadata().expect("it is open").len();
                    assert_eq!(len, files[0].metadata().expect("it is open").len());
                    if *read_only {
                        let mut content = vec![0; len as usize];
                        file.read_exact_at(&mut content, 0).expect("it is memory");
                        let mut fresh = vec![0; len as usize];
                        file_content(&mut fresh);
                        assert_eq!(content, fresh, "a disk that is read-only was written to");
                    }
                }
            }
            Self::Mem(mem) => {
                let mem = mem.lock().expect("nobody panicked");
                let plugged: u64 = mem.save().plugged.iter().map(|(_, count)| count).sum();
                assert_eq!(plugged * bulkhead_vmm::virtio::mem::BLOCK_SIZE, mem.plugged());
                assert!(mem.plugged() <= mem.size());
            }
            Self::Vsock(vsock, _) => {
                let vsock = vsock.lock().expect("nobody panicked");
                assert!(vsock.buffered() <= 2 * bulkhead_vmm::virtio::vsock::BUFFER_SIZE);
                assert!(vsock.queued_packets() <= 512 + 2);
            }
            _ => {}
        }
    }
}

fn file_content(content: &mut [u8]) {
    if let Some(place) = content.get_mut(512..519) {
        place.copy_from_slice(b"content");
    }
}

thread_local! {
    static RAM: Ram = Ram::map();
}

fuzz_target!(|case: Case| {
    RAM.with(|ram| {
        let (mut host, device) = Host::new(&case.kind);
        let len = match &host {
            Host::Block(_, files, _) => files[0].metadata().expect("it is open").len(),
            _ => 0,
        };
        let mut driver = Driver::new(ram, device);
        driver.discards = matches!(case.kind, Kind::Balloon);
        for step in case.steps {
            match step {
                Step::Driver(action) => driver.act(action),
                Step::Host(what, value) => host.act(what, value),
            }
            host.check();
        }
        if let Host::Block(_, files, _) = &host {
            assert_eq!(files[0].metadata().expect("it is open").len(), len);
        }
    });
});
