//! What a snapshot is of.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bulkhead_protocol::{agent, control};
use serde::{Deserialize, Serialize};

use super::{LONGEST, MANIFEST, SnapshotError, check_owner, failed};
use crate::config::Configuration;
use crate::template::Identity;

/// Version of the manifest. Others are refused.
const VERSION: u32 = 2;

/// What a snapshot is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    version: u32,
    /// Of the messages to VMM and agent.
    messages: (u32, u32),
    /// Who had made the pod.
    pub origin: Origin,
    /// Kubernetes namespace of the pod, or else containerd's. Only pods of the same one begin from the snapshot.
    pub namespace: String,
    /// The guest's root image.
    pub image: Identity,
    /// The VM.
    pub machine: Machine,
    /// The containers.
    pub containers: Vec<SavedContainer>,
}

/// Who has made a pod, and can be asked about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Socket of the container manager; empty: it has told none.
    pub manager: PathBuf,
    /// The manager's namespace, which need not be that of Kubernetes.
    pub namespace: String,
    /// Id that the manager has for the pod, or for the stand-alone container.
    pub pod: String,
}

/// A VM's shape and size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// vCPUs that it booted with.
    pub boot_vcpus: u8,
    /// vCPUs that exist.
    pub vcpus: u8,
    /// vCPUs on line.
    pub online: u8,
    /// Most vCPUs.
    pub max_vcpus: u8,
    /// Memory in MiB that it booted with.
    pub memory_mib: u32,
    /// Memory in MiB that it was asked to have beside that.
    pub added_mib: u32,
    /// Memory in MiB by which it can grow.
    pub hotplug_mib: u32,
    /// Whether it has a serial console.
    pub console: bool,
    /// Whether it has a balloon.
    pub balloon: bool,
    /// Places for disks.
    pub disk_slots: u32,
    /// Places for network interfaces.
    pub net_slots: u32,
}

impl Machine {
    /// Makes a configuration describe the VM as it was.
    pub fn apply(&self, config: &mut Configuration) {
        config.console = self.console;
        config.balloon = self.balloon;
        config.disk_slots = self.disk_slots;
        config.net_slots = self.net_slots;
    }
}

/// A container of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedContainer {
    /// Id that the guest knows it by.
    pub id: String,
    /// Id that the container manager had for it. It is another one in a pod that began from a snapshot itself.
    pub container: String,
    /// Name within its pod; a stand-alone container has none.
    pub name: Option<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Which of stdin, stdout and stderr it has.
    pub streams: [bool; 3],
    /// Ids of processes that were added to it. They end when the pod begins again: nobody holds their streams.
    pub execs: Vec<String>,
    /// Its root file system.
    pub root: SavedRoot,
    /// Its volumes by their path in the container.
    pub volumes: Vec<SavedVolume>,
}

impl SavedContainer {
    /// What errors call it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or(&self.id)
    }
}

/// Where a container's root file system came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum SavedRoot {
    /// An overlay that the host mounts.
    Overlay {
        /// The layers below, as in the mount's options.
        lower: String,
        /// Folder of the snapshot with the content of the upper directory.
        upper: PathBuf,
    },
    /// A file system on a disk.
    Disk(SavedDisk),
    /// EROFS layers on one disk and a writable one.
    Layers {
        /// The layers' files, topmost first.
        lower: Vec<PathBuf>,
        /// Slot of their disk.
        slot: u32,
        /// The writable disk; absent: guest memory.
        upper: Option<SavedDisk>,
    },
}

/// A disk of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDisk {
    /// Slot in the VM.
    pub slot: u32,
    /// File of the snapshot with its content; absent: the guest cannot write it.
    pub copy: Option<PathBuf>,
}

/// A volume of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedVolume {
    /// Path in the container.
    pub destination: PathBuf,
    /// Name in the shared tree and in the guest.
    pub name: String,
    /// Name of the volume that it is a directory of.
    pub whole: Option<String>,
    /// How it reaches the guest.
    pub kind: SavedVolumeKind,
    /// The version that the guest shows of one whose content the kubelet writes.
    pub shown: Option<PathBuf>,
}

/// How a volume reaches the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SavedVolumeKind {
    /// By the shared tree.
    Shared,
    /// As a copy of what the kubelet writes.
    Written,
    /// In guest memory.
    Memory,
}

impl Manifest {
    /// Of a pod.
    #[must_use]
    pub fn new(
        origin: Origin,
        namespace: String,
        image: Identity,
        machine: Machine,
        containers: Vec<SavedContainer>,
    ) -> Self {
        Self {
            version: VERSION,
            messages: (control::VERSION, agent::VERSION),
            origin,
            namespace,
            image,
            machine,
            containers,
        }
    }

    /// Reads the one of the snapshot in `directory`, which is in `store`.
    ///
    /// # Errors
    /// There is none, others could have changed it, or it is of another version of this program.
    pub fn read(store: &Path, directory: &Path) -> Result<Self, SnapshotError> {
        let path = directory.join(MANIFEST);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => SnapshotError::None(directory.into()),
            _ => failed("open", &path)(error).into(),
        })?;
        check_owner(store)?;
        check_owner(directory)?;
        let mut json = Vec::new();
        file.take(LONGEST)
            .read_to_end(&mut json)
            .map_err(failed("read", &path))?;
        let manifest: Self =
            serde_json::from_slice(&json).map_err(|error| SnapshotError::Manifest(path.clone(), error))?;
        let found = (manifest.version, manifest.messages.0, manifest.messages.1);
        let wanted = (VERSION, control::VERSION, agent::VERSION);
        if found != wanted {
            return Err(SnapshotError::Version { found, wanted });
        }
        Ok(manifest)
    }

    /// Whether a pod of `namespace` with this root image of the guest can begin from it.
    pub(super) fn check(&self, namespace: &str, image: &Path) -> Result<(), SnapshotError> {
        let changed = |what: &str, saved: String, now: String| SnapshotError::Changed {
            what: what.to_owned(),
            saved,
            now,
        };
        if self.namespace != namespace {
            return Err(changed("Namespace", self.namespace.clone(), namespace.to_owned()));
        }
        let now = Identity::of(image).map_err(SnapshotError::Image)?;
        if self.image != now {
            return Err(changed(
                "Root image",
                format!("{:?}", self.image),
                format!("{now:?}"),
            ));
        }
        Ok(())
    }
}
