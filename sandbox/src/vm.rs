//! One virtual machine: the VMM process and the control socket to it.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bulkhead_protocol::control::{
    Booted, Channel, ChannelError, Event, Exit, Fd, Inspection, Reply, Request, RequestMessage,
    VMM_SOCKET_FD, VmConfig, VmmMessage,
};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot, watch};

use crate::cgroup::Cgroup;
use crate::console;
use crate::jail::Jail;
use crate::limits;
use crate::mount;
use crate::spawn::{self, Ending, Program};

mod actor;
mod error;
#[cfg(any(test, fuzzing))]
mod fake;
#[cfg(test)]
mod tests;

pub use error::VmError;

/// How the VM ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmEnd {
    /// In words.
    pub reason: String,
    /// Whether the guest powered itself off.
    pub orderly: bool,
    /// End of the guest console, one line; may be empty.
    pub console: String,
    /// Whether the host killed it because the pod's cgroup had no memory left.
    pub out_of_memory: bool,
}

impl std::fmt::Display for VmEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.reason)?;
        if !self.console.is_empty() {
            write!(f, "; console: {}", self.console)?;
        }
        Ok(())
    }
}

/// A started VMM process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Process id.
    pub pid: i32,
    /// Clock ticks since boot.
    pub start_time: u64,
}

/// Collects the descriptors of one message and hands out their indices.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    /// Adds a descriptor; its index.
    pub fn add(&mut self, fd: OwnedFd) -> Fd {
        // A message holds at most 250 descriptors; the channel refuses more.
        let index = u16::try_from(self.0.len()).unwrap_or(u16::MAX);
        self.0.push(fd);
        Fd(index)
    }

    /// The descriptors in the order of their indices.
    #[must_use]
    pub fn into_vec(self) -> Vec<OwnedFd> {
        self.0
    }
}

struct Command {
    request: Request,
    descriptors: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<Reply, VmError>>,
}

/// A running VMM process. When the last clone is dropped the process is killed.
#[derive(Clone, Debug)]
pub struct Vm {
    commands: mpsc::UnboundedSender<Command>,
    end: watch::Receiver<Option<Arc<VmEnd>>>,
    memory: watch::Receiver<u32>,
    started: Started,
    /// Why this process killed it, if it said.
    verdict: Arc<OnceLock<String>>,
}

/// A stream's news from the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VsockEvent {
    /// The guest has dialled this host port.
    Connected(u32),
    /// The first byte from the guest has come on this host port, at this `CLOCK_MONOTONIC` time in
    /// microseconds.
    FirstData(u32, u64),
    /// The stream of this port is over.
    Closed(u32),
}

impl Vm {
    /// Starts the VMM process in `jail`. Its `Boot` request is for [`Vm::boot`]. Stream events go to `events`.
    ///
    /// Call it from the process's main thread: the VMM dies with the thread that started it.
    ///
    /// # Errors
    /// [`VmError`]; no process is left.
    pub fn start(
        program: &std::path::Path,
        jail: Jail<'_>,
        cgroup: Option<Cgroup>,
        oom_score_adj: i32,
        events: mpsc::UnboundedSender<VsockEvent>,
    ) -> Result<Self, VmError> {
        let executable = mount::open_path(program, false).map_err(VmError::Program)?;
        let (ours, theirs) = Channel::pair().map_err(VmError::Socket)?;
        let (stderr, stderr_write) = std::io::pipe().map_err(VmError::Descriptor)?;
        let null = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .map_err(VmError::Descriptor)?;
        let name = CString::new("bulkhead-vmm").unwrap_or_default();
        let process = spawn::spawn(&Program {
            executable: executable.as_fd(),
            arguments: vec![name],
            environment: Vec::new(),
            descriptors: vec![
                (null.as_fd(), 0),
                (null.as_fd(), 1),
                (stderr_write.as_fd(), 2),
                (theirs.as_fd(), VMM_SOCKET_FD),
            ],
            jail: Some(jail),
        })
        .map_err(VmError::Spawn)?;
        drop((theirs, stderr_write));
        let started = Started {
            pid: process.pid,
            start_time: spawn::start_time(process.pid).unwrap_or_default(),
        };
        if let Err(error) = std::fs::write(
            format!("/proc/{}/oom_score_adj", process.pid),
            oom_score_adj.to_string(),
        ) {
            log::warn!("cannot set oom_score_adj of the VMM to {oom_score_adj}: {error}");
        }
        fcntl(
            std::os::fd::AsRawFd::as_raw_fd(&ours),
            FcntlArg::F_SETFL(OFlag::O_NONBLOCK),
        )
        .map_err(|errno| VmError::Descriptor(errno.into()))?;
        let (commands, receiver) = mpsc::unbounded_channel();
        let (end_sender, end) = watch::channel(None);
        let (memory_sender, memory) = watch::channel(0);
        let lines = actor::read_stderr(stderr).map_err(VmError::Descriptor)?;
        let verdict = Arc::new(OnceLock::new());
        let actor = actor::Actor {
            verdict: verdict.clone(),
            channel: watch_fd(ours).map_err(VmError::Descriptor)?,
            pidfd: watch_fd(process.pidfd).map_err(VmError::Descriptor)?,
            commands: receiver,
            pending: HashMap::new(),
            next_id: 1,
            events,
            exit: None,
            memory: memory_sender,
            oom_kills_before: cgroup.as_ref().map_or(0, Cgroup::oom_kills),
            cgroup,
            stderr: lines,
        };
        tokio::spawn(async move {
            let end = actor.run().await;
            log::debug!("VM ended: {end}");
            // The receivers live in the handles; if all are gone nobody wants to know.
            let _ = end_sender.send(Some(Arc::new(end)));
        });
        Ok(Self {
            commands,
            end,
            memory,
            started,
            verdict,
        })
    }

