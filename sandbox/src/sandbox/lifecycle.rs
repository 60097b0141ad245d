//! Creating, starting and deleting containers and processes.

use bulkhead_protocol::agent::{
    self, CreateContainerRequest, DiskRange, ExecProcessRequest, Filesystem, Layers, RemoveContainerRequest,
    RootFilesystem, StartContainerRequest, root_filesystem,
};
use bulkhead_protocol::control::{Disk, Fd, Request};

use super::resize::Resize;
use super::*;
use crate::spec;
use crate::storage::{PreparedDisk, PreparedRoot, StorageError, plan_root};
use crate::streams::Stdio;

impl Sandbox {
    /// Creates a container; waits for the VM if it still boots. On failure nothing of it is left.
    ///
    /// # Errors
    /// [`Error::Exists`], or why it could not be made.
    pub async fn create(&self, request: ContainerRequest) -> Result<(), Error> {
        let id = request.id.clone();
        {
            let mut state = self.lock();
            if state.containers.contains_key(&id) {
                return Err(Error::Exists(format!("container {id}")));
            }
            state
                .containers
                .insert(id.clone(), Record::new(&id, request.role == Role::Sandbox));
        }
        let result = self.create_registered(request).await;
        match &result {
            Ok(()) => {
                self.0.timeline.mark("container_created");
                let _ = self.with(&id, |record| {
                    record.machine.created();
                    self.0.sink.event(SandboxEvent::Created {
                        container: id.clone(),
                    });
                    Ok(())
                });
            }
            Err(_) => {
                self.release_resources(&id).await;
                self.lock().containers.remove(&id);
            }
        }
        result
    }

    async fn create_registered(&self, request: ContainerRequest) -> Result<(), Error> {
        let ContainerRequest {
            id,
            mut spec,
            bundle,
            root,
            stdio,
            role,
            pid_namespace,
        } = request;
        spec::check(&spec, role)?;
        if role == Role::Sandbox {
            drop(stdio);
            return self.ready().await;
        }
        if role == Role::Container {
            spec::add_mounts(&mut spec, self.0.files.keys().map(String::as_str));
        }
        {
            let sizing = &mut self.lock().sizing;
            sizing.add(&id, Demand::of_container(&spec));
            if let Some(linux) = spec.linux_mut()
                && let Some(resources) = linux.resources_mut()
            {
                resize::translate(resources, sizing, &id);
            }
        }
        let root_spec = spec.root().as_ref().ok_or(spec::SpecError::Missing("root"))?;
        let root_path = bundle.join(root_spec.path());
        let plan = plan_root(&root, &root_path)?;
        let mut rewritten = spec::rewrite(spec, spec::probe)?;

        // The mounts are made while the guest boots, on a thread of their own: a slow file system must not
        // keep other requests waiting.
        let (tree, folder, volumes) = (self.0.tree.clone(), id.clone(), rewritten.volumes.clone());
        let preparing = tokio::task::spawn_blocking(move || {
            tree.map(|tree| tree.prepare(&folder, &plan, &volumes))
                .transpose()
        });
        let (guest, prepared) = tokio::join!(self.guest(), preparing);
        let (guest, prepared) = (guest?, prepared.map_err(Error::Task)??);
        let (root, volumes) = prepared.ok_or_else(|| Error::NoContainer(self.0.id.clone()))?;
        self.adjust(&guest, Resize::Grow).await?;
        let root = self.attach_root(&guest, &id, root).await?;
        let mut sources = Vec::new();
        for volume in &volumes {
            sources.push(self.provide_volume(&guest, volume).await?);
        }
        let block_volumes = std::mem::take(&mut rewritten.block_volumes);
        let block_devices = self.attach_block_volumes(&guest, &id, block_volumes).await?;
        let (streams, open) = self.0.streams.open(&guest.vm, stdio, None).await?;
        self.with(&id, |record| {
            record.streams.insert(String::new(), open);
            Ok(())
        })?;
        let message = CreateContainerRequest {
            container_id: id,
            spec_json: rewritten.finish(&sources)?,
            block_devices,
            root: Some(root).into(),
            streams: Some(streams).into(),
            pid_namespace: pid_namespace_message(pid_namespace).into(),
            ..CreateContainerRequest::default()
        };
        guest.agent.create_container(&message).await?;
        self.adjust(&guest, Resize::Fit).await
    }

