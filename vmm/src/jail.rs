//! What the VMM gives up before guest code runs.
//!
//! Whoever starts the VMM has put it in namespaces of its own: its root directory is the shared tree, its user namespace
//! has no power over the host. The `virtiofsd` library counts on that: it hands names of FUSE requests to `mkdirat`,
//! `unlinkat`, `renameat2`, `symlinkat`, `linkat` and `mknodat` as they come, `..` and `/` included, and a guest whose
//! kernel is hostile chooses these names. Here go what is left of capabilities, and everything else that can be given up.

use std::io;

use nix::errno::Errno;
use nix::sys::resource::{Resource, rlim_t, setrlimit};

pub mod filter;
pub mod landlock;
mod table;
#[cfg(test)]
mod tests;

pub use table::Thread;

/// Capabilities the file server needs to act for every owner in the shared tree (capabilities(7)):
/// CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, SETGID 6, SETUID 7, MKNOD 27, SETFCAP 31.
const KEPT: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

/// `_LINUX_CAPABILITY_VERSION_3`: two 32-bit words of each set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Why the jail could not be entered. The guest must then not run.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Limits of resources.
    #[error("Cannot lower the limit {0:?}")]
    Limit(Resource, #[source] Errno),
    /// Capabilities.
    #[error("Cannot drop capabilities")]
    Capabilities(#[source] io::Error),
    /// `no_new_privs`.
    #[error("Cannot set no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
    /// Landlock, which this kernel has.
    #[error("Cannot enter a Landlock domain")]
    Landlock(#[source] io::Error),
    /// System calls.
    #[error(
        "Cannot confine the VMM to the system calls it needs: the host's kernel needs CONFIG_SECCOMP_FILTER; a weaker jail can \
         be accepted by \"weaker_jail\": [\"seccomp\"] in the configuration"
    )]
    Filter(#[source] io::Error),
}

/// Largest file in bytes: that of ext4 with blocks of 4 KiB. Block devices are not limited. A write beyond it fails with
/// `EFBIG`, as SIGXFSZ is ignored.
pub const FILE_SIZE: rlim_t = 16 << 40;

/// Limits, soft and hard.
const LIMITS: [(Resource, rlim_t); 3] = [
    // Disks and files of the shared tree are as large as their file systems let them be, within reason: whoever
    // controls the VMM is not to make one that no tool of the host can copy or back up.
    (Resource::RLIMIT_FSIZE, FILE_SIZE),
    // It would hold guest memory.
    (Resource::RLIMIT_CORE, 0),
    // Guest memory is not locked.
    (Resource::RLIMIT_MEMLOCK, 0),
];

/// Keeps no privilege but what serving files takes. System calls are [`confine`]'s.
///
/// Call it on the main thread before any other thread exists (capabilities belong to a thread, and new threads inherit
/// them), and after everything that needs more.
///
/// # Errors
/// [`JailError`]; some of the steps may have been taken.
pub fn enter() -> Result<(), JailError> {
    for (resource, limit) in LIMITS {
        setrlimit(resource, limit, limit).map_err(|errno| JailError::Limit(resource, errno))?;
    }
    drop_capabilities().map_err(JailError::Capabilities)?;
    // SAFETY: prctl with these constants takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
        .map_err(JailError::NoNewPrivileges)?;
    landlock::enter().map_err(JailError::Landlock)
}

/// Confines the calling thread, which is one of kind `thread`, to the system calls it needs. Any other one kills
/// the process.
///
/// # Errors
/// [`JailError::Filter`].
pub fn confine(thread: Thread) -> Result<(), JailError> {
    filter::install(thread).map_err(JailError::Filter)
}

/// Leaves [`KEPT`] in the permitted, effective and bounding sets and nothing in the others.
fn drop_capabilities() -> io::Result<()> {
    for capability in (0..64u64).filter(|capability| *capability >= 32 || KEPT & (1 << capability) == 0) {
        // SAFETY: prctl with these constants takes no pointers.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
            // Beyond the last capability of this kernel.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            result => result?,
        }
    }
    // SAFETY: prctl with these constants takes no pointers.
    check(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) })?;
    // struct __user_cap_header_struct { version, pid }, then per word { effective, permitted, inheritable }.
    let header = [CAPABILITY_VERSION, 0];
    let data = [[KEPT, KEPT, 0], [0, 0, 0]];
    // SAFETY: both arrays have the size and layout capset(2) reads for version 3.
    let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
