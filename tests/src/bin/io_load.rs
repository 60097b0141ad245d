//! Work for the devices of a guest, for `cargo xtask bench`: the same program in our guest and in a peer's.
//!
//! `io-load fs NAME DIRECTORY FILES`, `io-load block NAME DEVICE`, `io-load net NAME ADDRESS` and `io-load vsock NAME PORT`
//! print a line for each piece of work, `bench NAME_WORK MICROSECONDS` by the monotonic clock. FILES are created, looked at
//! and removed; none: that is left out. PORT is one of the host's (context id 2).
//!
//! `io-load serve ADDRESS` is the other end of streams: of TCP, of AF_VSOCK if the address is `vsock:PORT`, or of a Unix
//! socket that it makes, `unix:PATH`, which a VMM without AF_VSOCK joins a guest to.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_protocol::ports::HOST_CID;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, listen, socket,
};

/// Bytes that are moved in sequence.
const SEQUENCE: usize = 32 << 20;
/// Bytes of one call then.
const CHUNK: usize = 128 << 10;
/// Small accesses anywhere, and bytes of each.
const ACCESSES: u32 = 2048;
const BLOCK: usize = 4096;
/// Questions over a stream, a byte each, each waiting for its answer.
const QUESTIONS: u32 = 1000;

/// What the other end of a stream is asked for: to take [`SEQUENCE`] bytes and say so, to send as many, or to answer
/// [`QUESTIONS`].
const SEND: &[u8; 1] = b"s";
const RECEIVE: &[u8; 1] = b"r";
const ASK: &[u8; 1] = b"q";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["fs", name, directory, files] => match files.parse() {
            Ok(files) => directory_work(name, directory.as_ref(), files),
            Err(_) => Err(io::ErrorKind::InvalidInput.into()),
        },
        ["block", name, device] => device_work(name, device.as_ref()),
        ["net", name, address] => network_work(name, address),
        ["vsock", name, port] => vsock_work(name, port),
        ["serve", address] => serve(address),
        _ => {
            eprintln!(
                "usage: io-load fs NAME DIRECTORY FILES, io-load block|net|vsock NAME PLACE, io-load serve ADDRESS"
            );
            return ExitCode::FAILURE;
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("io-load {arguments:?}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Does some work and prints how long it took.
fn time<T>(name: &str, work: &str, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let begin = Instant::now();
    let result = f()?;
    println!("bench {name}_{work} {}", begin.elapsed().as_micros());
    Ok(result)
}

fn directory_work(name: &str, directory: &Path, files: u32) -> io::Result<()> {
    let path = directory.join("file");
    let buffer = Aligned::new();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    data_work(name, &file, buffer)?;
    drop(file);
    fs::remove_file(&path)?;

    if files == 0 {
        return Ok(());
    }
    let many = directory.join("many");
    fs::create_dir(&many)?;
    let names: Vec<_> = (0..files).map(|number| many.join(format!("f{number}"))).collect();
    time(name, "create", || {
        names.iter().try_for_each(|path| File::create_new(path).map(drop))
    })?;
    time(name, "stat", || {
        names
            .iter()
            .try_for_each(|path| fs::symlink_metadata(path).map(drop))
    })?;
    time(name, "unlink", || names.iter().try_for_each(fs::remove_file))?;
    fs::remove_dir(&many)
}

fn device_work(name: &str, device: &Path) -> io::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?;
    data_work(name, &file, Aligned::new())
}

/// Reads and writes in sequence and anywhere.
fn data_work(name: &str, file: &File, mut buffer: Aligned) -> io::Result<()> {
    time(name, "seq_write", || {
        for at in (0..SEQUENCE).step_by(CHUNK) {
            file.write_all_at(buffer.bytes(), at as u64)?;
        }
        file.sync_data()
    })?;
    forget(file)?;
    time(name, "seq_read", || {
        for at in (0..SEQUENCE).step_by(CHUNK) {
            file.read_exact_at(buffer.bytes(), at as u64)?;
        }
        Ok(())
    })?;
    forget(file)?;
    let places = || Places(0x9e37_79b9_7f4a_7c15).take(ACCESSES as usize);
    time(name, "rand_read", || {
        for at in places() {
            file.read_exact_at(&mut buffer.bytes()[..BLOCK], at)?;
        }
        Ok(())
    })?;
    time(name, "rand_write", || {
        for at in places() {
            file.write_all_at(&buffer.bytes()[..BLOCK], at)?;
        }
        file.sync_data()
    })
}

/// Drops what the guest's kernel keeps of a file, so that it is asked for again, and reads no more than is asked for.
fn forget(file: &File) -> io::Result<()> {
    file.sync_data()?;
    for advice in [libc::POSIX_FADV_DONTNEED, libc::POSIX_FADV_RANDOM] {
        // SAFETY: the descriptor is open; the call touches no memory of this process.
        let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
        // Devices that are open with O_DIRECT have nothing to forget.
        if error != 0 && error != libc::EINVAL {
            return Err(io::Error::from_raw_os_error(error));
        }
    }
    Ok(())
}

/// Multiples of [`BLOCK`] below [`SEQUENCE`], in an order that is the same every time (xorshift).
struct Places(u64);

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        Some(self.0 % (SEQUENCE / BLOCK) as u64 * BLOCK as u64)
    }
}