    async fn attach_root(
        &self,
        guest: &Guest,
        id: &str,
        prepared: PreparedRoot,
    ) -> Result<RootFilesystem, Error> {
        let kind = match prepared {
            PreparedRoot::Shared(path) => {
                root_filesystem::Kind::SharedPath(path.to_string_lossy().into_owned())
            }
            PreparedRoot::Disk(disk) => {
                let parts = self.attach_disk(guest, id, disk).await?;
                root_filesystem::Kind::Disk(
                    parts
                        .into_iter()
                        .next()
                        .ok_or_else(|| StorageError::Root("empty disk".into()))?,
                )
            }
            PreparedRoot::Layers { lower, upper } => {
                let mut layers = Layers {
                    lower: self.attach_disk(guest, id, lower).await?,
                    ..Layers::default()
                };
                if let Some(upper) = upper {
                    layers.upper = self
                        .attach_disk(guest, id, upper)
                        .await?
                        .into_iter()
                        .next()
                        .into();
                }
                root_filesystem::Kind::Layers(layers)
            }
        };
        Ok(RootFilesystem {
            kind: Some(kind),
            ..RootFilesystem::default()
        })
    }

    /// Puts a disk into a free slot; the file systems in it.
    pub(super) async fn attach_disk(
        &self,
        guest: &Guest,
        id: &str,
        disk: PreparedDisk,
    ) -> Result<Vec<Filesystem>, Error> {
        let slot = {
            let mut state = self.lock();
            let free = state.slots.iter().position(|used| !used);
            let index = free.ok_or(StorageError::NoSlot(self.0.config.disk_slots))?;
            state.slots[index] = true;
            let slot = u32::try_from(index).unwrap_or(u32::MAX);
            match state.containers.get_mut(id) {
                Some(record) => record.slots.push(slot),
                None => state.slots[index] = false,
            }
            slot
        };
        let files = (0..disk.files.len())
            .map(|index| Fd(u16::try_from(index).unwrap_or(u16::MAX)))
            .collect();
        let description = Disk {
            files,
            read_only: disk.read_only,
        };
        guest
            .vm
            .ask(
                Request::AttachDisk {
                    slot,
                    disk: description,
                },
                disk.files,
            )
            .await?;
        Ok(disk
            .parts
            .into_iter()
            .map(|part| Filesystem {
                range: Some(DiskRange {
                    slot,
                    offset: part.offset,
                    length: part.length,
                    ..DiskRange::default()
                })
                .into(),
                type_: part.kind,
                options: part.options,
                read_only: disk.read_only,
                ..Filesystem::default()
            })
            .collect())
    }

    /// Starts the init process or an added one. `stdio` is for an added process.
    ///
    /// # Errors
    /// [`Error::State`], or the agent's reason; the process can then be deleted.
    pub async fn start_process(&self, id: &str, exec: &str, stdio: Stdio) -> Result<(), Error> {
        let is_sandbox = self.with(id, |record| {
            record.machine.begin_start(exec)?;
            Ok(record.is_sandbox)
        })?;
        let result = match (is_sandbox, exec.is_empty()) {
            (true, _) => Ok(()),
            (false, true) => {
                // A network attached between creation and start is there when the program runs.
                self.settle_network().await;
                let request = StartContainerRequest {
                    container_id: id.into(),
                    ..Default::default()
                };
                match self.agent_now() {
                    Ok(agent) => agent.start_container(&request).await.map(drop),
                    Err(error) => Err(error),
                }
            }
            (false, false) => self.start_exec(id, exec, stdio).await,
        };
        self.with(id, |record| {
            let told = match &result {
                Ok(()) => {
                    let exit_known = record.machine.process(exec)?.exit().is_some();
                    if !exit_known {
                        self.0.sink.event(SandboxEvent::Started {
                            container: id.into(),
                            exec: exec.into(),
                        });
                    }
                    record.machine.started(exec)
                }
                Err(_) => record.machine.start_failed(exec),
            };
            self.tell(id, record, told);
            Ok(())
        })?;
        if result.is_ok() && exec.is_empty() {
            self.0.timeline.mark("container_started");
            self.0.timeline.save(&self.0.id);
        }
        result
    }