    /// Process id and start time of the VMM.
    #[must_use]
    pub fn process(&self) -> Started {
        self.started
    }

    /// Waits for the end of the VM.
    pub async fn ended(&self) -> Arc<VmEnd> {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().unwrap_or_else(unknown_end),
            Err(_) => unknown_end(),
        }
    }

    /// How the VM ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<Arc<VmEnd>> {
        self.end.borrow().clone()
    }

    /// Memory in MiB that the guest has beside that of its boot.
    #[must_use]
    pub fn added_memory(&self) -> u32 {
        *self.memory.borrow()
    }

    /// Follows [`Vm::added_memory`]; closed when the VM has ended.
    #[must_use]
    pub fn watch_memory(&self) -> watch::Receiver<u32> {
        self.memory.clone()
    }

    /// Waits until the guest has `mib` MiB beside that of its boot; whether it has.
    pub async fn wait_for_memory(&self, mib: u32, limit: Duration) -> bool {
        let mut memory = self.memory.clone();
        let grown = memory.wait_for(|has| *has >= mib);
        matches!(tokio::time::timeout(limit, grown).await, Ok(Ok(_)))
    }

    /// Kills the VMM process.
    pub fn kill(&self) {
        match spawn::pidfd_open(self.started.pid) {
            Ok(pidfd) if spawn::start_time(self.started.pid) == Some(self.started.start_time) => {
                let _ = spawn::pidfd_kill(&pidfd);
            }
            _ => {}
        }
    }

    /// Kills the VMM process; its end has this reason unless it ends of itself first.
    pub fn kill_because(&self, reason: String) {
        // The first reason is the cause of the others.
        let _ = self.verdict.set(reason);
        self.kill();
    }

    /// Sends a request and waits for its answer, at most for `limit`.
    ///
    /// # Errors
    /// [`VmError::Refused`] with the VMM's words, [`VmError::Gone`] when the VM ends first, [`VmError::NoAnswer`].
    async fn request(
        &self,
        request: Request,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Reply, VmError> {
        let name = name(&request);
        let (reply, answer) = oneshot::channel();
        let command = Command {
            request,
            descriptors,
            reply,
        };
        self.commands.send(command).map_err(|_| VmError::Gone)?;
        match tokio::time::timeout(limit, answer).await {
            Ok(answer) => answer.map_err(|_| VmError::Gone)?,
            Err(_) => Err(VmError::NoAnswer { request: name, limit }),
        }
    }

    /// Boots the VM: waits until its first instruction, at most for `limit`.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub async fn boot(
        &self,
        config: VmConfig,
        descriptors: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Booted, VmError> {
        let request = Request::Boot(Box::new(config));
        match self.request(request, descriptors, limit).await? {
            Reply::Booted(booted) => Ok(booted),
            _ => Err(VmError::WrongReply("boot")),
        }
    }

    /// A request whose answer has no content. It may take [`limits::VMM_TIME`].
    ///
    /// # Errors
    /// [`VmError::Refused`] with the VMM's words, [`VmError::Gone`] when the VM ends first, [`VmError::NoAnswer`].
    pub async fn ask(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<(), VmError> {
        let name = name(&request);
        match self.request(request, descriptors, limits::VMM_TIME).await? {
            Reply::Done => Ok(()),
            _ => Err(VmError::WrongReply(name)),
        }
    }

    /// Writes the VM down, which is paused, into two empty files.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub async fn snapshot(&self, state: OwnedFd, memory: OwnedFd) -> Result<(), VmError> {
        let pagemap = PathBuf::from(format!("/proc/{}/pagemap", self.started.pid));
        let mut fds = Descriptors::default();
        let request = Request::Snapshot {
            state: fds.add(state),
            memory: fds.add(memory),
            pagemap: fds.add(open_for_vm("the VMM's pagemap", &pagemap, false)?),
        };
        self.ask(request, fds.into_vec()).await
    }

    /// Which memory the guest, which began from a snapshot, has written since: `None` if that is more than can be
    /// used, in bytes for [`Start::Snapshot`](bulkhead_protocol::control::Start::Snapshot).
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub async fn list_written(&self) -> Result<Option<Vec<u8>>, VmError> {
        let pagemap = PathBuf::from(format!("/proc/{}/pagemap", self.started.pid));
        // In memory, and copied: tenants' code has run beside the VMM, which may keep its descriptor.
        let list = memfd_create(c"written", MemFdCreateFlag::MFD_CLOEXEC);
        let list = File::from(list.map_err(|errno| VmError::Descriptor(errno.into()))?);
        let mut fds = Descriptors::default();
        let request = Request::ListWritten {
            list: fds.add(list.try_clone().map_err(VmError::Descriptor)?.into()),
            pagemap: fds.add(open_for_vm("the VMM's pagemap", &pagemap, false)?),
        };
        self.ask(request, fds.into_vec()).await?;
        let mut bytes = vec![0; limits::WRITTEN + 1];
        let length = list.read_at(&mut bytes, 0).map_err(VmError::Descriptor)?;
        bytes.truncate(length);
        Ok((length <= limits::WRITTEN).then_some(bytes))
    }

    /// What the VMM says about its VM, within `limit`.
    ///
    /// # Errors
    /// As [`Vm::ask`].
    pub async fn inspect(&self, limit: Duration) -> Result<Inspection, VmError> {
        match self.request(Request::Inspect, Vec::new(), limit).await? {
            Reply::Inspected(inspection) => Ok(inspection),
            _ => Err(VmError::WrongReply("inspect")),
        }
    }

    /// The end of the guest console on one line, for an error; empty if the VMM does not answer soon.
    pub async fn console_tail(&self) -> String {
        self.inspect(limits::CONSOLE_TIME)
            .await
            .map_or_else(|_| String::new(), |inspection| console::tail(&inspection.console))
    }
}

