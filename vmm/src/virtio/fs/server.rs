//! What runs on the worker thread: the file server and the queues it answers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{close, fchdir};
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};

use super::message::Messages;
use crate::virtio::DeviceError;
use crate::virtio::queue::{DeviceQueue, DeviceQueueState};
use crate::virtio::worker::Work;

/// Descriptors kept for everything else in this process.
const RESERVED_FILES: u64 = 512;

/// Size to which the descriptor table is grown at once. The kernel doubles the table when it is full, and
/// waits for an RCU grace period each time if the process has threads: milliseconds in the middle of a
/// container's start.
const TABLE_SIZE: u64 = 4096;

/// How long the guest takes names and attributes for granted. Others change volumes while the guest runs.
const CACHE_TIME: Duration = Duration::from_secs(1);

/// The file server.
pub(super) struct Server {
    server: virtiofsd::server::Server<PassthroughFs>,
    messages: Messages,
    queues: Vec<DeviceQueue>,
}

impl Server {
    /// Serves `root` on `queues`. Must run on the thread that will serve, and takes over its working
    /// directory and umask.
    ///
    /// # Errors
    /// The library cannot use the directory.
    pub(super) fn new(
        root: &File,
        proc_self_fd: Option<File>,
        guest_files: u64,
        queues: Vec<DeviceQueue>,
    ) -> Result<Self, DeviceError> {
        let fs = passthrough(root, proc_self_fd, guest_files).map_err(DeviceError::Backend)?;
        let memory = queues
            .first()
            .ok_or(DeviceError::Protocol("no queue"))?
            .memory()
            .clone();
        Ok(Self {
            server: virtiofsd::server::Server::new(fs),
            messages: Messages::new(memory).map_err(DeviceError::Backend)?,
            queues,
        })
    }
}

impl Work for Server {
    fn process_queue(&mut self, index: usize, interrupted: &AtomicBool) -> Result<(), DeviceError> {
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(());
        };
        while !interrupted.load(Ordering::Acquire) {
            let Some(chain) = queue.pop()? else {
                break;
            };
            let (reader, writer) = self.messages.open(&chain)?;
            let written = self
                .server
                .handle_message(reader, writer, None::<&mut ()>)
                .map_err(|error| DeviceError::Backend(io::Error::other(error)))?;
            queue.add_used(chain, u32::try_from(written).unwrap_or(u32::MAX))?;
            // The guest waits for each answer by itself.
            queue.signal()?;
        }
        Ok(())
    }

    fn save_queues(&self) -> Vec<DeviceQueueState> {
        self.queues.iter().map(DeviceQueue::save).collect()
    }
}

fn passthrough(root: &File, proc_self_fd: Option<File>, guest_files: u64) -> io::Result<PassthroughFs> {
    // From here on directory and umask are this thread's own. The library opens its root by path; as that
    // is the working directory, nothing outside it is ever looked up.
    unshare(CloneFlags::CLONE_FS)?;
    fchdir(root.as_raw_fd())?;
    PassthroughFs::new(Config {
        root_dir: ".".to_owned(),
        proc_sfd_rawfd: proc_self_fd,
        guest_fd_limit: guest_files,
        entry_timeout: CACHE_TIME,
        attr_timeout: CACHE_TIME,
        // Close-to-open consistency, because volumes are shared with the host and other pods. A write-back
        // cache would break appends to a file others append to, and what it holds dies with the VM.
        cache_policy: CachePolicy::Auto,
        writeback: false,
        // Each container's root file system and volume is a mount of its own, and inode numbers repeat
        // between them: the guest needs a device number for each, or `cp` takes different files for one.
        announce_submounts: true,
        // `open_by_handle_at` needs a capability in the initial user namespace.
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        xattr: true,
        // Access is decided in the guest, so it has to see the ACLs.
        posix_acl: NegotiationMode::Auto,
        // Otherwise the guest asks for `security.capability` before every write.
        killpriv_v2: true,
        // Not every file system below takes O_DIRECT, and its alignment rules differ.
        allow_direct_io: false,
        ..Config::default()
    })
}

/// Raises the soft limit of open files to the hard one and grows the descriptor table. Returns how many
/// files the server may keep open. `any` is any open file.
pub(super) fn raise_file_limit(any: &File) -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    if hard > TABLE_SIZE {
        let last = fcntl(any.as_raw_fd(), FcntlArg::F_DUPFD_CLOEXEC(TABLE_SIZE as i32 - 1))?;
        close(last)?;
    }
    Ok(hard.saturating_sub(RESERVED_FILES))
}