    async fn start_exec(&self, id: &str, exec: &str, stdio: Stdio) -> Result<(), Error> {
        let guest = self.guest().await?;
        let (process_json, size) = self.with(id, |record| {
            let json = record.execs.get(exec).cloned().unwrap_or_default();
            Ok((json, record.sizes.get(exec).copied()))
        })?;
        let (streams, open) = self.0.streams.open(&guest.vm, stdio, size).await?;
        self.with(id, |record| {
            record.streams.insert(exec.into(), open);
            Ok(())
        })?;
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json,
            streams: Some(streams).into(),
            ..ExecProcessRequest::default()
        };
        let result = guest.agent.exec_process(&request).await.map(drop);
        if result.is_err() {
            let open = self.with(id, |record| Ok(record.streams.remove(exec)))?;
            if let Some(open) = open {
                self.unlisten(Some(&guest.vm), &open).await;
            }
        }
        result
    }

    async fn unlisten(&self, vm: Option<&crate::vm::Vm>, streams: &ProcessStreams) {
        // Nothing is drained: the guest has not connected, or has been told to forget the process.
        self.0.streams.drain(vm, streams, Duration::ZERO).await;
    }

    /// Adds a process to a running container.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::State`].
    pub fn exec(&self, request: ExecRequest) -> Result<(), Error> {
        let ExecRequest {
            container,
            exec,
            process_json,
        } = request;
        self.with(&container, |record| {
            if record.is_sandbox {
                return Err(Error::Unsupported(
                    "a process in the sandbox container, which is the VM itself,",
                ));
            }
            record.machine.add_exec(&exec)?;
            record.execs.insert(exec.clone(), process_json);
            record.exits.insert(exec.clone(), watch::Sender::new(None));
            self.0.sink.event(SandboxEvent::ExecAdded {
                container: container.clone(),
                exec,
            });
            Ok(())
        })
    }

    /// Deletes a container, or a process by exec id, that does not run; waits for its output to drain.
    ///
    /// # Errors
    /// [`Error::State`] while it runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<Exit, Error> {
        let never = Exit {
            status: KILLED,
            at_ns: now_ns(),
        };
        let exit = self.with(id, |record| {
            record.machine.check_delete(exec)?;
            if exec.is_empty() {
                if record.deleting {
                    return Err(Error::State {
                        what: format!("Container {id}"),
                        state: "being deleted",
                        operation: "delete it",
                    });
                }
                record.deleting = true;
            }
            Ok(record.machine.process(exec)?.exit().unwrap_or(never))
        })?;
        let streams = self.with(id, |record| Ok(record.streams.remove(exec)))?;
        if let Some(streams) = streams {
            self.0
                .streams
                .drain(self.vm_now().as_ref(), &streams, DRAIN_LIMIT)
                .await;
        }
        if !exec.is_empty() {
            self.with(id, |record| {
                record.machine.forget_exec(exec);
                record.execs.remove(exec);
                record.exits.remove(exec);
                record.sizes.remove(exec);
                Ok(())
            })?;
            return Ok(exit);
        }
        self.release_resources(id).await;
        let mut state = self.lock();
        state.containers.remove(id);
        self.0.sink.event(SandboxEvent::Deleted {
            container: id.into(),
            exit,
        });
        Ok(exit)
    }

    /// Gives back what a container holds in the guest and on the host.
    async fn release_resources(&self, id: &str) {
        let taken = self.with(id, |record| {
            let streams: Vec<ProcessStreams> = record.streams.drain().map(|(_, streams)| streams).collect();
            Ok((streams, std::mem::take(&mut record.slots), record.is_sandbox))
        });
        let Ok((streams, slots, is_sandbox)) = taken else {
            return;
        };
        let vm = self.vm_now();
        let agent = if is_sandbox { None } else { self.agent_now().ok() };
        if let Some(agent) = agent {
            let request = RemoveContainerRequest {
                container_id: id.into(),
                ..Default::default()
            };
            match agent.remove_container(&request).await {
                Ok(agent::RemoveContainerResponse { .. }) => {}
                // The guest never had it, or is gone with it.
                Err(
                    Error::Agent {
                        kind: crate::Kind::NotFound,
                        ..
                    }
                    | Error::Ended(_),
                ) => {}
                Err(error) => log::warn!("{}", crate::error::chain(&error)),
            }
        }
        self.shrink(id).await;
        for streams in streams {
            self.unlisten(vm.as_ref(), &streams).await;
        }
        for slot in slots {
            if let Some(vm) = &vm
                && let Err(error) = vm.ask(Request::DetachDisk { slot }, Vec::new()).await
            {
                log::debug!("{}", crate::error::chain(&error));
            }
            let index = usize::try_from(slot).unwrap_or(usize::MAX);
            if let Some(used) = self.lock().slots.get_mut(index) {
                *used = false;
            }
        }
        self.release_volumes(id).await;
        let tree = self.0.tree.clone();
        if let (Some(tree), false) = (tree, is_sandbox) {
            let id = id.to_owned();
            let _ = tokio::task::spawn_blocking(move || tree.remove(&id)).await;
        }
    }
}

fn pid_namespace_message(namespace: PidNamespace) -> Option<agent::PidNamespace> {
    use agent::pid_namespace::Kind;
    let kind = match namespace {
        PidNamespace::Own => return None,
        PidNamespace::Pod => Kind::Pod(agent::PodPidNamespace::new()),
        PidNamespace::Container(id) => Kind::Container(id),
    };
    Some(agent::PidNamespace {
        kind: Some(kind),
        ..agent::PidNamespace::default()
    })
}
