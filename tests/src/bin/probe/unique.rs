//! What no two guests may have in common.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// Numbers of this guest. Takes CAP_NET_ADMIN.
pub fn report() -> io::Result<Value> {
    // Looked at first, as the guest's own programs would.
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let mut urandom = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut urandom)?;
    let mut getrandom = [0u8; 16];
    // SAFETY: the buffer is of the length given.
    if unsafe { libc::getrandom(getrandom.as_mut_ptr().cast(), getrandom.len(), 0) } != 16 {
        return Err(io::Error::last_os_error());
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?;
    Ok(json!({
        "boot_id": boot_id.trim(),
        "uuid": uuid.trim(),
        "urandom": format!("{urandom:02x?}"),
        "getrandom": format!("{getrandom:02x?}"),
        "sequence": sequence()?,
        "hostname": fs::read_to_string("/proc/sys/kernel/hostname")?.trim(),
        "realtime_ms": now.as_millis() as u64,
    }))
}

/// The part of a TCP connection's first sequence number that comes from the kernel's secret and the addresses, which are
/// the same in every guest; the clock's part is taken off (Linux net/core/secure_seq.c: 64 ns a step).
fn sequence() -> io::Result<u32> {
    const LISTEN: u16 = 40_000;
    const FROM: u16 = 40_001;
    let listener = TcpListener::bind(("127.0.0.1", LISTEN))?;
    // SAFETY: plain calls; every pointer is to a value of the type and length given.
    let stream = unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        let stream = <TcpStream as std::os::fd::FromRawFd>::from_raw_fd(socket);
        let address = |port: u16| libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: port.to_be(),
            sin_addr: libc::in_addr {
                s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
            },
            sin_zero: [0; 8],
        };
        let size = size_of::<libc::sockaddr_in>() as libc::socklen_t;
        let (from, to) = (address(FROM), address(LISTEN));
        if libc::bind(socket, (&raw const from).cast(), size) != 0
            || libc::connect(socket, (&raw const to).cast(), size) != 0
        {
            return Err(io::Error::last_os_error());
        }
        stream
    };
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(io::Error::other)?;
    drop(listener);
    let steps = (clock.as_nanos() >> 6) as u32;
    Ok(queue_sequence(stream.as_raw_fd())?.wrapping_sub(steps))
}

/// Next sequence number of the send queue (Linux include/uapi/linux/tcp.h).
fn queue_sequence(socket: RawFd) -> io::Result<u32> {
    let set = |option: libc::c_int, value: libc::c_int| {
        let size = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the pointer is to an int, whose size is given.
        match unsafe { libc::setsockopt(socket, libc::IPPROTO_TCP, option, (&raw const value).cast(), size) }
        {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    set(libc::TCP_REPAIR, 1)?;
    const TCP_SEND_QUEUE: libc::c_int = 2;
    set(libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)?;
    let mut sequence = 0u32;
    let mut size = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the pointers are to an unsigned int and its size.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::IPPROTO_TCP,
            libc::TCP_QUEUE_SEQ,
            (&raw mut sequence).cast(),
            &raw mut size,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(sequence)
}
