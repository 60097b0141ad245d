//! Making a container.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sys::stat::{SFlag, major, minor, stat};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use tokio::task::AbortHandle;

use super::spec::{Adapted, DeviceNode, Guest, adapt, valid_id};
use super::{Container, Containers, Status};
use crate::cgroup::{Cgroup, CgroupError, DeviceRules, Watch};
use crate::error::{Error, chain};
use crate::job::{Job, JobError, Report, StatusPipe};
use crate::storage::{Plan, RUN, disk};
use crate::streams::{HostEnds, ProgramEnds};

mod setup;
mod stdio;

use setup::{Setup, shared_sources};

/// How long undoing it may take.
pub(super) const REMOVE_LIMIT: Duration = Duration::from_secs(30);

/// How long a terminal may take to arrive after the process that made it.
const CONSOLE_LIMIT: Duration = Duration::from_secs(2);

impl Containers {
    /// Makes a container whose init process waits to be started, within `limit`. On failure nothing is left of it.
    ///
    /// # Errors
    /// The request makes no sense, or what it asks for cannot be done.
    pub async fn create(
        self: &Arc<Self>,
        request: proto::CreateContainerRequest,
        limit: Duration,
    ) -> Result<Pid, Error> {
        let id = request.container_id.as_str();
        if !valid_id(id) {
            return Err(Error::Invalid {
                field: "container_id",
                value: id.to_owned(),
            });
        }
        let fail = |source| Error::Create {
            id: id.to_owned(),
            source: Box::new(source),
        };
        let spec: Spec = serde_json::from_slice(&request.spec_json)
            .map_err(|source| Error::Json {
                field: "spec_json",
                source,
            })
            .map_err(fail)?;
        let container = self.reserve(&request)?;
        let _turn = container.turn.lock().await;
        let result = self.build(&container, spec, &request, limit).await;
        if result.is_err() {
            self.undo(&container).await;
        }
        result.map_err(fail)
    }

    /// Takes the id and plans the filesystems.
    fn reserve(&self, request: &proto::CreateContainerRequest) -> Result<Arc<Container>, Error> {
        let id = &request.container_id;
        let mut map = self.map();
        if map.contains_key(id) {
            return Err(Error::ContainerExists(id.clone()));
        }
        let directory = Path::new(RUN).join("containers").join(id);
        let plan = Plan::new(
            &directory,
            request.root.get_or_default(),
            &request.disk_mounts,
            &request.block_devices,
            &mut self.partitions(),
        )?;
        let container = Arc::new(Container::new(id, directory, plan, self.events.clone()));
        map.insert(id.clone(), Arc::clone(&container));
        Ok(container)
    }

    async fn build(
        &self,
        container: &Arc<Container>,
        spec: Spec,
        request: &proto::CreateContainerRequest,
        limit: Duration,
    ) -> Result<Pid, Error> {
        let wanted = request.streams.get_or_default();
        let pid_namespace = self.pid_namespace(request.pid_namespace.as_ref()).await?;
        let (adapted, devices) = prepare(container, spec, wanted.terminal, pid_namespace.as_ref())?;
        let bundle = container.directory.join("bundle");
        write_bundle(&bundle, &adapted.spec)?;

        let user = user_of(&adapted.spec);
        let host = HostEnds::dial(&self.host, wanted).await.map_err(Error::Streams)?;
        let stdio = self.stdio(host, wanted, user)?;
        let setup = Setup {
            container,
            bundle: &bundle,
            resources: &adapted.resources,
            devices: devices.as_ref(),
            shared: shared_sources(&adapted.spec),
        };
        let (program, console) = (stdio.program, stdio.console);
        let keep: Vec<i32> = program
            .as_ref()
            .map(keep)
            .unwrap_or_default()
            .into_iter()
            .chain(pid_namespace.as_ref().map(AsRawFd::as_raw_fd))
            .collect();
        let console_path = console.as_ref().map(|console| console.path.clone());
        // The init process's id is known only when the helper is done.
        let _birth = self.reaper.birth();
        let mut job = Job::spawn(&self.reaper, "creation of the container", &keep, move |status| {
            setup.run(program, console_path, status)
        })?;
        container.state().creator = Some(job.pid());
        let reports = job.finish(limit).await;
        container.state().creator = None;
        let pid = reported_pid(&reports?)?;
        container.adopt_init(&self.reaper, pid);
        let (terminal, copies) = match console {
            None => (None, stdio.copies),
            Some(console) => {
                let (terminal, copies) = console.finish(CONSOLE_LIMIT).await?;
                (Some(terminal), Some(copies))
            }
        };
        let watch = watch_memory(container);
        let mut state = container.state();
        state.memory_watch = watch;
        if state.status == Status::Stopped {
            return Err(JobError::Died {
                job: "the container's init process",
                status: 0,
            }
            .into());
        }
        state.status = Status::Created;
        state.status_pipe = Some(job.into_status());
        state.init.terminal = terminal;
        state.init.copies = copies;
        Ok(pid)
    }

