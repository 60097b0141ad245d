//! The pod's cgroup on the host (cgroup v2).
//!
//! The shim and the VMM live in it, so that the pod's memory and processor time are accounted where the
//! orchestrator looks. It is given what the pod's containers are given together, and what the VM costs beside
//! them: a guest that ignores its own limits is held there. The limits of a Kubernetes pod are on the parent
//! cgroup as well, which the kubelet makes. On a host without cgroup v2 a pod stays in its caller's cgroup.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::agent::ContainerStatsResponse;
use nix::errno::Errno;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

#[cfg(test)]
mod tests;

/// Where cgroup v2 is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// Controllers enabled on the way to the pod's cgroup, where the host has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// Marks directories made by this runtime, which the last pod below removes.
const MARK: &std::ffi::CStr = c"trusted.bulkhead";

/// Attempts at creating a directory whose parent another pod may be removing.
const ATTEMPTS: u32 = 8;

/// Why a cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The path of the OCI specification makes no sense.
    #[error("linux.cgroupsPath = {0} is not valid")]
    Path(String),
    /// A directory could not be made.
    #[error("Cannot create the cgroup {}", .0.display())]
    Create(PathBuf, #[source] std::io::Error),
    /// A directory could not be removed.
    #[error("Cannot remove the cgroup {}", .0.display())]
    Remove(PathBuf, #[source] std::io::Error),
    /// A process could not be moved.
    #[error("Cannot move process {pid} to the cgroup {}", .path.display())]
    Move {
        /// The process.
        pid: u32,
        /// The cgroup.
        path: PathBuf,
        /// Reason.
        #[source]
        error: std::io::Error,
    },
}

/// Whether the host's cgroup hierarchy is v2.
#[must_use]
pub fn is_unified() -> bool {
    statfs(ROOT).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC)
}

/// Translates `linux.cgroupsPath` to a path relative to [`ROOT`].
///
/// The systemd form `slice:prefix:name` becomes the directory systemd would use; a relative path is
/// taken from the root; an absent one is `bulkhead/<id>`.
///
/// # Errors
/// [`CgroupError::Path`] for a path that leaves the hierarchy, or a slice name that systemd refuses.
pub fn translate(path: Option<&str>, id: &str) -> Result<PathBuf, CgroupError> {
    let path = match path {
        Some(path) if !path.is_empty() => path,
        _ => return Ok(Path::new("bulkhead").join(id)),
    };
    let bad = || CgroupError::Path(path.to_owned());
    let parts: Vec<&str> = path.split(':').collect();
    let relative = match parts.as_slice() {
        [slice, prefix, name] => {
            if name.is_empty() || name.contains('/') || prefix.contains('/') {
                return Err(bad());
            }
            let leaf = match (name.ends_with(".slice"), prefix.is_empty()) {
                (true, _) => (*name).to_owned(),
                (false, true) => format!("{name}.scope"),
                (false, false) => format!("{prefix}-{name}.scope"),
            };
            expand_slice(slice).ok_or_else(bad)?.join(leaf)
        }
        [plain] => PathBuf::from(plain.trim_start_matches('/')),
        _ => return Err(bad()),
    };
    let normal = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if relative.as_os_str().is_empty() || !normal || relative.as_os_str().as_bytes().contains(&0) {
        return Err(bad());
    }
    Ok(relative)
}

/// `a-b.slice` is the directory `a.slice/a-b.slice` (systemd.slice(5)).
fn expand_slice(slice: &str) -> Option<PathBuf> {
    if slice.is_empty() {
        return Some("system.slice".into());
    }
    if slice == "-.slice" {
        return Some(PathBuf::new());
    }
    let name = slice.strip_suffix(".slice")?;
    if name.is_empty() || name.contains('/') || name.split('-').any(str::is_empty) {
        return None;
    }
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    Some(path)
}

/// A pod's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    root: PathBuf,
    relative: PathBuf,
}

