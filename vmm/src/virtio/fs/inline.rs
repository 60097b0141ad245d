//! The file server without a worker thread, for fuzzing.

use std::fs::File;
use std::sync::atomic::AtomicBool;

use super::known::Scratch;
use super::server::{Files, Server};
use crate::virtio::DeviceError;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::Work;

/// Serves queues on the thread that asks for it, whose working directory and umask it takes over.
#[allow(missing_debug_implementations)]
pub struct Inline(Server);

impl Inline {
    /// As [`Fs::new`](super::Fs::new); the guest may keep `guest_files` files open.
    ///
    /// # Errors
    /// The directory cannot be served.
    pub fn new(
        root: File,
        proc_self_fd: File,
        guest_files: u64,
        queues: Vec<DeviceQueue>,
    ) -> Result<Self, DeviceError> {
        let files = Files {
            root,
            proc_self_fd,
            scratch: Scratch::new().map_err(DeviceError::Backend)?,
        };
        Server::new(files, guest_files, queues, &[]).map(Self)
    }

    /// Serves queue `index` until it is empty.
    ///
    /// # Errors
    /// The device has to stop.
    pub fn serve(&mut self, index: usize) -> Result<(), DeviceError> {
        self.0.process_queue(index, &AtomicBool::new(false))
    }
}
