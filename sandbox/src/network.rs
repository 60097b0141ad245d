//! The pod's network: its namespace on the host and its interfaces in the guest.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use bulkhead_protocol::agent::ConfigureNetworkRequest;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use crate::spec::NetworkNamespace;

mod interfaces;
mod netlink;
mod tap;

/// Why the pod's network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace's file cannot be opened.
    #[error("Cannot open the network namespace {}", .0.display())]
    Open(PathBuf, #[source] std::io::Error),
    /// The namespace cannot be entered.
    #[error("Cannot enter the network namespace {}", .0.display())]
    Enter(PathBuf, #[source] Errno),
    /// A namespace cannot be made.
    #[error("Cannot create a network namespace")]
    Create(#[source] Errno),
    /// The rtnetlink socket does not work.
    #[error("Cannot use an rtnetlink socket")]
    Socket(#[source] std::io::Error),
    /// The kernel sent something that is not an answer.
    #[error("Cannot decode an rtnetlink answer")]
    Decode(#[source] netlink_packet_core::DecodeError),
    /// The kernel refused.
    #[error("The kernel refused to {what}")]
    Refused {
        /// What was asked.
        what: String,
        /// Reason.
        #[source]
        error: std::io::Error,
    },
    /// A tap device cannot be made.
    #[error("Cannot create a tap device for {interface}")]
    Tap {
        /// Interface of the pod.
        interface: String,
        /// Reason.
        #[source]
        error: std::io::Error,
    },
    /// An interface is of a kind that cannot be joined to the guest.
    #[error("Interface {0} has addresses but is not an Ethernet device")]
    Kind(String),
}

/// Moves the calling, still single-threaded process into the pod's network namespace.
///
/// # Errors
/// [`NetworkError`].
pub fn enter(namespace: &NetworkNamespace) -> Result<(), NetworkError> {
    match namespace {
        NetworkNamespace::Fresh => unshare(CloneFlags::CLONE_NEWNET).map_err(NetworkError::Create),
        NetworkNamespace::Path(path) => {
            let file = std::fs::File::open(path).map_err(|error| NetworkError::Open(path.clone(), error))?;
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NetworkError::Enter(path.clone(), errno))
        }
    }
}

/// Joins every interface of the current network namespace to a tap device for the guest, and describes
/// what the guest has to set up. Loopback is the guest's own.
///
/// The interfaces stay as the network plugin made them; only their traffic is redirected. Taps go with
/// their descriptors, and the redirections with the interface or its tap, so nothing is left to undo.
///
/// # Errors
/// [`NetworkError`]; what was joined before is undone when the descriptors are dropped.
pub fn attach() -> Result<GuestNetwork, NetworkError> {
    let mut netlink = netlink::Netlink::open()?;
    let found = interfaces::scan(&mut netlink)?;
    let mut nets = Vec::new();
    for (number, interface) in found.interfaces.iter().enumerate() {
        let tap = tap::create(&mut netlink, interface, number)?;
        nets.push(GuestNet {
            tap,
            mac: interface.mac,
            mtu: interface.mtu,
        });
    }
    let request = (!nets.is_empty()).then(|| found.request());
    Ok(GuestNetwork { nets, request })
}

/// A network device of the guest.
#[derive(Debug)]
pub struct GuestNet {
    /// The tap device's queue.
    pub tap: OwnedFd,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest frame payload in bytes.
    pub mtu: u16,
}

/// The pod's interfaces as the guest gets them.
#[derive(Debug, Default)]
pub struct GuestNetwork {
    /// Devices.
    pub nets: Vec<GuestNet>,
    /// What the agent sets up on them; absent: nothing but loopback.
    pub request: Option<ConfigureNetworkRequest>,
}
