//! What the event loop hears of while this process serves the rings.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::{KICK, Net, TAP};
use super::tap::Tap;

impl Net {
    pub(super) fn watch_tap(&self, tap: &Tap) -> io::Result<()> {
        let edges = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        add(&self.poller, tap.as_raw_fd(), EpollEvent::new(edges, TAP))
    }

    /// Has the poller tell of frames and kicks.
    pub(super) fn watch(&self) -> io::Result<()> {
        if let Some(wire) = &self.wire {
            self.watch_tap(&wire.tap)?;
        }
        for (name, kick) in (KICK..).zip(&self.kicks) {
            add(
                &self.poller,
                kick.as_raw_fd(),
                EpollEvent::new(EventSet::IN, name),
            )?;
        }
        Ok(())
    }

    /// Has the poller tell of neither, so that a device that does not look does not keep the event loop awake.
    pub(super) fn unwatch(&self) {
        let tap = self.wire.as_ref().map(|wire| wire.tap.as_raw_fd());
        for fd in self.kicks.iter().map(AsRawFd::as_raw_fd).chain(tap) {
            // It may not be watched. Closing alone would leave a watch behind if another process shared the description.
            let _ = self
                .poller
                .ctl(ControlOperation::Delete, fd, EpollEvent::default());
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
