//! A network device whose rings the kernel serves, between activation and reset.

#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Error, Queue, QueueT};
use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ERRORS, Net, NetError, SlotError};
use super::tap::Tap;
use super::vhost::Vhost;
use crate::memory::GuestMemory;
use crate::virtio::queue::DeviceQueueState;
use crate::virtio::{Activation, DeviceError, Interrupt};

/// The rings, of which this process only remembers where they are.
#[derive(Debug)]
pub struct KernelRings {
    /// Their indices are true while they stand still.
    queues: Vec<Queue>,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    running: bool,
}

impl KernelRings {
    /// Hands the rings of an activation to the kernel. The driver kicks it by `kicks`, in the order of the rings.
    ///
    /// # Errors
    /// A ring is off or not in memory, or the kernel refuses; no ring runs then.
    pub fn start(
        vhost: &Vhost,
        tap: &Tap,
        kicks: &[EventFd],
        activation: Activation,
    ) -> Result<Self, DeviceError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        if queues.len() != kicks.len() {
            return Err(DeviceError::Protocol("network device needs two queues"));
        }
        // The kernel knows nothing of queues that are off.
        if !queues.iter().all(QueueT::ready) {
            return Err(DeviceError::Queue(Error::QueueNotReady));
        }
        vhost.prepare(features, &memory).map_err(DeviceError::Vhost)?;
        for (index, (queue, kick)) in (0..).zip(queues.iter().zip(kicks)) {
            vhost
                .set_ring(index, queue, &memory, kick, interrupt.event())
                .map_err(DeviceError::Vhost)?;
        }
        interrupt.raised_by_kernel(true);
        let mut rings = Self {
            queues,
            memory,
            interrupt,
            running: false,
        };
        match rings.resume(vhost, tap, kicks) {
            Ok(()) => Ok(rings),
            Err(error) => {
                rings.stop(vhost);
                Err(error)
            }
        }
    }

    /// Lets the rings run; those that do go on.
    ///
    /// # Errors
    /// The kernel refuses; no ring runs then.
    pub fn resume(&mut self, vhost: &Vhost, tap: &Tap, kicks: &[EventFd]) -> Result<(), DeviceError> {
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
        self.halt(vhost);
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
    /// Has the kernel serve the rings of the interface, by `/dev/vhost-net`, from the driver's next start on.
    ///
    /// # Errors
    /// See [`SlotError`]; the interface is as it was.
    pub fn serve_by(&mut self, vhost: OwnedFd) -> Result<(), SlotError> {
        let slot = self.slot;
        let vhost = Vhost::new(vhost).map_err(|error| SlotError::Wire(slot, NetError::Vhost(error)))?;
        self.serve_with(vhost)
    }

    pub(super) fn serve_with(&mut self, vhost: Vhost) -> Result<(), SlotError> {
        if self.wire.is_none() {
            return Err(SlotError::Empty(self.slot));
        }
        let errors = vhost.errors().as_raw_fd();
        self.poller
            .ctl(
                ControlOperation::Add,
                errors,
                EpollEvent::new(EventSet::IN, ERRORS),
            )
            .map_err(|error| SlotError::Wire(self.slot, NetError::Poller(error)))?;
        self.vhost = Some(vhost);
        // Frames wake the kernel's worker, and not this process.
        self.unwatch();
        Ok(())
    }

    /// Takes the kernel's server from an interface that goes.
    pub(super) fn close_kernel(&mut self) {
        self.stop_kernel();
        if let Some(vhost) = self.vhost.take() {
            let errors = vhost.errors().as_raw_fd();
            let _ = self
                .poller
                .ctl(ControlOperation::Delete, errors, EpollEvent::default());
        }
    }

    /// Starts the device on the kernel's server, if the interface has one; else gives the activation back.
    pub(super) fn start_kernel(&mut self, activation: Activation) -> Result<Option<Activation>, DeviceError> {
        let (Some(wire), Some(vhost)) = (&self.wire, &self.vhost) else {
            return Ok(Some(activation));
        };
        vhost.forget_errors();
        self.kernel = Some(KernelRings::start(vhost, &wire.tap, &self.kicks, activation)?);
        Ok(None)
    }

    /// Takes the rings back from the kernel, if it has them.
    pub(super) fn stop_kernel(&mut self) {
        if let (Some(rings), Some(vhost)) = (self.kernel.take(), &self.vhost) {
            rings.stop(vhost);
            vhost.forget_errors();
        }
    }

    /// The kernel has found a ring broken.
    pub(super) fn ring_broken(&mut self) {
        if let Some(vhost) = &self.vhost {
            vhost.forget_errors();
        }
        if self.kernel.is_some() {
            self.failure = Some(DeviceError::Protocol("the kernel found a ring malformed"));
        }
    }

    pub(super) fn pause_kernel(&mut self) -> Result<(), DeviceError> {
        match (&mut self.kernel, &self.vhost) {
            (Some(rings), Some(vhost)) => rings.pause(vhost),
            _ => Ok(()),
        }
    }

    /// Goes on after a pause. A failure stops the device when the event loop has its turn.
    pub(super) fn resume_kernel(&mut self) {
        if let (Some(rings), Some(wire), Some(vhost)) = (&mut self.kernel, &self.wire, &self.vhost)
            && let Err(error) = rings.resume(vhost, &wire.tap, &self.kicks)
        {
            self.failure = Some(error);
            self.wake();
        }
    }
}
