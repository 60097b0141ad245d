//! Creating containers.

use bulkhead_protocol::agent::{
    self, CreateContainerRequest, DiskRange, Filesystem, Layers, RootFilesystem, root_filesystem,
};
use bulkhead_protocol::control::{Disk, Fd, Request};

use super::checkpoint::Made;
use super::resize::Resize;
use super::*;
use crate::spec;
use crate::storage::{PreparedDisk, PreparedRoot, StorageError, plan_root};

/// Cancels a creation that nobody waits for any more.
struct GivenUp(Option<watch::Sender<bool>>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Some(cancelled) = self.0.take() {
            cancelled.send_replace(true);
        }
    }
}

/// Waits until the flag is set.
pub(super) async fn is_set(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|set| *set).await.is_err() {
        std::future::pending().await
    }
}

impl Sandbox {
    /// Creates a container; waits for the VM if it still boots. On failure nothing of it is left. A caller that gives
    /// up cancels the creation, and so does [`Sandbox::delete`].
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::Cancelled`], [`Error::Timeout`] with the phase, or why it could not be made.
    pub async fn create(&self, request: ContainerRequest) -> Result<(), Error> {
        let id = request.id.clone();
        let cancel = {
            let mut state = self.lock();
            let mut known = state.containers.iter();
            if known.any(|(other, record)| *other == id || record.guest_id == id) {
                return Err(Error::Exists(format!("container {id}")));
            }
            let record = Record::new(&id, request.role == Role::Sandbox);
            let cancel = record.cancelled.clone();
            state.containers.insert(id, record);
            cancel
        };
        // On a task of its own, because a future that is dropped cleans nothing up.
        let sandbox = self.clone();
        let cancelled = cancel.subscribe();
        let mut given_up = GivenUp(Some(cancel));
        let creating = tokio::spawn(async move { sandbox.create_or_clean_up(request, cancelled).await });
        let result = creating.await;
        given_up.0 = None;
        result.map_err(Error::Task)?
    }

    async fn create_or_clean_up(
        self,
        request: ContainerRequest,
        mut cancelled: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let (id, role) = (request.id.clone(), request.role);
        let config = &self.0.config;
        let limit =
            Duration::from_secs(u64::from(config.boot_timeout_s) + u64::from(config.request_timeout_s));
        let result = tokio::select! {
            biased;
            result = self.create_registered(request) => result,
            () = is_set(&mut cancelled) => Err(Error::Cancelled {
                id: id.clone(),
                phase: self.phase(&id),
            }),
            () = tokio::time::sleep(limit) => Err(Error::Timeout {
                phase: self.phase(&id),
                limit,
                console: String::new(),
            }),
        };
        let result = match result {
            Err(Error::Timeout {
                phase,
                limit,
                console,
            }) if console.is_empty() => Err(self.timeout(phase, limit).await),
            result => result,
        };
        match &result {
            Ok(()) => {
                self.0.timeline.mark("container_created");
                self.list_later();
                let _ = self.with(&id, |record| {
                    record.machine.created();
                    self.0.sink.event(SandboxEvent::Created {
                        container: id.clone(),
                    });
                    Ok(())
                });
            }
            Err(error) => {
                let stuck = matches!(error, Error::Cancelled { .. } | Error::Timeout { .. });
                if stuck && role != Role::Container {
                    // Its VM is for nobody else, and may never answer.
                    self.begin_stop();
                    if let Some(vm) = self.vm_now() {
                        vm.kill();
                    }
                }
                // What the agent makes can only be removed once it is made.
                if let Ok(Some(making)) = self.with(&id, |record| Ok(record.making.take())) {
                    let _ = making.await;
                }
                self.release_resources(&id).await;
                self.lock().containers.remove(&id);
            }
        }
        result
    }

    /// What the creation of a container waits for.
    fn phase(&self, id: &str) -> &'static str {
        let booting = matches!(*self.0.boot.borrow(), Boot::Pending);
        let step = match self.with(id, |record| Ok(record.step)) {
            // The mounts are made during the boot.
            Ok(step) if !(booting && step == Step::RootMounted) => step,
            _ => self.lock().boot_step,
        };
        step.words()
    }

    /// A phase that took too long, with what the guest's console says.
    pub(super) async fn timeout(&self, phase: &'static str, limit: Duration) -> Error {
        let console = match self.vm_now() {
            Some(vm) => vm.console_tail().await,
            None => String::new(),
        };
        Error::Timeout {
            phase,
            limit,
            console,
        }
    }

    /// Ends the creation of container `id`, and waits a moment for what it leaves.
    pub(super) async fn cancel(&self, id: &str) {
        let gone = self.with(id, |record| {
            record.cancelled.send_replace(true);
            Ok(record.cancelled.clone())
        });
        if let Ok(gone) = gone {
            // Other senders go with the record and with who asked for the creation.
            let _ = tokio::time::timeout(CANCEL_WAIT, gone.closed()).await;
        }
    }

    /// A step of a container's creation.
    async fn step(&self, id: &str, step: Step) -> Result<(), Error> {
        let _ = self.with(id, |record| {
            record.step = step;
            Ok(())
        });
        fault::reach(step).await.map_err(|error| Error::Step(step, error))
    }

    async fn create_registered(&self, request: ContainerRequest) -> Result<(), Error> {
        spec::check(&request.spec, request.role)?;
        if request.role != Role::Sandbox
            && let Some(restore) = self.awaits()
        {
            return self.create_saved(restore, request).await;
        }
        let ContainerRequest {
            id,
            mut spec,
            bundle,
            root,
            stdio,
            role,
            pid_namespace,
        } = request;
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
        let destinations = spec::destinations(&spec);
        let name = spec::container_name(&spec);
        let mut rewritten = spec::rewrite(spec, spec::probe)?;

        // The mounts are made while the guest boots, on a thread of their own: a slow file system must not
        // keep other requests waiting.
        let (tree, folder, volumes) = (self.0.tree.clone(), id.clone(), rewritten.volumes.clone());
        let prepare = plan.clone();
        let preparing = tokio::task::spawn_blocking(move || {
            fault::point(Step::RootMounted).map_err(|error| Error::Step(Step::RootMounted, error))?;
            tree.map(|tree| tree.prepare(&folder, &prepare, &volumes))
                .transpose()
                .map_err(Error::from)
        });
        let (guest, prepared) = tokio::join!(self.guest(), preparing);
        let (guest, prepared) = (guest?, prepared.map_err(Error::Task)??);
        let pid_namespace = match pid_namespace {
            PidNamespace::Container(id) => PidNamespace::Container(self.guest_id(&id)),
            other => other,
        };
        let (root, volumes) = prepared.ok_or_else(|| Error::NoContainer(self.0.id.clone()))?;
        self.step(&id, Step::VmGrown).await?;
        self.adjust(&guest, Resize::Grow).await?;
        self.step(&id, Step::DisksAttached).await?;
        let root = self.attach_root(&guest, &id, root).await?;
        self.step(&id, Step::VolumesProvided).await?;
        let mut sources = Vec::new();
        for volume in &volumes {
            sources.push(self.provide_volume(&guest, volume).await?);
        }
        let block_volumes = std::mem::take(&mut rewritten.block_volumes);
        let block_devices = self.attach_block_volumes(&guest, &id, block_volumes).await?;
        self.step(&id, Step::StreamsListening).await?;
        let made = Made {
            name,
            terminal: stdio.terminal,
            streams: [&stdio.stdin, &stdio.stdout, &stdio.stderr].map(Option::is_some),
            root: plan,
            volumes: rewritten
                .volumes
                .iter()
                .filter_map(|volume| destinations.get(volume.mount).cloned())
                .zip(volumes)
                .collect(),
            block_device: block_devices.first().map(|device| device.path.clone().into()),
        };
        let (streams, open) = self.0.streams.open(&guest.vm, stdio, None).await?;
        self.with(&id, |record| {
            record.streams.insert(String::new(), open);
            record.made = Some(made);
            Ok(())
        })?;
        let message = CreateContainerRequest {
            container_id: id.clone(),
            spec_json: rewritten.finish(&sources)?,
            block_devices,
            root: Some(root).into(),
            streams: Some(streams).into(),
            pid_namespace: pid_namespace_message(pid_namespace).into(),
            ..CreateContainerRequest::default()
        };
        self.step(&id, Step::GuestContainer).await?;
        let (sender, made) = tokio::sync::oneshot::channel();
        let agent = guest.agent.clone();
        let making = tokio::spawn(async move {
            // Nobody listens after a cancellation.
            let _ = sender.send(agent.create_container(&message).await);
        });
        self.with(&id, |record| {
            record.making = Some(making);
            Ok(())
        })?;
        made.await.map_err(|_| Error::NoContainer(id.clone()))??;
        self.step(&id, Step::VmFitted).await?;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;
    use protobuf::Message;

    use super::*;

    fn any_namespace() -> impl Strategy<Value = PidNamespace> {
        prop_oneof![
            Just(PidNamespace::Own),
            Just(PidNamespace::Pod),
            "\\PC{0,20}".prop_map(PidNamespace::Container),
        ]
    }

    proptest! {
        /// Whose processes a container sees is the same to the agent, over the bytes of the request.
        #[test]
        fn pid_namespaces_reach_the_agent(wanted in any_namespace()) {
            let request = CreateContainerRequest {
                pid_namespace: pid_namespace_message(wanted.clone()).into(),
                ..CreateContainerRequest::default()
            };
            let bytes = request.write_to_bytes().unwrap();
            let arrived = CreateContainerRequest::parse_from_bytes(&bytes).unwrap();
            use agent::pid_namespace::Kind;
            let arrived = match arrived.pid_namespace.into_option().map(|namespace| namespace.kind.unwrap()) {
                None => PidNamespace::Own,
                Some(Kind::Pod(_)) => PidNamespace::Pod,
                Some(Kind::Container(id)) => PidNamespace::Container(id),
                Some(other) => panic!("{other:?}"),
            };
            prop_assert_eq!(arrived, wanted);
        }
    }
}
