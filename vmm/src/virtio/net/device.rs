//! The slot of a network device: its wire, and what the transport asks of it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::Queue;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::Control;
use super::frames::{Active, HEADER_SIZE, MAX_SEGMENT};
use super::kernel::KernelRings;
use super::pairs::{Changes, Queues};
use super::tap::{OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, Tap};
use super::vhost::{Vhost, VhostError};
use super::watch::{ERRORS, KICKS, TAPS, WAKE};
use crate::virtio::queue::{DeviceQueue, DeviceQueueState, RING_FEATURES};
use crate::virtio::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};

/// Device id (virtio 1.2, 5).
const DEVICE_TYPE: u32 = 1;
/// Device id of a place without a device (virtio 1.2, 4.2.3.1.1): drivers pass it by.
const NO_DEVICE: u32 = 0;
/// Largest sizes of a receive and a transmit queue, and of the control queue (virtio 1.2, 5.1.2).
const FRAMES: u16 = 256;
const COMMANDS: u16 = 16;

/// Everything the device offers with one pair of queues. UFO is left out, Linux guests no longer produce it; so is the MTU, which a
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

/// What it offers with several pairs in addition.
const PAIRS: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The poller could not be created, or does not take the tap.
    #[error("Cannot poll the tap")]
    Poller(#[source] io::Error),
    /// Queues of the tap, and pairs of the device.
    #[error("Tap has {0} queues, the device {1} pairs of them")]
    Queues(usize, usize),
    /// Servers of the kernel, and pairs of the device.
    #[error("There are {0} vhost-net devices for {1} pairs of queues")]
    Servers(usize, usize),
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
    pub(super) name: String,
    pub(super) slot: u32,
    /// Largest sizes: of two for each pair, and of the control queue if there are several pairs.
    pub(super) queue_sizes: Vec<u16>,
    pub(super) wire: Option<Wire>,
    /// Who serves the rings of each pair; none: this process.
    pub(super) vhosts: Vec<Vhost>,
    pub(super) poller: Epoll,
    pub(super) wake: EventFd,
    /// The driver's kicks, by queue.
    pub(super) kicks: Vec<EventFd>,
    /// Between activation and reset the pairs that the driver has, in one of the two.
    pub(super) active: Vec<Active>,
    pub(super) kernel: Vec<KernelRings>,
    /// Pairs that are on: the first so many.
    pub(super) on: usize,
    /// Pairs that a restored driver has on.
    restored: usize,
    pub(super) control: Option<Control>,
    /// Queues that an active driver does not use.
    pub(super) unused: Vec<Queue>,
    /// Why the device has to stop, found where nobody could be told.
    pub(super) failure: Option<DeviceError>,
    /// Changes of their number that the driver may make.
    pub(super) changes: Changes,
    /// It was told that a pair cannot be turned on.
    pub(super) reported: bool,
}

/// What makes a slot an interface.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
    /// Queues of the tap, by pair.
    pub(super) taps: Vec<Tap>,
}

/// What a snapshot keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Hardware address and largest frame payload in bytes; none for an empty slot.
    pub wire: Option<([u8; 6], u16)>,
    /// Pairs of queues that the device offers.
    pub pairs: u16,
    /// Pairs that are on, 0 if the device is not active.
    pub on: u16,
    /// The queues, empty if the device is not active.
    pub queues: Vec<DeviceQueueState>,
}

impl Net {
    /// An empty slot, whose interface is to have this many pairs of queues, one at least.
    ///
    /// # Errors
    /// [`NetError::Poller`].
    pub fn new(slot: u32, pairs: u8) -> Result<Self, NetError> {
        let poller = Epoll::new().map_err(NetError::Poller)?;
        let wake = EventFd::new(EFD_NONBLOCK).map_err(NetError::Poller)?;
        poller
            .ctl(
                ControlOperation::Add,
                wake.as_raw_fd(),
                EpollEvent::new(EventSet::IN, WAKE),
            )
            .map_err(NetError::Poller)?;
        let pairs = usize::from(pairs.max(1));
        let mut queue_sizes = vec![FRAMES; 2 * pairs];
        if pairs > 1 {
            queue_sizes.push(COMMANDS);
        }
        Ok(Self {
            name: format!("net{slot}"),
            slot,
            queue_sizes,
            wire: None,
            vhosts: Vec::new(),
            poller,
            wake,
            kicks: Vec::new(),
            active: Vec::new(),
            kernel: Vec::new(),
            on: 0,
            restored: 0,
            control: None,
            unused: Vec::new(),
            failure: None,
            changes: Changes::new(Instant::now()),
            reported: false,
        })
    }

