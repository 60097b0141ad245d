//! Process 1 of the pod's shared pid namespace.
//!
//! The containers of a pod can share one pid namespace (Kubernetes' `shareProcessNamespace`). Such a namespace lives
//! and dies with its process 1, so that process can belong to no container: the agent makes it for the first
//! container that asks. It is the agent's own program under the name that Kubernetes users expect there, `/pause`.
//!
//! Containers see it and may look at it through `/proc/1`. It has executed anew, so that nothing of the agent's
//! memory is in it, and has neither privileges nor files: an empty root, a user of its own, not dumpable.

use std::convert::Infallible;
use std::ffi::{CStr, c_char};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use bulkhead_protocol::agent as proto;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl::{set_dumpable, set_name, set_no_new_privs};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Pid, Uid, chdir, execveat, pipe2, pivot_root, setgroups, setresgid, setresuid};

use super::{Containers, Process};
use crate::error::Error;
use crate::fd::AsyncFile;
use crate::job;
use crate::reaper::Reaper;

/// The program's name, its whole command line.
const NAME: &CStr = c"/pause";

/// User and group: as that of the pause image, without a name in any container.
const USER: u32 = 65535;

/// Becomes the root directory of the process.
const EMPTY: &str = "/run/bulkhead/empty";

/// Where a container's processes are numbered, if not in a namespace of its own.
pub(super) type Namespace = OwnedFd;

/// Whether this process was started as process 1 of a shared namespace.
///
/// # Safety
/// `argv` is the argument vector of `main`.
pub unsafe fn is_asked(argc: i32, argv: *const *const c_char) -> bool {
    if argc != 1 {
        return false;
    }
    // SAFETY: there is one argument, a string, says the caller.
    unsafe { CStr::from_ptr(*argv) == NAME }
}

/// Sleeps for ever. Orphans are collected by the kernel, because SIGCHLD is ignored.
pub fn run() -> ! {
    let _ = set_dumpable(false);
    let _ = set_name(c"pause");
    loop {
        nix::unistd::pause();
    }
}

/// The pod's pid namespace, once a container has asked for it.
#[derive(Debug, Default)]
pub(super) struct Shared(tokio::sync::Mutex<std::sync::Weak<OwnedFd>>);

impl Shared {
    /// The namespace, with a process 1 that runs.
    async fn namespace(&self, reaper: &Reaper) -> io::Result<Namespace> {
        let mut known = self.0.lock().await;
        if let Some(namespace) = known.upgrade() {
            return namespace.try_clone();
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        let pid = spawn(&write)?;
        drop(write);
        let namespace = std::sync::Arc::new(open(pid)?);
        *known = std::sync::Arc::downgrade(&namespace);
        let copy = namespace.try_clone()?;
        reaper.expect(pid, move |exit| {
            log::error!("process 1 of the shared pid namespace ended: {}", exit.status);
            drop(namespace);
        });
        let mut errno = [0; 4];
        match AsyncFile::new(read)?.read(&mut errno).await? {
            0 => Ok(copy),
            _ => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
        }
    }
}

impl Containers {
    /// The pid namespace a container asks for; none: a new one, or what the specification says.
    ///
    /// # Errors
    /// The other container does not exist or run, or the pod's namespace cannot be made.
    pub(super) async fn pid_namespace(
        &self,
        wanted: Option<&proto::PidNamespace>,
    ) -> Result<Option<Namespace>, Error> {
        let Some(wanted) = wanted else { return Ok(None) };
        let namespace = match &wanted.kind {
            Some(proto::pid_namespace::Kind::Pod(_)) => self.shared.namespace(&self.reaper).await,
            Some(proto::pid_namespace::Kind::Container(id)) => {
                let other = self.get(id)?;
                let pid = other.with_process("", Process::running)?;
                open(pid.ok_or_else(|| Error::State {
                    id: id.clone(),
                    state: other.status().name(),
                    wanted: "running",
                })?)
            }
            Some(_) | None => {
                return Err(Error::Invalid {
                    field: "pid_namespace",
                    value: String::new(),
                });
            }
        };
        namespace
            .map(Some)
            .map_err(Error::io("cannot share a pid namespace"))
    }
}

/// The pid namespace of a process. Kept open, it stays the same even if the process's id is given to another one.
fn open(pid: Pid) -> io::Result<OwnedFd> {
    File::open(format!("/proc/{pid}/ns/pid")).map(OwnedFd::from)
}

/// Makes the process. It writes an error number to `status` if it fails.
fn spawn(status: &OwnedFd) -> io::Result<Pid> {
    let program = File::open("/proc/self/exe")?;
    match fs::create_dir(EMPTY) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::SIGCHLD;
    // SAFETY: as fork(2): the child goes on with a copy of this stack. The agent has a single thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match i32::try_from(pid) {
        Ok(0) => {
            let Err(errno) = execute(&program, status);
            let _ = nix::unistd::write(status, &(errno as i32).to_ne_bytes());
            // SAFETY: ends this process without running the exit handlers of the agent it was copied from.
            unsafe { libc::_exit(1) }
        }
        Ok(pid @ 1..) => Ok(Pid::from_raw(pid)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn execute(program: &File, status: &OwnedFd) -> Result<Infallible, Errno> {
    job::reset_signals();
    job::close_others(&[program.as_raw_fd()], status.as_raw_fd());
    // SAFETY: ignoring a signal installs no handler. The disposition survives exec(2).
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    let (none, empty) = (None::<&str>, Path::new(EMPTY));
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), empty, Some("tmpfs"), flags, Some("mode=0555"))?;
    chdir(empty)?;
    // The new root over the old one, which is then taken away from under it: pivot_root(2).
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    setgroups(&[])?;
    let (user, group) = (Uid::from_raw(USER), Gid::from_raw(USER));
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    set_no_new_privs()?;
    execveat(
        Some(program.as_raw_fd()),
        c"",
        &[NAME],
        &[] as &[&CStr],
        AtFlags::AT_EMPTY_PATH,
    )
}
