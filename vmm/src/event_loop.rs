//! The event loop of the devices: one thread serves them in turns.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::virtio::mmio::MmioTransport;
use crate::virtio::vsock::Vsock;

/// Low half of a device's epoll data when its own descriptor is meant, not a queue.
const OWN_EVENT: u64 = 0xffff_ffff;

/// Most turns of [`DeviceLoop::deliver`] while nothing waits for a far end: more than it takes to serve full
/// queues.
const IDLE_TURNS: usize = 32;

/// Everything of the devices that is watched, behind one descriptor, so that a pause takes one call.
#[derive(Debug)]
pub struct DeviceLoop {
    poll: Epoll,
    devices: Vec<Arc<MmioTransport>>,
    vsock: Arc<Mutex<Vsock>>,
}

impl DeviceLoop {
    /// Watches `devices`, of which one is `vsock`.
    ///
    /// # Errors
    /// A descriptor cannot be made or watched.
    pub fn new(devices: &[Arc<MmioTransport>], vsock: &Arc<Mutex<Vsock>>) -> io::Result<Self> {
        let poll = Epoll::new()?;
        for (index, device) in (0u64..).zip(devices) {
            for (queue, event) in (0u64..).zip(device.watched_queues()) {
                watch(&poll, event.as_raw_fd(), index << 32 | queue)?;
            }
            if let Some(fd) = device.watched_event() {
                watch(&poll, fd, index << 32 | OWN_EVENT)?;
            }
        }
        Ok(Self {
            poll,
            devices: devices.to_vec(),
            vsock: vsock.clone(),
        })
    }

    /// Readable when [`turn`](Self::turn) has something to do.
    pub fn descriptor(&self) -> RawFd {
        self.poll.as_raw_fd()
    }

    /// Serves what is ready, waiting up to `timeout` for it, and each queue by its budget at most. Whether
    /// anything was ready.
    ///
    /// # Errors
    /// Polling failed.
    pub fn turn(&self, timeout: Duration) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 32];
        let count = wait(&self.poll, timeout.as_millis() as i32, &mut events)?;
        for event in &events[..count] {
            let (index, part) = (event.data() >> 32, event.data() & 0xffff_ffff);
            let Some(device) = self.devices.get(index as usize) else {
                continue;
            };
            if part == OWN_EVENT {
                device.process_event();
            } else {
                device.process_queue(part as usize);
            }
        }
        Ok(count > 0)
    }

    /// Serves what the guest left in the queues when it ended, and waits for far ends that are slow to take
    /// its bytes, `limit` at most.
    ///
    /// # Errors
    /// Polling failed.
    pub fn deliver(&self, limit: Duration) -> io::Result<()> {
        let deadline = Instant::now() + limit;
        let mut idle_turns = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let waiting = self
                .vsock
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .has_undelivered();
            idle_turns += usize::from(!waiting);
            let ready = self.turn(if waiting { left } else { Duration::ZERO })?;
            if left.is_zero() || idle_turns > IDLE_TURNS || !ready && !waiting {
                return Ok(());
            }
        }
    }
}

/// Adds a descriptor to `poll`.
///
/// # Errors
/// The kernel refuses.
pub fn watch(poll: &Epoll, fd: RawFd, data: u64) -> io::Result<()> {
    poll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data))
}

/// Waits up to `timeout` milliseconds (-1: for ever); the number of `events`.
///
/// # Errors
/// Polling failed.
pub fn wait(poll: &Epoll, timeout: i32, events: &mut [EpollEvent]) -> io::Result<usize> {
    loop {
        match poll.wait(timeout, events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
