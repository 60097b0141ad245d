//! Pairs of rings that the kernel serves, between activation and reset.

#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Error, Queue, QueueT};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Net, NetError, SlotError};
use super::tap::Tap;
use super::vhost::Vhost;
use super::watch::ERRORS;
use crate::memory::GuestMemory;
use crate::virtio::queue::DeviceQueueState;
use crate::virtio::{DeviceError, Interrupt};

/// The rings of a pair, of which this process only remembers where they are.
#[derive(Debug)]
pub struct KernelRings {
    /// Their indices are true while they stand still.
    queues: [Queue; 2],
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    features: u64,
    /// The kernel knows of them.
    told: bool,
    running: bool,
}

impl KernelRings {
    /// Rings of an activation, which stand still.
    pub fn new(queues: [Queue; 2], memory: GuestMemory, interrupt: Arc<Interrupt>, features: u64) -> Self {
        Self {
            queues,
            memory,
            interrupt,
            features,
            told: false,
            running: false,
        }
    }

    /// Lets the rings run; those that do go on. The driver kicks the kernel by `kicks`, in the order of the rings.
    ///
    /// # Errors
    /// A ring is off or not in memory, or the kernel refuses; no ring runs then.
    pub fn run(&mut self, vhost: &Vhost, tap: &Tap, kicks: &[EventFd]) -> Result<(), DeviceError> {
        if !self.told {
            self.tell(vhost, kicks)?;
        }
        if self.running {
            return Ok(());
        }
        for index in self.indices() {
            if let Err(error) = vhost.run(index, tap.as_raw_fd()) {
                self.halt(vhost);
                return Err(DeviceError::Vhost(error));
            }
        }
        self.running = true;
        for kick in kicks {
            // A kick that came while a ring stood still had no effect. It can fail only if the counter is full: then
            // the kernel is told already.
            let _ = kick.write(1);
        }
        Ok(())
    }

    /// Tells the kernel where the rings are.
    fn tell(&mut self, vhost: &Vhost, kicks: &[EventFd]) -> Result<(), DeviceError> {
        if kicks.len() != self.queues.len() {
            return Err(DeviceError::Protocol("network device needs two queues"));
        }
        // The kernel knows nothing of queues that are off.
        if !self.queues.iter().all(QueueT::ready) {
            return Err(DeviceError::Queue(Error::QueueNotReady));
        }
        vhost.forget_errors();
        vhost
            .prepare(self.features, &self.memory)
            .map_err(DeviceError::Vhost)?;
        for (index, (queue, kick)) in (0..).zip(self.queues.iter().zip(kicks)) {
            vhost
                .set_ring(index, queue, &self.memory, kick, self.interrupt.event())
                .map_err(DeviceError::Vhost)?;
        }
        self.interrupt.raised_by_kernel(true);
        self.told = true;
        Ok(())
    }

    /// Has the rings stand still, and learns where they are.
    ///
    /// # Errors
    /// The kernel does not tell; the rings stand still, or some of them.
    pub fn pause(&mut self, vhost: &Vhost) -> Result<(), DeviceError> {
        if !std::mem::take(&mut self.running) {
            return Ok(());
        }
        for index in self.indices() {
            vhost.halt(index).map_err(DeviceError::Vhost)?;
        }
        for (index, queue) in (0..).zip(&mut self.queues) {
            queue.set_next_avail(vhost.base(index).map_err(DeviceError::Vhost)?);
            // The kernel keeps its index of used elements in memory alone.
            let used = queue.used_idx(&self.memory, Ordering::Acquire);
            queue.set_next_used(used.map_err(DeviceError::Queue)?.0);
        }
        Ok(())
    }

    /// Takes the rings back from the kernel for good.
    pub fn stop(self, vhost: &Vhost) {
        if self.told {
            self.halt(vhost);
        }
        self.interrupt.raised_by_kernel(false);
    }

