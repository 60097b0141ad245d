//! Pairs of a receive and a transmit queue, of which the driver has the first few on.
//!
//! A pair that is off is not served in either direction, and its queue of the tap is detached: the kernel would choose it
//! for frames that nobody takes. The first pair is always on, and its queue always attached.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use virtio_queue::{Error, Queue};

use super::device::{Net, NetState};
use crate::error_chain;
use crate::virtio::DeviceError;
use crate::virtio::queue::DeviceQueueState;

/// Commands in a row that turn pairs on, and the time after which there may be one more.
const CHANGES: u32 = 32;
const INTERVAL: Duration = Duration::from_secs(1);

/// Limits how often a driver turns pairs on, and so off: for a queue of a tap the host's kernel takes a lock that all
/// interfaces share, and waits for all processors.
#[derive(Debug)]
pub(super) struct Changes {
    left: u32,
    since: Instant,
}

impl Changes {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: CHANGES,
            since: now,
        }
    }

    /// Whether there may be one at `now`.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.since).as_secs() / INTERVAL.as_secs();
        let earned = u32::try_from(passed).unwrap_or(u32::MAX);
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(CHANGES);
            self.since = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

/// Queues of an activation by their use (virtio 1.2, 5.1.2).
pub(super) struct Queues {
    /// Receive and transmit queues.
    pub(super) pairs: Vec<[Queue; 2]>,
    /// Comes behind them.
    pub(super) control: Option<Queue>,
    /// What is left without the driver's features.
    pub(super) unused: Vec<Queue>,
}

impl Queues {
    /// Of a device that offers `most` pairs, to a driver that took `features`.
    pub(super) fn split(mut queues: Vec<Queue>, features: u64, most: usize) -> Result<Self, DeviceError> {
        let has = |feature: u32| features & (1 << feature) != 0;
        if has(VIRTIO_NET_F_MQ) && !has(VIRTIO_NET_F_CTRL_VQ) {
            return Err(DeviceError::Protocol("several pairs need a control queue"));
        }
        let pairs = if has(VIRTIO_NET_F_MQ) { most } else { 1 };
        if queues.len() < 2 * pairs {
            return Err(DeviceError::Protocol("network device needs two queues"));
        }
        let mut unused = queues.split_off(2 * pairs);
        let control = (has(VIRTIO_NET_F_CTRL_VQ) && !unused.is_empty()).then(|| unused.remove(0));
        let mut queues = queues.into_iter();
        let pairs = std::iter::from_fn(|| Some([queues.next()?, queues.next()?])).collect();
        Ok(Self {
            pairs,
            control,
            unused,
        })
    }
}

impl Net {
    /// Pairs that the device offers.
    pub(super) fn offered(&self) -> usize {
        self.queue_sizes.len() / 2
    }

    /// Pairs that the driver can have on.
    fn present(&self) -> usize {
        self.active.len().max(self.kernel.len())
    }

    /// Has the first `count` pairs on, as the driver asks. If that cannot be, as many are on as before: `false`.
    pub(super) fn switch(&mut self, count: usize) -> bool {
        // A driver that did not take several pairs has no such command.
        if self.present() < 2 || !(1..=self.present()).contains(&count) {
            return false;
        }
        let before = self.on;
        if count > before && !self.changes.take(Instant::now()) {
            return false;
        }
        if let Err(error) = self.turn_on(count) {
            if !std::mem::replace(&mut self.reported, true) {
                // Nobody reads it once the sandbox has gone.
                let _ = writeln!(io::stderr(), "{}: {}", self.name, error_chain(&error));
            }
            // What fails now stops the device as well.
            let _ = self.turn_off(before);
            return false;
        }
        self.turn_off(count)
    }

    /// Turns pairs on until `count` are.
    ///
    /// # Errors
    /// The next one cannot be turned on.
    pub(super) fn turn_on(&mut self, count: usize) -> Result<(), DeviceError> {
        if count > self.present() {
            return Err(DeviceError::Protocol("there are not so many pairs"));
        }
        while self.on < count {
            self.turn_one_on(self.on)?;
            self.on += 1;
        }
        Ok(())
    }

    fn turn_one_on(&mut self, index: usize) -> Result<(), DeviceError> {
        let Some(tap) = self.wire.as_ref().and_then(|wire| wire.taps.get(index)) else {
            return Err(DeviceError::Protocol("the wire is gone"));
        };
        if let Some(active) = self.active.get(index)
            && index > 0
            && !active.ready()
        {
            return Err(DeviceError::Queue(Error::QueueNotReady));
        }
        if index > 0 {
            tap.set_attached(true).map_err(DeviceError::Backend)?;
        }
        let served = match (self.kernel.get_mut(index), self.vhosts.get_mut(index)) {
            (Some(rings), Some(vhost)) => {
                let kicks = self.kicks.get(2 * index..2 * index + 2).unwrap_or_default();
                vhost
                    .take()
                    .map_err(DeviceError::Vhost)
                    .and_then(|()| rings.run(vhost, tap, kicks))
            }
            _ => self.watch_tap(index, tap).map_err(DeviceError::Backend),
        };
        if served.is_err() && index > 0 {
            // It is no use to the host's kernel.
            let _ = tap.set_attached(false);
        }
        served?;
        if let Some(active) = self.active.get_mut(index) {
            active.begin();
            self.wake();
        }
        Ok(())
    }

    /// Turns pairs off, the last first, until `count` are on. A failure stops the device when it has answered: `false`.
    fn turn_off(&mut self, count: usize) -> bool {
        while self.on > count.max(1) {
            if let Err(error) = self.turn_one_off(self.on - 1) {
                self.failure = Some(error);
                self.wake();
                return false;
            }
            self.on -= 1;
        }
        true
    }

    fn turn_one_off(&mut self, index: usize) -> Result<(), DeviceError> {
        let tap = self.wire.as_ref().and_then(|wire| wire.taps.get(index));
        if let (Some(rings), Some(vhost)) = (self.kernel.get_mut(index), self.vhosts.get(index)) {
            rings.pause(vhost)?;
        }
        // Receive buffers that this process holds are for the next frame, whenever it comes.
        if let Some(tap) = tap {
            self.unwatch_tap(tap);
            tap.set_attached(false).map_err(DeviceError::Backend)?;
        }
        Ok(())
    }

    /// Everything is off, and the driver's queues are not touched again until the next activation.
    pub(super) fn stop(&mut self) {
        self.stop_kernel();
        self.unwatch();
        if let Some(wire) = &self.wire {
            for tap in wire.taps.iter().take(self.on).skip(1).rev() {
                // It is attached.
                let _ = tap.set_attached(false);
            }
        }
        self.on = 0;
        self.active.clear();
        self.control = None;
        self.unused.clear();
        self.failure = None;
    }

    /// State for a snapshot. Receive buffers that are held go back to the ring; the device thread is
    /// stopped.
    pub fn save(&mut self) -> NetState {
        let mut queues = Vec::new();
        for active in &mut self.active {
            active.release();
            queues.extend([active.rx.save(), active.tx.save()]);
        }
        for rings in &self.kernel {
            queues.extend(rings.save());
        }
        if !queues.is_empty() {
            queues.extend(self.control.iter().map(|control| control.queue.save()));
            queues.extend(self.unused.iter().map(DeviceQueueState::of));
        }
        NetState {
            wire: self.wire.as_ref().map(|wire| (wire.mac, wire.mtu)),
            pairs: self.offered() as u16,
            on: self.on as u16,
            queues,
        }
    }
}