    /// Removes all traces of a container and forgets it; goes on after errors, which are logged.
    pub(super) async fn undo(&self, container: &Arc<Container>) {
        if container.cgroup.kill().is_ok()
            && let Err(error) = container.cgroup.empty().await
        {
            log::error!("container {}: {}", container.id, chain(&error));
        }
        if container.plan.has_mounts() {
            let plan = &container.plan;
            let job = Job::spawn(&self.reaper, "unmounting", &[], |_| {
                plan.unmount().map_err(|e| chain(&e))
            });
            let result = match job {
                Ok(mut job) => job.finish(REMOVE_LIMIT).await.map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                log::error!("container {}: {}", container.id, chain(&error));
            }
        }
        self.partitions().release(&container.plan);
        if let Err(error) = container.cgroup.remove() {
            log::error!("container {}: {}", container.id, chain(&error));
        }
        // Bundle and state only: what was mounted below is gone, and without a mount nothing of it is on disk.
        if let Err(error) = remove_own_files(&container.directory) {
            log::error!("container {}: {error}", container.id);
        }
        self.map().remove(&container.id);
    }
}

/// Fits the specification to the guest and the guest to the specification.
fn prepare(
    container: &Container,
    spec: Spec,
    terminal: bool,
    pid_namespace: Option<&OwnedFd>,
) -> Result<(Adapted, Option<DeviceRules>), Error> {
    let root = container.plan.root();
    let cgroup = Cgroup::spec_path(&container.id);
    let guest = Guest {
        root: &root,
        cgroup,
        terminal,
        // Opened by libcontainer in a process that has inherited the descriptor.
        pid_namespace: pid_namespace.map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()).into()),
        device: &|path| {
            let block = container
                .plan
                .block_devices
                .iter()
                .find(|device| device.path == path);
            match block {
                Some(device) => device_node(&disk::node(device.slot)?),
                None => device_node(path),
            }
        },
    };
    let adapted = adapt(spec, &guest).map_err(Error::Spec)?;
    for notice in &adapted.notices {
        log::info!("container {}: {notice}", container.id);
    }
    apply_to_guest(&adapted)?;
    let devices = device_rules(&adapted)?;
    Ok((adapted, devices))
}

