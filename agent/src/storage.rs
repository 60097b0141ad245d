//! Filesystems of a container: what to mount where, how, and how to undo it.
//!
//! A plan is made by the agent, which also owns the partition numbers; it is carried out and undone by helper
//! processes.

pub mod disk;
pub mod mount;
pub mod volumes;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent as proto;
use bulkhead_protocol::agent::root_filesystem::Kind;
use disk::DiskError;
use mount::MountError;
use nix::mount::MsFlags;

use crate::container::spec::valid_path;
use crate::error::Error;

/// Where the agent keeps what it makes.
pub const RUN: &str = "/run/bulkhead";

/// Where the tree shared with the host is mounted.
pub const SHARED: &str = "/run/bulkhead/shared";

/// Filesystem types that may be on a disk.
const TYPES: [&str; 3] = ["ext4", "xfs", "erofs"];

/// Layers one overlay can have.
const MAX_LAYERS: usize = 500;

/// Why a container's filesystems could not be mounted.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A directory.
    #[error("cannot create {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The root directory is not there.
    #[error("root filesystem {}", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A filesystem on a disk or part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Disk slot.
    pub slot: u32,
    /// Size the disk must have, in bytes; 0: any but empty.
    pub capacity: u64,
    /// Number and place of the partition that covers the filesystem, if it is not the whole disk.
    pub partition: Option<disk::Partition>,
    /// Filesystem type.
    pub kind: String,
    /// Mount options.
    pub options: Vec<String>,
    /// Mounted read-only.
    pub read_only: bool,
    /// Where.
    pub mount_point: PathBuf,
}

/// Where a container's root comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootPlan {
    /// A directory that is there.
    Directory(PathBuf),
    /// A volume.
    Volume(Box<Volume>),
    /// An overlay of volumes, topmost first, with writes to a volume or to memory.
    Overlay {
        /// Read-only layers.
        lower: Vec<Volume>,
        /// Volume with the upper and work directories.
        upper: Option<Box<Volume>>,
    },
}

/// All filesystems of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Directory of the container, below which everything but `volumes` is mounted.
    pub directory: PathBuf,
    /// Root.
    pub root: RootPlan,
    /// Further volumes, at mount points of the host's choice.
    pub volumes: Vec<Volume>,
    /// Disks that the container gets as they are.
    pub block_devices: Vec<BlockDevice>,
}

/// A disk for a container, as a device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Disk slot.
    pub slot: u32,
    /// Size the disk must have, in bytes; 0: any but empty.
    pub capacity: u64,
    /// Path of the node in the container.
    pub path: PathBuf,
    /// Nobody may open it for writing.
    pub read_only: bool,
}

/// Partition numbers in use on each disk.
#[derive(Debug, Default)]
pub struct Partitions(HashMap<u32, BTreeSet<i32>>);

impl Partitions {
    fn take(&mut self, slot: u32) -> i32 {
        let used = self.0.entry(slot).or_default();
        let free = (1..).find(|number| !used.contains(number)).unwrap_or(i32::MAX);
        used.insert(free);
        free
    }

    /// Whether no number is in use.
    #[cfg(fuzzing)]
    pub fn is_empty(&self) -> bool {
        self.0.values().all(BTreeSet::is_empty)
    }

    /// Gives the numbers of a plan back, after its partitions have been deleted.
    pub fn release(&mut self, plan: &Plan) {
        for volume in plan.all() {
            if let Some(partition) = &volume.partition
                && let Some(used) = self.0.get_mut(&volume.slot)
            {
                used.remove(&partition.number);
            }
        }
    }
}

impl Plan {
    /// Plans a container's filesystems below `directory`.
    ///
    /// # Errors
    /// A field of the request makes no sense.
    pub fn new(
        directory: &Path,
        root: &proto::RootFilesystem,
        mounts: &[proto::DiskMount],
        block_devices: &[proto::BlockDevice],
        partitions: &mut Partitions,
    ) -> Result<Self, Error> {
        let block_devices: Result<_, _> = block_devices.iter().map(block_device).collect();
        let mut plan = Self {
            block_devices: block_devices?,
            directory: directory.to_owned(),
            root: RootPlan::Directory(PathBuf::new()),
            volumes: Vec::new(),
        };
        let result = plan.fill(root, mounts, partitions);
        if result.is_err() {
            partitions.release(&plan);
        }
        result.map(|()| plan)
    }

