//! Volumes in guest memory, which the pod's containers share.
//!
//! Each is a mount of its own below [`VOLUMES`]. What the host writes as a whole and updates (ConfigMaps, Secrets) is
//! copied in two steps: first beside what is shown, then shown by renaming one symbolic link, as the kubelet does it
//! on the host. A container never sees a mix, and inotify tells it.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent as proto;
use bulkhead_protocol::agent::create_volume_request::Kind;
use nix::errno::Errno;
use nix::mount::MsFlags;

use super::SHARED;
use super::mount::{self, MountError};
use crate::error::{Error, FileError, failed};

/// Where the volumes are mounted.
pub const VOLUMES: &str = "/run/bulkhead/volumes";

/// Folder of the shared tree with the volumes of the host.
const SHARED_VOLUMES: &str = ".volumes";

/// The symbolic link to the content that is shown, and its name before it is.
const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Directories below each other in a volume.
const MAX_DEPTH: usize = 64;

/// Why a volume could not be made or brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A file or directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// The kernel has no pages of that size.
    #[error("the guest has no huge pages of {0} bytes")]
    PageSize(u64),
}

/// A checked request to make a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Create {
    point: PathBuf,
    mode: u32,
    uid: u32,
    gid: u32,
    kind: CreateKind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum CreateKind {
    Memory(u64),
    HugePages { page_size: u64, size: u64 },
    Directory { volume: PathBuf, path: PathBuf },
}

/// Where a volume of that name is mounted.
fn point(name: &str) -> Result<PathBuf, Error> {
    let is_number = (1..=20).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number {
        return Err(Error::Invalid {
            field: "name",
            value: name.to_owned(),
        });
    }
    Ok(Path::new(VOLUMES).join(name))
}

impl Create {
    /// Checks a request.
    ///
    /// # Errors
    /// A field makes no sense.
    pub fn new(request: &proto::CreateVolumeRequest) -> Result<Self, Error> {
        let kind = match &request.kind {
            Some(Kind::Memory(memory)) => CreateKind::Memory(memory.size),
            Some(Kind::HugePages(pages)) => CreateKind::HugePages {
                page_size: pages.page_size,
                size: pages.size,
            },
            Some(Kind::Directory(directory)) => {
                let path = PathBuf::from(&directory.path);
                let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
                if !is_plain || directory.path.is_empty() || directory.path.contains('\0') {
                    return Err(Error::Invalid {
                        field: "directory.path",
                        value: directory.path.clone(),
                    });
                }
                CreateKind::Directory {
                    volume: point(&directory.volume)?,
                    path,
                }
            }
            Some(_) | None => {
                return Err(Error::Invalid {
                    field: "kind",
                    value: "unset".into(),
                });
            }
        };
        Ok(Self {
            point: point(&request.name)?,
            mode: request.mode & 0o7777,
            uid: request.uid,
            gid: request.gid,
            kind,
        })
    }

    /// Where the volume will be mounted.
    #[cfg(fuzzing)]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Mounts the volume unless it is.
    ///
    /// # Errors
    /// The first step that fails; nothing is left mounted.
    pub fn run(&self) -> Result<(), VolumeError> {
        if is_mount_point(&self.point) {
            return Ok(());
        }
        make_point(&self.point)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        match &self.kind {
            CreateKind::Memory(size) => {
                let size = if *size == 0 {
                    String::new()
                } else {
                    format!("size={size}")
                };
                mount::mount("tmpfs", &self.point, "tmpfs", flags, &size)?;
            }
            CreateKind::HugePages { page_size, size } => {
                allow_huge_pages(*page_size)?;
                let mut options = format!("pagesize={page_size}");
                if *size != 0 {
                    options = format!("{options},size={size}");
                }
                mount::mount("hugetlbfs", &self.point, "hugetlbfs", flags, &options)?;
            }
            CreateKind::Directory { volume, path } => {
                return self.mount_directory(volume, path);
            }
        }
        let owned = own(&self.point, self.uid, self.gid, self.mode);
        if owned.is_err() {
            let _ = mount::unmount(&self.point);
        }
        Ok(owned?)
    }

