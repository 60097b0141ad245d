//! What the VMM gives up before guest code runs.
//!
//! The `virtiofsd` library hands names of FUSE requests to `mkdirat`, `unlinkat`, `renameat2`, `symlinkat`,
//! `linkat` and `mknodat` as they come, `..` and `/` included: it counts on a process whose root directory
//! is the shared tree. A guest whose kernel is hostile chooses these names, so without [`enter`] it could
//! make and remove files anywhere on the host.
//!
//! Still missing from the jail of `docs/threat-model.md`: user, mount and pid namespaces, and seccomp.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot, fchdir};

#[cfg(test)]
mod tests;

/// Capabilities the file server needs to act for every owner in the shared tree (capabilities(7)):
/// CHOWN 0, DAC_OVERRIDE 1, FOWNER 3, FSETID 4, SETGID 6, SETUID 7, MKNOD 27, SETFCAP 31.
const KEPT: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 27 | 1 << 31;

/// `_LINUX_CAPABILITY_VERSION_3`: two 32-bit words of each set.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

/// Why the jail could not be entered. The guest must then not run.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// Empty namespaces.
    #[error("Cannot unshare the network, IPC and UTS namespaces")]
    Namespaces(#[source] Errno),
    /// The root directory.
    #[error("Cannot change the root directory to the shared tree")]
    Root(#[source] Errno),
    /// The limit of core dumps, which would hold guest memory.
    #[error("Cannot forbid core dumps")]
    CoreDumps(#[source] Errno),
    /// Capabilities.
    #[error("Cannot drop capabilities")]
    Capabilities(#[source] io::Error),
    /// `no_new_privs`.
    #[error("Cannot set no_new_privs")]
    NoNewPrivileges(#[source] io::Error),
}

/// Makes `root`, if there is one, the root directory, and keeps no privilege but what serving its files takes.
///
/// Call it on the main thread before any other thread exists (capabilities and namespaces belong to a
/// thread, and new threads inherit them), and after everything that opens a path.
///
/// # Errors
/// [`JailError`]; some of the steps may have been taken.
pub fn enter(root: Option<BorrowedFd<'_>>) -> Result<(), JailError> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)
        .map_err(JailError::Namespaces)?;
    // ".." of the new root is the new root, for names relative to descriptors below it as well.
    if let Some(root) = root {
        fchdir(root.as_raw_fd())
            .and_then(|()| chroot("."))
            .and_then(|()| chdir("/"))
            .map_err(JailError::Root)?;
    }
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(JailError::CoreDumps)?;
    drop_capabilities().map_err(JailError::Capabilities)?;
    // SAFETY: prctl with these constants takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).map_err(JailError::NoNewPrivileges)
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