    fn fill(
        &mut self,
        root: &proto::RootFilesystem,
        mounts: &[proto::DiskMount],
        partitions: &mut Partitions,
    ) -> Result<(), Error> {
        for mount in mounts {
            let point = &mount.mount_point;
            let below = Path::new(point).starts_with(RUN) && Path::new(point) != Path::new(RUN);
            if !valid_path(point) || !below {
                return Err(Error::Invalid {
                    field: "disk_mounts.mount_point",
                    value: point.clone(),
                });
            }
            let filesystem = mount.filesystem.as_ref();
            self.volumes.push(volume(
                filesystem,
                Path::new(point),
                partitions,
                "disk_mounts.filesystem",
            )?);
        }
        let mount_point = self.directory.join("rootfs");
        match &root.kind {
            Some(Kind::SharedPath(path)) => {
                if !valid_path(path) || !Path::new(path).starts_with(RUN) {
                    return Err(Error::Invalid {
                        field: "root.shared_path",
                        value: path.clone(),
                    });
                }
                self.root = RootPlan::Directory(path.into());
            }
            Some(Kind::Disk(filesystem)) => {
                let volume = volume(Some(filesystem), &mount_point, partitions, "root.disk")?;
                self.root = RootPlan::Volume(Box::new(volume));
            }
            Some(Kind::Layers(layers)) => self.fill_layers(layers, partitions)?,
            Some(_) | None => {
                return Err(Error::Invalid {
                    field: "root",
                    value: "unset".into(),
                });
            }
        }
        Ok(())
    }

    fn fill_layers(&mut self, layers: &proto::Layers, partitions: &mut Partitions) -> Result<(), Error> {
        if !(1..=MAX_LAYERS).contains(&layers.lower.len()) {
            return Err(Error::Invalid {
                field: "root.layers.lower",
                value: layers.lower.len().to_string(),
            });
        }
        // Filled in place, so that a failure half-way gives the numbers taken so far back.
        self.root = RootPlan::Overlay {
            lower: Vec::new(),
            upper: None,
        };
        let RootPlan::Overlay { lower, upper } = &mut self.root else {
            return Ok(());
        };
        for (index, layer) in layers.lower.iter().enumerate() {
            let point = self.directory.join(layer_name(index));
            let mut volume = volume(Some(layer), &point, partitions, "root.layers.lower")?;
            volume.read_only = true;
            lower.push(volume);
        }
        if let Some(filesystem) = layers.upper.as_ref() {
            let point = self.directory.join(UPPER);
            *upper = Some(Box::new(volume(
                Some(filesystem),
                &point,
                partitions,
                "root.layers.upper",
            )?));
        }
        Ok(())
    }

    /// All volumes.
    pub fn all(&self) -> impl Iterator<Item = &Volume> {
        let (lower, single): (&[Volume], Option<&Volume>) = match &self.root {
            RootPlan::Directory(_) => (&[], None),
            RootPlan::Volume(volume) => (&[], Some(volume)),
            RootPlan::Overlay { lower, upper } => (lower, upper.as_deref()),
        };
        self.volumes.iter().chain(lower).chain(single)
    }

    /// Directory the container will have as its root.
    pub fn root(&self) -> PathBuf {
        match &self.root {
            RootPlan::Directory(path) => path.clone(),
            RootPlan::Volume(_) | RootPlan::Overlay { .. } => self.directory.join("rootfs"),
        }
    }

    /// Whether [`Plan::unmount`] has anything to do.
    pub fn has_mounts(&self) -> bool {
        self.all().next().is_some() || !self.mount_points().is_empty()
    }

    /// What is mounted for the container, the latest first. Directories of the shared tree on which the host has
    /// mounted something become mounts of their own when they are entered (virtio-fs submounts).
    fn mount_points(&self) -> Vec<PathBuf> {
        let mut points = mount::mounts_below(&self.directory).unwrap_or_default();
        points.extend(self.volumes.iter().rev().map(|volume| volume.mount_point.clone()));
        if let RootPlan::Directory(root) = &self.root
            && let Some(own) = root
                .parent()
                .filter(|own| own.starts_with(SHARED) && *own != Path::new(SHARED))
        {
            points.extend(mount::mounts_below(own).unwrap_or_default());
        }
        points
    }

    /// Mounts everything. After an error [`Plan::unmount`] undoes what was done. Changes the working directory.
    ///
    /// # Errors
    /// The first that occurs.
    pub fn mount(&self) -> Result<(), StorageError> {
        for volume in self.all() {
            mount_volume(volume)?;
        }
        for device in &self.block_devices {
            let node = disk::open(device.slot, device.capacity, None)?;
            disk::set_read_only(&node, device.slot, device.read_only)?;
        }
        match &self.root {
            RootPlan::Directory(path) => {
                let kind = fs::metadata(path).and_then(|meta| match meta.is_dir() {
                    true => Ok(()),
                    false => Err(io::ErrorKind::NotADirectory.into()),
                });
                kind.map_err(|source| StorageError::Root {
                    path: path.clone(),
                    source,
                })
            }
            RootPlan::Volume(_) => Ok(()),
            RootPlan::Overlay { lower, upper } => self.mount_overlay(lower.len(), upper.is_some()),
        }
    }

