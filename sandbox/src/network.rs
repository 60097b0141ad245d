//! The pod's network: its namespace on the host and its interfaces in the guest.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use bulkhead_protocol::agent::ConfigureNetworkRequest;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use crate::spec::NetworkNamespace;

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
