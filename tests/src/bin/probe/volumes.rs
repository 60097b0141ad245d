//! What containers of a pod do to each other through a volume.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::Outcome;

/// A lock of the whole file, as fcntl(2) takes it.
fn whole_file() -> libc::flock {
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as _;
    lock
}

/// Holds locks of two files and answers on a socket, until it has been asked once.
pub fn serve(directory: &Path) -> Outcome {
    let whole = File::create(directory.join("flock"))?;
    let _held = Flock::lock(whole, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let record = File::create(directory.join("fcntl"))?;
    fcntl(record.as_raw_fd(), FcntlArg::F_SETLK(&whole_file()))?;
    let listener = UnixListener::bind(directory.join("socket"))?;
    println!("serving");
    let (mut connection, _) = listener.accept()?;
    connection.write_all(b"hello over the volume")?;
    Ok(())
}

/// Finds the locks taken and the server there.
pub fn ask(directory: &Path) -> Outcome {
    let open = |name| File::options().read(true).write(true).open(directory.join(name));
    match Flock::lock(open("flock")?, FlockArg::LockExclusiveNonblock) {
        Err((_, Errno::EWOULDBLOCK)) => println!("flock is held"),
        Err((_, errno)) => return Err(errno.into()),
        Ok(_) => return Err("flock is free".into()),
    }
    match fcntl(open("fcntl")?.as_raw_fd(), FcntlArg::F_SETLK(&whole_file())) {
        Err(Errno::EAGAIN | Errno::EACCES) => println!("fcntl lock is held"),
        Err(errno) => return Err(errno.into()),
        Ok(_) => return Err("fcntl lock is free".into()),
    }
    let mut answer = String::new();
    UnixStream::connect(directory.join("socket"))?.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Prints the names that are moved or made in a directory.
pub fn watch(directory: &Path) -> Outcome {
    let inotify = Inotify::init(InitFlags::empty())?;
    inotify.add_watch(directory, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE)?;
    println!("watching");
    loop {
        for event in inotify.read_events()? {
            if let Some(name) = event.name {
                println!("event {}", name.to_string_lossy());
            }
        }
    }
}

/// Maps a new file of `pages` huge pages of 2 MiB and writes to each.
pub fn huge(file: &Path, pages: usize) -> Outcome {
    const PAGE: usize = 2 << 20;
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(file)?;
    let length = pages * PAGE;
    file.set_len(u64::try_from(length)?)?;
    // SAFETY: a new mapping of a file that is open, at no fixed address.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    for page in 0..pages {
        // SAFETY: the byte is in the mapping, which nothing else refers to.
        unsafe { start.cast::<u8>().add(page * PAGE).write_volatile(7) };
    }
    let memory = std::fs::read_to_string("/proc/meminfo")?;
    let line = memory.lines().find(|line| line.starts_with("HugePages_Total:"));
    println!(
        "{}",
        line.unwrap_or_default()
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
    );
    Ok(())
}