impl Cgroup {
    /// Names a cgroup below [`ROOT`]; nothing is created.
    #[must_use]
    pub fn new(relative: PathBuf) -> Self {
        Self {
            root: ROOT.into(),
            relative,
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.root.join(&self.relative)
    }

    /// Creates the directory and those above it, and enables the controllers on the way.
    ///
    /// # Errors
    /// [`CgroupError::Create`].
    pub fn create(&self) -> Result<(), CgroupError> {
        let mut attempt = 0;
        loop {
            match self.try_create() {
                // Another pod has just removed a parent.
                Err(error) if error.kind() == ErrorKind::NotFound && attempt < ATTEMPTS => attempt += 1,
                result => return result.map_err(|error| CgroupError::Create(self.path(), error)),
            }
        }
    }

    fn try_create(&self) -> std::io::Result<()> {
        let mut directory = self.root.clone();
        let parts: Vec<_> = self.relative.iter().collect();
        for part in parts {
            enable_controllers(&directory);
            directory.push(part);
            match fs::create_dir(&directory) {
                Ok(()) => mark(&directory),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Kills what is left in the cgroup and removes it, then the empty parents this runtime made.
    /// A cgroup that does not exist is no error.
    ///
    /// # Errors
    /// [`CgroupError::Remove`] if processes stay in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let path = self.path();
        if !path.exists() {
            return Ok(());
        }
        // Absent before Linux 5.14; the processes have been told to end in other ways by then.
        let _ = fs::write(path.join("cgroup.kill"), "1");
        wait_until_empty(&path, std::time::Duration::from_secs(2));
        match fs::remove_dir(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(CgroupError::Remove(path, error)),
        }
        let mut parent = path.as_path();
        while let Some(next) = parent
            .parent()
            .filter(|next| *next != self.root && next.starts_with(&self.root))
        {
            if !is_marked(next) || fs::remove_dir(next).is_err() {
                break;
            }
            parent = next;
        }
        Ok(())
    }

    /// Moves a process into this cgroup.
    ///
    /// # Errors
    /// [`CgroupError::Move`].
    pub fn add(&self, pid: u32) -> Result<(), CgroupError> {
        let path = self.path();
        fs::write(path.join("cgroup.procs"), pid.to_string()).map_err(|error| CgroupError::Move {
            pid,
            path,
            error,
        })
    }

    /// Sets the limits. What the host lacks the controller for, or does not take, is left out with a message: the
    /// limits hold inside the guest all the same.
    pub fn limit(&self, limits: &HostLimits) {
        for (file, value) in limits.settings() {
            let path = self.path().join(file);
            // Unchanged values are not written: lowering memory makes the kernel reclaim.
            let current = fs::read_to_string(&path).unwrap_or_default();
            if current.trim() == value {
                continue;
            }
            let text = if value.is_empty() {
                self.all_of_parent(file)
            } else {
                value.clone()
            };
            let result = fs::File::options()
                .write(true)
                .open(&path)
                .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()));
            match result {
                Ok(()) => log::debug!("{} = {value}", path.display()),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => log::warn!("cannot set {} to {value}: {error}", path.display()),
            }
        }
    }

    /// What a list of processors or memory nodes is set to when there is no list any more. The kernel takes no empty one
    /// for a cgroup that has processes (ENOSPC), so it is what the parent has.
    fn all_of_parent(&self, file: &str) -> String {
        let path = self.path();
        let effective = path
            .parent()
            .and_then(|parent| fs::read_to_string(parent.join(format!("{file}.effective"))).ok());
        effective
            .filter(|list| !list.trim().is_empty())
            .unwrap_or_else(|| "\n".to_owned())
    }

    /// The cgroup's counters; what cannot be read is zero.
    #[must_use]
    pub fn stats(&self) -> ContainerStatsResponse {
        let read = |name: &str| fs::read_to_string(self.path().join(name)).unwrap_or_default();
        let number = |name: &str| match read(name).trim() {
            "max" => u64::MAX,
            text => text.parse().unwrap_or(0),
        };
        ContainerStatsResponse {
            cpu: flat_keyed(&read("cpu.stat")),
            memory_stat: flat_keyed(&read("memory.stat")),
            memory_current: number("memory.current"),
            memory_max: number("memory.max"),
            swap_current: number("memory.swap.current"),
            swap_max: number("memory.swap.max"),
            memory_events: flat_keyed(&read("memory.events")),
            pids_current: number("pids.current"),
            pids_max: number("pids.max"),
            ..ContainerStatsResponse::default()
        }
    }

    /// How often the kernel has killed a process of this cgroup for lack of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let text = fs::read_to_string(self.path().join("memory.events")).unwrap_or_default();
        flat_keyed(&text).get("oom_kill").copied().unwrap_or(0)
    }
}