    /// State for a snapshot, in a pause.
    pub fn save(&self) -> Vec<DeviceQueueState> {
        self.queues.iter().map(DeviceQueueState::of).collect()
    }

    fn halt(&self, vhost: &Vhost) {
        for index in self.indices() {
            // The kernel refuses only those that do not own the device.
            let _ = vhost.halt(index);
        }
    }

    fn indices(&self) -> std::ops::Range<u32> {
        0..self.queues.len() as u32
    }
}

impl Net {
    /// Has the kernel serve the rings of the interface, by a `/dev/vhost-net` for each pair, from the driver's next start on.
    ///
    /// # Errors
    /// See [`SlotError`]; the interface is as it was.
    pub fn serve_by(&mut self, vhosts: Vec<OwnedFd>) -> Result<(), SlotError> {
        let slot = self.slot;
        let vhosts: Result<_, _> = vhosts.into_iter().map(Vhost::new).collect();
        self.serve_with(vhosts.map_err(|error| SlotError::Wire(slot, NetError::Vhost(error)))?)
    }

    pub(super) fn serve_with(&mut self, mut vhosts: Vec<Vhost>) -> Result<(), SlotError> {
        let slot = self.slot;
        let unusable = |error| SlotError::Wire(slot, error);
        if self.wire.is_none() {
            return Err(SlotError::Empty(slot));
        }
        if vhosts.len() != self.offered() {
            return Err(unusable(NetError::Servers(vhosts.len(), self.offered())));
        }
        // That of the first pair will be needed. Each costs a thread and memory.
        if let Some(first) = vhosts.first_mut() {
            first.take().map_err(|error| unusable(NetError::Vhost(error)))?;
        }
        for vhost in &vhosts {
            let errors = vhost.errors().as_raw_fd();
            let event = EpollEvent::new(EventSet::IN, ERRORS);
            // Those of devices that are dropped go with them.
            self.poller
                .ctl(ControlOperation::Add, errors, event)
                .map_err(|error| unusable(NetError::Poller(error)))?;
        }
        self.vhosts = vhosts;
        // Frames wake the kernel's worker, and not this process.
        self.unwatch();
        Ok(())
    }

    /// Takes the kernel's servers from an interface that goes.
    pub(super) fn close_kernel(&mut self) {
        self.stop_kernel();
        for vhost in self.vhosts.drain(..) {
            let errors = vhost.errors().as_raw_fd();
            let _ = self
                .poller
                .ctl(ControlOperation::Delete, errors, EpollEvent::default());
        }
    }

    /// Takes the rings back from the kernel, if it has them.
    pub(super) fn stop_kernel(&mut self) {
        for (rings, vhost) in self.kernel.drain(..).zip(&self.vhosts) {
            rings.stop(vhost);
            vhost.forget_errors();
        }
    }

    /// The kernel has found a ring broken.
    pub(super) fn ring_broken(&mut self) {
        for vhost in &self.vhosts {
            vhost.forget_errors();
        }
        if !self.kernel.is_empty() {
            self.failure = Some(DeviceError::Protocol("the kernel found a ring malformed"));
        }
    }

    pub(super) fn pause_kernel(&mut self) -> Result<(), DeviceError> {
        let mut pairs = self.kernel.iter_mut().zip(&self.vhosts);
        pairs.try_for_each(|(rings, vhost)| rings.pause(vhost))
    }

    /// Goes on after a pause. A failure stops the device when the event loop has its turn.
    pub(super) fn resume_kernel(&mut self) {
        let Some(wire) = &self.wire else { return };
        let pairs = self.kernel.iter_mut().zip(&self.vhosts).zip(&wire.taps);
        let mut kicks = self.kicks.chunks(2);
        for ((rings, vhost), tap) in pairs.take(self.on) {
            if let Err(error) = rings.run(vhost, tap, kicks.next().unwrap_or_default()) {
                self.failure = Some(error);
            }
        }
        if self.failure.is_some() {
            self.wake();
        }
    }
}
