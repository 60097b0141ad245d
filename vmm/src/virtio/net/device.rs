//! The slot of a network device: its wire, and what the transport asks of it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::frames::{Active, HEADER_SIZE, MAX_SEGMENT};
use super::kernel::KernelRings;
use super::tap::{OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, Tap};
use super::vhost::{Vhost, VhostError};
use crate::virtio::queue::{DeviceQueue, DeviceQueueState, RING_FEATURES};
use crate::virtio::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};

/// Device id (virtio 1.2, 5).
const DEVICE_TYPE: u32 = 1;
/// Device id of a place without a device (virtio 1.2, 4.2.3.1.1): drivers pass it by.
const NO_DEVICE: u32 = 0;
/// Receive and transmit queue (virtio 1.2, 5.1.2).
const QUEUE_SIZES: [u16; 2] = [256, 256];
const TX: usize = 1;

/// Everything the device offers. UFO is left out, Linux guests no longer produce it; so is the MTU, which a
/// driver takes as the largest that can ever be set, while the host's may grow.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | RING_FEATURES
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MAC;

/// Poller's names of its descriptors.
pub(super) const TAP: u64 = 0;
const WAKE: u64 = 1;
pub(super) const ERRORS: u64 = 2;
/// The first queue's kicks; the others follow.
pub(super) const KICK: u64 = 3;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The poller could not be created, or does not take the tap.
    #[error("Cannot poll the tap")]
    Poller(#[source] io::Error),
    /// The tap cannot be made non-blocking.
    #[error("Tap cannot be used")]
    Tap(#[source] io::Error),
    /// Bit 0 of the first byte is set (group address) or all is zero.
    #[error("Hardware address is not that of one station")]
    Address,
    /// Below 68, the least IPv4 allows (RFC 791).
    #[error("MTU {0} is too small")]
    Mtu(u16),
    /// The kernel's server.
    #[error("Cannot use vhost-net; \"vhost_net\": false in the configuration does without")]
    Vhost(#[source] VhostError),
}

/// Why a network slot cannot be filled or emptied.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// There is a wire in it already.
    #[error("Network slot {0} is in use")]
    Occupied(u32),
    /// There is none.
    #[error("Network slot {0} is empty")]
    Empty(u32),
    /// The wire cannot be used.
    #[error("Cannot use the tap for network slot {0}")]
    Wire(u32, #[source] NetError),
}

/// A network slot of a VM: an interface when there is a wire in it, and else nothing that a driver would take.
#[derive(Debug)]
pub struct Net {
    name: String,
    pub(super) slot: u32,
    pub(super) wire: Option<Wire>,
    /// Who serves the rings; none: this process.
    pub(super) vhost: Option<Vhost>,
    pub(super) poller: Epoll,
    pub(super) wake: EventFd,
    /// The driver's kicks, by queue.
    pub(super) kicks: Vec<EventFd>,
    /// Between activation and reset one of the two.
    active: Option<Active>,
    pub(super) kernel: Option<KernelRings>,
    /// Why the device has to stop, found where nobody could be told.
    pub(super) failure: Option<DeviceError>,
}

/// What makes a slot an interface.
#[derive(Debug)]
pub(super) struct Wire {
    mac: [u8; 6],
    mtu: u16,
    pub(super) tap: Tap,
}

/// What a snapshot keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Hardware address and largest frame payload in bytes; none for an empty slot.
    pub wire: Option<([u8; 6], u16)>,
    /// The queues, empty if the device is not active.
    pub queues: Vec<DeviceQueueState>,
}

impl Net {
    /// An empty slot.
    ///
    /// # Errors
    /// [`NetError::Poller`].
    pub fn new(slot: u32) -> Result<Self, NetError> {
        let poller = Epoll::new().map_err(NetError::Poller)?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(NetError::Poller)?;
        poller
            .ctl(
                ControlOperation::Add,
                wake.as_raw_fd(),
                EpollEvent::new(EventSet::IN, WAKE),
            )
            .map_err(NetError::Poller)?;
        Ok(Self {
            name: format!("net{slot}"),
            slot,
            wire: None,
            vhost: None,
            poller,
            wake,
            kicks: Vec::new(),
            active: None,
            kernel: None,
            failure: None,
        })
    }

    /// Makes the slot an interface on `tap`, which has `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR` and is attached. A
    /// guest that runs has to look again at this place of the bus.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn attach(&mut self, tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<(), SlotError> {
        if self.wire.is_some() {
            return Err(SlotError::Occupied(self.slot));
        }
        let wire = self
            .connect(tap, mac, mtu)
            .map_err(|error| SlotError::Wire(self.slot, error))?;
        self.wire = Some(wire);
        Ok(())
    }

    fn connect(&self, tap: OwnedFd, mac: [u8; 6], mtu: u16) -> Result<Wire, NetError> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Address);
        }
        if mtu < 68 {
            return Err(NetError::Mtu(mtu));
        }
        let tap = Tap::new(tap).map_err(NetError::Tap)?;
        self.watch_tap(&tap).map_err(NetError::Poller)?;
        Ok(Wire { mac, mtu, tap })
    }

    /// The queues are not touched again until the next activation.
    fn stop(&mut self) {
        self.active = None;
        self.stop_kernel();
        self.unwatch();
        self.failure = None;
    }

    /// Empties the slot and closes its tap. A driver that still has the device finds it dead.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn detach(&mut self) -> Result<(), SlotError> {
        if self.wire.is_none() {
            return Err(SlotError::Empty(self.slot));
        }
        self.stop();
        self.close_kernel();
        self.wire = None;
        Ok(())
    }

    /// State for a snapshot. Receive buffers that are held go back to the ring; the device thread is
    /// stopped.
    pub fn save(&mut self) -> NetState {
        let mut queues = Vec::new();
        if let Some(active) = &mut self.active {
            active.release();
            queues = vec![active.rx.save(), active.tx.save()];
        }
        if let Some(rings) = &self.kernel {
            queues = rings.save();
        }
        NetState {
            wire: self.wire.as_ref().map(|wire| (wire.mac, wire.mtu)),
            queues,
        }
    }

    /// The tap, for tests that put something else in its place.
    #[cfg(test)]
    pub(super) fn tap(&mut self) -> Option<&mut Tap> {
        self.wire.as_mut().map(|wire| &mut wire.tap)
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let (Some(active), Some(wire)) = (&mut self.active, &self.wire) else {
            return Ok(());
        };
        let mut result = active.transmit(&wire.tap);
        if result.is_ok() {
            result = active.receive(&wire.tap);
        }
        match result {
            Ok(done) => {
                if !done || (active.tx_filled && active.writable) {
                    self.wake();
                }
                Ok(())
            }
            Err(error) => {
                self.stop();
                Err(error)
            }
        }
    }

    /// The driver has kicked a queue.
    fn kicked(&mut self, index: usize) {
        if let (TX, Some(active)) = (index, &mut self.active) {
            active.tx_filled = true;
        }
    }

    /// Makes the event descriptor readable.
    pub(super) fn wake(&self) {
        // It can fail only if the counter is full: then it is readable.
        let _ = self.wake.write(1);
    }

    fn poll(&mut self) -> io::Result<()> {
        let mut ready = [EpollEvent::default(); 8];
        let count = match self.poller.wait(0, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &ready[..count] {
            match event.data() {
                WAKE => {
                    let _ = self.wake.read();
                }
                TAP => {
                    if let Some(active) = &mut self.active {
                        active.readable = true;
                        active.writable = true;
                    }
                }
                ERRORS => self.ring_broken(),
                kick => {
                    let index = (kick - KICK) as usize;
                    if let Some(event) = self.kicks.get(index) {
                        let _ = event.read();
                    }
                    self.kicked(index);
                }
            }
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        if self.wire.is_some() {
            DEVICE_TYPE
        } else {
            NO_DEVICE
        }
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `virtio_net_config` (virtio 1.2, 5.1.4): `mac`; what follows means nothing without its features.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mac = self.wire.as_ref().map_or([0; 6], |wire| wire.mac);
        config::read(&mac, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Some(wire) = &self.wire else {
            // A restored driver may have one that is gone. It finds it dead, as after `detach`.
            return Ok(());
        };
        let features = activation.features;
        let has = |feature: u32| features & (1 << feature) != 0;
        // The TSO features need the checksum one (virtio 1.2, 5.1.3.1), and so does the tap.
        let csum = has(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = csum && has(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = csum && has(VIRTIO_NET_F_GUEST_TSO6);
        let offloads = [(csum, OFFLOAD_CSUM), (tso4, OFFLOAD_TSO4), (tso6, OFFLOAD_TSO6)]
            .into_iter()
            .filter_map(|(on, flag)| on.then_some(flag))
            .sum();
        wire.tap
            .configure(offloads, HEADER_SIZE)
            .map_err(DeviceError::Backend)?;
        let mtu = usize::from(wire.mtu);
        let Some(activation) = self.start_kernel(activation)? else {
            return Ok(());
        };
        let payload = if tso4 || tso6 { MAX_SEGMENT } else { mtu };
        let queues = DeviceQueue::from_activation(activation);
        let Ok([rx, tx]) = <[DeviceQueue; 2]>::try_from(queues) else {
            return Err(DeviceError::Protocol("network device needs two queues"));
        };
        if let Err(error) = self.watch() {
            self.unwatch();
            return Err(DeviceError::Backend(error));
        }
        self.active = Some(Active::new(rx, tx, payload, has(VIRTIO_NET_F_MRG_RXBUF)));
        // This is a vCPU thread: frames are for the device thread.
        self.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
    }

    fn process_queue(&mut self, index: usize) -> Result<Turn, DeviceError> {
        self.kicked(index);
        // It wakes itself when there is more.
        self.serve().map(|()| Turn::Done)
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.poller.as_raw_fd())
    }

    fn process_event(&mut self) -> Result<(), DeviceError> {
        let polled = self.poll().map_err(DeviceError::Backend);
        if let Some(error) = self.failure.take().or(polled.err()) {
            self.stop();
            return Err(error);
        }
        self.serve()
    }

    /// Kicks are for the kernel when it serves the rings, and only the device knows whether it does.
    fn owns_queue_events(&self) -> bool {
        true
    }

    fn set_queue_events(&mut self, events: Vec<EventFd>) {
        self.kicks = events;
    }

    /// The kernel's worker is not stopped with the event loop.
    fn pause(&mut self) -> Result<(), DeviceError> {
        self.pause_kernel()
    }

    fn resume(&mut self) {
        self.resume_kernel();
    }

    fn save_state(&mut self) -> DeviceState {
        DeviceState::Net(self.save())
    }

    /// The hardware address may differ: the driver read the old one, and keeps it until the guest sets another. That a
    /// device has come or gone meanwhile is found when the driver looks again.
    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Net(_) => Ok(()),
            _ => Err(RestoreError::Kind),
        }
    }
}
