//! What runs on the worker thread: the file server and the queues it answers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{close, fchdir};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::SerializableFileSystem as _;
use virtiofsd::passthrough::{
    CachePolicy, Config, InodeFileHandlesMode, MigrationMode, MigrationOnError, NegotiationMode,
    PassthroughFs,
};

use super::known::{INIT_ANSWER_SIZE, Known, Scratch};
use super::message::Messages;
use super::reports;
use super::versions::{self, Version, Versions};
use crate::virtio::DeviceError;
use crate::virtio::queue::{Chain, DeviceQueue};
use crate::virtio::worker::{Work, WorkState};

/// Descriptors kept for everything else in this process.
const RESERVED_FILES: u64 = 512;

/// Most open files of this process. Each takes memory of the host's kernel.
const MOST_FILES: u64 = 1 << 20;

/// Size to which the descriptor table is grown at once. The kernel doubles the table when it is full, and
/// waits for an RCU grace period each time if the process has threads: milliseconds in the middle of a
/// container's start.
const TABLE_SIZE: u64 = 4096;

/// How long the guest takes names and attributes for granted. Others change volumes while the guest runs.
const CACHE_TIME: Duration = Duration::from_secs(1);

const FUSE_FORGET: u32 = 2;
const FUSE_OPEN: u32 = 14;
const FUSE_INIT: u32 = 26;
const FUSE_DESTROY: u32 = 38;

/// Bytes of a successful answer to `FUSE_OPEN`: header, file handle, flags, padding.
const OPEN_ANSWER_SIZE: usize = 32;
/// Offset of the flags in it.
const OPEN_FLAGS_OFFSET: usize = 24;
/// The guest's pages of the file stay valid.
const FOPEN_KEEP_CACHE: u32 = 1 << 1;

/// What the server needs of the process.
pub(super) struct Files {
    /// The directory that is served.
    pub root: File,
    /// The directory of this process's descriptors.
    pub proc_self_fd: File,
    /// Where the library writes and reads what it knows.
    pub scratch: Scratch,
}

/// The file server.
pub(super) struct Server {
    server: virtiofsd::server::Server<PassthroughFs>,
    messages: Messages,
    versions: Versions,
    queues: Vec<DeviceQueue>,
    scratch: Scratch,
    /// The `FUSE_INIT` by which the guest has mounted the tree; `None`: it has not, and knows nothing of it.
    mount: Option<Vec<u8>>,
}

impl Server {
    /// Serves a directory on `queues` to a guest that knows of it what `known` says, as [`Work::save`] wrote it, or
    /// nothing. Must run on the thread that will serve, and takes over its working directory and umask.
    ///
    /// # Errors
    /// The library cannot use the directory, or `known` is not what it wrote.
    pub(super) fn new(
        files: Files,
        guest_files: u64,
        queues: Vec<DeviceQueue>,
        known: &[u8],
    ) -> Result<Self, DeviceError> {
        let Files {
            root,
            proc_self_fd,
            scratch,
        } = files;
        let fs = passthrough(&root, proc_self_fd, guest_files).map_err(DeviceError::Backend)?;
        let memory = queues
            .first()
            .ok_or(DeviceError::Protocol("no queue"))?
            .memory()
            .clone();
        let mut server = Self {
            server: virtiofsd::server::Server::new(fs),
            messages: Messages::new(memory).map_err(DeviceError::Backend)?,
            versions: Versions::default(),
            queues,
            scratch,
            mount: None,
        };
        if !known.is_empty() {
            server.restore(Known::decode(known)?)?;
        }
        Ok(server)
    }

    /// Goes on where another server was. Versions of files are not kept: at the next open of a file the guest drops its
    /// pages, for the file may be another one now.
    fn restore(&mut self, known: Known) -> Result<(), DeviceError> {
        // The library keeps what was agreed on with the guest in two places and brings back one of them.
        let (reader, writer) = self.messages.open_own(&known.mount, INIT_ANSWER_SIZE)?;
        handle(&self.server, reader, writer)?;
        let mut answer = [0; 8];
        self.messages.read_own(&mut answer)?;
        let [.., e0, e1, e2, e3] = answer;
        match i32::from_le_bytes([e0, e1, e2, e3]) {
            0 => {}
            error => {
                return Err(DeviceError::Backend(io::Error::from_raw_os_error(
                    error.saturating_neg(),
                )));
            }
        }
        let file = self.scratch.fill(&known.files).map_err(DeviceError::Backend)?;
        let read = reports::tell(|| self.server.deserialize_and_apply(file));
        read.and_then(|()| self.scratch.empty())
            .map_err(DeviceError::Backend)?;
        self.mount = Some(known.mount);
        Ok(())
    }

