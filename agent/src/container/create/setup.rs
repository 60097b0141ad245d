//! The work of the helper process that makes a container.

use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::container::ContainerStatus;
use oci_spec::runtime::{LinuxResources, Spec};

use super::{builder, refusal, state_root, with_streams};
use crate::cgroup::{self, DeviceRules, attach_device_filter};
use crate::container::Container;
use crate::container::executor::ProgramExecutor;
use crate::error::chain;
use crate::job::{Report, StatusPipe};
use crate::resume::{self, boot_id};
use crate::storage::SHARED;
use crate::streams::ProgramEnds;

/// The work of the helper that makes a container.
pub(super) struct Setup<'a> {
    pub(super) container: &'a Container,
    pub(super) bundle: &'a Path,
    pub(super) resources: &'a LinuxResources,
    pub(super) devices: Option<&'a DeviceRules>,
    /// Paths in the shared tree that are mounted in the container.
    pub(super) shared: Vec<PathBuf>,
}

impl Setup<'_> {
    pub(super) fn run(
        self,
        program: Option<ProgramEnds>,
        console: Option<PathBuf>,
        status: &StatusPipe,
    ) -> Result<(), String> {
        resume::discard_held_back();
        let cgroup = &self.container.cgroup;
        cgroup
            .create()
            .and_then(|()| cgroup::bound(cgroup))
            .and_then(|()| cgroup.apply(self.resources))
            .map_err(|error| refusal(&error, status))?;
        if let Some(rules) = self.devices {
            attach_device_filter(cgroup.path(), rules).map_err(|error| chain(&error))?;
        }
        self.container.plan.mount().map_err(|error| chain(&error))?;
        for source in &self.shared {
            // A directory on which the host has mounted something becomes a file system of its own when it is entered.
            // Entered here it is the same one, with the same locks and sockets, for all containers; entered first in a
            // container's mount namespace it would be another one in each. A file has nothing to enter.
            let _ = fs::metadata(source.join("."));
        }
        let executor = ProgramExecutor {
            status: status.number(),
            gate: None,
            confinement: None,
        };
        let builder = with_streams(
            builder(&self.container.id, &state_root(&self.container.directory))?,
            program,
        )
        .with_executor(executor)
        .with_console_socket(console);
        let mut made = builder
            .as_init(self.bundle)
            .with_systemd(false)
            .with_detach(true)
            .as_sibling(true)
            .build()
            .map_err(|error| chain(&error))?;
        let pid = made.pid().ok_or("libcontainer reported no process")?;
        // Nobody but this agent reads the state; it saves the start from doing so.
        made.set_status(ContainerStatus::Running)
            .save()
            .map_err(|error| chain(&error))?;
        // Last: this process is in the container's mount namespace then.
        boot_id::cover(pid).map_err(|error| format!("cannot give the container a boot id: {error}"))?;
        status.send(&Report::Pid(pid.as_raw().unsigned_abs()));
        Ok(())
    }
}

/// What a specification mounts from the shared tree.
pub(super) fn shared_sources(spec: &Spec) -> Vec<PathBuf> {
    let mounts = spec.mounts().iter().flatten();
    mounts
        .filter_map(|mount| mount.source().clone())
        .filter(|source| source.starts_with(SHARED))
        .collect()
}
