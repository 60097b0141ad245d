//! The guest as the pod's sandbox: name, clock, kernel parameters, shared tree.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use nix::mount::MsFlags;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

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

/// Carries a `SetupSandbox` request out.
///
/// # Errors
/// The first step that fails.
pub fn setup(request: &proto::SetupSandboxRequest) -> Result<(), SandboxError> {
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
    for (key, value) in sysctls {
        set_sysctl(key, value)?;
    }
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
            MsFlags::empty(),
            "",
        )
        .map_err(SandboxError::Shared)?;
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
