//! Host mounts: the system calls, and sources that are held open.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{FileStat, fstat};
use nix::sys::statfs::{Statfs, fstatfs};

pub mod info;
mod options;
mod overlay;
#[cfg(test)]
mod tests;

pub use options::{ParsedOptions, parse_options};

/// Longest data of mount(2): one page with its terminating zero.
const DATA_LIMIT: usize = 4095;

/// Why a mount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel refused.
    #[error("Cannot mount {source_path} ({kind}) on {}", .target.display())]
    Mount {
        /// What.
        source_path: String,
        /// File system type.
        kind: String,
        /// Where.
        target: PathBuf,
        /// Reason.
        #[source]
        errno: Errno,
    },
    /// The options are longer than the kernel takes.
    #[error("Mount options for {} are {length} bytes long, over the limit", .target.display())]
    OptionsTooLong {
        /// Where.
        target: PathBuf,
        /// Length in bytes.
        length: usize,
    },
    /// An option has no meaning here.
    #[error("Mount option {0} is not supported")]
    Option(String),
    /// A path cannot be used.
    #[error("Cannot open {}", .0.display())]
    Open(PathBuf, #[source] Errno),
    /// A mount point cannot be made.
    #[error("Cannot create the mount point {}", .0.display())]
    MountPoint(PathBuf, #[source] std::io::Error),
    /// A mount cannot be undone.
    #[error("Cannot unmount {}", .0.display())]
    Unmount(PathBuf, #[source] Errno),
    /// The helper thread for a long mount could not run.
    #[error("Cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// One mount as a caller describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// File system type, `bind` for a bind mount.
    pub kind: String,
    /// Device, directory or name.
    pub source: String,
    /// Path relative to the root file system; empty: the root itself.
    pub target: String,
    /// Flags and data, mixed.
    pub options: Vec<String>,
}

fn mount_error(source: &str, kind: &str, target: &Path, errno: Errno) -> MountError {
    MountError::Mount {
        source_path: source.into(),
        kind: kind.into(),
        target: target.into(),
        errno,
    }
}

/// Performs one mount on `target`.
///
/// # Errors
/// [`MountError`]; nothing is left mounted.
pub fn perform(request: &Mount, target: &Path) -> Result<(), MountError> {
    let mut parsed = parse_options(&request.options)?;
    if parsed.is_loop {
        return Err(MountError::Option("loop".into()));
    }
    if request.kind == "bind" || parsed.flags.contains(MsFlags::MS_BIND) {
        return bind(Path::new(&request.source), target, &parsed);
    }
    // As in `attach`. An image can have nodes of the host's devices in it.
    parsed.flags |= MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let data = parsed.data_string();
    let fail = |errno| mount_error(&request.source, &request.kind, target, errno);
    if data.len() > DATA_LIMIT {
        return overlay::mount_long(request, target, &parsed);
    }
    mount(
        Some(request.source.as_str()),
        target,
        Some(request.kind.as_str()),
        parsed.flags,
        Some(data.as_str()),
    )
    .map_err(fail)
}

/// A file or directory of the host, held open: what is looked at is what gets mounted, whatever happens to the path.
#[derive(Debug)]
pub struct Source {
    fd: OwnedFd,
    path: PathBuf,
}

impl Source {
    /// Opens `path`, through symbolic links, without reading or writing it.
    ///
    /// # Errors
    /// [`MountError::Open`].
    pub fn open(path: &Path) -> Result<Self, MountError> {
        Ok(Self {
            fd: open_path(path, false)?,
            path: path.into(),
        })
    }

    /// A path that names it, for system calls that only take paths.
    #[must_use]
    pub fn fd_path(&self) -> PathBuf {
        fd_path(&self.fd)
    }

    /// Opens what is at a path below this directory, which no symbolic link and no `..` may leave; nor may it lead
    /// through one.
    ///
    /// # Errors
    /// [`MountError::Open`].
    pub fn below(self, path: &Path) -> Result<Self, MountError> {
        if path.as_os_str().is_empty() {
            return Ok(self);
        }
        let whole = self.path.join(path);
        let fail = |errno| MountError::Open(whole.clone(), errno);
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| fail(Errno::EINVAL))?;
        // SAFETY: the structure is plain numbers, for which zero is a value.
        let mut how: libc::open_how = unsafe { std::mem::zeroed() };
        how.flags = u64::from((libc::O_PATH | libc::O_CLOEXEC).unsigned_abs());
        how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS;
        // SAFETY: name is a C string and how a structure of the given size, both alive during the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                self.fd.as_raw_fd(),
                name.as_ptr(),
                &raw const how,
                size_of::<libc::open_how>(),
            )
        };
        let fd = Errno::result(fd).map_err(fail)?;
        let fd = i32::try_from(fd).map_err(|_| fail(Errno::EBADF))?;
        // SAFETY: the system call has just returned this descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, path: whole })
    }

    /// Its attributes.
    ///
    /// # Errors
    /// [`MountError::Open`].
    pub fn stat(&self) -> Result<FileStat, MountError> {
        fstat(self.fd.as_raw_fd()).map_err(|errno| MountError::Open(self.path.clone(), errno))
    }

    /// Its file system.
    ///
    /// # Errors
    /// [`MountError::Open`].
    pub fn statfs(&self) -> Result<Statfs, MountError> {
        fstatfs(&self.fd).map_err(|errno| MountError::Open(self.path.clone(), errno))
    }

    /// Where it is, without symbolic links, and the number of its mount.
    ///
    /// # Errors
    /// [`MountError::Open`].
    pub fn place(&self) -> Result<(PathBuf, u64), MountError> {
        let fail = || MountError::Open(self.path.clone(), Errno::EIO);
        let path = std::fs::read_link(self.fd_path()).map_err(|_| fail())?;
        // proc(5): the line "mnt_id:" of fdinfo.
        let info = Path::new("/proc/self/fdinfo").join(self.fd.as_raw_fd().to_string());
        let text = std::fs::read_to_string(info).map_err(|_| fail())?;
        let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let id = line.and_then(|id| id.trim().parse().ok()).ok_or_else(fail)?;
        Ok((path, id))
    }

    /// A copy of the mount at this place that is not mounted anywhere yet.
    fn clone_tree(&self, recursive: bool) -> Result<OwnedFd, Errno> {
        let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.unsigned_abs();
        if recursive {
            flags |= libc::AT_RECURSIVE.unsigned_abs();
        }
        // SAFETY: the path is an empty C string, the descriptor is open.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, self.fd.as_raw_fd(), c"".as_ptr(), flags) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the system call has just returned this descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// A copy of its mount, without what is mounted below, that no path leads to.
    ///
    /// # Errors
    /// [`MountError::Open`].
    pub fn detached(&self) -> Result<OwnedFd, MountError> {
        self.clone_tree(false)
            .map_err(|errno| MountError::Open(self.path.clone(), errno))
    }
}