/// What a pod's cgroup is given. `None`: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Bytes.
    pub memory_max: Option<u64>,
    /// Thousandths of a processor.
    pub cpu_milli: Option<u64>,
    /// `cpu.shares` of cgroup v1, 2 to 262144.
    pub cpu_shares: Option<u64>,
    /// Processors of the host.
    pub cpus: Option<String>,
    /// Memory nodes of the host.
    pub mems: Option<String>,
    /// `blkio.weight` of cgroup v1, 10 to 1000.
    pub io_weight: Option<u16>,
}

impl HostLimits {
    /// The files and what to write into them.
    fn settings(&self) -> [(&'static str, String); 6] {
        // Period in microseconds; a limit of one thousandth is the least the kernel takes.
        const PERIOD: u64 = 100_000;
        let max = || "max".to_owned();
        let quota = self.cpu_milli.map_or_else(max, |milli| {
            (milli.saturating_mul(PERIOD / 1000)).max(1000).to_string()
        });
        // The lines through the ends of the ranges of both versions.
        let weight = self
            .cpu_shares
            .map_or(100, |shares| 1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142);
        let io = self.io_weight.map_or(100, |weight| {
            1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
        });
        [
            (
                "memory.max",
                self.memory_max.map_or_else(max, |bytes| bytes.to_string()),
            ),
            ("cpu.max", format!("{quota} {PERIOD}")),
            ("cpu.weight", weight.to_string()),
            ("cpuset.cpus", self.cpus.clone().unwrap_or_default()),
            ("cpuset.mems", self.mems.clone().unwrap_or_default()),
            ("io.weight", format!("default {io}")),
        ]
    }
}

/// The cgroup of the calling process, relative to [`ROOT`].
#[must_use]
pub fn current() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("0::/").map(PathBuf::from))
}

/// Enables what is missing; a cgroup that has processes of its own refuses, and accounting then stays
/// with its parent.
fn enable_controllers(directory: &Path) {
    let read = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let available = read("cgroup.controllers");
    let enabled = read("cgroup.subtree_control");
    for controller in CONTROLLERS {
        let has = |list: &str| list.split_whitespace().any(|name| name == controller);
        if has(&available) && !has(&enabled) {
            let request = format!("+{controller}");
            if let Err(error) = fs::write(directory.join("cgroup.subtree_control"), request) {
                log::debug!("cannot enable {controller} in {}: {error}", directory.display());
            }
        }
    }
}

/// A cgroup file of `KEY VALUE` lines.
fn flat_keyed(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect()
}

fn c_path(path: &Path) -> Option<CString> {
    CString::new(path.as_os_str().as_bytes()).ok()
}

fn mark(directory: &Path) {
    let Some(path) = c_path(directory) else { return };
    // SAFETY: path and name are C strings; the value is one readable byte.
    let result = unsafe { libc::setxattr(path.as_ptr(), MARK.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
    if let Err(errno) = Errno::result(result) {
        log::debug!("cannot mark {}: {errno}", directory.display());
    }
}

fn is_marked(directory: &Path) -> bool {
    let Some(path) = c_path(directory) else {
        return false;
    };
    // SAFETY: path and name are C strings; a size of zero asks for the length only.
    unsafe { libc::getxattr(path.as_ptr(), MARK.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// Waits for `populated 0` in cgroup.events, which the kernel signals by POLLPRI.
fn wait_until_empty(path: &Path, limit: std::time::Duration) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let Ok(file) = fs::File::open(path.join("cgroup.events")) else {
        return;
    };
    let deadline = std::time::Instant::now() + limit;
    loop {
        let mut text = String::new();
        let read = std::io::Seek::rewind(&mut &file)
            .and_then(|()| std::io::Read::read_to_string(&mut &file, &mut text));
        if read.is_err() || text.contains("populated 0") {
            return;
        }
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return;
        }
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    }
}
