//! Containers of a fork do not see the kernel's boot id.
//!
//! The kernel makes it when it is read first and keeps it, so forks of a pod in which something has read it share it.
//! A file over it in a container's own mount namespace is all that can be done about it; libcontainer refuses such a
//! mount in the specification, so it is made when the container's others are there.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::Pid;

use super::BOOT_ID;

const KERNEL_FILE: &CStr = c"/proc/sys/kernel/random/boot_id";

/// Mounts this guest's boot id over the kernel's in the mount namespace of a process, unless the guest has no id of its
/// own or the process sees none. The calling process stays in that namespace.
///
/// # Errors
/// The mount fails.
pub fn cover(pid: Pid) -> io::Result<()> {
    if !Path::new(BOOT_ID).exists() {
        return Ok(());
    }
    let file = std::ffi::CString::new(BOOT_ID)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    let source = descriptor(
        // SAFETY: the path is a string; the call returns a new descriptor.
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, file.as_ptr(), flags) },
    )?;
    setns(
        File::open(format!("/proc/{pid}/ns/mnt"))?,
        CloneFlags::CLONE_NEWNS,
    )?;
    let target = descriptor(
        // SAFETY: as above.
        unsafe { libc::open(KERNEL_FILE.as_ptr(), libc::O_PATH | libc::O_CLOEXEC) }.into(),
    );
    let target = match target {
        // A container without /proc.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        target => target?,
    };
    // An image can make /proc lead anywhere; it is its own then.
    if fstatfs(&target)?.filesystem_type() != PROC_SUPER_MAGIC {
        return Ok(());
    }
    let both_empty = 0x04 | 0x40;
    // SAFETY: both paths are empty strings: the mount and its place are the descriptors.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            source.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            both_empty,
        )
    };
    Errno::result(moved)?;
    Ok(())
}

/// The descriptor a system call has returned.
fn descriptor(returned: libc::c_long) -> io::Result<OwnedFd> {
    let number = Errno::result(i32::try_from(returned).unwrap_or(-1))?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
