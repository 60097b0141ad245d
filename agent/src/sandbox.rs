//! The guest as the pod's sandbox: name, clock, kernel parameters, shared tree.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use nix::mount::MsFlags;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::container::spec::valid_id;
use crate::init::{self, InitError};
use crate::network;
use crate::storage::SHARED;
use crate::storage::mount::{MountError, mount};

/// Size of `/dev/shm` if the host does not say.
const DEFAULT_SHM: u64 = 64 << 20;

/// Why the sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The clock.
    #[error("cannot set the clock")]
    Clock(#[source] nix::Error),
    /// The host name.
    #[error("cannot set the host name to {0:?}")]
    Hostname(String, #[source] nix::Error),
    /// A kernel parameter.
    #[error("cannot set {0} to {1:?}")]
    Sysctl(String, String, #[source] io::Error),
    /// The name of a kernel parameter.
    #[error("{0:?} is not a kernel parameter")]
    SysctlName(String),
    /// A file for containers.
    #[error("cannot write {}", .0.display())]
    File(PathBuf, #[source] io::Error),
    /// The name of such a file.
    #[error("{0:?} is not a file's name")]
    FileName(String),
    /// The shared tree.
    #[error("cannot mount the shared tree")]
    Shared(#[source] MountError),
    /// Its mount point.
    #[error("cannot create {SHARED}")]
    SharedDirectory(#[source] io::Error),
    /// Filesystems of the guest.
    #[error(transparent)]
    Init(#[from] InitError),
    /// The loopback interface.
    #[error("cannot bring the loopback interface up")]
    Loopback(#[source] nix::Error),
}

/// Holds the pod's files that containers bind-mount.
pub const FILES: &str = "/run/bulkhead/etc";

/// Kernel parameters of network interfaces that the guest does not have yet.
#[derive(Debug, Default)]
pub struct Pending(Vec<(String, String)>);

impl Pending {
    /// Sets those whose interface has come.
    ///
    /// # Errors
    /// The kernel refuses a value; the others are kept for another attempt.
    pub fn apply(&mut self) -> Result<(), SandboxError> {
        let waiting = std::mem::take(&mut self.0);
        for (key, value) in waiting {
            match set_sysctl(&key, &value) {
                Err(SandboxError::Sysctl(key, value, error)) if error.kind() == io::ErrorKind::NotFound => {
                    self.0.push((key, value));
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Checks that none is left.
    ///
    /// # Errors
    /// Names the first one whose interface has not come.
    pub fn check(&self) -> Result<(), SandboxError> {
        match self.0.first() {
            None => Ok(()),
            Some((key, value)) => Err(SandboxError::Sysctl(
                key.clone(),
                value.clone(),
                io::ErrorKind::NotFound.into(),
            )),
        }
    }
}

/// Carries a `SetupSandbox` request out. Kernel parameters of interfaces that are still to come are returned.
///
/// # Errors
/// The first step that fails.
pub fn setup(request: &proto::SetupSandboxRequest) -> Result<Pending, SandboxError> {
    if request.realtime_ns != 0 {
        let now = TimeSpec::from_duration(Duration::from_nanos(request.realtime_ns));
        clock_settime(ClockId::CLOCK_REALTIME, now).map_err(SandboxError::Clock)?;
    }
    let name = if request.hostname.is_empty() {
        &request.sandbox_id
    } else {
        &request.hostname
    };
    // The kernel's limit; ids can be longer.
    let name: String = name.chars().take(64).collect();
    nix::unistd::sethostname(&name).map_err(|errno| SandboxError::Hostname(name, errno))?;
    network::loopback_up().map_err(SandboxError::Loopback)?;
    let mut sysctls: Vec<_> = request.sysctls.iter().collect();
    sysctls.sort();
    let mut pending = Pending::default();
    for (key, value) in sysctls {
        match set_sysctl(key, value) {
            Err(SandboxError::Sysctl(key, value, error))
                if error.kind() == io::ErrorKind::NotFound && is_of_interface(&key) =>
            {
                pending.0.push((key, value));
            }
            result => result?,
        }
    }
    write_files(&request.files)?;
    let shm = if request.shm_size == 0 {
        DEFAULT_SHM
    } else {
        request.shm_size
    };
    init::setup_for_containers(shm)?;
    if !request.shared_tag.is_empty() {
        fs::create_dir(SHARED).map_err(SandboxError::SharedDirectory)?;
        mount(
            &request.shared_tag,
            Path::new(SHARED),
            "virtiofs",
            // A device node in a volume would be one of the guest's. Mounts below, and containers', inherit it.
            MsFlags::MS_NODEV,
            "",
        )
        .map_err(SandboxError::Shared)?;
    }
    Ok(pending)
}

fn write_files(files: &HashMap<String, Vec<u8>>) -> Result<(), SandboxError> {
    if files.is_empty() {
        return Ok(());
    }
    let fail = |name: &str| {
        let path = Path::new(FILES).join(name);
        |source| SandboxError::File(path, source)
    };
    // A resume may have made it for the machine id.
    fs::create_dir_all(FILES).map_err(fail(""))?;
    for (name, content) in files {
        if !valid_id(name) {
            return Err(SandboxError::FileName(name.clone()));
        }
        let path = Path::new(FILES).join(name);
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o644)))
            .map_err(fail(name))?;
    }
    Ok(())
}

/// Sets a kernel parameter of the guest.
///
/// # Errors
/// The kernel has no such parameter or refuses the value.
pub fn set_sysctl(key: &str, value: &str) -> Result<(), SandboxError> {
    let path = sysctl_path(key).ok_or_else(|| SandboxError::SysctlName(key.to_owned()))?;
    fs::write(path, value).map_err(|source| SandboxError::Sysctl(key.to_owned(), value.to_owned(), source))
}

/// Whether a kernel parameter belongs to one network interface: `net.<family>.conf` or `.neigh`, then its name.
fn is_of_interface(key: &str) -> bool {
    let Some(path) = sysctl_path(key) else {
        return false;
    };
    let parts: Vec<_> = path.iter().skip(3).filter_map(|part| part.to_str()).collect();
    matches!(parts.as_slice(), ["net", "ipv4" | "ipv6", "conf" | "neigh", name, _] if !matches!(*name, "all" | "default"))
}

/// File of a kernel parameter. As with sysctl(8), the first of `.` and `/` in the key is the separator, and the
/// other one stands for itself (an interface named `eth0.1`).
fn sysctl_path(key: &str) -> Option<PathBuf> {
    let slashes = key
        .find(['.', '/'])
        .is_some_and(|at| key.as_bytes().get(at) == Some(&b'/'));
    let path: String = key
        .chars()
        .map(|c| match c {
            '.' if !slashes => '/',
            '/' if !slashes => '.',
            c => c,
        })
        .collect();
    let plain = path
        .split('/')
        .all(|part| !matches!(part, "" | "." | "..") && !part.contains('\0'));
    plain.then(|| Path::new("/proc/sys").join(path))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_are_paths() {
        let path = |key| sysctl_path(key).map(|path| path.to_string_lossy().into_owned());
        assert_eq!(
            path("net.ipv4.ip_forward").as_deref(),
            Some("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        for key in ["", "a..b", "../x", "/etc/passwd", "a/../../b", "a.", "a\0"] {
            assert_eq!(path(key), None, "{key}");
        }
    }

    #[test]
    fn parameters_of_interfaces() {
        for key in [
            "net.ipv4.conf.eth0.rp_filter",
            "net.ipv6.neigh.eth0/1.gc_stale_time",
            "net/ipv4/conf/eth0.1/forwarding",
        ] {
            assert!(is_of_interface(key), "{key}");
        }
        for key in [
            "net.ipv4.conf.all.rp_filter",
            "net.ipv4.conf.eth0",
            "net.ipv4.ip_forward",
            "vm.swappiness",
            "..",
        ] {
            assert!(!is_of_interface(key), "{key}");
        }
    }

    #[test]
    fn parameters_wait_for_their_interface() {
        let mut pending = Pending(vec![("net.ipv4.conf.nosuch0.rp_filter".into(), "1".into())]);
        assert!(pending.apply().is_ok());
        let refused = pending.check().map_err(|error| error.to_string());
        assert_eq!(
            refused,
            Err("cannot set net.ipv4.conf.nosuch0.rp_filter to \"1\"".into())
        );
        assert!(Pending::default().check().is_ok());
    }

    proptest! {
        #[test]
        fn no_key_leads_elsewhere(key in "[a./]{0,12}") {
            if let Some(path) = sysctl_path(&key) {
                prop_assert!(path.starts_with("/proc/sys"));
                prop_assert!(path.components().all(|part| part != std::path::Component::ParentDir));
            }
        }
    }
}
