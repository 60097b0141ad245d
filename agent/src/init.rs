//! What PID 1 does before it can serve.
//!
//! This is the boot path of every pod: nothing here that the first call does not need. The root is a read-only
//! image holding the agent and empty directories; all that is written goes to memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use crate::cgroup::{self, CgroupError};
use crate::storage::RUN;
use crate::storage::mount::{MountError, mount};

/// Why the guest cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// A filesystem.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A directory.
    #[error("cannot create {path}")]
    Directory {
        /// The directory.
        path: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The cgroup hierarchy.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// A filesystem every guest has.
struct Filesystem {
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const fn filesystem(
    source: &'static str,
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    options: &'static str,
) -> Filesystem {
    Filesystem {
        source,
        target,
        kind,
        flags,
        options,
    }
}

const NOSUID_NODEV: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);
const STRICT: MsFlags = NOSUID_NODEV.union(MsFlags::MS_NOEXEC);

/// In the order of mounting. `/dev` is mounted before, see [`standard_descriptors`].
const FILESYSTEMS: [Filesystem; 6] = [
    filesystem("proc", "/proc", "proc", STRICT, ""),
    filesystem("sysfs", "/sys", "sysfs", STRICT, ""),
    filesystem("cgroup2", cgroup::MOUNT_POINT, "cgroup2", STRICT, "nsdelegate"),
    filesystem("tmpfs", "/run", "tmpfs", NOSUID_NODEV, "mode=0755"),
    filesystem("tmpfs", "/tmp", "tmpfs", NOSUID_NODEV, "mode=1777"),
    filesystem(
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        "mode=0620,ptmxmode=0666",
    ),
];

/// Open files a process may have: what container hosts usually grant. Containers inherit it.
const OPEN_FILES: u64 = 1 << 20;

/// Mounts `/dev` and opens descriptors 0 to 2 if the kernel has not: without a console there are none, and the
/// next files opened would take their place.
///
/// # Errors
/// `/dev` cannot be mounted.
pub fn standard_descriptors() -> Result<(), InitError> {
    if !Path::new("/dev/null").exists() {
        mount(
            "devtmpfs",
            Path::new("/dev"),
            "devtmpfs",
            MsFlags::MS_NOSUID,
            "mode=0755",
        )?;
    }
    while let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        if null.as_raw_fd() > 2 {
            break;
        }
        let _ = null.into_raw_fd();
    }
    Ok(())
}

/// Mounts the filesystems, makes the cgroups and sets the agent's own limits.
///
/// # Errors
/// The kernel lacks something the agent cannot do without.
pub fn setup() -> Result<(), InitError> {
    for Filesystem {
        source,
        target,
        kind,
        flags,
        options,
    } in FILESYSTEMS
    {
        if target == "/dev/pts" {
            make_dir(target)?;
        }
        mount(source, Path::new(target), kind, flags, options)?;
    }
    make_dir(RUN)?;
    // Moving a process between cgroups, as every container and exec does, waits for an RCU grace period: several
    // milliseconds, or microseconds when it is expedited at the price of interrupting the guest's few CPUs.
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
    cgroup::prepare()?;
    // The kernel's OOM killer must choose anything before PID 1, whose death ends the guest.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    raise_limits();
    Ok(())
}

/// The pod's shared memory, for containers to bind to their `/dev/shm`.
pub const SHM: &str = "/run/bulkhead/shm";

/// Filesystems that only containers need: mounted with the sandbox, off the boot path. `shm_size` is in bytes.
///
/// # Errors
/// A mount fails for another reason than a kernel without that filesystem.
pub fn setup_for_containers(shm_size: u64) -> Result<(), InitError> {
    make_dir(SHM)?;
    mount(
        "shm",
        Path::new(SHM),
        "tmpfs",
        STRICT,
        &format!("mode=1777,size={shm_size}"),
    )?;
    make_dir("/dev/shm")?;
    mount(SHM, Path::new("/dev/shm"), "", MsFlags::MS_BIND, "")?;
    make_dir("/dev/mqueue")?;
    match mount("mqueue", Path::new("/dev/mqueue"), "mqueue", STRICT, "") {
        Err(MountError::Mount {
            source: Errno::ENODEV,
            ..
        }) => Ok(()),
        result => Ok(result?),
    }
}

fn raise_limits() {
    for (resource, limit) in [
        (Resource::RLIMIT_NOFILE, OPEN_FILES),
        (Resource::RLIMIT_NPROC, RLIM_INFINITY),
        (Resource::RLIMIT_SIGPENDING, RLIM_INFINITY),
    ] {
        if let Err(errno) = setrlimit(resource, limit, limit) {
            log::warn!("cannot raise {resource:?}: {errno}");
        }
    }
}

fn make_dir(path: &'static str) -> Result<(), InitError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(InitError::Directory { path, source })
        }
        _ => Ok(()),
    }
}
