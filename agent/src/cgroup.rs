//! The guest's cgroup v2 hierarchy.
//!
//! `/agent` holds the agent, `/bulkhead/<id>` a container, `/filter` nothing ([`keep_filter`]). Limits are written by the agent itself, at creation
//! and on update by the same code; libcontainer only moves processes in.

mod bounds;
mod devices;
pub mod resources;
mod stats;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use bounds::bound;
pub use devices::{DeviceRules, attach as attach_device_filter};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use oci_spec::runtime::LinuxResources;
pub use resources::{Setting, settings};
pub use stats::{KeyValues, Stats, key_values};

use crate::error::{FileError, failed};
use crate::fd::AsyncFile;

/// Where the hierarchy is mounted.
pub const MOUNT_POINT: &str = "/sys/fs/cgroup";

/// Parent of the containers' groups, below [`MOUNT_POINT`].
const CONTAINERS: &str = "bulkhead";

/// The group of [`keep_filter`].
const FILTER: &str = "filter";

/// How long the kernel has to freeze, thaw or kill a group.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// Why a cgroup operation failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of the hierarchy.
    #[error(transparent)]
    File(#[from] FileError),
    /// A limit the kernel does not take.
    #[error("cannot set {file} to {value:?}")]
    Set {
        /// Name of the file.
        file: String,
        /// The value.
        value: String,
        /// Why the kernel refused.
        #[source]
        source: io::Error,
    },
    /// A limit that has no meaning.
    #[error("invalid {field}: {value}")]
    Invalid {
        /// Field of the OCI resources.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// The group did not come to rest.
    #[error("{} did not become {key} {value} within {} s", path.display(), SETTLE_LIMIT.as_secs())]
    Settle {
        /// The file watched.
        path: PathBuf,
        /// Key in it.
        key: &'static str,
        /// Value awaited.
        value: u64,
    },
    /// The filter of device accesses.
    #[error("cannot install the device filter")]
    Devices(#[source] io::Error),
}

impl CgroupError {
    /// Whether the host's request is to blame.
    pub fn is_argument(&self) -> bool {
        match self {
            Self::Invalid { .. } => true,
            Self::Set { source, .. } => matches!(
                source.raw_os_error(),
                Some(libc::EINVAL | libc::ERANGE | libc::ENODEV | libc::ENOENT)
            ),
            _ => false,
        }
    }
}

/// Makes the agent's group and the parent of all containers, with every controller enabled.
///
/// # Errors
/// The hierarchy is not mounted, or read-only.
pub fn prepare() -> Result<(), CgroupError> {
    let root = Path::new(MOUNT_POINT);
    let agent = root.join("agent");
    make_dir(&agent)?;
    write(&agent.join("cgroup.procs"), "0")?;
    let controllers = read(&root.join("cgroup.controllers"))?;
    let enable: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    let enable = enable.join(" ");
    let containers = root.join(CONTAINERS);
    make_dir(&containers)?;
    for group in [root, &containers] {
        write(&group.join("cgroup.subtree_control"), &enable)?;
    }
    Ok(())
}

/// Makes a group that stays, with a device filter and no process. The kernel puts compiled filters, those of seccomp as
/// well, into packs of 2 MiB, and fills all of one with traps when it makes it; and it changes its own code when the first
/// group has a filter. As long as this group is there neither is done again.
///
/// # Errors
/// The hierarchy is not mounted, or the kernel refuses the filter.
pub fn keep_filter() -> Result<(), CgroupError> {
    let group = Path::new(MOUNT_POINT).join(FILTER);
    make_dir(&group)?;
    attach_device_filter(&group, &DeviceRules::default())
}

/// A container's group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The group of a container, whether it exists or not. `id` is a valid container id: one path component.
    pub fn of(id: &str) -> Self {
        Self {
            path: Path::new(MOUNT_POINT).join(CONTAINERS).join(id),
        }
    }

    /// Path within the hierarchy, as the OCI `cgroupsPath` wants it.
    pub fn spec_path(id: &str) -> PathBuf {
        Path::new("/").join(CONTAINERS).join(id)
    }

    /// Makes the group.
    ///
    /// # Errors
    /// The hierarchy is full or read-only.
    pub fn create(&self) -> Result<(), CgroupError> {
        make_dir(&self.path)
    }

    /// Sets the limits that are given and leaves the others.
    ///
    /// # Errors
    /// A value makes no sense or the kernel refuses it.
    pub fn apply(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        for setting in settings(resources)? {
            let path = self.path.join(&setting.file);
            if let Err(source) = write_existing(&path, &setting.value) {
                if setting.optional && matches!(source.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) {
                    log::info!("{} is not available in the guest and ignored", setting.file);
                    continue;
                }
                let Setting { file, value, .. } = setting;
                return Err(CgroupError::Set { file, value, source });
            }
        }
        Ok(())
    }

    /// Path of a file of the group.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many processes the kernel has killed for lack of memory in this group and below.
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.file("memory.events")).unwrap_or_default();
        key_values(&text)
            .into_iter()
            .find(|(key, _)| key == "oom_kill")
            .map_or(0, |(_, count)| count)
    }

    /// Process ids of the group and the groups below it.
    ///
    /// # Errors
    /// The group does not exist.
    pub fn processes(&self) -> Result<Vec<i32>, CgroupError> {
        let mut pids = Vec::new();
        for group in self.subtree()? {
            let text = match fs::read_to_string(group.join("cgroup.procs")) {
                Ok(text) => text,
                // Removed meanwhile, or a threaded group, whose processes are listed at its root.
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
                    ) =>
                {
                    continue;
                }
                Err(error) => return Err(failed("read", &group)(error).into()),
            };
            // 0: a process of a pid namespace that is not below the guest's, which cannot be.
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse::<i32>().ok())
                    .filter(|pid| *pid > 0),
            );
        }
        Ok(pids)
    }

    /// Kills every process of the group and below.
    ///
    /// # Errors
    /// The group does not exist.
    pub fn kill(&self) -> Result<(), CgroupError> {
        write(&self.file("cgroup.kill"), "1")
    }

    /// Stops or continues all processes; returns when they have.
    ///
    /// # Errors
    /// The group does not exist or does not settle.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        write(&self.file("cgroup.freeze"), if frozen { "1" } else { "0" })?;
        self.wait("frozen", u64::from(frozen)).await
    }

    /// Returns when no process is left.
    ///
    /// # Errors
    /// The group does not exist or does not settle.
    pub async fn empty(&self) -> Result<(), CgroupError> {
        self.wait("populated", 0).await
    }

    async fn wait(&self, key: &'static str, value: u64) -> Result<(), CgroupError> {
        let path = self.file("cgroup.events");
        let reached = || -> Result<bool, CgroupError> {
            Ok(key_values(&read(&path)?)
                .into_iter()
                .any(|pair| pair.0 == key && pair.1 == value))
        };
        if reached()? {
            return Ok(());
        }
        let watch = Watch::new(&path)?;
        let settle = async {
            while !reached()? {
                watch.changed().await?;
            }
            Ok(())
        };
        match tokio::time::timeout(SETTLE_LIMIT, settle).await {
            Ok(result) => result,
            Err(_) => Err(CgroupError::Settle { path, key, value }),
        }
    }

    /// Removes the group and those below it. A group that does not exist is fine.
    ///
    /// # Errors
    /// Processes are left in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        // Children first.
        for group in self.subtree()?.into_iter().rev() {
            match fs::remove_dir(&group) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &group)(error).into());
                }
                _ => (),
            }
        }
        Ok(())
    }

    /// The group and all below it, parents before children.
    fn subtree(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut groups = vec![self.path.clone()];
        let mut next = 0;
        while let Some(group) = groups.get(next).cloned() {
            next += 1;
            let entries = match fs::read_dir(&group) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound && next > 1 => continue,
                Err(error) => return Err(failed("list", &group)(error).into()),
            };
            let children = entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            groups.extend(children.map(|entry| entry.path()));
        }
        Ok(groups)
    }
}

