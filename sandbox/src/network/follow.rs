//! What the network plugin has set up, and what of it the guest has.

use std::path::PathBuf;

use bulkhead_protocol::agent::ConfigureNetworkRequest;
use tokio::io::unix::AsyncFd;

use super::interfaces::{self, Found, Interface};
use super::netlink::Netlink;
use super::watch::Watch;
use super::{GuestNet, NetworkError, Record, inode_of, tap};
use crate::fault::{self, Step};
use crate::journal::Entry;
use crate::spec::NetworkNamespace;

/// An interface that is joined to a network slot of the VM.
#[derive(Debug)]
struct Joined {
    slot: u32,
    interface: Interface,
    tap: u32,
}

/// Steps that bring the guest to the namespace's state, in this order.
#[derive(Debug, Default)]
pub struct Change {
    /// Slots whose interface has gone.
    pub detach: Vec<u32>,
    /// New devices with their slots.
    pub attach: Vec<(u32, GuestNet)>,
    /// What the agent has to set up; absent: nothing.
    pub request: Option<ConfigureNetworkRequest>,
    /// The first interface that could not be joined; the next look tries it again.
    pub failed: Option<NetworkError>,
}

/// Follows the network of the namespace it was made in.
#[derive(Debug)]
pub struct Follower {
    watch: Option<Watch>,
    netlink: Netlink,
    joined: Vec<Joined>,
    told: Found,
    /// Queues of each tap.
    queues: u8,
    /// Path and inode number of the namespace; none for one that ends with this process.
    namespace: Option<(PathBuf, u64)>,
}

/// Tells when there may be something to do.
#[derive(Debug)]
pub struct News(AsyncFd<Watch>);

impl News {
    /// Waits for a change in the namespace.
    ///
    /// # Errors
    /// The socket fails.
    pub async fn changed(&self) -> std::io::Result<()> {
        loop {
            let mut guard = self.0.readable().await?;
            let news = guard.get_inner().drain();
            guard.clear_ready();
            if news {
                return Ok(());
            }
        }
    }

    /// Whether there was a change; waits for nothing.
    pub fn has_changed(&self) -> bool {
        self.0.get_ref().drain()
    }
}

impl Follower {
    /// Makes taps with so many queues.
    pub(super) fn new(namespace: &NetworkNamespace, queues: u8) -> Result<Self, NetworkError> {
        let namespace = match namespace {
            NetworkNamespace::Path(path) => inode_of(path).map(|inode| (path.clone(), inode)),
            NetworkNamespace::Fresh => None,
        };
        Ok(Self {
            // From here on, so that nothing is missed between the first look and the next.
            watch: Some(Watch::open()?),
            netlink: Netlink::open()?,
            joined: Vec::new(),
            told: Found::default(),
            queues,
            namespace,
        })
    }

    /// The news of the namespace, for one taker. To be called inside the runtime.
    ///
    /// # Errors
    /// They are taken, or the runtime refuses.
    pub fn news(&mut self) -> std::io::Result<News> {
        let watch = self.watch.take().ok_or(std::io::ErrorKind::AlreadyExists)?;
        Ok(News(watch.register()?))
    }

    /// Looks at the namespace and joins what is new to a free slot below `slots`.
    ///
    /// # Errors
    /// [`NetworkError`]; nothing was done then.
    pub fn update(&mut self, slots: u32, record: &mut Record<'_>) -> Result<Change, NetworkError> {
        let own: Vec<u32> = self.joined.iter().map(|joined| joined.tap).collect();
        let mut found = interfaces::scan(&mut self.netlink, &own)?;
        let mut change = Change::default();
        // One with another hardware address is another one for the guest.
        self.joined.retain(|joined| {
            let stays = found.interfaces.iter().any(|now| joined.is(now));
            if !stays {
                change.detach.push(joined.slot);
            }
            stays
        });
        let mut left_out = Vec::new();
        for interface in &found.interfaces {
            if let Some(joined) = self.joined.iter_mut().find(|joined| joined.is(interface)) {
                if joined.interface.mtu != interface.mtu
                    && let Err(error) = tap::set_mtu(&mut self.netlink, joined.tap, "a tap", interface.mtu)
                {
                    change.failed.get_or_insert(error);
                }
                joined.interface = interface.clone();
                continue;
            }
            // A slot that is just being emptied is free for the next change.
            let taken = |slot: &u32| {
                change.detach.contains(slot) || self.joined.iter().any(|joined| joined.slot == *slot)
            };
            let Some(slot) = (0..slots).find(|slot| !taken(slot)) else {
                log::warn!(
                    "interface {} does not reach the guest: its network slots are in use (configuration key net_slots)",
                    interface.name
                );
                left_out.push(interface.index);
                continue;
            };
            let joined = match join(
                &mut self.netlink,
                self.namespace.as_ref(),
                interface,
                (slot, self.queues),
                record,
            ) {
                Ok(joined) => joined,
                Err(error) => {
                    change.failed.get_or_insert(error);
                    left_out.push(interface.index);
                    continue;
                }
            };
            self.joined.push(Joined {
                slot,
                interface: interface.clone(),
                tap: joined.index,
            });
            change.attach.push((
                slot,
                GuestNet {
                    taps: joined.taps,
                    mac: interface.mac,
                    mtu: interface.mtu,
                },
            ));
        }
        found.leave_out(&left_out);
        if found != self.told {
            change.request = Some(found.request(&self.told));
            self.told = found;
        }
        Ok(change)
    }
}

impl Joined {
    fn is(&self, interface: &Interface) -> bool {
        self.interface.index == interface.index && self.interface.mac == interface.mac
    }
}

/// Joins a tap to `interface`: for which slot, with how many queues.
fn join(
    netlink: &mut Netlink,
    namespace: Option<&(PathBuf, u64)>,
    interface: &Interface,
    (slot, queues): (u32, u8),
    record: &mut Record<'_>,
) -> Result<tap::Joined, NetworkError> {
    tap::clear(netlink, interface)?;
    if let Some((path, inode)) = namespace {
        record(&Entry::Redirection {
            namespace: path.clone(),
            inode: *inode,
            interface: interface.name.clone(),
        })
        .map_err(|error| NetworkError::Journal(Box::new(error)))?;
    }
    fault::point(Step::InterfaceJoined).map_err(|error| NetworkError::Step(Step::InterfaceJoined, error))?;
    tap::create(netlink, interface, slot, queues)
}
