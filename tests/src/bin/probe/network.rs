//! Servers and clients for the tests of a pod's network.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;

use super::Outcome;

/// Says how many bytes each caller sent, once it has sent all.
pub fn count(address: &str) -> Outcome {
    let listener = TcpListener::bind(address)?;
    println!("listening");
    for caller in listener.incoming() {
        let mut caller = caller?;
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // A caller that breaks off gets no answer.
            if caller.read_to_end(&mut bytes).is_ok() {
                let _ = write!(caller, "{} bytes", bytes.len());
            }
        });
    }
    Ok(())
}

/// Sends `length` bytes to a server and prints what it says then.
pub fn send(address: &str, length: usize) -> Outcome {
    let mut server = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(60))?;
    server.set_read_timeout(Some(Duration::from_secs(60)))?;
    server.write_all(&vec![7; length])?;
    server.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    server.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Sends a datagram and prints the answer.
pub fn datagram(address: &str, text: &str) -> Outcome {
    let any = if address.starts_with('[') {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    socket.send_to(text.as_bytes(), address)?;
    let mut answer = [0; 2048];
    let (length, _) = socket.recv_from(&mut answer)?;
    println!("{}", String::from_utf8_lossy(&answer[..length]));
    Ok(())
}

/// Makes a tun interface of the network 10.99.0.0/24 and prints what a datagram to it carries when it comes out at the
/// device's end.
pub fn tun(text: &str) -> Outcome {
    let mut device = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: the structure is plain numbers and pointers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"vpn0") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = i16::try_from(libc::IFF_TUN | libc::IFF_NO_PI)?;
    // SAFETY: the descriptor is open and the argument points to an ifreq for the call's duration.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw const request) })?;
    for arguments in ["address add 10.99.0.1/24 dev vpn0", "link set vpn0 up"] {
        let status = Command::new("ip").args(arguments.split(' ')).status()?;
        if !status.success() {
            return Err(format!("ip {arguments}: {status}").into());
        }
    }
    UdpSocket::bind("10.99.0.1:0")?.send_to(text.as_bytes(), "10.99.0.2:9")?;
    let mut packet = [0; 2048];
    loop {
        let length = device.read(&mut packet)?;
        // Headers of IPv4 and UDP without options; the kernel sends packets of its own too.
        if packet[..length].get(28..) == Some(text.as_bytes()) {
            println!("{text}");
            return Ok(());
        }
    }
}
