//! A file descriptor of any pollable kind as an asynchronous stream.
//!
//! Pipes, pseudo-terminals, vsock and Unix sockets are all copied by the same code; one type over
//! `AsyncFd` serves them, where tokio has a type for each and none for terminals.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// An open descriptor in non-blocking mode. Clones share it.
#[derive(Clone, Debug)]
pub struct AsyncFile(Arc<AsyncFd<OwnedFd>>);

impl AsyncFile {
    /// Takes a descriptor and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor cannot be polled (a regular file), or the kernel refused.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        // SAFETY: an `OwnedFd` is open, and the same file, until it is dropped with the registration.
        let fd = unsafe { AsyncFd::register(fd) }?;
        Ok(Self(Arc::new(fd)))
    }

    /// Reads what is there; waits until something is. 0 means end of file.
    ///
    /// # Errors
    /// Those of read(2) but `EAGAIN` and `EINTR`.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_read_into(cx, buffer)).await
    }

    /// Writes all bytes.
    ///
    /// # Errors
    /// Those of write(2) but `EAGAIN` and `EINTR`.
    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        self.write_some(&mut data).await
    }

    /// Writes all bytes; `data` becomes what is still to be written.
    ///
    /// # Errors
    /// Those of write(2) but `EAGAIN` and `EINTR`.
    pub async fn write_some(&self, data: &mut &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let written = std::future::poll_fn(|cx| self.poll_write_from(cx, data)).await?;
            *data = data.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    /// Waits until there is something to read, or the end of file.
    ///
    /// # Errors
    /// Those of epoll.
    pub async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there, without waiting.
    ///
    /// # Errors
    /// Those of read(2); `WouldBlock` if there is nothing.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = self.0.try_io(Interest::READABLE, |fd| {
                // SAFETY: the buffer is valid for writes of its length.
                let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
                usize::try_from(n).map_err(|_| io::Error::last_os_error())
            });
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                result => return result,
            }
        }
    }

    /// Waits until the descriptor is ready for writing (a socket: until it is connected).
    ///
    /// # Errors
    /// Those of epoll.
    pub async fn writable(&self) -> io::Result<()> {
        self.0.writable().await.map(|mut guard| guard.retain_ready())
    }

    /// Waits until the descriptor is in error. A vsock connection that a transport reset ends is that and nothing else:
    /// whoever waits for something to read is not woken.
    pub async fn failed(&self) {
        while let Ok(mut guard) = self.0.ready(Interest::ERROR).await {
            if guard.ready().is_error() {
                return;
            }
            guard.clear_ready();
        }
    }

    /// Tells the peer of a socket that no more data follows; other kinds are left alone.
    pub fn shutdown_write(&self) {
        // SAFETY: the descriptor is open as long as `self` lives; ENOTSOCK and ENOTCONN do no harm.
        unsafe { libc::shutdown(self.as_raw_fd(), libc::SHUT_WR) };
    }

    /// Ends both directions of a socket, also for copies of the descriptor in other processes.
    pub fn shutdown_both(&self) {
        // SAFETY: as above.
        unsafe { libc::shutdown(self.as_raw_fd(), libc::SHUT_RDWR) };
    }

    fn poll_read_into(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let result = guard.try_io(|fd| {
                // SAFETY: the buffer is valid for writes of its length.
                let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
                usize::try_from(n).map_err(|_| io::Error::last_os_error())
            });
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => (),
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => (),
            }
        }
    }

    fn poll_write_from(&self, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            let result = guard.try_io(|fd| {
                // SAFETY: the buffer is valid for reads of its length.
                let n = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
                usize::try_from(n).map_err(|_| io::Error::last_os_error())
            });
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => (),
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => (),
            }
        }
    }
}

impl AsRawFd for AsyncFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for AsyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for AsyncFile {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let n = ready!(self.poll_read_into(cx, buf.initialize_unfilled()))?;
        buf.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for AsyncFile {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_from(cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shutdown_write();
        Poll::Ready(Ok(()))
    }
}

/// Puts a descriptor into non-blocking mode.
///
/// # Errors
/// Those of fcntl(2).
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_raw_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn pipe_carries_bytes_and_end_of_file() {
        let (read, write) = nix::unistd::pipe().unwrap();
        let (read, write) = (AsyncFile::new(read).unwrap(), AsyncFile::new(write).unwrap());
        let data = vec![7u8; 300_000];
        let writer = tokio::spawn({
            let data = data.clone();
            async move { write.write_all(&data).await }
        });
        let (mut got, mut buffer) = (Vec::new(), vec![0; 4096]);
        loop {
            match read.read(&mut buffer).await.unwrap() {
                0 => break,
                n => got.extend_from_slice(&buffer[..n]),
            }
        }
        writer.await.unwrap().unwrap();
        assert_eq!(got, data);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn failure_is_noticed_where_nothing_is_readable() {
        // The write end of a pipe that nobody reads shows what a reset vsock socket does: an error, and writable.
        let (read, write) = nix::unistd::pipe().unwrap();
        let write = AsyncFile::new(write).unwrap();
        write.writable().await.unwrap();
        let short = std::time::Duration::from_millis(20);
        assert!(tokio::time::timeout(short, write.failed()).await.is_err());
        let (failed, ()) = tokio::join!(
            tokio::time::timeout(std::time::Duration::from_secs(30), write.failed()),
            async { drop(read) }
        );
        failed.unwrap();
        assert!(tokio::time::timeout(short, write.readable()).await.is_err());
    }

    #[test]
    fn regular_file_is_refused() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert!(AsyncFile::new(file.into()).is_err());
    }
}
