//! Snapshots of a pod on disk: what its VM was, and what of its containers' file systems the host has.
//!
//! A snapshot is a directory with the files `state` and `memory` of the VM, a folder for each container that has written
//! something on the host, and [`Manifest`] as `manifest.json`. The manifest is written last and by a rename: a directory
//! without one is no snapshot. Nothing in it changes later, so that any number of pods can begin from it at once.

use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use crate::error::Kind;
use crate::private::{self, FileError, failed};
use crate::template::TemplateError;

mod copy;
mod manifest;
#[cfg(test)]
mod tests;

pub use copy::{CopyError, disk as copy_disk, tree as copy_tree};
pub use manifest::{
    Machine, Manifest, Origin, SavedContainer, SavedDisk, SavedRoot, SavedVolume, SavedVolumeKind,
};

/// Annotation of a sandbox, or of a stand-alone container, that names the snapshot it begins from.
pub const ANNOTATION: &str = "dev.bulkhead.snapshot";

/// File of a running pod's state directory with its [`Origin`], in JSON.
pub const ORIGIN: &str = "origin.json";

const STATE: &str = "state";
const MEMORY: &str = "memory";
const MANIFEST: &str = "manifest.json";

/// Longest manifest in bytes.
const LONGEST: u64 = 16 << 20;

/// Longest name in bytes.
const LONGEST_NAME: usize = 128;

/// Why a snapshot cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not a name.
    #[error(
        "Snapshot name {0:?} is not valid: letters, digits, dots, dashes and underscores are, 128 at most, the first no dot"
    )]
    Name(String),
    /// There is none of this name.
    #[error("There is no snapshot in {}", .0.display())]
    None(PathBuf),
    /// Something is in the directory already.
    #[error("Directory {} of a new snapshot is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// Whoever can write there writes the memory of guests.
    #[error("Directory {} can be changed by others than its owner, or is not this user's", .0.display())]
    Open(PathBuf),
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The manifest is not one.
    #[error("Manifest {} is not valid", .0.display())]
    Manifest(PathBuf, #[source] serde_json::Error),
    /// It is of another version of this program.
    #[error("Snapshot has version {found:?} of manifest, VMM and agent messages, {wanted:?} is needed")]
    Version {
        /// The snapshot's.
        found: (u32, u32, u32),
        /// This program's.
        wanted: (u32, u32, u32),
    },
    /// Something the snapshot needs is another now.
    #[error("{what} of the snapshot was {saved} and is {now}")]
    Changed {
        /// What.
        what: String,
        /// Then.
        saved: String,
        /// Now.
        now: String,
    },
    /// The guest's root image cannot be looked at.
    #[error("Cannot compare the guest's root image")]
    Image(#[source] TemplateError),
    /// A container of the pod cannot be saved.
    #[error("Container {id} cannot be saved: {reason}")]
    Container {
        /// Its id.
        id: String,
        /// Why.
        reason: String,
    },
    /// A container has changed too much to go on.
    #[error("Container {id} cannot go on from the snapshot: {reason}")]
    Unfit {
        /// Its name in the snapshot.
        id: String,
        /// Why.
        reason: String,
    },
    /// A container that the snapshot does not have.
    #[error("The snapshot has no container {name}; it has {}", .known.join(", "))]
    Unknown {
        /// The container's name.
        name: String,
        /// Names in the snapshot that are not taken.
        known: Vec<String>,
    },
    /// A container was removed before all of them were there.
    #[error("Container {0} of the snapshot was removed before all were created")]
    Gone(String),
    /// Files could not be copied.
    #[error("Cannot copy files of container {0}")]
    Copy(String, #[source] CopyError),
    /// The guest has thawed itself before everything was copied.
    #[error("The guest did not stand still long enough for its disks to be copied")]
    Expired,
}

impl SnapshotError {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Name(_) | Self::Unknown { .. } => Kind::InvalidArgument,
            Self::None(_) => Kind::NotFound,
            Self::NotEmpty(_) => Kind::AlreadyExists,
            Self::Open(_)
            | Self::Version { .. }
            | Self::Changed { .. }
            | Self::Container { .. }
            | Self::Unfit { .. }
            | Self::Gone(_) => Kind::FailedPrecondition,
            Self::File(_) | Self::Manifest(..) | Self::Image(_) | Self::Copy(..) | Self::Expired => {
                Kind::Internal
            }
        }
    }
}

