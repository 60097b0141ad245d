//! Connections to the loopback address of the pod's namespace, which are meant for the guest's.
//!
//! containerd forwards a port by entering the pod's network namespace on the host and dialling `localhost:PORT`.
//! Nothing of the pod listens there, so one socket here takes these connections, whatever their port.

use std::fs::File;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::fd::OwnedFd;

use nix::sys::socket::{SockFlag, setsockopt, sockopt};

use super::bpf::{self, Steering};

/// The listening socket.
#[derive(Debug)]
pub struct Forwarder {
    listener: TcpListener,
    _steering: Steering,
}

/// A connection to hand on.
#[derive(Debug)]
pub struct Connection {
    /// Its socket.
    pub socket: OwnedFd,
    /// Where the caller dialled.
    pub address: IpAddr,
    /// Which port.
    pub port: u16,
}

impl Forwarder {
    /// Takes over the loopback addresses of the current network namespace.
    ///
    /// # Errors
    /// The kernel cannot steer connections (before 5.9, or without bpf(2)).
    pub fn open() -> io::Result<Self> {
        use nix::sys::socket::{AddressFamily, Backlog, SockType, bind, listen, socket};
        use nix::sys::socket::{SockaddrIn, SockaddrIn6};
        use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
        use std::os::fd::AsRawFd;
        // One socket for both families, where the host has both. Its own port is of no use to anyone.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = match socket(AddressFamily::Inet6, SockType::Stream, flags, None) {
            Ok(socket) => {
                setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
                let any = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0);
                bind(socket.as_raw_fd(), &SockaddrIn6::from(any))?;
                socket
            }
            Err(_) => {
                let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
                let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
                bind(socket.as_raw_fd(), &SockaddrIn::from(any))?;
                socket
            }
        };
        listen(&listener, Backlog::MAXCONN)?;
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let steering = bpf::steer_loopback(&namespace, &listener)?;
        Ok(Self {
            listener: listener.into(),
            _steering: steering,
        })
    }

    /// Hands every connection to `take`, until the listener fails. To be called inside the runtime.
    ///
    /// # Errors
    /// Descriptors run out, or the socket fails.
    pub async fn run(self, mut take: impl FnMut(Connection)) -> io::Result<()> {
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        loop {
            let (stream, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                // The caller has gone again.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => return Err(error),
            };
            let Ok(local) = stream.local_addr() else { continue };
            take(Connection {
                address: local.ip().to_canonical(),
                port: local.port(),
                socket: stream.into_std()?.into(),
            });
        }
    }
}

impl Connection {
    /// Breaks the connection: the caller sees a reset.
    pub fn reset(socket: &OwnedFd) {
        let now = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        // It fails only if the connection is broken already.
        let _ = setsockopt(socket, sockopt::Linger, &now);
    }
}
