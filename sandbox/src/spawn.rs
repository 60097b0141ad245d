//! Starting a process by descriptor, and telling processes apart.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::jail::{self, Jail, JailError};

/// A program about to be started.
#[derive(Debug)]
pub struct Program<'a> {
    /// The program's file, opened with `O_PATH`.
    pub executable: BorrowedFd<'a>,
    /// Arguments, the program's name first.
    pub arguments: Vec<CString>,
    /// `KEY=VALUE` pairs.
    pub environment: Vec<CString>,
    /// Descriptors the program gets, and their numbers there. Every other one is closed at exec.
    pub descriptors: Vec<(BorrowedFd<'a>, RawFd)>,
    /// Namespaces of its own; absent: those of the caller.
    pub jail: Option<Jail<'a>>,
}

/// Why a program could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// More than it may have.
    #[error("Too many descriptors for a program")]
    TooManyDescriptors,
    /// No process.
    #[error("Cannot create a process")]
    Create(#[source] Errno),
    /// No process in namespaces of its own.
    #[error(
        "Cannot create a process in namespaces of its own (limits: sysctls user.max_mnt_namespaces, max_pid_namespaces, \
         max_net_namespaces, max_ipc_namespaces and max_uts_namespaces)"
    )]
    Namespaces(#[source] Errno),
    /// It could not be confined, and is gone.
    #[error("Cannot confine the process")]
    Jail(#[source] JailError),
}

/// A started process that has not been waited for.
#[derive(Debug)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Readable when the process has ended.
    pub pidfd: OwnedFd,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

/// Number from which copies of descriptors are made before they go to their places; above every place.
const SCRATCH: RawFd = 100;

/// Most descriptors handed to a program.
const MAX_DESCRIPTORS: usize = 8;

/// Starts `program` in a session of its own. It gets SIGKILL when the calling thread ends, so call this
/// from the thread that lives as long as the process.
///
/// # Errors
/// [`SpawnError`]; no process is left. A failing exec shows as exit status 127 of the process.
pub fn spawn(program: &Program<'_>) -> Result<Process, SpawnError> {
    if program.descriptors.len() > MAX_DESCRIPTORS {
        return Err(SpawnError::TooManyDescriptors);
    }
    let jail = program.jail.as_ref().map(jail::Prepared::new).transpose();
    let jail = jail.map_err(SpawnError::Jail)?;
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        strings
            .iter()
            .map(|string| string.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let arguments = pointers(&program.arguments);
    let environment = pointers(&program.environment);
    let moves: Vec<(RawFd, RawFd)> = program
        .descriptors
        .iter()
        .map(|(fd, number)| (fd.as_raw_fd(), *number))
        .collect();
    let executable = program.executable.as_raw_fd();
    // In a pid namespace of its own the child does not see its parent, and [`jail`] finds out that it lives.
    let parent = if jail.is_some() {
        0
    } else {
        nix::unistd::getpid().as_raw()
    };
    let mut pidfd: RawFd = -1;
    // SAFETY: an all-zero clone_args is a valid value of that plain struct.
    let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
    let namespaces = if jail.is_some() { jail::NAMESPACES } else { 0 };
    clone.flags = u64::from((libc::CLONE_PIDFD | namespaces).unsigned_abs());
    clone.pidfd = (&raw mut pidfd) as u64;
    clone.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    // SAFETY: without CLONE_VM the child has its own copy of memory, as after fork(2); until exec it
    // makes only system calls, on data prepared before.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const clone, size_of::<libc::clone_args>()) };
    if pid == 0 {
        // SAFETY: this is the child described above; the pointers are into its own copy of memory.
        unsafe {
            run_child(
                executable,
                &arguments,
                &environment,
                &moves,
                parent,
                jail.as_ref(),
            )
        }
    }
    let pid = Errno::result(pid).and_then(|pid| i32::try_from(pid).map_err(|_| Errno::EOVERFLOW));
    let pid = pid.map_err(|errno| match jail {
        Some(_) => SpawnError::Namespaces(errno),
        None => SpawnError::Create(errno),
    })?;
    // SAFETY: clone3 has stored a new descriptor there.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    if let Some(jail) = jail
        && let Err(error) = jail.parent(pid)
    {
        let _ = pidfd_kill(&pidfd);
        let _ = wait(pidfd.as_fd(), 0);
        return Err(SpawnError::Jail(error));
    }
    Ok(Process { pid, pidfd })
}

/// The child's part of [`spawn`].
///
/// # Safety
/// To be called in a fresh child process only. The pointer lists end with null.
unsafe fn run_child(
    executable: RawFd,
    arguments: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    moves: &[(RawFd, RawFd)],
    parent: libc::pid_t,
    jail: Option<&jail::Prepared>,
) -> ! {
    // SAFETY: plain system calls; every pointer is to memory of this process.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        // The parent may have died before the call above.
        if libc::getppid() != parent {
            libc::_exit(127);
        }
        // Dispositions that were set to "ignore" would pass through exec.
        for signal in [libc::SIGPIPE, libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        // First all out of the way, then into place: a place may be another descriptor's number.
        let executable = libc::fcntl(executable, libc::F_DUPFD_CLOEXEC, SCRATCH);
        let socket = jail.map(|jail| jail.keep_socket(SCRATCH));
        let mut copies = [-1; MAX_DESCRIPTORS];
        for (copy, (from, _)) in copies.iter_mut().zip(moves) {
            *copy = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, SCRATCH);
        }
        for (copy, (_, to)) in copies.iter().zip(moves) {
            if libc::dup2(*copy, *to) < 0 {
                libc::_exit(127);
            }
        }
        if let (Some(jail), Some(socket)) = (jail, socket) {
            jail.child(socket);
        }
        // Every descriptor is closed at exec already; this makes sure of it.
        let first = u32::try_from(SCRATCH).unwrap_or_default();
        libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        libc::syscall(
            libc::SYS_execveat,
            executable,
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
        libc::_exit(127)
    }
}

/// Copies the calling, single-threaded process, as fork(2), with the copy in the cgroup of directory
/// `cgroup` from its first instruction: moving a process later makes the kernel wait for every other one.
/// The parent gets the copy's process id, the copy none.
///
/// # Errors
/// The errno of clone3(2).
///
/// # Safety
/// The calling process has one thread.
pub unsafe fn fork_into(cgroup: Option<BorrowedFd<'_>>) -> Result<Option<i32>, Errno> {
    let mut thread_id: *mut libc::c_int = std::ptr::null_mut();
    // The C library keeps the thread's id where the kernel clears it at the thread's end, and its fork
    // lets the kernel put the copy's id there. Not every kernel tells the place.
    // SAFETY: the kernel writes one pointer.
    let told = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut thread_id) };
    let (Some(cgroup), 0, false) = (cgroup, told, thread_id.is_null()) else {
        // SAFETY: the caller has one thread, so the copy is a whole program.
        let pid = Errno::result(unsafe { libc::fork() })?;
        if pid == 0
            && let Some(cgroup) = cgroup
        {
            let procs = crate::mount::fd_path(&cgroup).join("cgroup.procs");
            if let Err(error) = std::fs::write(procs, "0") {
                log::warn!("cannot enter the pod's cgroup: {error}");
            }
        }
        return Ok((pid != 0).then_some(pid));
    };
    // SAFETY: an all-zero clone_args is a valid value of that plain struct.
    let mut clone: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID;
    clone.flags = u64::from(flags.unsigned_abs()) | CLONE_INTO_CGROUP;
    clone.child_tid = thread_id as u64;
    clone.exit_signal = u64::from(libc::SIGCHLD.unsigned_abs());
    clone.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    // SAFETY: without CLONE_VM this is fork(2), and the C library's idea of the thread's id is kept right.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const clone, size_of::<libc::clone_args>()) };
    let pid = i32::try_from(Errno::result(pid)?).map_err(|_| Errno::EOVERFLOW)?;
    Ok((pid != 0).then_some(pid))
}