/// A snapshot that is being made. What was written is gone when this is dropped before [`finish`](Self::finish).
#[derive(Debug)]
pub struct Making {
    directory: PathBuf,
    finished: bool,
}

impl Making {
    /// Of a snapshot in `directory`, which is empty or not there yet.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn begin(directory: &Path) -> Result<Self, SnapshotError> {
        private::make_directory(directory)?;
        let mut entries = fs::read_dir(directory).map_err(failed("read", directory))?;
        if entries.next().is_some() {
            return Err(SnapshotError::NotEmpty(directory.into()));
        }
        Ok(Self {
            directory: directory.into(),
            finished: false,
        })
    }

    /// Where it is made.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The empty files for the VM's state and memory.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn files(&self) -> Result<(File, File), SnapshotError> {
        let create = |name| private::create(&self.directory.join(name));
        Ok((create(STATE)?, create(MEMORY)?))
    }

    /// Writes the manifest: the snapshot is complete.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn finish(mut self, manifest: &Manifest) -> Result<(), SnapshotError> {
        let path = self.directory.join(MANIFEST);
        let json = serde_json::to_vec_pretty(manifest)
            .map_err(|error| SnapshotError::Manifest(path.clone(), error))?;
        let unfinished = path.with_extension("new");
        fs::write(&unfinished, json).map_err(failed("write", &unfinished))?;
        fs::rename(&unfinished, &path).map_err(failed("rename", &unfinished))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The directory itself may be the caller's.
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for entry in entries {
            let path = entry.path();
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_directory {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            if let Err(error) = removed {
                log::warn!("cannot remove {} of a snapshot: {error}", path.display());
            }
        }
    }
}

/// A snapshot that a pod begins from.
#[derive(Debug)]
pub struct Snapshot {
    directory: PathBuf,
    /// What it is of.
    pub manifest: Manifest,
    /// All of the VM but memory.
    pub state: File,
    /// Its memory.
    pub memory: File,
}

impl Snapshot {
    /// The one with this name in `store`, for a pod of `namespace` and a guest with this root image.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(store: &Path, name: &str, namespace: &str, image: &Path) -> Result<Self, SnapshotError> {
        check_name(name)?;
        let directory = store.join(name);
        let manifest = Manifest::read(store, &directory)?;
        manifest.check(namespace, image)?;
        let open = |name| private::open(&directory.join(name));
        Ok(Self {
            state: open(STATE)?,
            memory: open(MEMORY)?,
            directory,
            manifest,
        })
    }

    /// Where a file or folder of it is.
    ///
    /// # Errors
    /// The path leads out of it.
    pub fn path(&self, relative: &Path) -> Result<PathBuf, SnapshotError> {
        let is_inside = relative
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        if !is_inside {
            return Err(SnapshotError::Name(relative.display().to_string()));
        }
        Ok(self.directory.join(relative))
    }
}

/// Checks the name of a snapshot.
///
/// # Errors
/// [`SnapshotError::Name`].
pub fn check_name(name: &str) -> Result<(), SnapshotError> {
    let is_name = !name.is_empty()
        && name.len() <= LONGEST_NAME
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    if is_name {
        return Ok(());
    }
    Err(SnapshotError::Name(name.to_owned()))
}

fn check_owner(directory: &Path) -> Result<(), SnapshotError> {
    if private::is_private(directory)? {
        return Ok(());
    }
    Err(SnapshotError::Open(directory.into()))
}
