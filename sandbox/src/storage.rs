//! File systems of containers: the tree shared with the guest, and disks.

use std::fs::{self, File};
use std::io::Seek;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};

use crate::error::Kind;
use crate::mount::{self as host_mount, Mount, MountError, Source};
use crate::spec::{GUEST_SHARED, Volume};

mod layers;
mod plan;
#[cfg(test)]
mod tests;
mod volumes;

pub use volumes::{DATA, GUEST_VOLUMES, Owner, PodVolume, VolumeKind, VolumeNames, is_version};

pub use plan::{DiskPlan, RootPlan, plan_root};

/// Bytes of the shared tree's own file system: only mount points are made in it.
const TREE_OPTIONS: &str = "mode=0700,size=1m,nr_inodes=16384";

/// Bytes in a sector; parts of a disk begin at multiples of it.
const SECTOR: u64 = 512;

/// Why a container's file systems could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The id cannot be a file name.
    #[error("Container id {0} is not valid")]
    Id(String),
    /// A host mount failed.
    #[error("Cannot prepare the mount")]
    Mount(#[from] MountError),
    /// The tree's own file system could not be mounted.
    #[error("Cannot mount the shared tree on {}", .0.display())]
    Tree(PathBuf, #[source] nix::errno::Errno),
    /// A directory or file could not be made.
    #[error("Cannot create {}", .0.display())]
    Create(PathBuf, #[source] std::io::Error),
    /// A disk's file could not be opened.
    #[error("Cannot open the disk {}", .0.display())]
    Disk(PathBuf, #[source] std::io::Error),
    /// The copy of a volume in the guest could not be made or brought up to date.
    #[error("Cannot follow volume {0}")]
    Update(String, #[source] std::io::Error),
    /// A volume's source is no longer what it was.
    #[error("{} was replaced while it was being mounted", .0.display())]
    Changed(PathBuf),
    /// The mounts make no root file system this runtime knows.
    #[error("Root file system: {0}")]
    Root(String),
    /// Every disk slot is taken.
    #[error("All {0} disk slots of the virtual machine are in use (configuration key disk_slots)")]
    NoSlot(u32),
}

impl StorageError {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Id(_) | Self::Root(_) => Kind::InvalidArgument,
            Self::NoSlot(_) => Kind::FailedPrecondition,
            _ => Kind::Internal,
        }
    }
}

/// The tree shared with the guest: a small private file system in which every container has a folder
/// with its root and its volumes mounted. It is gone, mounts and all, when the last process of the
/// sandbox's mount namespace is.
///
/// The guest's kernel cannot change the tree itself: it is mounted read-only. The shim makes mount points through a
/// second mount of the same file system that no path leads to.
#[derive(Clone, Debug)]
pub struct SharedTree {
    root: PathBuf,
    writable: Arc<OwnedFd>,
    volumes: volumes::Pool,
}

/// A file system inside a disk that will be attached.
#[derive(Debug)]
pub struct PreparedDisk {
    /// Files, one behind the other.
    pub files: Vec<OwnedFd>,
    /// The guest may not write.
    pub read_only: bool,
    /// File systems in it.
    pub parts: Vec<Part>,
}

/// A file system in a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes; 0: to the end.
    pub length: u64,
    /// `ext4`, `xfs` or `erofs`.
    pub kind: String,
    /// Mount options for the guest.
    pub options: Vec<String>,
}

/// A root file system ready for the guest.
#[derive(Debug)]
pub enum PreparedRoot {
    /// At this path of the guest, below the shared tree.
    Shared(PathBuf),
    /// On a disk.
    Disk(PreparedDisk),
    /// Read-only layers on a disk, topmost first, and a writable disk or none.
    Layers {
        /// The layers.
        lower: PreparedDisk,
        /// The writable disk; absent: guest memory.
        upper: Option<PreparedDisk>,
    },
}

impl SharedTree {
    /// Mounts the tree at `root`, which is created. The caller has a mount namespace of its own.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn create(root: &Path) -> Result<Self, StorageError> {
        make_directory(root)?;
        mount(
            Some("bulkhead"),
            root,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
            Some(TREE_OPTIONS),
        )
        .map_err(|errno| StorageError::Tree(root.into(), errno))?;
        let protect = || {
            let writable = Source::open(root)?.detached()?;
            host_mount::make_read_only(root)?;
            // What is mounted in it later has to reach the VMM's own mount namespace.
            host_mount::share(root)?;
            Ok::<_, MountError>(writable)
        };
        match protect() {
            Ok(writable) => Ok(Self {
                root: root.into(),
                writable: Arc::new(writable),
                volumes: volumes::Pool::default(),
            }),
            Err(error) => {
                let _ = host_mount::detach(root);
                Err(error.into())
            }
        }
    }

    /// The root's path.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Unmounts the tree with everything mounted in it.
    ///
    /// # Errors
    /// [`MountError`].
    pub fn unmount(&self) -> Result<(), MountError> {
        host_mount::detach(&self.root)
    }

    /// Where the tree's own directories and files can be made and removed.
    fn writable(&self) -> PathBuf {
        host_mount::fd_path(&self.writable)
    }

    /// Name of a container's folder.
    fn folder<'a>(&self, id: &'a str) -> Result<&'a str, StorageError> {
        let mut parts = Path::new(id).components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(name)), None) if name == id && !id.starts_with('.') => Ok(id),
            _ => Err(StorageError::Id(id.to_owned())),
        }
    }

    /// Mounts or opens what the guest needs for container `id`, and the volumes in their order. On failure nothing
    /// is left but volumes, which [`SharedTree::release`] gives back.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn prepare(
        &self,
        id: &str,
        root: &RootPlan,
        volumes: &[Volume],
    ) -> Result<(PreparedRoot, Vec<Arc<PodVolume>>), StorageError> {
        self.prepare_again(id, root, volumes, &[])
    }

    /// As [`SharedTree::prepare`], for a guest that knows the first volumes by these names already.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn prepare_again(
        &self,
        id: &str,
        root: &RootPlan,
        volumes: &[Volume],
        names: &[VolumeNames],
    ) -> Result<(PreparedRoot, Vec<Arc<PodVolume>>), StorageError> {
        let folder = self.folder(id)?;
        make_directory(&self.writable().join(folder))?;
        let prepared = self.prepare_root(id, folder, root).and_then(|prepared| {
            let writable = self.writable();
            let volumes: Result<_, _> = volumes
                .iter()
                .enumerate()
                .map(|(number, volume)| {
                    let names = names.get(number);
                    self.volumes.take(id, &self.root, &writable, volume, names)
                })
                .collect();
            Ok((prepared, volumes?))
        });
        if prepared.is_err() {
            self.remove(id);
        }
        prepared
    }

    /// Forgets that container `id` uses volumes; returns those that nobody uses any more, which the guest must let go
    /// of before [`SharedTree::remove_volume`].
    #[must_use]
    pub fn release(&self, id: &str) -> Vec<Arc<PodVolume>> {
        self.volumes.release(id)
    }

    /// Unmounts a volume that [`SharedTree::release`] has returned.
    pub fn remove_volume(&self, volume: &PodVolume) {
        let Some(directory) = &volume.directory else {
            return;
        };
        match host_mount::detach(directory) {
            Ok(()) => volumes::remove_point(&self.writable().join(volumes::FOLDER).join(&volume.name)),
            Err(error) => log::warn!("{}", crate::error::chain(&error)),
        }
    }

    fn prepare_root(&self, id: &str, folder: &str, root: &RootPlan) -> Result<PreparedRoot, StorageError> {
        let target = self.root.join(folder).join("rootfs");
        match root {
            RootPlan::Mounts(mounts) => {
                make_directory(&self.writable().join(folder).join("rootfs"))?;
                for request in mounts {
                    let point = inside(&target, &request.target)?;
                    host_mount::perform(request, &point.fd_path())?;
                }
                Ok(PreparedRoot::Shared(
                    Path::new(GUEST_SHARED).join(id).join("rootfs"),
                ))
            }
            RootPlan::Disk(disk) => Ok(PreparedRoot::Disk(open_disk(disk)?)),
            RootPlan::Layers { lower, upper } => Ok(PreparedRoot::Layers {
                lower: layers::open(lower)?,
                upper: upper.as_ref().map(open_disk).transpose()?,
            }),
        }
    }

    /// Unmounts and removes what [`SharedTree::prepare`] made but volumes; what is gone already is no error.
    pub fn remove(&self, id: &str) {
        let Ok(folder) = self.folder(id) else { return };
        if let Err(error) = host_mount::detach(&self.root.join(folder).join("rootfs")) {
            log::warn!("{}", crate::error::chain(&error));
            // What is mounted here is not ours to remove.
            return;
        }
        let folder = self.writable().join(folder);
        let _ = fs::remove_dir(folder.join("rootfs"));
        if let Err(error) = fs::remove_dir(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove a container's folder: {error}");
        }
    }
}

