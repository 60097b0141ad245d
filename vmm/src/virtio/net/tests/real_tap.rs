//! The device on a tap of the kernel, in a network namespace of its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use nix::sched::{CloneFlags, unshare};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4};

use super::pairs::Pairs;
use super::*;
use crate::virtio::net::tap::Tap;

const NAME: &[u8; 5] = b"vtap0";
const ETH_P_ALL: u16 = 3;
const CHECKSUM_NEEDED: u8 = 1;
const GSO_TCPV4: u8 = 1;

mod ioctl {
    nix::ioctl_write_ptr!(set_interface, b'T', 202, libc::c_int);
    nix::ioctl_read!(get_interface, b'T', 210, libc::c_uint);
    nix::ioctl_read!(header_size, b'T', 215, libc::c_int);
    nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, libc::ifreq);
    nix::ioctl_readwrite_bad!(index, libc::SIOCGIFINDEX, libc::ifreq);
}

fn request() -> libc::ifreq {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, &from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = from as libc::c_char;
    }
    request
}

/// A queue of the tap.
fn queue(flags: libc::c_int) -> File {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    let mut interface = request();
    interface.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags) as i16;
    // SAFETY: the request outlives the call; TUNSETIFF is declared with an int but takes an `ifreq`.
    unsafe { ioctl::set_interface(tap.as_raw_fd(), (&raw const interface).cast()) }.unwrap();
    tap
}

/// Whether a queue is one of those the kernel chooses from.
fn is_attached(tap: &File) -> bool {
    let mut interface = request();
    // SAFETY: the kernel fills the request, which outlives the call.
    unsafe { ioctl::get_interface(tap.as_raw_fd(), (&raw mut interface).cast()) }.unwrap();
    // SAFETY: the kernel has set the flags.
    let flags = unsafe { interface.ifr_ifru.ifru_flags };
    i32::from(flags) & libc::IFF_DETACH_QUEUE == 0
}

/// A tap of one queue that is up, and a packet socket that sees and sends what is on it.
fn tap() -> (File, File) {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let tap = queue(0);
    (tap, packets())
}

/// Brings the tap up; a packet socket that sees and sends what is on it.
fn packets() -> File {
    let protocol = i32::from(ETH_P_ALL.to_be());
    // SAFETY: plain system call; the descriptor is new and gets one owner.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        File::from_raw_fd(fd)
    };
    let mut up = request();
    up.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
    let mut index = request();
    // SAFETY: the requests outlive the calls, which read or fill one field each.
    let index = unsafe {
        ioctl::set_flags(socket.as_raw_fd(), &up).unwrap();
        ioctl::index(socket.as_raw_fd(), &mut index).unwrap();
        index.ifr_ifru.ifru_ifindex
    };
    // SAFETY: all zero is a valid address, which outlives the call.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ETH_P_ALL.to_be();
        address.sll_ifindex = index;
        let size = size_of::<libc::sockaddr_ll>() as u32;
        let result = libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size);
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }
    socket
}

/// An Ethernet frame of a local experimental protocol.
fn ethernet(len: usize) -> Vec<u8> {
    let mut frame = frame(len);
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame
}