/// `CLONE_INTO_CGROUP` of linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Reaps the process of `pidfd` if it has ended.
///
/// # Errors
/// `ECHILD` when it is reaped already.
pub fn reap(pidfd: BorrowedFd<'_>) -> Result<Option<Ending>, Errno> {
    wait(pidfd, libc::WNOHANG)
}

fn wait(pidfd: BorrowedFd<'_>, flags: libc::c_int) -> Result<Option<Ending>, Errno> {
    // SAFETY: an all-zero siginfo_t is a valid value of that plain struct.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = libc::id_t::try_from(pidfd.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    // SAFETY: info is a writable siginfo_t.
    let result = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED | flags) };
    Errno::result(result)?;
    // SAFETY: waitid has filled the fields for a child, or left them zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    Ok(match info.si_code {
        _ if pid == 0 => None,
        libc::CLD_EXITED => Some(Ending::Exited(status)),
        _ => Some(Ending::Killed(status)),
    })
}

/// Opens a process by id.
///
/// # Errors
/// `ESRCH` when there is none.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: pidfd_open takes two numbers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EOVERFLOW)?;
    // SAFETY: pidfd_open has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends SIGKILL to the process of `pidfd`.
///
/// # Errors
/// `ESRCH` when it has ended and been reaped.
pub fn pidfd_kill(pidfd: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: a null siginfo means "as by kill(2)".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            Signal::SIGKILL as libc::c_int,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Start time of a process in clock ticks since boot (proc_pid_stat(5), field 22); absent if it is gone.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, is in parentheses and may hold anything, also parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}
