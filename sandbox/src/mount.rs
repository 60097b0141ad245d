//! Host mounts: options as containerd writes them, and the system calls.

use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

#[cfg(test)]
mod tests;

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

/// Options split into what mount(2) wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedOptions {
    /// `MS_*` flags without propagation.
    pub flags: MsFlags,
    /// Propagation to set after the mount; empty: none.
    pub propagation: MsFlags,
    /// Options of the file system, in order.
    pub data: Vec<String>,
    /// A loop device is asked for: the source is a regular file.
    pub is_loop: bool,
    /// Read-only with everything mounted below.
    pub recursive_read_only: bool,
}

impl ParsedOptions {
    /// Whether the mount may not be written through.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.flags.contains(MsFlags::MS_RDONLY) || self.recursive_read_only
    }

    /// The file system's options as mount(2) wants them.
    #[must_use]
    pub fn data_string(&self) -> String {
        self.data.join(",")
    }
}

/// What one option means: flags to set, or flags to clear.
enum Meaning {
    Set(MsFlags),
    Clear(MsFlags),
    Propagation(MsFlags),
    Nothing,
}

fn meaning(option: &str) -> Option<Meaning> {
    use Meaning::{Clear, Nothing, Propagation, Set};
    Some(match option {
        "defaults" | "" => Nothing,
        "ro" => Set(MsFlags::MS_RDONLY),
        "rw" => Clear(MsFlags::MS_RDONLY),
        "nosuid" => Set(MsFlags::MS_NOSUID),
        "suid" => Clear(MsFlags::MS_NOSUID),
        "nodev" => Set(MsFlags::MS_NODEV),
        "dev" => Clear(MsFlags::MS_NODEV),
        "noexec" => Set(MsFlags::MS_NOEXEC),
        "exec" => Clear(MsFlags::MS_NOEXEC),
        "sync" => Set(MsFlags::MS_SYNCHRONOUS),
        "async" => Clear(MsFlags::MS_SYNCHRONOUS),
        "dirsync" => Set(MsFlags::MS_DIRSYNC),
        "mand" => Set(MsFlags::MS_MANDLOCK),
        "nomand" => Clear(MsFlags::MS_MANDLOCK),
        "noatime" => Set(MsFlags::MS_NOATIME),
        "atime" => Clear(MsFlags::MS_NOATIME),
        "nodiratime" => Set(MsFlags::MS_NODIRATIME),
        "diratime" => Clear(MsFlags::MS_NODIRATIME),
        "relatime" => Set(MsFlags::MS_RELATIME),
        "norelatime" => Clear(MsFlags::MS_RELATIME),
        "strictatime" => Set(MsFlags::MS_STRICTATIME),
        "nostrictatime" => Clear(MsFlags::MS_STRICTATIME),
        "bind" => Set(MsFlags::MS_BIND),
        "rbind" => Set(MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        "private" => Propagation(MsFlags::MS_PRIVATE),
        "rprivate" => Propagation(MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
        "slave" => Propagation(MsFlags::MS_SLAVE),
        "rslave" => Propagation(MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
        "shared" => Propagation(MsFlags::MS_SHARED),
        "rshared" => Propagation(MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
        "unbindable" => Propagation(MsFlags::MS_UNBINDABLE),
        "runbindable" => Propagation(MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
        _ => return None,
    })
}

/// Splits `options` into flags and file system data; later options win over earlier ones.
///
/// Options for the caller itself (`X-…`, `x-…`) are dropped, as mount(8) does.
///
/// # Errors
/// [`MountError::Option`] for options this runtime cannot honour.
pub fn parse_options<S: AsRef<str>>(options: &[S]) -> Result<ParsedOptions, MountError> {
    let mut parsed = ParsedOptions {
        flags: MsFlags::empty(),
        propagation: MsFlags::empty(),
        data: Vec::new(),
        is_loop: false,
        recursive_read_only: false,
    };
    for option in options {
        let option = option.as_ref();
        match meaning(option) {
            Some(Meaning::Set(flags)) => parsed.flags |= flags,
            Some(Meaning::Clear(flags)) => parsed.flags -= flags,
            Some(Meaning::Propagation(flags)) => parsed.propagation = flags,
            Some(Meaning::Nothing) => {}
            None => match option {
                "loop" => parsed.is_loop = true,
                "rro" => parsed.recursive_read_only = true,
                _ if option.starts_with("X-") || option.starts_with("x-") => {}
                // An id-mapped mount changes who owns what: ignoring it would be wrong in silence.
                "idmap" | "ridmap" => return Err(MountError::Option(option.into())),
                _ if option.starts_with("uidmap=") || option.starts_with("gidmap=") => {
                    return Err(MountError::Option(option.into()));
                }
                _ => parsed.data.push(option.to_owned()),
            },
        }
    }
    Ok(parsed)
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
    let parsed = parse_options(&request.options)?;
    if parsed.is_loop {
        return Err(MountError::Option("loop".into()));
    }
    if request.kind == "bind" || parsed.flags.contains(MsFlags::MS_BIND) {
        return bind(Path::new(&request.source), target, &parsed);
    }
    let data = parsed.data_string();
    let fail = |errno| mount_error(&request.source, &request.kind, target, errno);
    if data.len() > DATA_LIMIT {
        return mount_long_overlay(request, target, &parsed);
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

/// Binds `source` on `target` with the flags and read-only state of `options`.
///
/// # Errors
/// [`MountError`]; nothing is left mounted.
pub fn bind(source: &Path, target: &Path, options: &ParsedOptions) -> Result<(), MountError> {
    let fail = |errno| mount_error(&source.display().to_string(), "bind", target, errno);
    let none: Option<&str> = None;
    let how = MsFlags::MS_BIND | (options.flags & MsFlags::MS_REC);
    mount(Some(source), target, none, how, none).map_err(fail)?;
    restrict(target, options).map_err(|errno| {
        // The error of the restriction is the one worth reporting.
        let _ = umount2(target, MntFlags::MNT_DETACH);
        fail(errno)
    })
}

/// A bind mount ignores flags when it is made; a second call sets them.
fn restrict(target: &Path, options: &ParsedOptions) -> Result<(), Errno> {
    let none: Option<&str> = None;
    let wanted = options.flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if options.recursive_read_only {
        set_read_only_recursive(target)?;
    } else if !wanted.is_empty() {
        mount(
            none,
            target,
            none,
            wanted | MsFlags::MS_BIND | MsFlags::MS_REMOUNT,
            none,
        )?;
    }
    // Propagation never crosses the virtual machine; what a container asks for is kept on this side as
    // "slave", so that host mounts below a volume appear and guest wishes change nothing on the host.
    mount(none, target, none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)
}

fn set_read_only_recursive(target: &Path) -> Result<(), Errno> {
    let path = CString::new(target.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: path is a C string and attributes a struct of the given size, both alive during the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Mounts an overlay whose options do not fit a page: in the lower directories' common parent, with
/// relative paths. The working directory is changed on a thread of its own.
fn mount_long_overlay(request: &Mount, target: &Path, parsed: &ParsedOptions) -> Result<(), MountError> {
    let too_long = || MountError::OptionsTooLong {
        target: target.into(),
        length: parsed.data_string().len(),
    };
    if request.kind != "overlay" {
        return Err(too_long());
    }
    let (parent, data) = shorten_lower_dirs(&parsed.data).ok_or_else(too_long)?;
    if data.len() > DATA_LIMIT {
        return Err(too_long());
    }
    let (source, flags) = (request.source.clone(), parsed.flags);
    let owned_target = target.to_path_buf();
    let result = std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().spawn_scoped(scope, move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&parent)?;
            mount(
                Some(source.as_str()),
                &owned_target,
                Some("overlay"),
                flags,
                Some(data.as_str()),
            )
        });
        worker.map(|thread| thread.join().unwrap_or(Err(Errno::EIO)))
    });
    result
        .map_err(MountError::Thread)?
        .map_err(|errno| mount_error(&request.source, &request.kind, target, errno))
}

/// The common parent of the lower directories, and the data with them relative to it.
fn shorten_lower_dirs(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = dirs.first()?.parent()?;
    while !dirs.iter().all(|dir| dir.starts_with(common)) {
        common = common.parent()?;
    }
    let relative: Option<Vec<&str>> = dirs
        .iter()
        .map(|dir| dir.strip_prefix(common).ok().and_then(Path::to_str))
        .collect();
    let relative = format!("lowerdir={}", relative?.join(":"));
    let shortened: Vec<&str> = data
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                relative.as_str()
            } else {
                option.as_str()
            }
        })
        .collect();
    Some((common.to_path_buf(), shortened.join(",")))
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
