//! Packets with descriptors over a `SOCK_SEQPACKET` socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Fd;

/// Largest message in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Most descriptors in one message; the kernel's limit is 253 (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 250;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// Creating the socket pair failed.
    #[error("Cannot create the control socket pair")]
    Pair(#[source] Errno),
    /// The socket would block; wait until it is ready and try again.
    #[error("The control socket is not ready")]
    WouldBlock,
    /// The other end is closed.
    #[error("The other end of the control socket is closed")]
    Closed,
    /// Sending failed.
    #[error("Cannot send a control message")]
    Send(#[source] Errno),
    /// Receiving failed.
    #[error("Cannot receive a control message")]
    Receive(#[source] Errno),
    /// The message is too large or holds too many descriptors.
    #[error("Control message of {bytes} bytes and {fds} descriptors is over the limit")]
    TooLarge {
        /// Encoded size.
        bytes: usize,
        /// Attached descriptors.
        fds: usize,
    },
    /// Encoding failed.
    #[error("Cannot encode a control message")]
    Encode(#[source] serde_json::Error),
    /// The peer sent something that is not a message.
    #[error("Cannot decode a control message")]
    Decode(#[source] serde_json::Error),
    /// A message names a descriptor that was not attached, or names it twice.
    #[error("Control message names descriptor {0}, which is not attached")]
    MissingFd(u16),
}

/// A message with its descriptors.
#[derive(Debug)]
pub struct Received<T> {
    /// The message.
    pub message: T,
    fds: Vec<Option<OwnedFd>>,
}

impl<T> Received<T> {
    /// Takes a descriptor out. Each can be taken once; those left are closed when `self` is dropped.
    ///
    /// # Errors
    /// [`ChannelError::MissingFd`] if it was not attached or is taken already.
    pub fn take(&mut self, fd: Fd) -> Result<OwnedFd, ChannelError> {
        self.fds
            .get_mut(usize::from(fd.0))
            .and_then(Option::take)
            .ok_or(ChannelError::MissingFd(fd.0))
    }
}

/// One end of the control socket. Blocking or not is the descriptor's own mode.
#[derive(Debug)]
pub struct Channel(OwnedFd);

impl Channel {
    /// Creates both ends, close-on-exec and blocking.
    ///
    /// # Errors
    /// [`ChannelError::Pair`].
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(ChannelError::Pair)?;
        Ok((Self(a), Self(b)))
    }

    /// Sends one message with the descriptors it names.
    ///
    /// # Errors
    /// [`ChannelError::WouldBlock`] when the descriptor is non-blocking and its buffer full; the message
    /// was not sent.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let bytes = serde_json::to_vec(message).map_err(ChannelError::Encode)?;
        if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
            return Err(ChannelError::TooLarge {
                bytes: bytes.len(),
                fds: fds.len(),
            });
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[] } else { &rights[..] };
        loop {
            let sent = sendmsg::<()>(
                self.0.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            return match sent {
                Ok(_) => Ok(()),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Err(ChannelError::WouldBlock),
                Err(Errno::EPIPE | Errno::ECONNRESET) => Err(ChannelError::Closed),
                Err(errno) => Err(ChannelError::Send(errno)),
            };
        }
    }

    /// Receives one message. Received descriptors are close-on-exec.
    ///
    /// # Errors
    /// [`ChannelError::Closed`] at the end of the stream, [`ChannelError::WouldBlock`] when the
    /// descriptor is non-blocking and no message waits.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Received<T>, ChannelError> {
        let mut buffer = vec![0; MAX_MESSAGE];
        let mut control = cmsg_space!([RawFd; MAX_FDS]);
        let (length, fds, truncated) = loop {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let received = recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut slices,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            );
            match received {
                Ok(received) => {
                    let mut fds = Vec::new();
                    for message in received.cmsgs().map_err(ChannelError::Receive)? {
                        if let ControlMessageOwned::ScmRights(raw) = message {
                            // SAFETY: the kernel has just installed these descriptors for this process.
                            fds.extend(
                                raw.into_iter()
                                    .map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) })),
                            );
                        }
                    }
                    let flags = received.flags;
                    break (
                        received.bytes,
                        fds,
                        flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC),
                    );
                }
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Err(ChannelError::WouldBlock),
                Err(Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(ChannelError::Receive(errno)),
            }
        };
        if length == 0 {
            return Err(ChannelError::Closed);
        }
        if truncated {
            return Err(ChannelError::TooLarge {
                bytes: length,
                fds: fds.len(),
            });
        }
        let message = serde_json::from_slice(&buffer[..length]).map_err(ChannelError::Decode)?;
        Ok(Received { message, fds })
    }
}

impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.0
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
