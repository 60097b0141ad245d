//! File system device (virtio 1.2, 5.11): a host directory served to the guest.
//!
//! The file server is the library of `virtiofsd`. It runs on a worker thread of its own, because any
//! request may block on the host's file systems, and because it changes directory, umask and credentials
//! of its thread while it works.

#[cfg(fuzzing)]
mod inline;
mod known;
mod message;
mod reports;
mod server;
#[cfg(test)]
mod tests;
mod versions;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::queue::{DeviceQueue, RING_FEATURES};
use super::worker::{WorkState, Worker, WorkerThread};
use super::{Activation, DeviceError, DeviceState, RestoreError, Turn, VirtioDevice, config};
use crate::jail::{Thread, filter};

use known::Scratch;

#[cfg(fuzzing)]
pub use inline::Inline;

/// Longest tag in bytes (virtio 1.2, 5.11.4).
const TAG_SIZE: usize = 36;

/// The high priority queue and one request queue (virtio 1.2, 5.11.2). Linux sends no request of more pages
/// than the request queue has entries, less four; 512 allows the server's 1 MiB.
const QUEUE_SIZES: &[u16] = &[128, 512];

/// Why a file system device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("Tag of the shared tree must have 1 to 36 bytes")]
    Tag,
    /// No more descriptors.
    #[error("Cannot create an event descriptor")]
    Event(#[source] io::Error),
    /// No file in memory.
    #[error("Cannot create a file in memory")]
    Scratch(#[source] io::Error),
    /// The limit of open files cannot be set.
    #[error("Cannot raise the limit of open files")]
    Limit(#[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Fs {
    name: String,
    config: [u8; TAG_SIZE + 4],
    root: File,
    proc_self_fd: File,
    guest_files: u64,
    kicks: Arc<Vec<EventFd>>,
    failed: EventFd,
    thread: Option<WorkerThread>,
    worker: Option<Worker>,
    /// Holds what the server knows while it is written down or read.
    scratch: Scratch,
    /// State while paused.
    paused: Option<WorkState>,
    /// What a restored server has to know.
    known: Vec<u8>,
}

impl Fs {
    /// Serves the directory `root` under the mount tag `tag`. `proc_self_fd` is the
    /// directory of this process's descriptors, `/proc/<pid>/fd`.
    ///
    /// The server keeps a descriptor for every file the guest knows, so this raises the process's limit of
    /// open files as far as it goes.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(index: u32, tag: &str, root: File, proc_self_fd: File) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_SIZE {
            return Err(FsError::Tag);
        }
        let mut config = [0; TAG_SIZE + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_SIZE..].copy_from_slice(&1u32.to_le_bytes());
        let guest_files = server::raise_file_limit(&root).map_err(FsError::Limit)?;
        Ok(Self {
            name: format!("fs{index}"),
            config,
            root,
            proc_self_fd,
            guest_files,
            kicks: Arc::default(),
            failed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(FsError::Event)?,
            thread: None,
            worker: None,
            scratch: Scratch::new().map_err(FsError::Scratch)?,
            paused: None,
            known: Vec::new(),
        })
    }

    /// Starts the thread of the server, before there is a guest; `confined` to the system calls it needs.
    ///
    /// # Errors
    /// The thread cannot be made or confined.
    pub fn start_thread(&mut self, confined: bool) -> io::Result<()> {
        self.thread = Some(WorkerThread::start(&self.name, move || {
            // From here on directory and umask are the thread's own.
            unshare(CloneFlags::CLONE_FS)?;
            if confined {
                filter::install(Thread::Files)
            } else {
                Ok(())
            }
        })?);
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }

    fn start(&self, queues: Vec<DeviceQueue>, known: Vec<u8>) -> io::Result<Worker> {
        let files = server::Files {
            root: self.root.try_clone()?,
            proc_self_fd: self.proc_self_fd.try_clone()?,
            scratch: self.scratch.try_clone()?,
        };
        let guest_files = self.guest_files;
        let thread = self.thread.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        Worker::start(thread, self.kicks.clone(), self.failed.try_clone()?, move || {
            server::Server::new(files, guest_files, queues, &known)
        })
    }
}

impl VirtioDevice for Fs {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | RING_FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // The worker of a driver that did not reset the device.
        self.stop();
        let queues = DeviceQueue::from_activation(activation);
        let known = std::mem::take(&mut self.known);
        let is_restored = !known.is_empty();
        let worker = self.start(queues, known).map_err(DeviceError::Backend)?;
        if is_restored {
            // A guest must not go on without the files it has open. This waits for the host's file systems, on the thread
            // that makes the VM: whoever wants the VM gives up in the end.
            worker.built()?;
        }
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.paused = None;
        self.known = Vec::new();
    }

    fn process_queue(&mut self, _index: usize) -> Result<Turn, DeviceError> {
        // Kicks go to the worker.
        Ok(Turn::Done)
    }

    fn event_fd(&self) -> Option<RawFd> {
        Some(self.failed.as_raw_fd())
    }

    fn process_event(&mut self) -> Result<(), DeviceError> {
        // Empty if the device was reset meanwhile.
        let _ = self.failed.read();
        match self.worker.as_ref().and_then(Worker::take_failure) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn owns_queue_events(&self) -> bool {
        true
    }

    fn set_queue_events(&mut self, events: Vec<EventFd>) {
        self.kicks = Arc::new(events);
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.paused = match &self.worker {
            Some(worker) => Some(worker.pause().map_err(DeviceError::Backend)?),
            None => None,
        };
        Ok(())
    }

    fn resume(&mut self) {
        self.paused = None;
        if let Some(worker) = &self.worker {
            worker.resume();
        }
    }

    /// With the files that the guest knows and has open, by their names in the tree: a restored device needs a tree that
    /// has them.
    fn save_state(&mut self) -> DeviceState {
        DeviceState::Fs(self.paused.clone().unwrap_or_default())
    }

    fn restore_state(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Fs(state) = state else {
            return Err(RestoreError::Kind);
        };
        if state.queues.is_empty() && !state.known.is_empty() {
            // What a driver knows it has been told over queues.
            return Err(RestoreError::Queues {
                queues: QUEUE_SIZES.len(),
                saved: 0,
            });
        }
        self.known.clone_from(&state.known);
        Ok(())
    }
}