    /// Makes the slot an interface on a tap that has `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. It has as many queues as the
    /// device has pairs, with `IFF_MULTI_QUEUE` if there are several: the first is attached, the others are detached. A
    /// guest that runs has to look again at this place of the bus.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn attach(&mut self, taps: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> Result<(), SlotError> {
        if self.wire.is_some() {
            return Err(SlotError::Occupied(self.slot));
        }
        let wire = self
            .connect(taps, mac, mtu)
            .map_err(|error| SlotError::Wire(self.slot, error))?;
        self.wire = Some(wire);
        Ok(())
    }

    fn connect(&self, taps: Vec<OwnedFd>, mac: [u8; 6], mtu: u16) -> Result<Wire, NetError> {
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Address);
        }
        if mtu < 68 {
            return Err(NetError::Mtu(mtu));
        }
        if taps.len() != self.offered() {
            return Err(NetError::Queues(taps.len(), self.offered()));
        }
        let taps = taps.into_iter().map(Tap::new);
        let taps = taps.collect::<Result<Vec<_>, _>>().map_err(NetError::Tap)?;
        if let Some(first) = taps.first() {
            self.watch_tap(0, first).map_err(NetError::Poller)?;
        }
        Ok(Wire { mac, mtu, taps })
    }

    /// Empties the slot and closes its tap. A driver that still has the device finds it dead.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn detach(&mut self) -> Result<(), SlotError> {
        if self.wire.is_none() {
            return Err(SlotError::Empty(self.slot));
        }
        // A driver that gives a command now is to hear that it cannot be: it waits for an answer.
        let control = self.control.take();
        self.stop();
        self.close_kernel();
        self.wire = None;
        self.listen(control);
        Ok(())
    }

    /// Hears of commands and of nothing else.
    fn listen(&mut self, control: Option<Control>) {
        self.control = control;
        if let Err(error) = self.watch_kicks() {
            self.failure = Some(DeviceError::Backend(error));
            self.wake();
        }
    }

    /// The first queue of the tap, for tests that put something else in its place.
    #[cfg(test)]
    pub(super) fn tap(&mut self) -> Option<&mut Tap> {
        self.wire.as_mut().and_then(|wire| wire.taps.first_mut())
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(wire) = &self.wire else { return Ok(()) };
        let mut more = false;
        for (active, tap) in self.active.iter_mut().zip(&wire.taps).take(self.on) {
            match active.serve(tap) {
                Ok(again) => more |= again,
                Err(error) => {
                    self.stop();
                    return Err(error);
                }
            }
        }
        if more {
            self.wake();
        }
        Ok(())
    }

    /// The driver has kicked a queue.
    fn kicked(&mut self, index: usize) -> Result<(), DeviceError> {
        if self
            .control
            .as_ref()
            .is_some_and(|control| control.index == index)
        {
            return self.serve_control();
        }
        // The second of a pair transmits.
        if let (1, Some(active)) = (index % 2, self.active.get_mut(index / 2)) {
            active.tx_filled = true;
        }
        Ok(())
    }

    /// Makes the event descriptor readable.
    pub(super) fn wake(&self) {
        // It can fail only if the counter is full: then it is readable.
        let _ = self.wake.write(1);
    }

    fn poll(&mut self) -> Result<(), DeviceError> {
        let mut ready = [EpollEvent::default(); 8];
        let count = match self.poller.wait(0, &mut ready) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(DeviceError::Backend(error)),
        };
        for event in &ready[..count] {
            match event.data() {
                WAKE => {
                    let _ = self.wake.read();
                }
                ERRORS => self.ring_broken(),
                tap @ TAPS..KICKS => {
                    if let Some(active) = self.active.get_mut((tap - TAPS) as usize) {
                        active.readable = true;
                        active.writable = true;
                    }
                }
                kick => {
                    let index = kick.saturating_sub(KICKS) as usize;
                    if let Some(event) = self.kicks.get(index) {
                        let _ = event.read();
                    }
                    self.kicked(index)?;
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
        FEATURES | if self.offered() > 1 { PAIRS } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `virtio_net_config` (virtio 1.2, 5.1.4): `mac`, `status`, `max_virtqueue_pairs`; what is not there means nothing
    /// without its features.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 10];
        space[..6].copy_from_slice(&self.wire.as_ref().map_or([0; 6], |wire| wire.mac));
        if self.offered() > 1 {
            space[8..].copy_from_slice(&(self.offered() as u16).to_le_bytes());
        }
        config::read(&space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let on = std::mem::take(&mut self.restored).max(1);
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let has = |feature: u32| features & (1 << feature) != 0;
        let Queues {
            pairs,
            control,
            unused,
        } = Queues::split(queues, features, self.offered())?;
        let shared = Arc::new(memory.clone());
        let device_queue = |queue| DeviceQueue::new(queue, shared.clone(), interrupt.clone(), features);
        let control = control.map(|queue| Control {
            index: 2 * pairs.len(),
            queue: device_queue(queue),
        });
        let Some(wire) = &self.wire else {
            // A restored driver may have one that is gone. It finds it dead, as after `detach`.
            self.listen(control);
            return Ok(());
        };
        // The TSO features need the checksum one (virtio 1.2, 5.1.3.1), and so does the tap.
        let csum = has(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = csum && has(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = csum && has(VIRTIO_NET_F_GUEST_TSO6);
        let offloads = [(csum, OFFLOAD_CSUM), (tso4, OFFLOAD_TSO4), (tso6, OFFLOAD_TSO6)]
            .into_iter()
            .filter_map(|(on, flag)| on.then_some(flag))
            .sum();
        // They are the interface's, whichever queue is told.
        if let Some(tap) = wire.taps.first() {
            tap.configure(offloads, HEADER_SIZE)
                .map_err(DeviceError::Backend)?;
        }
        if self.vhosts.is_empty() {
            let payload = if tso4 || tso6 {
                MAX_SEGMENT
            } else {
                usize::from(wire.mtu)
            };
            let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
            let pairs = pairs.into_iter().map(|pair| pair.map(&device_queue));
            self.active = pairs
                .map(|[rx, tx]| Active::new(rx, tx, payload, mergeable))
                .collect();
        } else {
            let pairs = pairs.into_iter();
            self.kernel = pairs
                .map(|pair| KernelRings::new(pair, memory.clone(), interrupt.clone(), features))
                .collect();
        }
        self.control = control;
        self.unused = unused;
        // This is a vCPU thread: frames are for the device thread, which is woken.
        let started = self
            .turn_on(on)
            .and_then(|()| self.watch_kicks().map_err(DeviceError::Backend));
        if started.is_err() {
            self.stop();
        }
        started
    }

    fn reset(&mut self) {
        self.stop();
    }

    fn process_queue(&mut self, index: usize) -> Result<Turn, DeviceError> {
        self.kicked(index)?;
        // It wakes itself when there is more.
        self.serve().map(|()| Turn::Done)
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.poller.as_raw_fd())
    }

    fn process_event(&mut self) -> Result<(), DeviceError> {
        let polled = self.poll();
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
            DeviceState::Net(state) => {
                RestoreError::check("pairs of queues", &usize::from(state.pairs), &self.offered())?;
                self.restored = state.on.into();
                Ok(())
            }
            _ => Err(RestoreError::Kind),
        }
    }
}