/// A buffer as O_DIRECT wants it.
struct Aligned {
    memory: Vec<u8>,
    begin: usize,
}

impl Aligned {
    fn new() -> Self {
        let memory = vec![0x5a; CHUNK + BLOCK];
        let begin = memory.as_ptr().align_offset(BLOCK);
        Self { memory, begin }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.begin..self.begin + CHUNK]
    }
}

fn network_work(name: &str, address: &str) -> io::Result<()> {
    stream_work(name, || {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    })
}

fn vsock_work(name: &str, port: &str) -> io::Result<()> {
    let socket = vsock_socket()?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, number(port)?))?;
    let stream = File::from(socket);
    // Our VMM joins one connection to a descriptor that it was given, so one has to do for all.
    stream_work(name, || stream.try_clone())
}

/// Moves bytes to the other end and back, over a stream of its own for each piece of work.
fn stream_work<S: Read + Write>(name: &str, open: impl Fn() -> io::Result<S>) -> io::Result<()> {
    let open = |kind: &[u8]| -> io::Result<S> {
        let mut stream = open()?;
        stream.write_all(kind)?;
        Ok(stream)
    };
    let mut buffer = vec![0x5a; CHUNK];
    {
        let mut stream = open(SEND)?;
        time(name, "send", || {
            for _ in (0..SEQUENCE).step_by(CHUNK) {
                stream.write_all(&buffer)?;
            }
            // The other end has it all.
            stream.read_exact(&mut [0])
        })?;
    }
    {
        let mut stream = open(RECEIVE)?;
        time(name, "receive", || {
            for _ in (0..SEQUENCE).step_by(CHUNK) {
                stream.read_exact(&mut buffer)?;
            }
            Ok(())
        })?;
    }
    let mut stream = open(ASK)?;
    time(name, "questions", || {
        for _ in 0..QUESTIONS {
            stream.write_all(&[1])?;
            stream.read_exact(&mut [0])?;
        }
        Ok(())
    })
}

fn number(text: &str) -> io::Result<u32> {
    text.parse()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{text} is no port")))
}

fn vsock_socket() -> io::Result<OwnedFd> {
    let kind = SockType::Stream;
    Ok(socket(AddressFamily::Vsock, kind, SockFlag::SOCK_CLOEXEC, None)?)
}

fn serve(address: &str) -> io::Result<()> {
    if let Some(path) = address.strip_prefix("unix:") {
        let listener = UnixListener::bind(path)?;
        answer_all(|| Ok(listener.accept()?.0))
    } else if let Some(port) = address.strip_prefix("vsock:") {
        let listener = vsock_socket()?;
        bind(
            listener.as_raw_fd(),
            &VsockAddr::new(libc::VMADDR_CID_ANY, number(port)?),
        )?;
        listen(&listener, Backlog::new(1)?)?;
        answer_all(|| {
            let stream = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
            // SAFETY: accept4 made the descriptor, and nobody else has it.
            Ok(unsafe { File::from_raw_fd(stream) })
        })
    } else {
        let listener = TcpListener::bind(address)?;
        answer_all(|| {
            let (stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            Ok(stream)
        })
    }
}

/// Serves one stream after the other, for ever.
fn answer_all<S: Read + Write>(accept: impl Fn() -> io::Result<S>) -> io::Result<()> {
    loop {
        let stream = accept()?;
        // A guest that breaks off is no reason to serve no other.
        if let Err(error) = answer(stream) {
            eprintln!("io-load serve: {error}");
        }
    }
}

/// Does what each first byte says, until there is none.
fn answer(mut stream: impl Read + Write) -> io::Result<()> {
    let mut buffer = vec![0x5a; CHUNK];
    let mut kind = [0];
    while stream.read(&mut kind)? == 1 {
        match &kind {
            SEND => {
                for _ in (0..SEQUENCE).step_by(CHUNK) {
                    stream.read_exact(&mut buffer)?;
                }
                stream.write_all(&[1])?;
            }
            RECEIVE => {
                for _ in (0..SEQUENCE).step_by(CHUNK) {
                    stream.write_all(&buffer)?;
                }
            }
            ASK => {
                let mut byte = [0];
                for _ in 0..QUESTIONS {
                    stream.read_exact(&mut byte)?;
                    stream.write_all(&byte)?;
                }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    Ok(())
}
