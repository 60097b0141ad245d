//! Servers and clients for the tests of a pod's network.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

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
