//! The host's end of a stream: a descriptor of any kind, used without blocking.

use std::io::{self, Error, ErrorKind, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::stat::{SFlag, fstat};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Linux takes no more vectors in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// What came of a read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// So many bytes went, at least one.
    Bytes(usize),
    /// Nothing now; the poller will report when to try again.
    Blocked,
    /// End of file, or an error: this direction is over.
    Over,
}

/// A far end.
///
/// Readiness is edge-triggered: [`readable`](Self::readable) and [`writable`](Self::writable) stay set until
/// a call says otherwise, so nothing is lost or polled again while the guest cannot take or give data.
#[derive(Debug)]
pub struct FarEnd {
    fd: Option<OwnedFd>,
    socket: bool,
    can_read: bool,
    can_write: bool,
    /// Whether the descriptor was made non-blocking here and must be given back as it was.
    restore: bool,
    poller: Option<Arc<Epoll>>,
    /// A read may give something.
    pub readable: bool,
    /// A write may take something.
    pub writable: bool,
}

impl FarEnd {
    /// Takes a socket, FIFO, pipe, terminal or regular file.
    ///
    /// The open file description becomes non-blocking, also for others that share it. A terminal gets its
    /// former mode back in the end, since it outlives the VM.
    ///
    /// # Errors
    /// It is something else, or its mode cannot be changed.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let kind = SFlag::from_bits_truncate(fstat(fd.as_raw_fd())?.st_mode) & SFlag::S_IFMT;
        let waits = match kind {
            SFlag::S_IFSOCK | SFlag::S_IFIFO | SFlag::S_IFCHR => true,
            SFlag::S_IFREG => false,
            _ => return Err(ErrorKind::InvalidInput.into()),
        };
        let flags = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
        let mode = flags & OFlag::O_ACCMODE;
        if flags.contains(OFlag::O_PATH) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let change = waits && !flags.contains(OFlag::O_NONBLOCK);
        if change {
            fcntl(fd.as_raw_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        let can_read = mode != OFlag::O_WRONLY;
        let can_write = mode != OFlag::O_RDONLY;
        Ok(Self {
            fd: Some(fd),
            socket: kind == SFlag::S_IFSOCK,
            can_read,
            can_write,
            restore: change && kind == SFlag::S_IFCHR,
            poller: None,
            // The first call finds out.
            readable: can_read,
            writable: can_write,
        })
    }

    /// Whether it is open for reading.
    pub fn can_read(&self) -> bool {
        self.can_read
    }

    /// Whether it is open for writing.
    pub fn can_write(&self) -> bool {
        self.can_write
    }

    /// Has `poller` report readiness as `token`.
    ///
    /// # Errors
    /// The kernel refuses for want of memory or watches.
    pub fn watch(&mut self, poller: &Arc<Epoll>, token: u64) -> io::Result<()> {
        let Some(fd) = &self.fd else { return Ok(()) };
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        match poller.ctl(
            ControlOperation::Add,
            fd.as_raw_fd(),
            EpollEvent::new(events, token),
        ) {
            Ok(()) => self.poller = Some(poller.clone()),
            // Regular files and some character devices (`/dev/null`) never wait.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Takes note of a report of the poller.
    pub fn notice(&mut self, events: EventSet) {
        let gone = events.intersects(EventSet::ERROR | EventSet::HANG_UP);
        self.readable |= self.can_read && (gone || events.intersects(EventSet::IN | EventSet::READ_HANG_UP));
        self.writable |= self.can_write && (gone || events.contains(EventSet::OUT));
    }

    /// Reads into guest memory.
    pub fn read(&mut self, vectors: &[libc::iovec]) -> Transfer {
        let Some(fd) = self.fd.as_ref().filter(|_| self.can_read) else {
            return Transfer::Over;
        };
        // SAFETY: the caller's vectors name guest memory that is mapped while it is borrowed, and no
        // Rust reference to it exists.
        let result = retry(|| unsafe { libc::readv(fd.as_raw_fd(), vectors.as_ptr(), count(vectors.len())) });
        let transfer = self.judge(result);
        if transfer == Transfer::Blocked {
            self.readable = false;
        }
        transfer
    }

    /// Writes from guest memory.
    pub fn write_guest(&mut self, vectors: &[libc::iovec]) -> Transfer {
        let Some(fd) = self.fd.as_ref().filter(|_| self.can_write) else {
            return Transfer::Over;
        };
        // SAFETY: as in `read`; the kernel only reads the memory.
        let result =
            retry(|| unsafe { libc::writev(fd.as_raw_fd(), vectors.as_ptr(), count(vectors.len())) });
        self.wrote(result)
    }

    /// Writes from own memory.
    pub fn write(&mut self, slices: &[IoSlice<'_>]) -> Transfer {
        let Some(fd) = self.fd.as_ref().filter(|_| self.can_write) else {
            return Transfer::Over;
        };
        let result = retry(|| {
            // SAFETY: `IoSlice` has the layout of `iovec`, and the slices are borrowed during the call.
            unsafe { libc::writev(fd.as_raw_fd(), slices.as_ptr().cast(), count(slices.len())) }
        });
        self.wrote(result)
    }

    /// Nothing will be written any more: the reader behind the far end shall see the end of file, if it is
    /// of a kind that has one. A two-way terminal or FIFO stays open.
    pub fn finish_writing(&mut self) {
        if self.socket {
            if let Some(fd) = &self.fd {
                // It fails if the peer is gone, which is what it is for.
                let _ = shutdown(fd.as_raw_fd(), Shutdown::Write);
            }
        } else if !self.can_read {
            self.close();
        }
        self.can_write = false;
        self.writable = false;
    }

    fn wrote(&mut self, result: io::Result<usize>) -> Transfer {
        let transfer = self.judge(result);
        if transfer == Transfer::Blocked {
            self.writable = false;
        }
        transfer
    }

    fn judge(&self, result: io::Result<usize>) -> Transfer {
        match result {
            Ok(0) => Transfer::Over,
            Ok(bytes) => Transfer::Bytes(bytes),
            // Without a poller nobody would say when to try again.
            Err(error) if error.kind() == ErrorKind::WouldBlock && self.poller.is_some() => Transfer::Blocked,
            Err(_) => Transfer::Over,
        }
    }

    fn close(&mut self) {
        let Some(fd) = self.fd.take() else { return };
        if let Some(poller) = self.poller.take() {
            // Closing alone would leave the watch behind when another process shares the description.
            let _ = poller.ctl(ControlOperation::Delete, fd.as_raw_fd(), EpollEvent::default());
        }
        if self.restore {
            let _ = set_blocking(fd.as_raw_fd());
        }
        self.readable = false;
        self.writable = false;
    }
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        self.close();
    }
}

fn set_blocking(fd: RawFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags - OFlag::O_NONBLOCK))?;
    Ok(())
}

fn count(vectors: usize) -> i32 {
    vectors.min(MAX_VECTORS) as i32
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => {
                let error = Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}
