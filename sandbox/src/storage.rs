//! File systems of containers: the tree shared with the guest, and disks.

use std::fs::{self, File};
use std::io::Seek;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::error::Kind;
use crate::mount::{self as host_mount, Mount, MountError};
use crate::spec::{GUEST_SHARED, Volume};

mod layers;
mod plan;
#[cfg(test)]
mod tests;

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
#[derive(Clone, Debug)]
pub struct SharedTree {
    root: PathBuf,
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
        Ok(Self { root: root.into() })
    }

    /// A descriptor of the tree's root for the VMM.
    ///
    /// # Errors
    /// [`StorageError::Disk`].
    pub fn open(&self) -> Result<OwnedFd, StorageError> {
        File::open(&self.root)
            .map(OwnedFd::from)
            .map_err(|error| StorageError::Disk(self.root.clone(), error))
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

    /// A container's folder.
    fn folder(&self, id: &str) -> Result<PathBuf, StorageError> {
        let mut parts = Path::new(id).components();
        match (parts.next(), parts.next()) {
            (Some(Component::Normal(name)), None) if name == id => Ok(self.root.join(id)),
            _ => Err(StorageError::Id(id.to_owned())),
        }
    }

    /// Mounts or opens what the guest needs for container `id`. On failure nothing is left.
    ///
    /// # Errors
    /// [`StorageError`].
    pub fn prepare(
        &self,
        id: &str,
        root: &RootPlan,
        volumes: &[Volume],
    ) -> Result<PreparedRoot, StorageError> {
        let folder = self.folder(id)?;
        make_directory(&folder)?;
        let prepared = self.prepare_root(id, &folder, root).and_then(|prepared| {
            for volume in volumes {
                mount_volume(&folder, volume)?;
            }
            Ok(prepared)
        });
        if prepared.is_err() {
            self.remove(id);
        }
        prepared
    }

    fn prepare_root(&self, id: &str, folder: &Path, root: &RootPlan) -> Result<PreparedRoot, StorageError> {
        let target = folder.join("rootfs");
        match root {
            RootPlan::Mounts(mounts) => {
                make_directory(&target)?;
                for request in mounts {
                    host_mount::perform(request, &inside(&target, &request.target)?)?;
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

    /// Unmounts and removes what [`SharedTree::prepare`] made; what is gone already is no error.
    pub fn remove(&self, id: &str) {
        let Ok(folder) = self.folder(id) else { return };
        let volumes = folder.join("mounts");
        let mut points = vec![folder.join("rootfs")];
        points.extend(
            fs::read_dir(&volumes)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path()),
        );
        for point in points {
            if let Err(error) = host_mount::detach(&point) {
                log::warn!("{}", crate::error::chain(&error));
                // What is mounted here is not ours to remove.
                continue;
            }
            let is_directory = fs::symlink_metadata(&point).is_ok_and(|metadata| metadata.is_dir());
            let _ = if is_directory {
                fs::remove_dir(&point)
            } else {
                fs::remove_file(&point)
            };
        }
        let _ = fs::remove_dir(&volumes);
        if let Err(error) = fs::remove_dir(&folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("cannot remove {}: {error}", folder.display());
        }
    }
}

/// A mount's target inside a root: no `..`, so that it stays there. Symbolic links of the image are not
/// followed out either, since only the root itself is mounted when targets are resolved.
fn inside(root: &Path, target: &str) -> Result<PathBuf, StorageError> {
    let relative = Path::new(target.trim_start_matches('/'));
    if !relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        return Err(StorageError::Root(format!("mount target {target} is not valid")));
    }
    let path = root.join(relative);
    let real = path
        .canonicalize()
        .map_err(|error| StorageError::Create(path.clone(), error))?;
    let real_root = root
        .canonicalize()
        .map_err(|error| StorageError::Create(root.into(), error))?;
    if !real.starts_with(&real_root) {
        return Err(StorageError::Root(format!(
            "mount target {target} leaves the root"
        )));
    }
    Ok(real)
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

fn mount_volume(folder: &Path, volume: &Volume) -> Result<(), StorageError> {
    let directory = folder.join("mounts");
    make_directory(&directory)?;
    let target = directory.join(&volume.name);
    if volume.directory {
        make_directory(&target)?;
    } else {
        File::create_new(&target).map_err(|error| StorageError::Create(target.clone(), error))?;
    }
    Ok(host_mount::bind(&volume.source, &target, &volume.options)?)
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

/// Size in bytes of a regular file or block device.
fn size_of_file(file: &mut File, path: &Path) -> Result<u64, StorageError> {
    let fail = |error| StorageError::Disk(path.into(), error);
    let metadata = file.metadata().map_err(fail)?;
    if metadata.file_type().is_block_device() {
        return file.seek(std::io::SeekFrom::End(0)).map_err(fail);
    }
    Ok(metadata.len())
}
