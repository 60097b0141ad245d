//! The pod's network while the guest runs: what changes later, and streams to its loopback address.

use bulkhead_protocol::agent::{ForwardRequest, PlugDeviceRequest};
use bulkhead_protocol::control::{Net, Request};
use tokio::sync::{mpsc, oneshot};

use super::restore::Restore;
use super::*;
use crate::error::chain;
use crate::network::{Change, Connection, Follower, Forwarder, GuestNet, News, open_vhosts};
use crate::vm::{Descriptors, VmError};

/// Places on the VM's bus, and how many are not for disks and networks (memory, streams, files, entropy, balloon,
/// growing memory).
const PLACES: u32 = 19;
const OTHER_DEVICES: u32 = 6;

/// How long a container's start waits for changes of the network to reach the guest.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// Who waits until the guest has the namespace's present state.
pub(super) type Settle = mpsc::UnboundedSender<oneshot::Sender<()>>;

/// Network slots of a VM that starts with `present` interfaces.
pub(super) fn net_slots(present: usize, config: &Configuration) -> u32 {
    let present = u32::try_from(present).unwrap_or(u32::MAX);
    let room = PLACES
        .saturating_sub(OTHER_DEVICES)
        .saturating_sub(config.disk_slots)
        .saturating_sub(present);
    present.saturating_add(config.net_slots.min(room))
}

impl Sandbox {
    pub(super) fn network(&self) -> MutexGuard<'_, GuestNetwork> {
        self.0.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the guest's network as the namespace's is, from now on.
    pub(super) fn follow_network(&self, guest: &Guest) {
        let (follower, forward) = {
            let mut network = self.network();
            (network.follower.take(), network.forward)
        };
        if let Some(mut follower) = follower {
            match follower.news() {
                Ok(news) => {
                    let (sender, asked) = mpsc::unbounded_channel();
                    self.lock().settle = Some(sender);
                    let (sandbox, guest) = (self.clone(), guest.clone());
                    tokio::spawn(async move { sandbox.run_follower(guest, follower, news, asked).await });
                }
                Err(error) => log::error!("changes of the network will not reach the guest: {error}"),
            }
        }
        if forward {
            self.forward_loopback(guest);
        }
    }

    async fn run_follower(
        self,
        guest: Guest,
        mut follower: Follower,
        news: News,
        mut asked: mpsc::UnboundedReceiver<oneshot::Sender<()>>,
    ) {
        loop {
            let waiting = tokio::select! {
                biased;
                _ = guest.vm.ended() => return,
                waiting = asked.recv() => match waiting {
                    Some(waiting) => Some(waiting),
                    None => return,
                },
                changed = news.changed() => match changed {
                    Ok(()) => None,
                    Err(error) => {
                        log::error!("changes of the network no longer reach the guest: {error}");
                        return;
                    }
                },
            };
            if self.is_stopping() {
                return;
            }
            if waiting.is_none() || news.has_changed() {
                self.update_network(&guest, &mut follower).await;
            }
            // Whoever waits may have given up.
            let _ = waiting.map(|waiting| waiting.send(()));
        }
    }

    /// Waits until the guest has what was set up so far.
    pub(super) async fn settle_network(&self) {
        let sender = self.lock().settle.clone();
        let (waiting, settled) = oneshot::channel();
        if sender.is_some_and(|sender| sender.send(waiting).is_ok())
            && tokio::time::timeout(SETTLE_LIMIT, settled).await.is_err()
        {
            log::warn!("the guest does not have the latest changes of its network yet");
        }
    }

    async fn update_network(&self, guest: &Guest, follower: &mut Follower) {
        let slots = self.network().slots;
        let mut record = |entry: &crate::journal::Entry| {
            let journal = self.0.journal.lock().unwrap_or_else(PoisonError::into_inner);
            journal.as_ref().map_or(Ok(()), |journal| journal.record(entry))
        };
        let result = match follower.update(slots, &mut record) {
            Ok(mut change) => {
                if let Some(error) = change.failed.take() {
                    log::error!("an interface does not reach the guest: {}", chain(&error));
                }
                self.apply(guest, change).await
            }
            Err(error) => Err(error.into()),
        };
        if let Err(error) = result {
            log::error!(
                "a change of the network does not reach the guest: {}",
                chain(&error)
            );
        }
    }

    async fn apply(&self, guest: &Guest, change: Change) -> Result<(), Error> {
        for slot in change.detach {
            log::debug!("network slot {slot}: interface gone");
            let unplugged = self.plug(guest, slot, false).await;
            guest.vm.ask(Request::DetachNet { slot }, Vec::new()).await?;
            unplugged?;
        }
        for (slot, net) in change.attach {
            log::debug!("network slot {slot}: new interface");
            self.attach(guest, slot, net).await?;
        }
        if let Some(request) = change.request {
            guest.agent.configure_network(&request).await?;
        }
        Ok(())
    }