/// A mount's target inside a root, held open: neither `..` nor a symbolic link leads out, also when the root changes
/// meanwhile.
fn inside(root: &Path, target: &str) -> Result<Source, StorageError> {
    let relative = Path::new(target.trim_start_matches('/'));
    if !relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(StorageError::Root(format!("mount target {target} is not valid")));
    }
    Ok(Source::open(root)?.below(relative)?)
}

fn make_directory(path: &Path) -> Result<(), StorageError> {
    fs::DirBuilder::new()
        .mode(0o755)
        .create(path)
        .or_else(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists if path.is_dir() => Ok(()),
            _ => Err(error),
        })
        .map_err(|error| StorageError::Create(path.into(), error))
}

/// Opens a disk's file.
fn open_disk(disk: &DiskPlan) -> Result<PreparedDisk, StorageError> {
    let file = File::options()
        .read(true)
        .write(!disk.read_only)
        .open(&disk.source)
        .map_err(|error| StorageError::Disk(disk.source.clone(), error))?;
    let part = Part {
        offset: 0,
        length: 0,
        kind: disk.kind.clone(),
        options: disk.options.clone(),
    };
    Ok(PreparedDisk {
        files: vec![file.into()],
        read_only: disk.read_only,
        parts: vec![part],
    })
}

/// Opens a block device for a container, with its size.
///
/// # Errors
/// [`StorageError::Disk`], also when it is empty or no block device.
pub fn open_block_device(disk: &DiskPlan) -> Result<PreparedDisk, StorageError> {
    let prepared = open_disk(disk)?;
    let is_device = fs::metadata(&disk.source).is_ok_and(|metadata| metadata.file_type().is_block_device());
    if !is_device {
        let error = std::io::ErrorKind::InvalidInput.into();
        return Err(StorageError::Disk(disk.source.clone(), error));
    }
    Ok(prepared)
}

/// Size in bytes of a regular file or block device.
fn size_of_file(file: &mut File, path: &Path) -> Result<u64, StorageError> {
    let fail = |error| StorageError::Disk(path.into(), error);
    let metadata = file.metadata().map_err(fail)?;
    if metadata.file_type().is_block_device() {
        return file.seek(std::io::SeekFrom::End(0)).map_err(fail);
    }
    Ok(metadata.len())
}