/// Removes what the agent wrote below a container's directory, never what a filesystem still mounted there holds.
fn remove_own_files(directory: &Path) -> std::io::Result<()> {
    if !crate::storage::mount::mounts_below(directory)?.is_empty() {
        return Err(std::io::Error::other("a filesystem is still mounted"));
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The text of an error, reported as the host's mistake if it is.
pub(super) fn refusal(error: &CgroupError, status: &StatusPipe) -> String {
    let text = chain(error);
    if error.is_argument() {
        status.send(&Report::Refused(text.clone()));
    }
    text
}

pub(super) fn state_root(directory: &Path) -> PathBuf {
    directory.join("state")
}

pub(super) fn builder(id: &str, state: &Path) -> Result<ContainerBuilder, String> {
    fs::create_dir_all(state).map_err(|error| error.to_string())?;
    ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(state)
        .map_err(|error| chain(&error))
}

pub(super) fn with_streams(builder: ContainerBuilder, program: Option<ProgramEnds>) -> ContainerBuilder {
    match program {
        None => builder,
        Some(ends) => builder
            .with_stdin(ends.stdin)
            .with_stdout(ends.stdout)
            .with_stderr(ends.stderr),
    }
}

pub(super) fn keep(ends: &ProgramEnds) -> Vec<i32> {
    vec![
        ends.stdin.as_raw_fd(),
        ends.stdout.as_raw_fd(),
        ends.stderr.as_raw_fd(),
    ]
}

pub(super) fn reported_pid(reports: &[Report]) -> Result<Pid, JobError> {
    let pid = reports.iter().find_map(|report| match report {
        Report::Pid(pid) => i32::try_from(*pid).ok(),
        _ => None,
    });
    pid.map(Pid::from_raw)
        .ok_or_else(|| JobError::Failed("the helper reported no process".into()))
}

/// Sets what a container's own namespaces would hold in the guest's.
fn apply_to_guest(adapted: &Adapted) -> Result<(), Error> {
    if let Some(name) = &adapted.hostname {
        nix::unistd::sethostname(name).map_err(Error::io("cannot set the host name"))?;
    }
    if let Some(name) = &adapted.domainname {
        fs::write("/proc/sys/kernel/domainname", name).map_err(Error::io("cannot set the domain name"))?;
    }
    adapted
        .sysctls
        .iter()
        .try_for_each(|(key, value)| crate::sandbox::set_sysctl(key, value).map_err(Error::Sandbox))
}

fn device_rules(adapted: &Adapted) -> Result<Option<DeviceRules>, Error> {
    let nodes = adapted
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().clone())
        .unwrap_or_default();
    let rules = adapted.resources.devices().clone().unwrap_or_default();
    Ok(DeviceRules::new(&rules, &nodes)?)
}

fn write_bundle(bundle: &Path, spec: &Spec) -> Result<(), Error> {
    let text = serde_json::to_vec(spec).map_err(|source| Error::Json {
        field: "spec_json",
        source,
    })?;
    fs::create_dir_all(bundle)
        .and_then(|()| fs::write(bundle.join("config.json"), text))
        .map_err(Error::io("cannot write the bundle"))
}

fn user_of(spec: &Spec) -> (u32, u32) {
    spec.process()
        .as_ref()
        .map_or((0, 0), |process| (process.user().uid(), process.user().gid()))
}

/// A device node of the guest by its path.
fn device_node(path: &Path) -> Option<DeviceNode> {
    let node = stat(path).ok()?;
    let kind = SFlag::from_bits_truncate(node.st_mode) & SFlag::S_IFMT;
    let block = match kind {
        SFlag::S_IFBLK => true,
        SFlag::S_IFCHR => false,
        _ => return None,
    };
    let number = |part: u64| i64::try_from(part).ok();
    Some(DeviceNode {
        block,
        major: number(major(node.st_rdev))?,
        minor: number(minor(node.st_rdev))?,
    })
}

/// Reports kills for lack of memory as they happen. The kernel does not tell the watch of the group's removal: the
/// container ends it.
fn watch_memory(container: &Arc<Container>) -> Option<AbortHandle> {
    let watch = match Watch::new(&container.cgroup.file("memory.events")) {
        Ok(watch) => watch,
        Err(error) => {
            log::warn!("container {}: {}", container.id, chain(&error));
            return None;
        }
    };
    let container = Arc::downgrade(container);
    let task = tokio::spawn(async move {
        while watch.changed().await.is_ok() {
            let Some(container) = container.upgrade() else {
                return;
            };
            container.report_oom(&mut container.state());
        }
    });
    Some(task.abort_handle())
}
