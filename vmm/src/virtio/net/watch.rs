//! What the event loop hears of while this process serves the rings, and of the control queue at all times.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::Net;
use super::tap::Tap;

/// Poller's names of its descriptors.
pub(super) const WAKE: u64 = 0;
pub(super) const ERRORS: u64 = 1;
/// The first pair's tap; the others follow.
pub(super) const TAPS: u64 = 0x100;
/// The first queue's kicks; the others follow.
pub(super) const KICKS: u64 = 0x200;

impl Net {
    /// Has the poller tell of frames of the pair of this number, which come by `tap`.
    pub(super) fn watch_tap(&self, pair: usize, tap: &Tap) -> io::Result<()> {
        let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(edges, TAPS + pair as u64);
        add(&self.poller, tap.as_raw_fd(), event)
    }

    /// Has it tell of them no more.
    pub(super) fn unwatch_tap(&self, tap: &Tap) {
        remove(&self.poller, tap.as_raw_fd());
    }

    /// Has the poller tell of kicks: of commands, and of frames if this process moves them.
    pub(super) fn watch_kicks(&self) -> io::Result<()> {
        let own = 2 * self.active.len();
        let control = self.control.as_ref().map(|control| control.index);
        for (index, kick) in self.kicks.iter().enumerate() {
            if index < own || Some(index) == control {
                let event = EpollEvent::new(EventSet::IN, KICKS + index as u64);
                add(&self.poller, kick.as_raw_fd(), event)?;
            }
        }
        Ok(())
    }

    /// Has the poller tell of neither, so that a device that does not look does not keep the event loop awake.
    pub(super) fn unwatch(&self) {
        for tap in self.wire.iter().flat_map(|wire| &wire.taps) {
            self.unwatch_tap(tap);
        }
        for kick in &self.kicks {
            remove(&self.poller, kick.as_raw_fd());
        }
        // Readable or not.
        let _ = self.wake.read();
    }
}

/// Adds a descriptor to a poller that may have it.
fn add(poller: &Epoll, fd: RawFd, event: EpollEvent) -> io::Result<()> {
    match poller.ctl(ControlOperation::Add, fd, event) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Takes a descriptor from a poller that may not have it. Closing alone would leave it there if another process shared the
/// description.
fn remove(poller: &Epoll, fd: RawFd) {
    let _ = poller.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}