/// Binds `source` on `target` with the flags, read-only state and propagation of `options`.
///
/// # Errors
/// [`MountError`]; nothing is left mounted.
pub fn bind(source: &Path, target: &Path, options: &ParsedOptions) -> Result<(), MountError> {
    attach(&Source::open(source)?, target, options, options.read_only())
}

/// As [`bind`], for a source held open; `read_only` in place of what `options` say.
///
/// Device nodes, set-user-id bits and programs of the mount have no effect on the host: only a file server uses it.
///
/// # Errors
/// [`MountError`]; nothing is left mounted.
pub fn attach(
    source: &Source,
    target: &Path,
    options: &ParsedOptions,
    read_only: bool,
) -> Result<(), MountError> {
    let fail = |errno| mount_error(&source.path.display().to_string(), "bind", target, errno);
    let tree = source
        .clone_tree(options.flags.contains(MsFlags::MS_REC))
        .map_err(fail)?;
    // Everything is set before the mount is seen. "Slave" lets mounts that the host makes below appear; nothing that
    // is made here ever appears on the host.
    let propagation = if options.propagation.contains(MsFlags::MS_SLAVE) {
        MsFlags::MS_SLAVE
    } else {
        MsFlags::MS_PRIVATE
    };
    let mut everywhere = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    if options.recursive_read_only {
        everywhere |= libc::MOUNT_ATTR_RDONLY;
    }
    set_attributes(&tree, everywhere, propagation, true).map_err(fail)?;
    if read_only {
        set_attributes(&tree, libc::MOUNT_ATTR_RDONLY, MsFlags::empty(), false).map_err(fail)?;
    }
    let path = CString::new(target.as_os_str().as_bytes()).map_err(|_| fail(Errno::EINVAL))?;
    // SAFETY: both paths are C strings that live during the call, the descriptor is open.
    let moved = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            path.as_ptr(),
            // A target can be a descriptor's link in /proc.
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_SYMLINKS,
        )
    };
    Errno::result(moved).map(drop).map_err(fail)
}

/// Makes the mount at `target` read-only.
///
/// # Errors
/// [`MountError::Mount`].
pub fn make_read_only(target: &Path) -> Result<(), MountError> {
    let source = Source::open(target)?;
    set_attributes(&source.fd, libc::MOUNT_ATTR_RDONLY, MsFlags::empty(), false)
        .map_err(|errno| mount_error("", "remount", target, errno))
}

/// Lets mounts below the one at `target` appear in its copies in other mount namespaces (mount_namespaces(7)).
///
/// # Errors
/// [`MountError::Mount`].
pub fn share(target: &Path) -> Result<(), MountError> {
    let source = Source::open(target)?;
    set_attributes(&source.fd, 0, MsFlags::MS_SHARED, false)
        .map_err(|errno| mount_error("", "share", target, errno))
}

fn set_attributes(mount: &OwnedFd, set: u64, propagation: MsFlags, recursive: bool) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation: propagation.bits(),
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and attributes a struct of the given size, both alive during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Unmounts everything at `target`, even if it is in use; nothing mounted there is no error.
///
/// # Errors
/// [`MountError::Unmount`].
pub fn detach(target: &Path) -> Result<(), MountError> {
    loop {
        match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => continue,
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            Err(errno) => return Err(MountError::Unmount(target.into(), errno)),
        }
    }
}

/// Opens `path` without following it into anything: an `O_PATH` descriptor.
///
/// # Errors
/// [`MountError::Open`].
pub fn open_path(path: &Path, directory: bool) -> Result<OwnedFd, MountError> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_PATH
        | OFlag::O_CLOEXEC
        | if directory {
            OFlag::O_DIRECTORY
        } else {
            OFlag::empty()
        };
    let fd = open(path, flags, nix::sys::stat::Mode::empty())
        .map_err(|errno| MountError::Open(path.into(), errno))?;
    // SAFETY: open has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A path that names what `fd` refers to, for system calls that only take paths.
#[must_use]
pub fn fd_path(fd: &impl AsRawFd) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}
