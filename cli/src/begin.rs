//! Makes a pod from a snapshot as a client of containerd, or nothing.

use anyhow::{Context, anyhow};
use bulkhead_containerd::Client;
use bulkhead_containerd::api::{
    Container, ContainerId, NewSnapshot, NewTask, OneContainer, Process, Signal, SnapshotKey, TaskId,
};
use bulkhead_containerd::grpc::{NOT_FOUND, Status};

mod plan;
mod spec;
#[cfg(test)]
mod tests;

pub use plan::{Wanted, new_id, plan, refuse, suffix};

/// A container that is to be made.
#[derive(Clone, Debug)]
pub struct Planned {
    /// What containerd is to know of it.
    pub container: Container,
    /// Its root file system, if it is a snapshotter's.
    pub root: Option<Root>,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// Where its output goes, as a URI; empty: nowhere.
    pub output: String,
}

/// A root file system that is to be made.
#[derive(Clone, Debug)]
pub struct Root {
    /// What the snapshotter is asked for.
    pub request: NewSnapshot,
    /// Whether it can be written.
    pub writable: bool,
}

impl Planned {
    fn id(&self) -> &str {
        &self.container.id
    }

    fn process(&self) -> Process {
        Process {
            container_id: self.id().to_owned(),
            ..Process::default()
        }
    }
}

/// How far a container is made.
struct Made<'a> {
    planned: &'a Planned,
    root: bool,
    task: bool,
}

/// Makes and starts the containers of a pod, the one that stands for the pod first.
///
/// # Errors
/// The container and the step that failed. What was made is removed again; the error says what could not be.
pub fn begin(client: &Client, pod: &[Planned]) -> anyhow::Result<()> {
    let mut made = Vec::new();
    make(client, pod, &mut made).map_err(|error| {
        let mut left = Vec::new();
        // The pod's sandbox goes last.
        for container in made.iter().rev() {
            unmake(client, container, &mut left);
        }
        if left.is_empty() {
            error
        } else {
            anyhow!("{error:#}; not all could be removed again: {}", left.join("; "))
        }
    })
}

fn make<'a>(client: &Client, pod: &'a [Planned], made: &mut Vec<Made<'a>>) -> anyhow::Result<()> {
    let (sandbox, containers) = match pod {
        [sandbox, containers @ ..] if !containers.is_empty() => (Some(sandbox), containers),
        alone => (None, alone),
    };
    // Its containers are created in a sandbox that runs.
    if let Some(sandbox) = sandbox {
        create(client, sandbox, made)?;
        start(client, sandbox)?;
    }
    for container in containers {
        create(client, container, made)?;
    }
    // All are there, so the VM runs by now: none goes on before the others could.
    for container in containers {
        start(client, container)?;
    }
    Ok(())
}

fn create<'a>(client: &Client, planned: &'a Planned, made: &mut Vec<Made<'a>>) -> anyhow::Result<()> {
    let id = planned.id();
    // Before the root file system: containerd removes one that no container names.
    client
        .create_container(&OneContainer {
            container: Some(planned.container.clone()).into(),
            ..OneContainer::default()
        })
        .with_context(|| format!("containerd does not take container {id}"))?;
    made.push(Made {
        planned,
        root: false,
        task: false,
    });
    let Some(made) = made.last_mut() else {
        return Ok(());
    };
    let mut rootfs = Vec::new();
    if let Some(root) = &planned.root {
        let mounts = if root.writable {
            client.prepare_snapshot(&root.request)
        } else {
            client.view_snapshot(&root.request)
        };
        rootfs = mounts
            .with_context(|| format!("Cannot make the root file system of container {id}"))?
            .mounts;
        made.root = true;
    }
    // Also when the answer does not come.
    made.task = true;
    client
        .create_task(&NewTask {
            container_id: id.to_owned(),
            rootfs,
            stdout: planned.output.clone(),
            stderr: if planned.terminal {
                String::new()
            } else {
                planned.output.clone()
            },
            terminal: planned.terminal,
            ..NewTask::default()
        })
        .with_context(|| format!("Cannot create the task of container {id}"))?;
    Ok(())
}

fn start(client: &Client, planned: &Planned) -> anyhow::Result<()> {
    let id = planned.id();
    client
        .start_task(&planned.process())
        .with_context(|| format!("Cannot start the task of container {id}"))?;
    Ok(())
}

/// Removes what was made for a container; what cannot be removed is added to `left`.
fn unmake(client: &Client, made: &Made<'_>, left: &mut Vec<String>) {
    let id = made.planned.id();
    let mut note = |what: &str, done: Result<(), Status>| {
        if let Err(status) = done
            && status.code != NOT_FOUND
        {
            left.push(format!("{what} {id} ({status})"));
        }
    };
    if made.task {
        note("task", remove_task(client, made.planned));
    }
    let container = ContainerId {
        id: id.to_owned(),
        ..ContainerId::default()
    };
    note("container", client.delete_container(&container).map(drop));
    if let Some(root) = made.planned.root.as_ref().filter(|_| made.root) {
        let key = SnapshotKey {
            snapshotter: root.request.snapshotter.clone(),
            key: root.request.key.clone(),
            ..SnapshotKey::default()
        };
        note("root file system", client.remove_snapshot(&key).map(drop));
    }
}

fn remove_task(client: &Client, planned: &Planned) -> Result<(), Status> {
    let signal = Signal {
        container_id: planned.id().to_owned(),
        signal: libc::SIGKILL.unsigned_abs(),
        all: true,
        ..Signal::default()
    };
    // One that has ended already, or whose VM has, cannot be killed. What counts is whether it can be deleted.
    let _ = client.kill(&signal);
    let _ = client.wait(&planned.process());
    let task = TaskId {
        container_id: planned.id().to_owned(),
        ..TaskId::default()
    };
    client.delete_task(&task).map(drop)
}
