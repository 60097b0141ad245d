//! Client of the streams that CRI's `Exec`, `Attach` and `PortForward` answer with: channels in a WebSocket
//! (RFC 6455), protocol `v4.channel.k8s.io`. The first byte of each message is its channel.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::Value;

/// Channel of standard input.
pub const INPUT: u8 = 0;
/// Channel of standard output.
pub const OUTPUT: u8 = 1;
/// Channel of standard error.
pub const ERRORS: u8 = 2;
/// Channel on which the end of a command is told.
pub const END: u8 = 3;
/// Channel of the terminal's size.
pub const SIZE: u8 = 4;

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;

/// An open stream.
#[derive(Debug)]
pub struct Stream {
    socket: BufReader<TcpStream>,
    received: BTreeMap<u8, Vec<u8>>,
    closed: bool,
    deadline: Instant,
}

impl Stream {
    /// Opens the stream at `url`. `limit` is for its whole life.
    ///
    /// # Errors
    /// It cannot be reached, or the server does not change to a WebSocket.
    pub fn open(url: &str, limit: Duration) -> io::Result<Self> {
        let rest = url.strip_prefix("http://").ok_or_else(|| wrong("not http"))?;
        let (host, path) = rest.split_once('/').ok_or_else(|| wrong("no path"))?;
        let mut socket = TcpStream::connect(host)?;
        write!(
            socket,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )?;
        let deadline = Instant::now() + limit;
        let mut stream = Self {
            socket: BufReader::new(socket),
            received: BTreeMap::new(),
            closed: false,
            deadline,
        };
        let head = stream.head()?;
        if head.starts_with("HTTP/1.1 101 ") {
            Ok(stream)
        } else {
            Err(wrong(&head))
        }
    }

    fn head(&mut self) -> io::Result<String> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.read_exact(&mut byte)?;
            head.extend(byte);
        }
        Ok(String::from_utf8_lossy(&head).into_owned())
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // Zero would be no limit.
        let left = left.max(Duration::from_millis(1));
        self.socket.get_ref().set_read_timeout(Some(left))?;
        self.socket.read_exact(buffer)
    }

    /// Sends bytes on a channel.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let frame = frame(&[&[channel], bytes].concat());
        self.socket.get_mut().write_all(&frame)
    }

    /// Says how large the terminal is.
    ///
    /// # Errors
    /// The connection has ended.
    pub fn resize(&mut self, rows: u16, columns: u16) -> io::Result<()> {
        let size = serde_json::json!({"Width": columns, "Height": rows});
        self.send(SIZE, size.to_string().as_bytes())
    }

    /// Receives one message. False at the end.
    fn receive(&mut self) -> io::Result<bool> {
        if self.closed {
            return Ok(false);
        }
        let mut head = [0; 2];
        match self.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.closed = true;
                return Ok(false);
            }
            other => other?,
        }
        let length = match head[1] & 0x7f {
            126 => {
                let mut bytes = [0; 2];
                self.read_exact(&mut bytes)?;
                u64::from(u16::from_be_bytes(bytes))
            }
            127 => {
                let mut bytes = [0; 8];
                self.read_exact(&mut bytes)?;
                u64::from_be_bytes(bytes)
            }
            short => u64::from(short),
        };
        if length > 64 << 20 {
            return Err(wrong("a message above 64 MiB"));
        }
        let mut message = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.read_exact(&mut message)?;
        match (head[0] & 0x0f, message.split_first()) {
            (TEXT | BINARY, Some((channel, bytes))) => {
                self.received.entry(*channel).or_default().extend(bytes);
            }
            (CLOSE, _) => self.closed = true,
            _ => {}
        }
        Ok(!self.closed)
    }

    /// What came on a channel so far.
    #[must_use]
    pub fn text(&self, channel: u8) -> String {
        let bytes = self.received.get(&channel).map_or(&[][..], Vec::as_slice);
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Receives until `text` is on a channel.
    ///
    /// # Panics
    /// If the stream ends or the limit passes before.
    #[track_caller]
    pub fn wait_for(&mut self, channel: u8, text: &str) {
        while !self.text(channel).contains(text) {
            let more = self.receive();
            assert!(
                matches!(more, Ok(true)),
                "{text:?} never came on channel {channel}: {more:?}, {self:?}"
            );
        }
    }

    /// Receives until the end of the command; its exit code.
    ///
    /// # Panics
    /// If the stream ends otherwise.
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        loop {
            if let Ok(end) = serde_json::from_str(&self.text(END)) {
                return exit_code(&end).unwrap_or_else(|| panic!("not the end of a command: {end}"));
            }
            let more = self.receive();
            assert!(matches!(more, Ok(true)), "no end came: {more:?}, {self:?}");
        }
    }
}

/// The exit code in a `Status` of Kubernetes.
fn exit_code(status: &Value) -> Option<i32> {
    if status["status"] == "Success" {
        return Some(0);
    }
    let causes = status["details"]["causes"].as_array()?;
    let cause = causes.iter().find(|cause| cause["reason"] == "ExitCode")?;
    cause["message"].as_str()?.parse().ok()
}

/// A whole binary message. Clients have to mask; the mask is zero.
fn frame(message: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | BINARY];
    match u16::try_from(message.len()) {
        Ok(length @ 0..126) => frame.push(0x80 | length as u8),
        Ok(length) => {
            frame.push(0x80 | 126);
            frame.extend(length.to_be_bytes());
        }
        Err(_) => {
            frame.push(0x80 | 127);
            frame.extend((message.len() as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(message);
    frame
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn messages_are_framed_by_their_length() {
        assert_eq!(frame(b"ab"), b"\x82\x82\0\0\0\0ab");
        assert_eq!(frame(&[7; 126])[..4], [0x82, 0xfe, 0, 126]);
        assert_eq!(frame(&[7; 65536])[..10], [0x82, 0xff, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn exit_codes_are_found() {
        assert_eq!(exit_code(&json!({"status": "Success"})), Some(0));
        let failure = json!({
            "status": "Failure",
            "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
        });
        assert_eq!(exit_code(&failure), Some(3));
        assert_eq!(exit_code(&json!({"status": "Failure", "message": "gone"})), None);
    }
}
