//! The pod's network: its namespace on the host and its interfaces in the guest.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::ConfigureNetworkRequest;
use bulkhead_protocol::control::queue_pairs;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::Kind;
use crate::fault::{self, Step};
use crate::journal::{Entry, JournalError};
use crate::spec::NetworkNamespace;

mod bpf;
mod counters;
mod follow;
mod forward;
mod interfaces;
mod netlink;
mod tap;
mod watch;

pub use counters::{Counters, counters};
pub use follow::{Change, Follower, News};
pub use forward::{Connection, Forwarder};

/// Abstract Unix socket that marks a network namespace as in use: such names belong to a namespace, and go with the
/// process that holds them (unix(7)).
const CLAIM: &[u8] = b"bulkhead-sandbox";

/// Why the pod's network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The namespace's file cannot be opened.
    #[error("Cannot open the network namespace {}", .0.display())]
    Open(PathBuf, #[source] std::io::Error),
    /// The namespace cannot be entered.
    #[error("Cannot enter the network namespace {}", .0.display())]
    Enter(PathBuf, #[source] Errno),
    /// The namespace is the host's.
    #[error("Network namespace {} is the host's: a pod with hostNetwork cannot run in a virtual machine", .0.display())]
    Host(PathBuf),
    /// The namespace belongs to another sandbox.
    #[error("The network namespace is used by another virtual machine")]
    InUse,
    /// The namespace cannot be marked as used.
    #[error("Cannot claim the network namespace")]
    Claim(#[source] Errno),
    /// The namespace cannot be watched.
    #[error("Cannot watch the network namespace")]
    Watch(#[source] std::io::Error),
    /// The journal cannot be kept.
    #[error("Cannot write the journal")]
    Journal(#[source] Box<JournalError>),
    /// A step did not succeed.
    #[error("Failed in phase \"{}\"", .0.words())]
    Step(Step, #[source] std::io::Error),
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

impl NetworkError {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Host(_) | Self::Kind(_) => Kind::InvalidArgument,
            Self::InUse => Kind::FailedPrecondition,
            _ => Kind::Internal,
        }
    }
}

/// Moves the calling, still single-threaded process into the pod's network namespace.
///
/// # Errors
/// [`NetworkError`]; the namespace is as it was.
pub fn enter(namespace: &NetworkNamespace) -> Result<Claim, NetworkError> {
    fault::point(Step::NetworkEntered).map_err(|error| NetworkError::Step(Step::NetworkEntered, error))?;
    match namespace {
        NetworkNamespace::Fresh => unshare(CloneFlags::CLONE_NEWNET).map_err(NetworkError::Create)?,
        NetworkNamespace::Path(path) => {
            let open = |error| NetworkError::Open(path.clone(), error);
            let file = File::open(path).map_err(open)?;
            let inode = file.metadata().map_err(open)?.ino();
            // The caller's own is containerd's, and so is that of the host's first process.
            if ["/proc/thread-self/ns/net", "/proc/1/ns/net"]
                .iter()
                .any(|host| inode_of(Path::new(host)) == Some(inode))
            {
                return Err(NetworkError::Host(path.clone()));
            }
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
                .map_err(|errno| NetworkError::Enter(path.clone(), errno))?;
        }
    }
    Ok(Claim { _socket: claim()? })
}

/// Keeps other sandboxes out of a network namespace, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Claim {
    _socket: OwnedFd,
}

/// Marks the current network namespace as used.
fn claim() -> Result<OwnedFd, NetworkError> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};
    use std::os::fd::AsRawFd;
    let socket = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(NetworkError::Claim)?;
    let name = UnixAddr::new_abstract(CLAIM).map_err(NetworkError::Claim)?;
    match bind(socket.as_raw_fd(), &name) {
        Ok(()) => Ok(socket),
        Err(Errno::EADDRINUSE) => Err(NetworkError::InUse),
        Err(errno) => Err(NetworkError::Claim(errno)),
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    std::fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// Joins every interface of the current network namespace to a tap device for the guest, and describes
/// what the guest has to set up. Loopback is the guest's own.
///
/// The interfaces stay as the network plugin made them; only their traffic is redirected. Taps go with
/// their descriptors; a redirection goes with its interface, and is written down by `record` before it is made. How many
/// queues they have depends on `max_vcpus`, the most the VM can have.
///
/// # Errors
/// [`NetworkError`].
pub fn attach(
    namespace: &NetworkNamespace,
    claim: Claim,
    max_vcpus: u8,
    record: &mut Record<'_>,
) -> Result<GuestNetwork, NetworkError> {
    let mut follower = Follower::new(namespace, queue_pairs(max_vcpus))?;
    let mut network = GuestNetwork {
        claim: Some(claim),
        ..GuestNetwork::default()
    };
    // A new namespace has nothing but loopback.
    if let NetworkNamespace::Path(_) = namespace {
        let change = follower.update(u32::MAX, record)?;
        if let Some(error) = change.failed {
            return Err(error);
        }
        network.nets = change.attach.into_iter().map(|(_, net)| net).collect();
        network.request = change.request;
        network.forward = true;
    }
    network.follower = Some(follower);
    Ok(network)
}

/// Writes something down that is about to be acquired.
pub type Record<'a> = dyn FnMut(&Entry) -> Result<(), JournalError> + 'a;

/// Removes the redirection of `interface` in the network namespace at `path`, if that is still the one with the
/// inode number `inode`.
///
/// # Errors
/// The kernel refuses.
pub fn undo_redirection(path: &Path, inode: u64, interface: &str) -> Result<(), NetworkError> {
    let Ok(file) = File::open(path) else {
        return Ok(());
    };
    if file.metadata().ok().map(|metadata| metadata.ino()) != Some(inode) {
        return Ok(());
    }
    // On a thread of its own, which alone changes its namespace.
    let undo = || {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET)
            .map_err(|errno| NetworkError::Enter(path.into(), errno))?;
        match nix::net::if_::if_nametoindex(interface) {
            Ok(index) => tap::restore(&mut netlink::Netlink::open()?, index, interface),
            Err(_) => Ok(()),
        }
    };
    std::thread::scope(|scope| scope.spawn(undo).join())
        .unwrap_or(Err(NetworkError::Enter(path.into(), Errno::ECANCELED)))
}

/// The kernel's server of virtio network devices.
const VHOST: &str = "/dev/vhost-net";

/// Servers for the pairs of queues of one network device: none if the host does not have that many. They belong to nobody
/// yet.
pub fn open_vhosts(pairs: usize) -> Vec<OwnedFd> {
    let servers: Option<Vec<_>> = (0..pairs).map(|_| open_vhost()).collect();
    servers.unwrap_or_default()
}

fn open_vhost() -> Option<OwnedFd> {
    match File::options().read(true).write(true).open(VHOST) {
        Ok(file) => Some(file.into()),
        Err(error) => {
            // A file without its module is as good as none.
            let absent = matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)
            );
            let level = if absent {
                log::Level::Debug
            } else {
                log::Level::Warn
            };
            log::log!(
                level,
                "the VMM carries frames by itself, without {VHOST}: {error}"
            );
            None
        }
    }
}

/// A network device of the guest.
#[derive(Debug)]
pub struct GuestNet {
    /// The tap device's queues, of which the first is attached.
    pub taps: Vec<OwnedFd>,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest frame payload in bytes.
    pub mtu: u16,
}

/// The pod's interfaces as the guest gets them.
#[derive(Debug, Default)]
pub struct GuestNetwork {
    /// Devices, in the order of their slots.
    pub nets: Vec<GuestNet>,
    /// What the agent sets up on them; absent: nothing but loopback.
    pub request: Option<ConfigureNetworkRequest>,
    /// Follows what changes later.
    pub follower: Option<Follower>,
    /// Whether connections to the namespace's loopback address are for the guest.
    pub forward: bool,
    /// Keeps other sandboxes out of the namespace.
    pub claim: Option<Claim>,
    /// Places of the VM for network devices.
    pub slots: u32,
}

#[cfg(test)]
mod tests;
