//! A second wall around the file system and the network, where the host has it (Linux Documentation/userspace-api/landlock.rst).
//!
//! It holds where the mount namespace does not: a descriptor of a file outside the tree, such as a disk that is open for
//! reading, cannot be opened again for writing by its link in `/proc/<pid>/fd`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: u32 = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const PATH_BENEATH: u32 = 1;

/// Rights over files that each version of the interface knows: their number, from bit 0 on.
const FILE_RIGHTS: [u32; 5] = [13, 14, 15, 15, 16];

/// `LANDLOCK_ACCESS_NET_BIND_TCP`, `LANDLOCK_ACCESS_NET_CONNECT_TCP`; from version 4 on.
const NET_RIGHTS: u64 = 3;
/// `LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET`, `LANDLOCK_SCOPE_SIGNAL`; from version 6 on.
const SCOPES: u64 = 3;

/// `struct landlock_ruleset_attr`.
#[repr(C)]
struct Ruleset {
    files: u64,
    net: u64,
    scopes: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: RawFd,
}

/// Version of the kernel's interface; 0: it has none.
pub fn version() -> u32 {
    let nothing = std::ptr::null::<Ruleset>();
    // SAFETY: without a ruleset the call only tells the version.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION) };
    u32::try_from(version).unwrap_or(0)
}

/// Leaves the calling thread, and those it starts, everything below the root directory, and nothing else of files,
/// TCP ports, abstract sockets and signals to other processes. The thread must have `no_new_privs`.
///
/// Does nothing before version 2 of the interface, which refuses every move from one directory to another.
///
/// # Errors
/// The kernel refuses what its version allows.
pub fn enter() -> io::Result<()> {
    let version = version();
    if version < 2 {
        return Ok(());
    }
    let known = FILE_RIGHTS[(version as usize).min(FILE_RIGHTS.len()) - 1];
    let ruleset = Ruleset {
        files: (1 << known) - 1,
        net: if version >= 4 { NET_RIGHTS } else { 0 },
        scopes: if version >= 6 { SCOPES } else { 0 },
    };
    // A kernel takes a longer struct than it knows as long as the rest is zero.
    let size = size_of::<Ruleset>();
    // SAFETY: the struct lives during the call, and its size is given.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, &raw const ruleset, size, 0) };
    let fd = RawFd::try_from(check(fd)?).map_err(io::Error::other)?;
    // SAFETY: the call has just returned this descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let root = File::open("/")?;
    let rule = PathBeneath {
        allowed: ruleset.files,
        parent: root.as_raw_fd(),
    };
    // SAFETY: the struct is of the kind that is named, and lives during the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            fd.as_raw_fd(),
            PATH_BENEATH,
            &raw const rule,
            0,
        )
    })?;
    // SAFETY: two numbers.
    check(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd.as_raw_fd(), 0) })?;
    Ok(())
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