    /// What the guest knows of the tree, in the form that [`restore`](Self::restore) takes.
    fn save_known(&mut self, cancelled: &Arc<AtomicBool>) -> io::Result<Vec<u8>> {
        let Some(mount) = &self.mount else {
            return Ok(Vec::new());
        };
        let file = self.scratch.fill(&[])?;
        let written = reports::tell(|| {
            self.server.prepare_serialization(cancelled.clone());
            // Also after a cancellation: it ends what the preparation has begun.
            self.server.serialize(file)
        });
        let files = written.and_then(|()| self.scratch.take());
        if cancelled.load(Ordering::Acquire) {
            // Some of the files have not been looked for.
            return Err(io::ErrorKind::Interrupted.into());
        }
        let known = Known {
            mount: mount.clone(),
            files: files?,
        };
        known.encode()
    }

    /// Answers one message and returns the number of bytes written.
    fn serve(&mut self, chain: &Chain) -> Result<u32, DeviceError> {
        let (header, reader, writer) = self.messages.open(chain)?;
        let written = handle(&self.server, reader, writer)?;
        match header.opcode {
            FUSE_OPEN if written == OPEN_ANSWER_SIZE => self.keep_cache(header.node, chain)?,
            FUSE_FORGET => self.versions.forget(header.node),
            FUSE_INIT if written == INIT_ANSWER_SIZE => {
                self.mount = Known::mount(self.messages.start());
            }
            FUSE_INIT | FUSE_DESTROY => self.mount = None,
            _ => {}
        }
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    /// Lets the guest keep the pages it has of a file it opens if the file is what it was at the last open.
    /// The library's choice is to drop them at every open, with them those of a running program, or never.
    fn keep_cache(&mut self, node: u64, chain: &Chain) -> Result<(), DeviceError> {
        let Some(version) = self.version(node)? else {
            return Ok(());
        };
        if self.versions.replace(node, version) {
            let Some(queue) = self.queues.first() else {
                return Ok(());
            };
            // With our configuration the library sets no other flag for a file.
            chain.write_at(queue.memory(), OPEN_FLAGS_OFFSET, &FOPEN_KEEP_CACHE.to_le_bytes())?;
        }
        Ok(())
    }

    fn version(&mut self, node: u64) -> Result<Option<Version>, DeviceError> {
        let (reader, writer) = self
            .messages
            .open_own(&versions::getattr(node), versions::GETATTR_ANSWER_SIZE)?;
        let written = handle(&self.server, reader, writer)?;
        if written != versions::GETATTR_ANSWER_SIZE {
            return Ok(None);
        }
        let mut answer = [0; versions::GETATTR_ANSWER_SIZE];
        self.messages.read_own(&mut answer)?;
        Ok(Some(Version::of(&answer)))
    }
}

fn handle(
    server: &virtiofsd::server::Server<PassthroughFs>,
    reader: Reader<'_>,
    writer: Writer<'_>,
) -> Result<usize, DeviceError> {
    server
        .handle_message(reader, writer, None::<&mut ()>)
        .map_err(|error| DeviceError::Backend(io::Error::other(error)))
}

impl Work for Server {
    fn process_queue(&mut self, index: usize, interrupted: &AtomicBool) -> Result<(), DeviceError> {
        while !interrupted.load(Ordering::Acquire) {
            let Some(chain) = self.queues.get_mut(index).map_or(Ok(None), DeviceQueue::pop)? else {
                break;
            };
            let written = self.serve(&chain)?;
            let Some(queue) = self.queues.get_mut(index) else {
                break;
            };
            queue.add_used(chain, written)?;
            // The guest waits for each answer by itself.
            queue.signal()?;
        }
        Ok(())
    }

    /// Files that have no name any more are not kept: the guest gets an error for them, and for them alone.
    fn save(&mut self, cancelled: &Arc<AtomicBool>) -> io::Result<WorkState> {
        Ok(WorkState {
            queues: self.queues.iter().map(DeviceQueue::save).collect(),
            known: self.save_known(cancelled)?,
        })
    }
}

fn passthrough(root: &File, proc_self_fd: File, guest_files: u64) -> io::Result<PassthroughFs> {
    // The library opens its root by path; as that is the working directory, nothing outside it is ever looked up.
    fchdir(root.as_raw_fd())?;
    PassthroughFs::new(Config {
        root_dir: ".".to_owned(),
        proc_sfd_rawfd: Some(proc_self_fd),
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
        // A snapshot names the files that the guest knows by where they are below the root.
        migration_mode: MigrationMode::FindPaths,
        migration_on_error: MigrationOnError::GuestError,
        ..Config::default()
    })
}

/// Raises the soft limit of open files to the hard one and grows the descriptor table. Returns how many
/// files the server may keep open. `any` is any open file.
pub(super) fn raise_file_limit(any: &File) -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let hard = hard.min(MOST_FILES);
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    if hard > TABLE_SIZE {
        let last = fcntl(any.as_raw_fd(), FcntlArg::F_DUPFD_CLOEXEC(TABLE_SIZE as i32 - 1))?;
        close(last)?;
    }
    Ok(hard.saturating_sub(RESERVED_FILES))
}