    /// Mounts what is at `path` of another volume; directories that are missing are made. A container could put
    /// links there: none is followed.
    fn mount_directory(&self, volume: &Path, path: &Path) -> Result<(), VolumeError> {
        let whole = volume.join(path);
        let mut at = open_at(libc::AT_FDCWD, volume, libc::O_DIRECTORY).map_err(failed("open", volume))?;
        for part in path.components() {
            let name = Path::new(part.as_os_str());
            at = match open_at(at.as_raw_fd(), name, 0) {
                Err(Errno::ENOENT) => {
                    let mode = nix::sys::stat::Mode::from_bits_truncate(0o750);
                    nix::sys::stat::mkdirat(Some(at.as_raw_fd()), name, mode)
                        .map_err(failed("create", &whole))?;
                    let made =
                        open_at(at.as_raw_fd(), name, libc::O_DIRECTORY).map_err(failed("open", &whole))?;
                    own(&fd_path(&made), self.uid, self.gid, self.mode)?;
                    made
                }
                opened => opened.map_err(failed("open", &whole))?,
            };
        }
        let source = fd_path(&at);
        if !fs::metadata(&source).is_ok_and(|metadata| metadata.is_dir()) {
            fs::remove_dir(&self.point).map_err(failed("replace", &self.point))?;
            File::create(&self.point).map_err(failed("create", &self.point))?;
        }
        let bound = nix::mount::mount(
            Some(&source),
            &self.point,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        );
        Ok(bound.map_err(failed("mount", &whole))?)
    }
}

/// Opens a name without following links.
fn open_at(directory: RawFd, name: &Path, flags: libc::c_int) -> Result<OwnedFd, Errno> {
    let name = CString::new(name.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the structure is plain numbers, for which zero is a value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((libc::O_PATH | libc::O_CLOEXEC | flags).unsigned_abs());
    how.resolve = libc::RESOLVE_NO_SYMLINKS;
    // SAFETY: name is a C string and how a structure of the given size, both alive during the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            directory,
            name.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the system call has just returned this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn fd_path(fd: &OwnedFd) -> PathBuf {
    Path::new("/proc/self/fd").join(fd.as_raw_fd().to_string())
}

fn own(path: &Path, uid: u32, gid: u32, mode: u32) -> Result<(), FileError> {
    chown(path, Some(uid), Some(gid))
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(failed("give away", path))
}

fn make_point(point: &Path) -> Result<(), FileError> {
    fs::create_dir_all(point).map_err(failed("create", point))
}

fn is_mount_point(point: &Path) -> bool {
    mount::mounts_below(point).is_ok_and(|points| points.iter().any(|other| other == point))
}

/// Lets processes take pages of a size as far as the guest's memory goes. What a container may take is its limit's
/// affair.
fn allow_huge_pages(size: u64) -> Result<(), VolumeError> {
    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10);
    let limit = Path::new(&directory).join("nr_overcommit_hugepages");
    let memory = fs::read_to_string("/proc/meminfo").map_err(failed("read", "/proc/meminfo".as_ref()))?;
    let kib = memory.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    let pages = kib.unwrap_or_default().checked_div(size >> 10);
    match (pages, limit.exists()) {
        (Some(pages), true) => Ok(fs::write(&limit, pages.to_string()).map_err(failed("write", &limit))?),
        _ => Err(VolumeError::PageSize(size)),
    }
}

/// A checked version of a volume's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    volume: PathBuf,
    name: String,
}

impl Version {
    /// Checks the fields of a request.
    ///
    /// # Errors
    /// A field makes no sense.
    pub fn new(volume: &str, version: &str) -> Result<Self, Error> {
        let is_version = version.starts_with("..")
            && version.len() > 2
            && !version.contains(['/', '\0'])
            && ![DATA, NEW_DATA].contains(&version);
        if !is_version {
            return Err(Error::Invalid {
                field: "version",
                value: version.to_owned(),
            });
        }
        Ok(Self {
            volume: point(volume)?,
            name: version.to_owned(),
        })
    }

    /// Copies the version from the shared directory `source`.
    ///
    /// # Errors
    /// The first file that cannot be copied.
    pub fn stage(&self, source: &Path) -> Result<(), VolumeError> {
        let target = self.volume.join(&self.name);
        remove_tree(&target)?;
        Ok(copy_directory(&source.join(&self.name), &target, MAX_DEPTH)?)
    }

