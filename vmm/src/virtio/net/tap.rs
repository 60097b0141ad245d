//! The host's end of the wire, or one queue of it.

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Linux takes no more vectors in one call (`UIO_MAXIOV`).
const MAX_VECTORS: usize = 1024;

/// Offloads of a tap (`linux/if_tun.h`): it hands over frames without checksum.
pub const OFFLOAD_CSUM: u32 = 1;
/// It hands over TCP/IPv4 segments larger than a frame; needs [`OFFLOAD_CSUM`].
pub const OFFLOAD_TSO4: u32 = 2;
/// It hands over TCP/IPv6 segments larger than a frame; needs [`OFFLOAD_CSUM`].
pub const OFFLOAD_TSO6: u32 = 4;

mod ioctl {
    nix::ioctl_write_int_bad!(set_offload, nix::request_code_write!(b'T', 208, size_of::<u32>()));
    nix::ioctl_write_ptr!(set_header_size, b'T', 216, libc::c_int);
    nix::ioctl_write_ptr_bad!(
        set_queue,
        nix::request_code_write!(b'T', 217, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// A descriptor that gives and takes one frame, with its virtio header, in one call.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// A stand-in without the tun driver's ioctls.
    #[cfg(any(test, fuzzing))]
    pub plain: bool,
    /// What a stand-in was told last.
    #[cfg(test)]
    pub attached: std::cell::Cell<Option<bool>>,
}

/// What came of reading or writing a frame.
#[derive(Debug)]
pub enum Frame {
    /// A frame of so many bytes, header included.
    Bytes(usize),
    /// No frame or no room now.
    Blocked,
    /// The kernel rejected this frame; others may pass.
    Dropped,
}

impl Tap {
    /// Takes a tap with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
    ///
    /// # Errors
    /// It cannot be made non-blocking.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(fd.as_raw_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self {
            fd,
            #[cfg(any(test, fuzzing))]
            plain: cfg!(fuzzing),
            #[cfg(test)]
            attached: std::cell::Cell::default(),
        })
    }

    /// Sets what the tap may hand over and the size of its header in bytes.
    ///
    /// # Errors
    /// It is no tap.
    pub fn configure(&self, offloads: u32, header_size: usize) -> Result<()> {
        #[cfg(any(test, fuzzing))]
        if self.plain {
            return Ok(());
        }
        let fd = self.fd.as_raw_fd();
        let size = header_size as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
        unsafe { ioctl::set_header_size(fd, &size)? };
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        unsafe { ioctl::set_offload(fd, offloads as libc::c_int)? };
        Ok(())
    }

    /// Puts this queue among those of its interface that the kernel chooses from for a frame, or takes it from them; with
    /// what waits in it then.
    ///
    /// # Errors
    /// The interface has one queue only, or this one is so already.
    pub fn set_attached(&self, attached: bool) -> Result<()> {
        #[cfg(test)]
        self.attached.set(Some(attached));
        #[cfg(any(test, fuzzing))]
        if self.plain {
            return Ok(());
        }
        let flag = if attached {
            libc::IFF_ATTACH_QUEUE
        } else {
            libc::IFF_DETACH_QUEUE
        };
        // SAFETY: all zero is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads an `ifreq`, which outlives the call.
        unsafe { ioctl::set_queue(self.fd.as_raw_fd(), &raw const request)? };
        Ok(())
    }

    /// Reads a frame into guest memory.
    ///
    /// # Errors
    /// The tap is gone.
    pub fn read(&self, vectors: &[libc::iovec]) -> Result<Frame> {
        // SAFETY: the caller's vectors name guest memory that is mapped while it is borrowed, and no
        // Rust reference to it exists.
        judge(|| unsafe { libc::readv(self.as_raw_fd(), vectors.as_ptr(), count(vectors)) })
    }

    /// Writes a frame from guest memory.
    ///
    /// # Errors
    /// The tap is gone.
    pub fn write(&self, vectors: &[libc::iovec]) -> Result<Frame> {
        // SAFETY: as in `read`; the kernel only reads the memory.
        judge(|| unsafe { libc::writev(self.as_raw_fd(), vectors.as_ptr(), count(vectors)) })
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn count(vectors: &[libc::iovec]) -> i32 {
    vectors.len().min(MAX_VECTORS) as i32
}

fn judge(mut call: impl FnMut() -> isize) -> Result<Frame> {
    loop {
        if let Ok(bytes) = usize::try_from(call()) {
            return Ok(Frame::Bytes(bytes));
        }
        let error = Error::last_os_error();
        match error.raw_os_error() {
            _ if error.kind() == ErrorKind::Interrupted => {}
            _ if error.kind() == ErrorKind::WouldBlock => return Ok(Frame::Blocked),
            // Detached from its interface, or not a tap at all.
            Some(libc::EBADFD | libc::EBADF | libc::EPIPE) => return Err(error),
            // A header the kernel does not accept, an interface that is down, no memory.
            _ => return Ok(Frame::Dropped),
        }
    }
}
