//! The namespaces a VMM starts in: it never holds root's power over the host, not even before it has read its
//! configuration.
//!
//! The mount, pid, network, IPC and UTS namespaces belong to the host's user namespace, and the VMM gets a user namespace
//! of its own in them: whatever capability it has there, it can change none of them.
//!
//! What is left to the VMM itself (capabilities, limits, Landlock, system calls) is in `bulkhead-vmm`'s `jail` module.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use bulkhead_protocol::control::VMM_PROC_FD;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};

#[cfg(test)]
mod tests;

/// How long the new process may take for its part. It makes a handful of system calls.
const PATIENCE: Duration = Duration::from_secs(10);

/// Flags of clone3(2) for a process in the jail.
pub(crate) const NAMESPACES: i32 =
    libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;

/// How a program is confined from its first instruction on.
#[derive(Clone, Copy, Debug)]
pub struct Jail<'a> {
    /// Becomes the root directory, with what is mounted below it. The mount is shared (mount_namespaces(7)), so that
    /// later mounts arrive there. Without it the root directory is empty and read-only.
    pub root: Option<&'a Path>,
    /// Whether the program gets a user namespace, and with it no capability on the host.
    pub user_namespace: bool,
}

/// Why a program could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The host has no user namespace to give.
    #[error(
        "The host refuses a user namespace: allow more in the sysctl user.max_user_namespaces, or accept a weaker jail by \
         \"weaker_jail\": [\"user_namespace\"] in the configuration"
    )]
    UserNamespace(#[source] Errno),
    /// Another step.
    #[error("Cannot {0}")]
    Step(&'static str, #[source] Errno),
    /// The path holds a zero byte.
    #[error("Path of the shared tree is not valid")]
    Path,
    /// The sockets between the two processes.
    #[error("Cannot talk to the new process")]
    Socket(#[source] Errno),
    /// The new process ended before it was confined.
    #[error("The new process ended while it was confined")]
    Died,
    /// User and group ids.
    #[error("Cannot map the ids of the user namespace")]
    Map(#[source] std::io::Error),
}

/// What the child does, by number, for the errors it reports.
const STEPS: [&str; 9] = [
    "separate the mounts",
    "mount the process's own files",
    "mount an empty root directory",
    "enter the root directory",
    "make it the root directory",
    "set the host name",
    "drop supplementary groups",
    "create a user namespace",
    "give the program its descriptors",
];
const SEPARATE: u32 = 0;
const PROC: u32 = 1;
const EMPTY: u32 = 2;
const ENTER: u32 = 3;
const PIVOT: u32 = 4;
const NAME: u32 = 5;
const GROUPS: u32 = 6;
const USER: u32 = 7;
const DESCRIPTORS: u32 = 8;
/// In place of a step: done, the ids can be mapped.
const DONE: u32 = u32::MAX;

/// A jail with everything the child needs prepared: after clone(2) it allocates nothing.
#[derive(Debug)]
pub(crate) struct Prepared {
    root: Option<CString>,
    user_namespace: bool,
    ours: OwnedFd,
    theirs: OwnedFd,
}

impl Prepared {
    pub(crate) fn new(jail: &Jail<'_>) -> Result<Self, JailError> {
        let root = match jail.root {
            Some(path) => Some(CString::new(path.as_os_str().as_bytes()).map_err(|_| JailError::Path)?),
            None => None,
        };
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(JailError::Socket)?;
        let patience = nix::sys::time::TimeVal::new(PATIENCE.as_secs().cast_signed(), 0);
        setsockopt(&ours, sockopt::ReceiveTimeout, &patience).map_err(JailError::Socket)?;
        Ok(Self {
            root,
            user_namespace: jail.user_namespace,
            ours,
            theirs,
        })
    }

    /// The first of the child's part: gets its socket out of the way of descriptors below `number`.
    ///
    /// # Safety
    /// To be called in a process just made with [`NAMESPACES`], before exec.
    pub(crate) unsafe fn keep_socket(&self, number: RawFd) -> RawFd {
        // SAFETY: plain system calls. The parent's end is never used in the child, which else would not see it close.
        unsafe {
            libc::close(self.ours.as_raw_fd());
            libc::fcntl(self.theirs.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number)
        }
    }

    /// The rest of the child's part. When it returns the process is confined and the parent lives.
    ///
    /// # Safety
    /// As [`keep_socket`](Self::keep_socket), which `socket` is from.
    pub(crate) unsafe fn child(&self, socket: RawFd) {
        // SAFETY: system calls on memory of this process, as the caller guarantees.
        let result = unsafe { self.confine() };
        let report = match result {
            Ok(()) => [DONE, 0],
            Err((step, errno)) => [step, errno as u32],
        };
        let mut answer = 0u8;
        // SAFETY: both buffers are this function's own and of the lengths given.
        unsafe {
            libc::send(
                socket,
                report.as_ptr().cast(),
                size_of_val(&report),
                libc::MSG_NOSIGNAL,
            );
            // The parent closes its end when it gives up or dies.
            let received = libc::recv(socket, (&raw mut answer).cast(), 1, 0);
            if result.is_err() || received != 1 {
                libc::_exit(127);
            }
        }
    }

    /// # Safety
    /// As [`child`](Self::child).
    unsafe fn confine(&self) -> Result<(), (u32, i32)> {
        let empty = c"".as_ptr();
        let here = c".".as_ptr();
        let slash = c"/".as_ptr();
        let locked = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
        // SAFETY: plain system calls; every pointer is to a C string that lives as long as the call, or null where
        // mount(2) takes that.
        unsafe {
            // What happens here must not reach the host, while what is mounted in the shared tree is to come.
            let slave = libc::MS_SLAVE | libc::MS_REC;
            check(
                SEPARATE,
                libc::mount(empty, slash, empty, slave, std::ptr::null()),
            )?;
            let files = own_files()?;
            check(DESCRIPTORS, libc::dup2(files, VMM_PROC_FD))?;
            let root = match &self.root {
                Some(root) => root.as_ptr(),
                None => {
                    // Any directory that is sure to exist. It is out of sight after the next steps.
                    let place = c"/proc".as_ptr();
                    let (kind, options) = (c"tmpfs".as_ptr(), c"size=4k,nr_inodes=2,mode=0555".as_ptr());
                    let flags = locked | libc::MS_RDONLY;
                    check(EMPTY, libc::mount(kind, place, kind, flags, options.cast()))?;
                    place
                }
            };
            check(ENTER, libc::chdir(root))?;
            // The old root goes on top of the new one, and away (pivot_root(2), notes).
            check(PIVOT, syscall2(libc::SYS_pivot_root, here, here))?;
            check(PIVOT, libc::umount2(here, libc::MNT_DETACH))?;
            check(PIVOT, libc::chdir(slash))?;
            let name = c"bulkhead";
            check(NAME, libc::sethostname(name.as_ptr(), name.count_bytes()))?;
            check(GROUPS, libc::setgroups(0, std::ptr::null()))?;
            if self.user_namespace {
                check(USER, libc::unshare(libc::CLONE_NEWUSER))?;
            }
            // A change of credentials may have cleared it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        }
    }

    /// The parent's part: waits for the child, maps its ids and lets it go on.
    pub(crate) fn parent(self, pid: i32) -> Result<(), JailError> {
        let Self {
            ours,
            theirs,
            user_namespace,
            ..
        } = self;
        // So that the child's end shows here.
        drop(theirs);
        let mut report = [0u32; 2];
        // SAFETY: the buffer is of the length given.
        let received = unsafe {
            libc::recv(
                ours.as_raw_fd(),
                report.as_mut_ptr().cast(),
                size_of_val(&report),
                0,
            )
        };
        match Errno::result(received) {
            Ok(8) => {}
            Ok(_) => return Err(JailError::Died),
            Err(errno) => return Err(JailError::Socket(errno)),
        }
        let [step, errno] = report;
        if step != DONE {
            let errno = Errno::from_raw(errno.cast_signed());
            return Err(match step {
                USER => JailError::UserNamespace(errno),
                _ => JailError::Step(STEPS.get(step as usize).copied().unwrap_or("confine it"), errno),
            });
        }
        if user_namespace {
            for map in ["uid_map", "gid_map"] {
                map_to_itself(pid, map).map_err(JailError::Map)?;
            }
        }
        // SAFETY: one byte of a static string.
        let sent = unsafe { libc::send(ours.as_raw_fd(), c"!".as_ptr().cast(), 1, libc::MSG_NOSIGNAL) };
        Errno::result(sent).map(drop).map_err(|_| JailError::Died)
    }
}

/// Maps every id the calling process has to itself in the user namespace of process `pid`.
fn map_to_itself(pid: i32, map: &str) -> std::io::Result<()> {
    let own = std::fs::read_to_string(Path::new("/proc/self").join(map))?;
    std::fs::write(format!("/proc/{pid}/{map}"), identity(&own))
}

/// Lines of user_namespaces(7) that map the first column of `own` to itself.
fn identity(own: &str) -> String {
    let mut lines = String::new();
    for line in own.lines() {
        let mut columns = line.split_whitespace();
        if let (Some(first), Some(_), Some(count)) = (columns.next(), columns.next(), columns.next()) {
            lines.push_str(&format!("{first} {first} {count}\n"));
        }
    }
    lines
}

/// Opens `/proc/<pid>/fd` of the calling process, the first of its pid namespace, in a procfs that holds
/// nothing else and that no path leads to: from the host's, `..` would lead to files such as
/// `/proc/sys/kernel/core_pattern`, which belong to root.
///
/// # Safety
/// As [`Prepared::child`].
unsafe fn own_files() -> Result<RawFd, (u32, i32)> {
    const FSOPEN_CLOEXEC: libc::c_uint = 1;
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    const FSMOUNT_CLOEXEC: libc::c_uint = 1;
    let nothing = std::ptr::null::<libc::c_char>();
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: plain system calls; every pointer is to a static C string, or null where fsconfig(2) wants that.
    unsafe {
        let context = check_fd(libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC))?;
        let (key, value) = (c"subset".as_ptr(), c"pid".as_ptr());
        let set = libc::syscall(libc::SYS_fsconfig, context, FSCONFIG_SET_STRING, key, value, 0);
        check_fd(set)?;
        let create = libc::syscall(
            libc::SYS_fsconfig,
            context,
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        );
        check_fd(create)?;
        let mount = check_fd(libc::syscall(
            libc::SYS_fsmount,
            context,
            FSMOUNT_CLOEXEC,
            attributes,
        ))?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        check_fd(libc::openat(mount, c"1/fd".as_ptr(), flags).into())
    }
}

fn check_fd(result: libc::c_long) -> Result<RawFd, (u32, i32)> {
    RawFd::try_from(result)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(|| (PROC, Errno::last_raw()))
}

fn check(step: u32, result: libc::c_int) -> Result<(), (u32, i32)> {
    if result < 0 {
        return Err((step, Errno::last_raw()));
    }
    Ok(())
}

/// # Safety
/// As the system call `number`, which takes two paths.
unsafe fn syscall2(
    number: libc::c_long,
    first: *const libc::c_char,
    second: *const libc::c_char,
) -> libc::c_int {
    // SAFETY: as the caller guarantees.
    if unsafe { libc::syscall(number, first, second) } < 0 {
        -1
    } else {
        0
    }
}