    /// Shows what was staged, and removes what was shown before.
    ///
    /// # Errors
    /// The first step that fails.
    pub fn commit(&self) -> Result<(), VolumeError> {
        let staged = self.volume.join(&self.name);
        fs::symlink_metadata(&staged).map_err(failed("find", &staged))?;
        let new = self.volume.join(NEW_DATA);
        remove_tree(&new)?;
        symlink(&self.name, &new).map_err(failed("link", &new))?;
        let data = self.volume.join(DATA);
        fs::rename(&new, &data).map_err(failed("swap", &data))?;
        // From here on the new content is what is seen; names follow it.
        for name in names(&staged)? {
            let link = self.volume.join(&name);
            let target = Path::new(DATA).join(&name);
            if fs::read_link(&link).is_ok_and(|old| old == target) {
                continue;
            }
            remove_tree(&link)?;
            symlink(&target, &link).map_err(failed("link", &link))?;
        }
        for name in names(&self.volume)? {
            let is_shown = name == DATA || *name == *self.name;
            let is_user_visible = !name.as_bytes().starts_with(b"..");
            let path = self.volume.join(&name);
            if !is_shown && (!is_user_visible || fs::symlink_metadata(staged.join(&name)).is_err()) {
                remove_tree(&path)?;
            }
        }
        Ok(())
    }
}

fn names(directory: &Path) -> Result<Vec<std::ffi::OsString>, FileError> {
    let entries = fs::read_dir(directory).map_err(failed("read", directory))?;
    let names: io::Result<Vec<_>> = entries.map(|entry| Ok(entry?.file_name())).collect();
    names.map_err(failed("read", directory))
}

/// Removes a file, link or directory; what is not there is fine.
fn remove_tree(path: &Path) -> Result<(), FileError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Copies a directory with owners and permissions: directories, files and links. Anything else is left out.
fn copy_directory(from: &Path, to: &Path, depth: usize) -> Result<(), FileError> {
    if depth == 0 {
        return Err(failed("copy", from)(Errno::ELOOP));
    }
    let metadata = fs::symlink_metadata(from).map_err(failed("read", from))?;
    fs::create_dir(to).map_err(failed("create", to))?;
    for name in names(from)? {
        let (from, to) = (from.join(&name), to.join(&name));
        let metadata = fs::symlink_metadata(&from).map_err(failed("read", &from))?;
        if metadata.is_dir() {
            copy_directory(&from, &to, depth - 1)?;
        } else if metadata.is_file() {
            copy_file(&from, &to).map_err(failed("copy", &from))?;
            own(&to, metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)?;
        } else if metadata.is_symlink() {
            let target = fs::read_link(&from).map_err(failed("read", &from))?;
            symlink(target, &to)
                .and_then(|()| lchown(&to, Some(metadata.uid()), Some(metadata.gid())))
                .map_err(failed("link", &to))?;
        }
    }
    own(to, metadata.uid(), metadata.gid(), metadata.mode() & 0o7777)
}

fn copy_file(from: &Path, to: &Path) -> io::Result<u64> {
    let mut options = File::options();
    let mut from = options.read(true).custom_flags(libc::O_NOFOLLOW).open(from)?;
    let mut to = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)?;
    io::copy(&mut from, &mut to)
}

/// A checked request to remove a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remove {
    point: PathBuf,
    shared: PathBuf,
}

impl Remove {
    /// Checks a request.
    ///
    /// # Errors
    /// The name makes no sense.
    pub fn new(name: &str) -> Result<Self, Error> {
        Ok(Self {
            point: point(name)?,
            shared: Path::new(SHARED).join(SHARED_VOLUMES).join(name),
        })
    }

    /// Unmounts the volume, and what was entered of it in the shared tree; goes on after an error.
    ///
    /// # Errors
    /// The first that occurred.
    pub fn run(&self) -> Result<(), VolumeError> {
        let mut first = Ok(());
        for directory in [&self.point, &self.shared] {
            for point in mount::mounts_below(directory).unwrap_or_default() {
                let unmounted = mount::unmount(&point).map_err(VolumeError::from);
                first = first.and(unmounted);
            }
        }
        first.and_then(|()| Ok(remove_tree(&self.point)?))
    }
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