    /// Makes the pod's interfaces devices of a VM that began without them.
    pub(super) async fn attach_interfaces(&self, guest: &Guest) -> Result<(), Error> {
        let nets = std::mem::take(&mut self.network().nets);
        for (slot, net) in (0..).zip(nets) {
            self.attach(guest, slot, net).await?;
        }
        Ok(())
    }

    /// Has the guest of a snapshot give up the interfaces that it had.
    pub(super) async fn unplug_interfaces(&self, guest: &Guest, restore: &Restore) -> Result<(), Error> {
        for slot in 0..restore.snapshot().manifest.machine.net_slots {
            self.plug(guest, slot, false).await?;
        }
        Ok(())
    }

    async fn attach(&self, guest: &Guest, slot: u32, net: GuestNet) -> Result<(), Error> {
        let mut fds = Descriptors::default();
        let net = self.describe_net(net, &mut fds);
        let request = Request::AttachNet { slot, net };
        guest.vm.ask(request, fds.into_vec()).await?;
        self.plug(guest, slot, true).await
    }

    /// A network device for the VMM, with the kernel's servers if the configuration wants them and the host has them.
    pub(super) fn describe_net(&self, net: GuestNet, fds: &mut Descriptors) -> Net {
        let GuestNet { taps, mac, mtu } = net;
        let vhosts = match self.0.config.vhost_net {
            true => open_vhosts(taps.len()),
            false => Vec::new(),
        };
        Net {
            taps: taps.into_iter().map(|tap| fds.add(tap)).collect(),
            vhosts: vhosts.into_iter().map(|vhost| fds.add(vhost)).collect(),
            mac,
            mtu,
        }
    }

    /// Has the guest's driver look at a network slot again.
    async fn plug(&self, guest: &Guest, slot: u32, present: bool) -> Result<(), Error> {
        let name = format!("net{slot}");
        let place = self.lock().places.iter().position(|device| *device == name);
        let place = place.ok_or(VmError::WrongReply("boot"))?;
        let request = PlugDeviceRequest {
            place: u32::try_from(place).unwrap_or(u32::MAX),
            present,
            ..PlugDeviceRequest::default()
        };
        guest.agent.plug_device(&request).await.map(drop)
    }

    /// Hands connections to the namespace's loopback address to the guest.
    fn forward_loopback(&self, guest: &Guest) {
        let forwarder = match Forwarder::open() {
            Ok(forwarder) => forwarder,
            Err(error) => {
                log::info!("ports on localhost cannot be forwarded: {error}");
                return;
            }
        };
        let (sandbox, guest) = (self.clone(), guest.clone());
        tokio::spawn(async move {
            let ended = guest.vm.clone();
            let run = forwarder.run(|connection| {
                let (sandbox, guest) = (sandbox.clone(), guest.clone());
                tokio::spawn(async move { sandbox.forward(guest, connection).await });
            });
            tokio::select! {
                _ = ended.ended() => {}
                result = run => if let Err(error) = result {
                    log::error!("ports on localhost are no longer forwarded: {error}");
                },
            }
        });
    }

    async fn forward(self, guest: Guest, connection: Connection) {
        let Connection {
            socket,
            address,
            port,
        } = connection;
        let ours = match duplicate(&socket) {
            Ok(ours) => ours,
            Err(error) => return log::warn!("cannot forward port {port}: {error}"),
        };
        let stream_port = match self.0.streams.open_one(&guest.vm, socket).await {
            Ok(stream_port) => stream_port,
            Err(error) => return log::warn!("cannot forward port {port}: {}", chain(&error)),
        };
        let request = ForwardRequest {
            address: address.to_string(),
            port: port.into(),
            stream_port,
            ..ForwardRequest::default()
        };
        if let Err(error) = guest.agent.forward(&request).await {
            log::debug!("port {port} is not forwarded: {}", chain(&error));
            let unlisten = Request::VsockUnlisten { port: stream_port };
            // The guest may have used it; then the stream ends by itself.
            let _ = guest.vm.ask(unlisten, Vec::new()).await;
            self.0.streams.ended(stream_port);
            Connection::reset(&ours);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_given_as_far_as_there_is_room() {
        let config = |disk_slots, net_slots| Configuration {
            disk_slots,
            net_slots,
            ..Configuration::default()
        };
        assert_eq!(net_slots(0, &config(2, 2)), 2);
        assert_eq!(net_slots(3, &config(2, 2)), 5);
        assert_eq!(net_slots(1, &config(12, 2)), 1);
        assert_eq!(net_slots(0, &config(12, 2)), 1);
        assert_eq!(net_slots(2, &config(12, 2)), 2);
        assert_eq!(net_slots(0, &config(0, 0)), 0);
    }
}
