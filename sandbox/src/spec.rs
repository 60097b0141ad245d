//! The OCI specification, from the host's view to the guest's.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Mount as OciMount, Process, Spec};

use crate::error::Kind;
use crate::mount::{self, MountError, ParsedOptions};

mod block;
mod pod;
mod refuse;
#[cfg(test)]
mod tests;

pub use block::{BlockVolume, device_path};
pub use pod::{GUEST_FILES, add_mounts};
pub use refuse::{Role, check};

/// Where the guest mounts the shared tree.
pub const GUEST_SHARED: &str = "/run/bulkhead/shared";

/// Where the guest keeps the pod's `/dev/shm`.
pub const GUEST_SHM: &str = "/run/bulkhead/shm";

/// Size of `/dev/shm` unless the host's says otherwise, in bytes.
pub const DEFAULT_SHM_SIZE: u64 = 64 << 20;

/// Mount types the guest's own kernel provides.
const GUEST_TYPES: [&str; 9] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs", "ramfs",
];

/// Why a specification is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// It cannot be read.
    #[error("Cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// It is not JSON of the right form.
    #[error("Cannot parse {}", .0.display())]
    Parse(PathBuf, #[source] serde_json::Error),
    /// A process to add is not JSON of the right form.
    #[error("Cannot parse the process")]
    Process(#[source] serde_json::Error),
    /// Resources of an update.
    #[error("Cannot parse the resources")]
    Resources(#[source] serde_json::Error),
    /// It cannot be written for the guest.
    #[error("Cannot encode the specification")]
    Encode(#[source] serde_json::Error),
    /// A field is needed.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The pod would use the host's network.
    #[error(
        "The host's network is not available to a pod in a virtual machine: linux.namespaces has no network namespace"
    )]
    HostNetwork,
    /// What is asked for cannot be had in a virtual machine.
    #[error("{field}: {what} is not supported: {reason}")]
    Unsupported {
        /// Field of the specification.
        field: &'static str,
        /// The value.
        what: String,
        /// Why.
        reason: &'static str,
    },
    /// A mount's options are not usable.
    #[error("Options of the mount on {}", .0.display())]
    Options(PathBuf, #[source] MountError),
    /// A mount's source is not usable.
    #[error("Source {source_path} of the mount on {}", .destination.display())]
    Source {
        /// On the host.
        source_path: String,
        /// In the container.
        destination: PathBuf,
        /// Reason.
        #[source]
        error: std::io::Error,
    },
}

impl SpecError {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::HostNetwork | Self::Unsupported { .. } => Kind::Unimplemented,
            Self::Encode(_) => Kind::Internal,
            _ => Kind::InvalidArgument,
        }
    }
}

/// Reads the specification of a bundle.
///
/// # Errors
/// [`SpecError::Read`], [`SpecError::Parse`].
pub fn load(bundle: &Path) -> Result<Spec, SpecError> {
    let path = bundle.join("config.json");
    let bytes = std::fs::read(&path).map_err(|error| SpecError::Read(path.clone(), error))?;
    serde_json::from_slice(&bytes).map_err(|error| SpecError::Parse(path, error))
}

/// The pod's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// A new one.
    Fresh,
    /// One that exists.
    Path(PathBuf),
}

/// The network namespace the specification asks for.
///
/// # Errors
/// [`SpecError::HostNetwork`] when there is none.
pub fn network_namespace(spec: &Spec) -> Result<NetworkNamespace, SpecError> {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces
        .and_then(|list| {
            list.iter()
                .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        })
        .ok_or(SpecError::HostNetwork)?;
    Ok(match network.path() {
        Some(path) if !path.as_os_str().is_empty() => NetworkNamespace::Path(path.clone()),
        _ => NetworkNamespace::Fresh,
    })
}

/// The pid namespace the specification joins, if it joins one.
#[must_use]
pub fn pid_namespace_path(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let pid = namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)?;
    pid.path().as_deref().filter(|path| !path.as_os_str().is_empty())
}

/// The specification's annotations.
#[must_use]
pub fn annotations(spec: &Spec) -> HashMap<String, String> {
    spec.annotations().clone().unwrap_or_default()
}

/// What a bind mount's source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
    /// Anything else.
    Other(&'static str),
}

/// Looks at a path on the host, through symbolic links.
///
/// # Errors
/// It does not exist or cannot be looked at.
pub fn probe(path: &Path) -> std::io::Result<SourceKind> {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(path)?.file_type();
    Ok(if kind.is_dir() {
        SourceKind::Directory
    } else if kind.is_file() {
        SourceKind::File
    } else if kind.is_block_device() {
        SourceKind::BlockDevice
    } else if kind.is_char_device() {
        SourceKind::Other("a character device")
    } else if kind.is_socket() {
        SourceKind::Other("a socket")
    } else {
        SourceKind::Other("a FIFO")
    })
}

/// A host file or directory that a container gets by the shared tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// Whether it is a directory.
    pub directory: bool,
    /// Flags of the bind mount.
    pub options: ParsedOptions,
    /// Place among the specification's mounts.
    pub mount: usize,
}

/// A specification for the guest and what it needs from the host.
#[derive(Debug)]
pub struct Rewritten {
    spec: Spec,
    /// Host files and directories to share.
    pub volumes: Vec<Volume>,
    /// Block devices to attach.
    pub block_volumes: Vec<BlockVolume>,
}