/// Registers something that owns one descriptor with the runtime.
fn watch_fd<T: Owning>(owner: T) -> std::io::Result<AsyncFd<T>> {
    // SAFETY: an `Owning` type keeps the same descriptor open for as long as it lives.
    unsafe { AsyncFd::register(owner) }.map_err(Into::into)
}

/// Types that own exactly one descriptor from creation to drop.
trait Owning: std::os::fd::AsRawFd {}
impl Owning for Channel {}
impl Owning for OwnedFd {}

fn unknown_end() -> Arc<VmEnd> {
    Arc::new(VmEnd {
        reason: "unknown".into(),
        ..VmEnd::default()
    })
}

fn name(request: &Request) -> &'static str {
    match request {
        Request::Boot(_) => "boot",
        Request::Pause => "pause",
        Request::Resume => "resume",
        Request::VsockListen { .. } => "vsock listen",
        Request::VsockUnlisten { .. } => "vsock unlisten",
        Request::VsockConnect { .. } => "vsock connect",
        Request::AttachDisk { .. } => "attach disk",
        Request::DetachDisk { .. } => "detach disk",
        Request::AttachNet { .. } => "attach net",
        Request::DetachNet { .. } => "detach net",
        Request::SetBalloon { .. } => "set balloon",
        Request::AddVcpus { .. } => "add vcpus",
        Request::SetMemory { .. } => "set memory",
        Request::Snapshot { .. } => "snapshot",
        Request::ListWritten { .. } => "list written",
        Request::Inspect => "inspect",
    }
}

/// Opens a file the VM needs.
///
/// # Errors
/// [`VmError::Open`].
pub fn open_for_vm(what: &'static str, path: &std::path::Path, write: bool) -> Result<OwnedFd, VmError> {
    std::fs::File::options()
        .read(true)
        .write(write)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|error| VmError::Open {
            what,
            path: path.into(),
            error,
        })
}
