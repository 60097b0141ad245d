//! The pod's network: its namespace on the host and its interfaces in the guest.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::ConfigureNetworkRequest;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use crate::journal::{Entry, Journal, JournalError};
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
    /// Somebody redirects the interface's traffic already.
    #[error(
        "Interface {0} has an ingress queue already: another virtual machine may use this network namespace"
    )]
    Taken(String),
    /// The journal.
    #[error("Cannot write down what is to be undone")]
    Journal(#[source] Box<JournalError>),
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

/// Joins every interface of `namespace`, which the calling process has entered, to a tap device for the guest, and
/// describes what the guest has to set up. Loopback is the guest's own.
///
/// The interfaces stay as the network plugin made them; only their traffic is redirected. Taps go with
/// their descriptors; the redirections are in the journal.
///
/// # Errors
/// [`NetworkError`]; what was joined before is undone by the journal.
pub fn attach(namespace: &Path, journal: &Journal) -> Result<GuestNetwork, NetworkError> {
    let mut netlink = netlink::Netlink::open()?;
    let found = interfaces::scan(&mut netlink)?;
    let inode = inode_of(namespace).map_err(|error| NetworkError::Open(namespace.into(), error))?;
    let mut nets = Vec::new();
    for (number, interface) in found.interfaces.iter().enumerate() {
        if tap::is_taken(&mut netlink, interface)? {
            return Err(NetworkError::Taken(interface.name.clone()));
        }
        let entry = Entry::Redirection {
            namespace: namespace.into(),
            inode,
            interface: interface.name.clone(),
            index: interface.index,
        };
        journal
            .record(&entry)
            .map_err(|error| NetworkError::Journal(Box::new(error)))?;
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

/// Ends the redirection of an interface's traffic. No error: the namespace or the interface is gone, or was never
/// redirected.
///
/// # Errors
/// [`NetworkError`].
pub fn detach(namespace: &Path, inode: u64, interface: &str, index: u32) -> Result<(), NetworkError> {
    if inode_of(namespace).ok() != Some(inode) {
        return Ok(());
    }
    // Only a thread of its own may change its namespace while others run.
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            enter(&NetworkNamespace::Path(namespace.into()))?;
            if nix::net::if_::if_nametoindex(interface) != Ok(index) {
                return Ok(());
            }
            tap::release(&mut netlink::Netlink::open()?, index, interface)
        });
        work.join()
            .unwrap_or_else(|_| Err(NetworkError::Enter(namespace.into(), Errno::EIO)))
    })
}

/// What tells a namespace from a later one of the same name.
fn inode_of(namespace: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(namespace)?.ino())
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