impl Rewritten {
    /// JSON for the agent. `sources` are the volumes' paths in the guest, in their order.
    ///
    /// # Errors
    /// [`SpecError::Encode`].
    pub fn finish(mut self, sources: &[PathBuf]) -> Result<Vec<u8>, SpecError> {
        let mut none = Vec::new();
        let mounts = self.spec.mounts_mut().as_mut().unwrap_or(&mut none);
        for (volume, source) in self.volumes.iter().zip(sources) {
            if let Some(mount) = mounts.get_mut(volume.mount) {
                mount.set_source(Some(source.clone()));
            }
        }
        serde_json::to_vec(&self.spec).map_err(SpecError::Encode)
    }
}

/// Rewrites `spec`, which [`check`] accepts, for the guest: bind mounts become volumes, block devices become disks,
/// and fields that mean the host are removed. `probe` looks at a path on the host.
///
/// # Errors
/// [`SpecError`], naming the field.
pub fn rewrite(
    mut spec: Spec,
    probe: impl Fn(&Path) -> std::io::Result<SourceKind>,
) -> Result<Rewritten, SpecError> {
    let mut volumes = Vec::new();
    let block_volumes = block::take(&mut spec, &probe);
    if let Some(mounts) = spec.mounts_mut() {
        for (number, mount) in mounts.iter_mut().enumerate() {
            volumes.extend(rewrite_mount(mount, number, &probe)?);
        }
    }
    // Labels and profiles name objects of the host's security modules; the guest has none of them.
    if let Some(process) = spec.process_mut() {
        process.set_apparmor_profile(None).set_selinux_label(None);
    }
    if let Some(linux) = spec.linux_mut() {
        linux.set_mount_label(None).set_cgroups_path(None);
    }
    Ok(Rewritten {
        spec,
        volumes,
        block_volumes,
    })
}

/// Rewrites an OCI `Process` object (JSON) for the guest, as [`rewrite`] does with the specification's.
///
/// # Errors
/// [`SpecError::Process`].
pub fn rewrite_process(json: &[u8]) -> Result<Vec<u8>, SpecError> {
    let mut process: Process = serde_json::from_slice(json).map_err(SpecError::Process)?;
    process.set_apparmor_profile(None).set_selinux_label(None);
    serde_json::to_vec(&process).map_err(SpecError::Encode)
}

fn is_bind(mount: &OciMount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind") || options.any(|option| option == "bind" || option == "rbind")
}

fn rewrite_mount(
    mount: &mut OciMount,
    number: usize,
    probe: &impl Fn(&Path) -> std::io::Result<SourceKind>,
) -> Result<Option<Volume>, SpecError> {
    let destination = mount.destination().clone();
    let options = mount.options().clone().unwrap_or_default();
    let kind = mount.typ().clone().unwrap_or_default();
    if !is_bind(mount) {
        if GUEST_TYPES.contains(&kind.as_str()) {
            return Ok(None);
        }
        return Err(SpecError::Unsupported {
            field: "mounts",
            what: format!("type {kind} on {}", destination.display()),
            reason: "neither a bind mount nor a file system of the guest's kernel",
        });
    }
    let source = mount
        .source()
        .clone()
        .filter(|source| !source.as_os_str().is_empty())
        .ok_or(SpecError::Missing("mounts.source"))?;
    if destination == Path::new("/dev/shm") {
        mount
            .set_typ(Some("bind".into()))
            .set_source(Some(GUEST_SHM.into()));
        return Ok(None);
    }
    if source == Path::new("/dev") || source.starts_with("/dev/") || pod::is_file(&source) {
        // As with Kata: a path below /dev names the guest's device, not the host's.
        mount.set_typ(Some("bind".into()));
        return Ok(None);
    }
    let parsed =
        mount::parse_options(&options).map_err(|error| SpecError::Options(destination.clone(), error))?;
    let directory = match probe(&source) {
        Ok(SourceKind::Directory) => true,
        Ok(SourceKind::File) => false,
        Ok(SourceKind::BlockDevice) => return Ok(None),
        Ok(SourceKind::Other(what)) => {
            return Err(SpecError::Unsupported {
                field: "mounts",
                what: format!(
                    "source {} ({what}) on {}",
                    source.display(),
                    destination.display()
                ),
                reason: "only files and directories can be shared with the virtual machine",
            });
        }
        Err(error) => {
            return Err(SpecError::Source {
                source_path: source.display().to_string(),
                destination,
                error,
            });
        }
    };
    mount.set_typ(Some("bind".into()));
    Ok(Some(Volume {
        source,
        directory,
        options: parsed,
        mount: number,
    }))
}

/// Where a container's mounts are, in their order.
#[must_use]
pub fn destinations(spec: &Spec) -> Vec<PathBuf> {
    let mounts = spec.mounts().iter().flatten();
    mounts.map(|mount| mount.destination().clone()).collect()
}

/// Name of a container within its pod as containerd and CRI-O tell it.
#[must_use]
pub fn container_name(spec: &Spec) -> Option<String> {
    let annotations = spec.annotations().as_ref()?;
    ["io.kubernetes.cri.container-name", "io.kubernetes.container.name"]
        .iter()
        .find_map(|key| annotations.get(*key).cloned())
}

/// Size in bytes of the pod's `/dev/shm`: that of the host file system bound there, if one is.
#[must_use]
pub fn shm_size(spec: &Spec) -> u64 {
    let bound = spec.mounts().as_ref().and_then(|mounts| {
        mounts.iter().find(|mount| {
            mount.destination() == Path::new("/dev/shm") && mount.typ().as_deref() == Some("bind")
        })
    });
    bound
        .and_then(|mount| mount.source().as_ref())
        .and_then(|source| nix::sys::statvfs::statvfs(source).ok())
        .map(|fs| fs.blocks() * fs.fragment_size())
        .filter(|size| *size > 0)
        .unwrap_or(DEFAULT_SHM_SIZE)
}