    fn mount_overlay(&self, layers: usize, has_upper: bool) -> Result<(), StorageError> {
        if !has_upper {
            let upper = self.directory.join(UPPER);
            make_dir(&upper)?;
            mount::mount("tmpfs", &upper, "tmpfs", MsFlags::empty(), "mode=0755")?;
        }
        for name in ["upper", "work"] {
            make_dir(&self.directory.join(UPPER).join(name))?;
        }
        let root = self.root();
        make_dir(&root)?;
        // The kernel takes one page of options, which many long layer names would exceed.
        std::env::set_current_dir(&self.directory).map_err(|source| StorageError::Directory {
            path: self.directory.clone(),
            source,
        })?;
        let names: Vec<String> = (0..layers).map(layer_name).collect();
        let options = format!(
            "lowerdir={},upperdir={UPPER}/upper,workdir={UPPER}/work",
            names.join(":")
        );
        Ok(mount::mount(
            "overlay",
            &root,
            "overlay",
            MsFlags::empty(),
            &options,
        )?)
    }

    /// Unmounts everything and deletes the partitions; goes on after an error.
    ///
    /// # Errors
    /// The first that occurred.
    pub fn unmount(&self) -> Result<(), StorageError> {
        let mut first: Option<StorageError> = None;
        let mut note = |error: StorageError| {
            first.get_or_insert(error);
        };
        for point in self.mount_points() {
            if let Err(error) = mount::unmount(&point) {
                note(error.into());
            }
        }
        for volume in self.all() {
            if let Some(partition) = &volume.partition
                && let Err(error) = disk::delete_partition(volume.slot, partition.number)
            {
                note(error.into());
            }
        }
        for volume in &self.volumes {
            // Others may be mounted below the same parent.
            let _ = fs::remove_dir(&volume.mount_point);
        }
        first.map_or(Ok(()), Err)
    }
}

/// A whole disk and an absolute path.
fn block_device(device: &proto::BlockDevice) -> Result<BlockDevice, Error> {
    let disk = device.disk.get_or_default();
    let is_whole = disk.offset == 0 && disk.length == 0;
    if !is_whole || !valid_path(&device.path) {
        return Err(Error::Invalid {
            field: "block_devices",
            value: device.path.clone(),
        });
    }
    Ok(BlockDevice {
        slot: disk.slot,
        capacity: disk.capacity,
        path: PathBuf::from(&device.path),
        read_only: device.read_only,
    })
}

const UPPER: &str = "upper";

fn layer_name(index: usize) -> String {
    format!("l{index}")
}

fn volume(
    filesystem: Option<&proto::Filesystem>,
    mount_point: &Path,
    partitions: &mut Partitions,
    field: &'static str,
) -> Result<Volume, Error> {
    let invalid = |value: String| Error::Invalid { field, value };
    let filesystem = filesystem.ok_or_else(|| invalid("unset".into()))?;
    if !TYPES.contains(&filesystem.type_.as_str()) {
        return Err(invalid(filesystem.type_.clone()));
    }
    let range = filesystem
        .range
        .as_ref()
        .ok_or_else(|| invalid("range unset".into()))?;
    let end = range.offset.checked_add(range.length);
    let aligned = range.offset % disk::SECTOR == 0 && range.length % disk::SECTOR == 0;
    // The kernel's interface has signed 64-bit bytes.
    if !aligned || end.is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(invalid(format!("range {}+{}", range.offset, range.length)));
    }
    let whole = range.offset == 0 && range.length == 0;
    let partition = (!whole).then(|| disk::Partition {
        number: partitions.take(range.slot),
        offset: range.offset,
        length: range.length,
    });
    Ok(Volume {
        slot: range.slot,
        capacity: range.capacity,
        partition,
        kind: filesystem.type_.clone(),
        options: filesystem.options.clone(),
        read_only: filesystem.read_only,
        mount_point: mount_point.to_owned(),
    })
}

fn mount_volume(volume: &Volume) -> Result<(), StorageError> {
    let device = disk::open(volume.slot, volume.capacity, volume.partition.as_ref())?;
    if volume.partition.is_none() {
        disk::set_read_only(&device, volume.slot, volume.read_only)?;
    }
    make_dir(&volume.mount_point)?;
    let (mut flags, data) = mount::parse_options(&volume.options);
    if volume.read_only {
        flags |= MsFlags::MS_RDONLY;
    }
    Ok(mount::mount(
        &device.to_string_lossy(),
        &volume.mount_point,
        &volume.kind,
        flags,
        &data,
    )?)
}

fn make_dir(path: &Path) -> Result<(), StorageError> {
    fs::create_dir_all(path).map_err(|source| StorageError::Directory {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
#[path = "storage_tests.rs"]
mod tests;
