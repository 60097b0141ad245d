//! The part of the guest's processes that its containers may have: the rest is the agent's, so that it can start one
//! whatever they do.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::{CONTAINERS, Cgroup, CgroupError, MOUNT_POINT, write_existing};
use crate::error::failed;

/// How many processes and threads there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    /// In all containers together.
    containers: u64,
    /// In a container without a limit of its own.
    container: u64,
}

impl Share {
    /// Of as many as the guest's kernel allows.
    fn of(guest: u64) -> Self {
        Self {
            containers: guest - guest / 4,
            container: guest / 2,
        }
    }
}

/// Bounds the containers together, and gives `cgroup` the limit of a container that names none.
///
/// # Errors
/// The kernel refuses a limit.
pub fn bound(cgroup: &Cgroup) -> Result<(), CgroupError> {
    // The kernel derives the first from its memory: some 2,000 with 256 MiB.
    let most = ["threads-max", "pid_max"].map(|name| {
        let text = fs::read_to_string(format!("/proc/sys/kernel/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    });
    let Some(guest) = most.into_iter().flatten().min() else {
        log::warn!("how many processes the guest allows is not known: they are not bounded");
        return Ok(());
    };
    let share = Share::of(guest);
    let all = Path::new(MOUNT_POINT).join(CONTAINERS).join("pids.max");
    for (path, count) in [
        (all, share.containers),
        (cgroup.file("pids.max"), share.container),
    ] {
        match write_existing(&path, &count.to_string()) {
            // A kernel without that controller, as where the agent's tests run.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                log::info!("{} is not available", path.display());
            }
            result => result.map_err(failed("write", &path))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Share;

    #[test]
    fn the_agent_keeps_a_quarter_and_no_container_has_all_of_the_rest() {
        for guest in [0, 1, 3, 1840, 32768, u64::MAX] {
            let Share {
                containers,
                container,
            } = Share::of(guest);
            assert!(container <= containers && containers <= guest);
            assert!(guest - containers >= guest / 4);
        }
        let expected = Share {
            containers: 1380,
            container: 920,
        };
        assert_eq!(Share::of(1840), expected);
    }
}
