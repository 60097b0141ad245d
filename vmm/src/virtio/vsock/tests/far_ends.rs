use std::fs::{File, OpenOptions};
use std::io::{Seek, pipe};
use std::os::fd::{AsRawFd, FromRawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};

use super::*;

fn file() -> File {
    memfd_create(c"far-end", MemFdCreateFlag::empty()).unwrap().into()
}

/// Opens an open file once more, with its own mode and flags.
fn reopen(fd: &impl AsRawFd, options: &mut OpenOptions) -> File {
    options.open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

fn nonblocking(fd: &impl AsRawFd) -> bool {
    let flags = fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL).unwrap();
    OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK)
}

#[test]
fn a_write_only_pipe_has_no_end_of_input() {
    let mut guest = Guest::new();
    let (mut reader, writer) = pipe().unwrap();
    guest.establish(writer);
    guest.run();
    assert_eq!((guest.ops(), guest.events()), (vec![], vec![]));
    guest.send_data(b"output");
    guest.send_shutdown(SHUTDOWN_SEND);
    let mut all = Vec::new();
    reader.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"output");
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn a_read_only_pipe_ends_with_its_writer() {
    let mut guest = Guest::new();
    let (reader, mut writer) = pipe().unwrap();
    guest.establish(reader);
    writer.write_all(b"input").unwrap();
    guest.run();
    assert_eq!(payload(guest.packets()), b"input");
    drop(writer);
    guest.run();
    let packets = guest.packets();
    assert_eq!(
        (packets[0].0.op, packets[0].0.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND)
    );
    assert_eq!((packets.len(), guest.events()), (1, vec![]));
    guest.send_shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn writing_to_a_read_only_pipe_is_refused_politely() {
    let mut guest = Guest::new();
    let (reader, mut writer) = pipe().unwrap();
    guest.establish(reader);
    for _ in 0..2 {
        guest.send_data(b"nowhere to go");
    }
    let packets = guest.packets();
    let (header, _) = packets[0];
    assert_eq!(
        (packets.len(), header.op, header.flags),
        (1, op::SHUTDOWN, SHUTDOWN_RECEIVE)
    );
    writer.write_all(b"input").unwrap();
    guest.run();
    let packets = guest.packets();
    assert_eq!(packets[0].0.fwd_cnt, 26);
    assert_eq!(payload(packets), b"input");
    assert_eq!(guest.events(), []);
    drop(writer);
    guest.run();
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn a_reader_that_goes_away_ends_a_one_way_stream() {
    let mut guest = Guest::new();
    let (reader, writer) = pipe().unwrap();
    guest.establish(writer);
    // More than the pipe holds.
    for _ in 0..3 {
        guest.send_data(&pattern(0, 60_000));
    }
    assert!(guest.vsock.buffered() > 0);
    drop(reader);
    guest.run();
    let mut ops = guest.ops();
    ops.retain(|&op| op != op::CREDIT_UPDATE);
    assert_eq!((ops, guest.events()), (vec![op::RST], CLOSED.into()));
    assert_eq!(guest.vsock.buffered(), 0);
    guest.send_data(b"late");
    assert_eq!(guest.ops(), [op::RST]);
}

#[test]
fn a_peer_that_goes_away_ends_a_socket_stream() {
    let mut guest = Guest::new();
    let near = guest.establish_socket();
    drop(near);
    guest.send_data(b"data");
    guest.run();
    let ops = guest.ops();
    assert_eq!(ops.last(), Some(&op::RST), "{ops:?}");
    assert_eq!(guest.events(), CLOSED);
}

#[test]
fn a_regular_file_takes_output() {
    let mut guest = Guest::new();
    let mut copy = file();
    let far = reopen(&copy, OpenOptions::new().write(true));
    guest.establish(far);
    let data = pattern(0, 200_000);
    for part in data.chunks(50_000) {
        guest.send_data(part);
    }
    guest.send_shutdown(SHUTDOWN_SEND);
    assert_eq!(guest.ops().last(), Some(&op::RST));
    assert_eq!(guest.events(), CLOSED);
    let mut all = Vec::new();
    copy.read_to_end(&mut all).unwrap();
    assert!(all == data);
    assert!(!nonblocking(&copy));
}

#[test]
fn a_regular_file_gives_input_as_fast_as_buffers_come() {
    let mut guest = Guest::starved();
    let mut far = file();
    let data = pattern(0, 50_000);
    far.write_all(&data).unwrap();
    far.rewind().unwrap();
    let far = reopen(&far, OpenOptions::new().read(true));
    guest.give(1);
    guest.establish(far);
    let mut all = Vec::new();
    for _ in 0..100 {
        assert!(!guest.pending());
        for (header, payload) in guest.packets() {
            assert!(matches!(header.op, op::RW | op::SHUTDOWN));
            all.extend(payload);
        }
    }
    assert!(all == data);
    assert_eq!(guest.events(), []);
}

#[test]
fn the_null_device_is_a_far_end() {
    let mut guest = Guest::new();
    let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
    guest.establish(null);
    guest.send_data(&[0; 1000]);
    guest.send_shutdown(SHUTDOWN_SEND);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn a_fifo_open_both_ways_has_no_end() {
    let mut guest = Guest::new();
    let (reader, mut writer) = pipe().unwrap();
    let both = reopen(&reader, OpenOptions::new().read(true).write(true));
    drop(reader);
    guest.establish(both);
    writer.write_all(b"input").unwrap();
    drop(writer);
    guest.run();
    assert_eq!(payload(guest.packets()), b"input");
    assert!(!guest.pending());
    guest.send_shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
}

#[test]
fn a_terminal_gets_its_mode_back() {
    let mut guest = Guest::new();
    let pty = nix::pty::openpty(None, None).unwrap();
    let slave = pty.slave.try_clone().unwrap();
    let mut master = File::from(pty.master);
    guest.establish(pty.slave);
    assert!(nonblocking(&slave));
    master.write_all(b"line\n").unwrap();
    guest.run();
    assert_eq!(payload(guest.packets()), b"line\n");
    guest.send_data(b"answer\n");
    let mut echo = [0; 14];
    master.read_exact(&mut echo).unwrap();
    assert_eq!(&echo, b"line\r\nanswer\r\n");
    guest.send_shutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    assert_eq!((guest.ops(), guest.events()), (vec![op::RST], CLOSED.into()));
    assert!(!nonblocking(&slave));
}

#[test]
fn a_far_end_shared_with_others_is_not_watched_after_the_stream() {
    let mut guest = Guest::new();
    let (mut near, far) = UnixStream::pair().unwrap();
    let shared = far.try_clone().unwrap();
    guest.establish(far);
    guest.send_op(op::RST);
    assert_eq!(guest.events(), CLOSED);
    near.write_all(b"for the other holder").unwrap();
    assert!(!guest.pending());
    drop(shared);
}

#[test]
fn directories_and_other_kinds_are_refused() {
    let mut vsock = Vsock::new(CID).unwrap();
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
    // SAFETY: the descriptor is new and has no other owner.
    let path = unsafe {
        let path = libc::open(c"/dev/null".as_ptr(), libc::O_PATH);
        OwnedFd::from_raw_fd(path)
    };
    for far in [File::open("/proc").unwrap().into(), epoll.0, path] {
        let error = vsock.listen(PORT, far).unwrap_err();
        assert!(matches!(error, VsockError::FarEnd(_)), "{error:?}");
    }
}
