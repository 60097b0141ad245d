//! News of the pod's network namespace.

use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use tokio::io::unix::AsyncFd;

use super::NetworkError;

/// `RTNLGRP_*` of what a guest takes over: links, neighbours, addresses and routes (linux/rtnetlink.h).
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];

/// A socket that becomes readable when something in the namespace changes. What changed is not looked at: with
/// several changes at once, or too many for the socket's buffer, only a new look tells.
#[derive(Debug)]
pub(super) struct Watch(Socket);

impl Watch {
    /// Watches the current network namespace.
    pub fn open() -> Result<Self, NetworkError> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(NetworkError::Socket)?;
        socket
            .bind(&SocketAddr::new(0, 0))
            .and_then(|()| GROUPS.iter().try_for_each(|group| socket.add_membership(*group)))
            .and_then(|()| socket.set_non_blocking(true))
            .map_err(NetworkError::Socket)?;
        Ok(Self(socket))
    }

    /// Forgets the news; whether there were any.
    pub fn drain(&self) -> bool {
        let mut news = false;
        let mut buffer = Vec::with_capacity(16 << 10);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => news = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Some were lost.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => news = true,
                Err(_) => return news,
            }
        }
    }

    /// Lets the runtime wait for news.
    pub fn register(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the socket keeps the same descriptor open for as long as it lives.
        unsafe { AsyncFd::register(self) }.map_err(Into::into)
    }
}

impl std::os::fd::AsRawFd for Watch {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}