/// Watches one file of the hierarchy for changes.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    events: AsyncFile,
}

impl Watch {
    /// Starts to watch.
    ///
    /// # Errors
    /// The file does not exist.
    pub fn new(path: &Path) -> Result<Self, CgroupError> {
        let fail = |errno: nix::Error| failed("watch", path)(errno);
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(fail)?;
        inotify.add_watch(path, AddWatchFlags::IN_MODIFY).map_err(fail)?;
        let fd = inotify
            .as_fd()
            .try_clone_to_owned()
            .map_err(failed("watch", path))?;
        let events = AsyncFile::new(fd).map_err(failed("watch", path))?;
        Ok(Self {
            path: path.to_owned(),
            events,
        })
    }

    /// Returns after a change; several changes count as one.
    ///
    /// # Errors
    /// Those of inotify.
    pub async fn changed(&self) -> Result<(), CgroupError> {
        let mut buffer = [0; 1024];
        self.events
            .read(&mut buffer)
            .await
            .map_err(failed("watch", &self.path))?;
        Ok(())
    }
}

fn make_dir(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("create", path)(error).into())
        }
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    Ok(write_existing(path, value).map_err(failed("write", path))?)
}

/// Without creating: the hierarchy would refuse that with `EACCES`, which hides that the file does not exist.
fn write_existing(path: &Path, value: &str) -> io::Result<()> {
    File::options()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

fn read(path: &Path) -> Result<String, CgroupError> {
    Ok(fs::read_to_string(path).map_err(failed("read", path))?)
}