/// Frames on the wire with that protocol; the kernel sends some of its own.
fn next_frame(socket: &mut File) -> Vec<u8> {
    let mut data = vec![0; 1 << 17];
    for _ in 0..1000 {
        match socket.read(&mut data) {
            Ok(len) if data[12..14] == [0x88, 0xb5] || data[23] == 6 => {
                data.truncate(len);
                return data;
            }
            Ok(_) => {}
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
    panic!("no frame");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn frames_and_segments_pass_a_real_tap() {
    let (tap, mut socket) = tap();
    let handle = tap.try_clone().unwrap();
    let features = LARGE | RING_FEATURES | 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let memory = test_queue::memory();
    let mut net = Net::new(0, 1).unwrap();
    net.attach(vec![tap.into()], MAC, 1500).unwrap();
    let mut guest = Guest {
        rx: TestQueue::new(&memory, 0, 256),
        tx: TestQueue::new(&memory, 1, 256),
        memory,
        net,
        wire: socket.try_clone().unwrap(),
    };
    let activation = test_queue::activation(&guest.memory, &[&guest.rx, &guest.tx], features);
    guest.net.activate(activation).unwrap();
    let mut size = 0;
    // SAFETY: the kernel fills the int, which outlives the call.
    unsafe { ioctl::header_size(handle.as_raw_fd(), &mut size) }.unwrap();
    assert_eq!(size, 12);

    // To the wire.
    let plain = [vec![0; 12], ethernet(100)].concat();
    guest.post(&plain, &[12, 50, 50]);
    guest.kick(TX);
    assert_eq!(next_frame(&mut socket), ethernet(100));

    // A TCP segment of several frames goes as one.
    let mut segment = [vec![0; 12], ethernet(14 + 40 + 8000)].concat();
    segment[0] = CHECKSUM_NEEDED;
    segment[1] = GSO_TCPV4;
    segment[2..4].copy_from_slice(&54_u16.to_le_bytes());
    segment[4..6].copy_from_slice(&1460_u16.to_le_bytes());
    segment[6..8].copy_from_slice(&34_u16.to_le_bytes());
    segment[8..10].copy_from_slice(&16_u16.to_le_bytes());
    segment[24..26].copy_from_slice(&[8, 0]);
    let ip = [
        0x45, 0, 0x1f, 0x68, 0, 0, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ];
    segment[26..46].copy_from_slice(&ip);
    segment[58] = 0x50;
    guest.post(&segment, &[segment.len()]);
    guest.kick(TX);
    assert_eq!(next_frame(&mut socket).len(), 14 + 40 + 8000);

    // A header the kernel rejects costs the frame, not the device.
    let mut bad = plain.clone();
    bad[1] = 0x7f;
    guest.post(&bad, &[bad.len()]);
    guest.post(&plain, &[plain.len()]);
    guest.kick(TX);
    assert_eq!(guest.tx.take_used().len(), 4);
    assert_eq!(next_frame(&mut socket), ethernet(100));

    // From the wire, behind whatever the kernel had to say on the new interface.
    guest.give(200, 2048);
    socket.write_all(&ethernet(700)).unwrap();
    let mut next = 0;
    for _ in 0..100 {
        guest.run();
        for (_, len) in guest.rx.take_used() {
            let received = guest.bytes(BUFFERS + next * 2048, len as usize);
            next += 1;
            assert_eq!(received[10..12], [1, 0]);
            if received[24..26] == [0x88, 0xb5] {
                assert_eq!(
                    (&received[..10], &received[12..]),
                    (&[0; 10][..], &*ethernet(700))
                );
                return;
            }
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("frame is lost");
}

/// A datagram of a flow of its own.
fn datagram(flow: u16) -> Vec<u8> {
    let mut frame = ethernet(14 + 20 + 8);
    frame[12..14].copy_from_slice(&[8, 0]);
    let ip = [
        0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ];
    frame[14..34].copy_from_slice(&ip);
    frame[34..36].copy_from_slice(&flow.to_be_bytes());
    frame[36..42].copy_from_slice(&[0, 7, 0, 8, 0, 0]);
    frame
}

/// Sends datagrams of many flows to the guest; how many came by each pair.
fn received(guest: &mut Pairs, socket: &mut File) -> [usize; 2] {
    const FLOWS: u16 = 32;
    for flow in 0..FLOWS {
        socket.write_all(&datagram(5000 + flow)).unwrap();
    }
    let mut counts = [0; 2];
    for _ in 0..1000 {
        guest.run();
        for (pair, count) in counts.iter_mut().enumerate() {
            // The kernel sends some of its own, which are longer.
            let used = guest.queues[2 * pair].take_used();
            *count += used.iter().filter(|(_, len)| *len == 12 + 42).count();
        }
        if counts.iter().sum::<usize>() == usize::from(FLOWS) {
            return counts;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("{counts:?} of {FLOWS}");
}

#[test]
#[ignore = "needs root and /dev/net/tun"]
fn a_queue_of_a_real_tap_gets_frames_while_its_pair_is_on() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let queues = [(); 2].map(|()| queue(libc::IFF_MULTI_QUEUE));
    Tap::new(queues[1].try_clone().unwrap().into())
        .unwrap()
        .set_attached(false)
        .unwrap();
    let mut socket = packets();
    let mut net = Net::new(0, 2).unwrap();
    let taps = queues.iter().map(|queue| queue.try_clone().unwrap().into());
    net.attach(taps.collect(), MAC, 1500).unwrap();
    let mut guest = Pairs::on(net);
    let attached = || [0, 1].map(|index: usize| is_attached(&queues[index]));
    for _ in 0..2 {
        guest.start(pairs::PAIRS).unwrap();
        for pair in 0..2 {
            guest.give(pair, 60);
        }
        assert_eq!(attached(), [true, false]);
        assert_eq!(received(&mut guest, &mut socket), [32, 0]);

        assert_eq!(guest.command(&pairs::set_pairs(2)), Some(0));
        assert_eq!(attached(), [true, true]);
        let [first, second] = received(&mut guest, &mut socket);
        assert!(first > 0 && second > 0, "{first} {second}");
        let mut plain = vec![0; 12];
        plain.extend(ethernet(100));
        guest.send(1, &plain);
        guest.run();
        while next_frame(&mut socket) != ethernet(100) {}

        // Off, and on again until the reset.
        assert_eq!(guest.command(&pairs::set_pairs(1)), Some(0));
        assert_eq!(attached(), [true, false]);
        for pair in 0..2 {
            guest.give(pair, 60);
        }
        assert_eq!(received(&mut guest, &mut socket), [32, 0]);
        assert_eq!(guest.command(&pairs::set_pairs(2)), Some(0));
        guest.net.reset();
        assert_eq!(attached(), [true, false]);
        let fresh = Pairs::on(guest.net);
        guest = fresh;
    }
}
