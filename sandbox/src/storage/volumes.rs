//! Volumes of a pod. Each is in the tree once, however many containers mount it: two mounts of one directory would
//! be two directories to the guest's kernel, and sockets and locks in the one would mean nothing in the other.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::stat::{FileStat, SFlag};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC};

use super::*;
use crate::mount::info::{self, MountInfo};

/// Folder of the tree that holds the volumes. No container has this id.
pub(super) const FOLDER: &str = ".volumes";

/// Where the guest keeps volumes in its memory.
pub const GUEST_VOLUMES: &str = "/run/bulkhead/volumes";

/// The symbolic link to a volume's current content that the kubelet swaps.
pub const DATA: &str = "..data";

/// Volumes whose content the kubelet writes and updates as a whole.
const WRITTEN_AT_ONCE: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// Volumes that are empty when the pod begins and gone when it ends.
const EMPTY: &str = "kubernetes.io~empty-dir";

/// How a volume reaches the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeKind {
    /// By the shared tree.
    Shared,
    /// A copy in guest memory of what the shared tree holds, brought up to date whenever it is swapped.
    Written(Owner),
    /// A file system in guest memory of this many bytes; 0: half of the memory.
    Memory(Owner, u64),
    /// Huge pages of the guest of this many bytes.
    HugePages(Owner, u64),
    /// A directory of a volume in guest memory.
    Directory(Owner, Arc<PodVolume>, PathBuf),
}

/// Attributes of a volume's root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Permissions.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Owner {
    fn of(stat: &FileStat) -> Self {
        Self {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
        }
    }
}

/// A volume of the pod.
#[derive(Debug)]
pub struct PodVolume {
    /// Its name in the tree and in the guest.
    pub name: String,
    /// How it reaches the guest.
    pub kind: VolumeKind,
    /// The volume's directory in the tree, if it has one there.
    pub directory: Option<PathBuf>,
    /// What the guest shows: absent until it has the volume. Held while that changes.
    pub shown: tokio::sync::Mutex<Option<PathBuf>>,
}

impl PartialEq for PodVolume {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for PodVolume {}

impl PodVolume {
    /// Where containers mount it from, in the guest.
    #[must_use]
    pub fn guest_path(&self) -> PathBuf {
        match self.kind {
            VolumeKind::Shared => self.guest_shared_path(),
            _ => Path::new(GUEST_VOLUMES).join(&self.name),
        }
    }

    /// Where the guest sees what the host has.
    #[must_use]
    pub fn guest_shared_path(&self) -> PathBuf {
        Path::new(GUEST_SHARED).join(FOLDER).join(&self.name)
    }

    /// Where the link to the current content leads.
    ///
    /// # Errors
    /// There is none, or the volume has no directory on the host.
    pub fn version(&self) -> std::io::Result<PathBuf> {
        let directory = self.directory.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
        fs::read_link(directory.join(DATA))
    }

    /// Whether it lives as long as the pod, not as its containers.
    fn is_lasting(&self) -> bool {
        matches!(
            self.kind,
            VolumeKind::Memory(..) | VolumeKind::HugePages(..) | VolumeKind::Directory(..)
        )
    }
}

/// By what names a guest knows a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeNames {
    /// Its own.
    pub name: String,
    /// That of the volume which it is a directory of.
    pub whole: Option<String>,
}

/// What makes two mounts the same volume.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Key {
    Host {
        device: u64,
        inode: u64,
        /// Number of the mount, where others are mounted below it: another mount has others.
        mount: Option<u64>,
        recursive: bool,
        follows: bool,
        recursive_read_only: bool,
        /// The host's own mount cannot be written.
        fixed: bool,
    },
    Memory {
        device: String,
        path: PathBuf,
    },
}

#[derive(Debug)]
struct Entry {
    key: Key,
    read_only: bool,
    users: BTreeSet<String>,
    volume: Arc<PodVolume>,
}

/// The volumes of a pod.
#[derive(Clone, Debug, Default)]
pub(super) struct Pool(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    next: u64,
    entries: Vec<Entry>,
}

impl State {
    /// The name of a new volume: `known`, or one that none has had.
    fn name(&mut self, known: Option<&str>) -> String {
        match known {
            Some(known) => {
                self.next = self.next.max(known.parse().unwrap_or(0));
                known.to_owned()
            }
            None => {
                self.next += 1;
                self.next.to_string()
            }
        }
    }

