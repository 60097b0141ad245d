//! Work for the devices of a guest, for `cargo xtask bench`: the same program in our guest and in a peer's.
//!
//! `io-load fs NAME DIRECTORY`, `io-load block NAME DEVICE` and `io-load net NAME ADDRESS` print a line for each piece of
//! work, `bench NAME_WORK MICROSECONDS` by the monotonic clock. `io-load serve ADDRESS` is the other end of the network.
//! `fs NAME DIRECTORY FILES` sets the number of files that are created, looked at and removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Bytes that are moved in sequence.
const SEQUENCE: usize = 32 << 20;
/// Bytes of one call then.
const CHUNK: usize = 128 << 10;
/// Small accesses anywhere, and bytes of each.
const ACCESSES: u32 = 2048;
const BLOCK: usize = 4096;
/// Questions over the network, a byte each, each waiting for its answer.
const QUESTIONS: u32 = 1000;

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
        ["serve", address] => serve(address),
        _ => {
            eprintln!(
                "usage: io-load fs NAME DIRECTORY FILES, io-load block|net NAME PLACE, io-load serve ADDRESS"
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
    let connect = |kind: &[u8]| -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.write_all(kind)?;
        Ok(stream)
    };
    let mut buffer = vec![0x5a; CHUNK];
    let mut stream = connect(b"s")?;
    time(name, "send", || {
        for _ in (0..SEQUENCE).step_by(CHUNK) {
            stream.write_all(&buffer)?;
        }
        // The other end has it all.
        stream.read_exact(&mut [0])
    })?;
    let mut stream = connect(b"r")?;
    time(name, "receive", || {
        for _ in (0..SEQUENCE).step_by(CHUNK) {
            stream.read_exact(&mut buffer)?;
        }
        Ok(())
    })?;
    let mut stream = connect(b"q")?;
    time(name, "questions", || {
        for _ in 0..QUESTIONS {
            stream.write_all(&[1])?;
            stream.read_exact(&mut [0])?;
        }
        Ok(())
    })
}

/// Serves one connection after the other, for ever.
fn serve(address: &str) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    loop {
        let (stream, _) = listener.accept()?;
        // A guest that breaks off is no reason to serve no other.
        if let Err(error) = answer(stream) {
            eprintln!("io-load serve: {error}");
        }
    }
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut kind = [0];
    stream.read_exact(&mut kind)?;
    let mut buffer = vec![0x5a; CHUNK];
    match &kind {
        b"s" => {
            for _ in (0..SEQUENCE).step_by(CHUNK) {
                stream.read_exact(&mut buffer)?;
            }
            stream.write_all(&[1])
        }
        b"r" => {
            for _ in (0..SEQUENCE).step_by(CHUNK) {
                stream.write_all(&buffer)?;
            }
            Ok(())
        }
        _ => {
            let mut byte = [0];
            while stream.read(&mut byte)? == 1 {
                stream.write_all(&byte)?;
            }
            Ok(())
        }
    }
}