    fn find(&mut self, key: &Key, read_only: bool) -> Option<&mut Entry> {
        // What may be written serves those who only read as well: the guest holds them to it.
        self.entries
            .iter_mut()
            .find(|entry| entry.key == *key && (read_only || !entry.read_only))
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings a volume into the tree for container `id`, unless it is there. `writable` is where the tree's own
    /// directories can be made.
    pub(super) fn take(
        &self,
        id: &str,
        tree: &Path,
        writable: &Path,
        wanted: &Volume,
        names: Option<&VolumeNames>,
    ) -> Result<Arc<PodVolume>, StorageError> {
        let source = Source::open(&wanted.source)?;
        let stat = source.stat()?;
        let is_directory = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFDIR.bits();
        let is_file = stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
        if is_directory != wanted.directory || !(is_directory || is_file) {
            return Err(StorageError::Changed(wanted.source.clone()));
        }
        let (path, mount) = source.place()?;
        let mounts =
            info::list().map_err(|error| StorageError::Create("/proc/self/mountinfo".into(), error))?;
        let mut state = self.lock();
        if is_directory && let Some(found) = in_memory(&source, &stat, &path, mount, &mounts)? {
            return Ok(take_memory(&mut state, id, found, names));
        }
        let writable_everywhere = of_kind(&path, &[EMPTY]);
        let read_only = wanted.options.read_only() && !writable_everywhere;
        let key = Key::Host {
            device: stat.st_dev,
            inode: stat.st_ino,
            mount: info::has_below(&mounts, mount, &path).then_some(mount),
            recursive: wanted.options.flags.contains(MsFlags::MS_REC),
            follows: wanted.options.propagation.contains(MsFlags::MS_SLAVE),
            recursive_read_only: wanted.options.recursive_read_only,
            fixed: source
                .statfs()?
                .flags()
                .contains(nix::sys::statvfs::FsFlags::ST_RDONLY),
        };
        if let Some(entry) = state.find(&key, read_only) {
            entry.users.insert(id.to_owned());
            return Ok(entry.volume.clone());
        }
        let name = state.name(names.map(|names| names.name.as_str()));
        let directory = tree.join(FOLDER).join(&name);
        attach_new(
            &source,
            &directory,
            &writable.join(FOLDER),
            &name,
            wanted,
            read_only,
        )?;
        let is_written = is_directory
            && wanted.options.read_only()
            && if of_kind(&path, &WRITTEN_AT_ONCE) {
                fs::read_link(directory.join(DATA)).is_ok()
            } else {
                is_laid_out(&directory)
            };
        let volume = Arc::new(PodVolume {
            name,
            kind: if is_written {
                VolumeKind::Written(Owner::of(&stat))
            } else {
                VolumeKind::Shared
            },
            directory: Some(directory),
            shown: tokio::sync::Mutex::default(),
        });
        state.entries.push(Entry {
            key,
            read_only,
            users: BTreeSet::from([id.to_owned()]),
            volume: volume.clone(),
        });
        Ok(volume)
    }

    /// Forgets container `id`; returns the volumes that nobody uses any more.
    pub(super) fn release(&self, id: &str) -> Vec<Arc<PodVolume>> {
        let mut state = self.lock();
        let (kept, released) = std::mem::take(&mut state.entries)
            .into_iter()
            .partition(|entry| entry.volume.is_lasting() || entry.users.iter().any(|user| user != id));
        state.entries = kept;
        for entry in &mut state.entries {
            entry.users.remove(id);
        }
        released.into_iter().map(|entry: Entry| entry.volume).collect()
    }
}

/// A volume in memory, and a directory of it that is wanted.
struct InMemory {
    device: String,
    kind: VolumeKind,
    below: Option<(Owner, PathBuf)>,
}

/// The `emptyDir` in memory that holds `source`, if one does. A `subPath` of it is a mount of its own.
fn in_memory(
    source: &Source,
    stat: &FileStat,
    path: &Path,
    mount: u64,
    mounts: &[MountInfo],
) -> Result<Option<InMemory>, StorageError> {
    let statfs = source.statfs()?;
    let kind = statfs.filesystem_type();
    if kind != TMPFS_MAGIC && kind != HUGETLBFS_MAGIC {
        return Ok(None);
    }
    let Some(own) = mounts.iter().find(|other| other.id == mount) else {
        return Ok(None);
    };
    let whole = mounts.iter().find(|other| {
        other.device == own.device && other.root == Path::new("/") && is_volume(&other.point, &[EMPTY])
    });
    let (Some(whole), Ok(rest)) = (whole, path.strip_prefix(&own.point)) else {
        return Ok(None);
    };
    let below = own.root.strip_prefix("/").unwrap_or(&own.root).join(rest);
    let root =
        fs::metadata(&whole.point).map_err(|error| StorageError::Create(whole.point.clone(), error))?;
    let owner = Owner {
        mode: root.mode() & 0o7777,
        uid: root.uid(),
        gid: root.gid(),
    };
    let page = u64::try_from(statfs.block_size()).unwrap_or_default();
    let kind = if kind == HUGETLBFS_MAGIC {
        VolumeKind::HugePages(owner, page)
    } else {
        VolumeKind::Memory(owner, statfs.blocks().saturating_mul(page))
    };
    let below = (!below.as_os_str().is_empty()).then(|| (Owner::of(stat), below));
    Ok(Some(InMemory {
        device: own.device.clone(),
        kind,
        below,
    }))
}

fn take_memory(state: &mut State, id: &str, found: InMemory, names: Option<&VolumeNames>) -> Arc<PodVolume> {
    let InMemory { device, kind, below } = found;
    let name = names.map(|names| names.name.as_str());
    match below {
        None => take_one(state, id, &device, PathBuf::new(), kind, name),
        Some((owner, path)) => {
            let whole = names.and_then(|names| names.whole.as_deref());
            let whole = take_one(state, id, &device, PathBuf::new(), kind, whole);
            let kind = VolumeKind::Directory(owner, whole, path.clone());
            take_one(state, id, &device, path, kind, name)
        }
    }
}

fn take_one(
    state: &mut State,
    id: &str,
    device: &str,
    path: PathBuf,
    kind: VolumeKind,
    name: Option<&str>,
) -> Arc<PodVolume> {
    let key = Key::Memory {
        device: device.to_owned(),
        path,
    };
    if let Some(entry) = state.find(&key, false) {
        entry.users.insert(id.to_owned());
        return entry.volume.clone();
    }
    let volume = Arc::new(PodVolume {
        name: state.name(name),
        kind,
        directory: None,
        shown: tokio::sync::Mutex::default(),
    });
    state.entries.push(Entry {
        key,
        read_only: false,
        users: BTreeSet::from([id.to_owned()]),
        volume: volume.clone(),
    });
    volume
}

/// Makes the mount point `name` in `folder` and attaches the source to it at `target`. On failure nothing is left.
fn attach_new(
    source: &Source,
    target: &Path,
    folder: &Path,
    name: &str,
    wanted: &Volume,
    read_only: bool,
) -> Result<(), StorageError> {
    make_directory(folder)?;
    let point = folder.join(name);
    if wanted.directory {
        make_directory(&point)?;
    } else {
        File::create_new(&point).map_err(|error| StorageError::Create(target.into(), error))?;
    }
    let attached = host_mount::attach(source, target, &wanted.options, read_only);
    if attached.is_err() {
        remove_point(&point);
    }
    Ok(attached?)
}

/// Removes an empty directory or file.
pub(super) fn remove_point(point: &Path) {
    if fs::remove_dir(point).is_err() {
        let _ = fs::remove_file(point);
    }
}

/// Whether a path is a volume of one of these kinds of a pod, or in one:
/// `…/pods/<uid>/volumes/<kind>/<name>`.
fn of_kind(path: &Path, kinds: &[&str]) -> bool {
    path.ancestors().any(|path| is_volume(path, kinds))
}

/// Whether a path is such a volume itself.
fn is_volume(path: &Path, kinds: &[&str]) -> bool {
    let mut above = path
        .ancestors()
        .skip(1)
        .map(|path| path.file_name().and_then(|name| name.to_str()));
    let kind = above.next().flatten();
    kind.is_some_and(|kind| kinds.contains(&kind))
        && above.next().flatten() == Some("volumes")
        && above.nth(1).flatten() == Some("pods")
}

/// Whether a directory is laid out as the kubelet's writer does it, and nothing else is in it: `..data` leads to
/// a directory beside it, and every name to that name in `..data`.
fn is_laid_out(directory: &Path) -> bool {
    let Ok(version) = fs::read_link(directory.join(DATA)) else {
        return false;
    };
    let is_plain = version.to_str().is_some_and(is_version);
    is_plain
        && fs::read_dir(directory).is_ok_and(|mut entries| {
            entries.all(|entry| {
                let Ok(entry) = entry else { return false };
                let name = entry.file_name();
                if name.to_str().is_some_and(|name| name.starts_with("..")) {
                    return true;
                }
                fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(DATA).join(&name))
            })
        })
}

/// Whether a name is one the kubelet gives to a version of a volume: it begins with two dots.
#[must_use]
pub fn is_version(name: &str) -> bool {
    name.starts_with("..") && name.len() > 2 && name != DATA && !name.contains(['/', '\0'])
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
