//! A pod that begins from a snapshot. Its VM is restored once each container of the snapshot has been created again: the
//! guest has to find its disks and files where it left them. Until it is started, a container stands still.

use std::collections::BTreeMap;

use bulkhead_protocol::agent::{ReattachStreamsRequest, ResumeContainerRequest, SignalProcessRequest};

use super::checkpoint::{Made, overlay, saved_kind};
use super::resize::Resize;
use super::*;
use crate::error::chain;
use crate::snapshot::{self, SavedContainer, SavedDisk, SavedRoot, SavedVolume, Snapshot, SnapshotError};
use crate::spec;
use crate::storage::{
    PodVolume, PreparedDisk, PreparedRoot, RootPlan, StorageError, VolumeKind, VolumeNames, plan_root,
};
use crate::streams::Stdio;

#[cfg(test)]
mod tests;

/// The way back of a container of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Return {
    /// Its guest does not run yet.
    Waits {
        /// It is to go on as soon as it does.
        started: bool,
    },
    /// It stands still in the guest until it is started.
    Stands,
}

/// What a container of the snapshot has on the host, for its guest.
#[derive(Debug)]
struct Ready {
    /// Id of the container that takes its place.
    id: String,
    stdio: Stdio,
    disks: Vec<(u32, PreparedDisk)>,
}

/// Who takes the place of a container of the snapshot.
#[derive(Debug)]
enum Place {
    /// The container with this id, which is being made.
    Taken(String),
    /// One that is made.
    Ready(Ready),
}

/// The snapshot of a pod, and how far it is on its way back.
#[derive(Debug)]
pub(super) struct Restore {
    snapshot: Snapshot,
    /// By number in the manifest.
    places: Mutex<BTreeMap<usize, Place>>,
    complete: watch::Sender<bool>,
}

impl Restore {
    pub(super) fn new(snapshot: Snapshot) -> Self {
        let complete = snapshot.manifest.containers.is_empty();
        Self {
            snapshot,
            places: Mutex::default(),
            complete: watch::Sender::new(complete),
        }
    }

    pub(super) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    fn containers(&self) -> &[SavedContainer] {
        &self.snapshot.manifest.containers
    }

    fn places(&self) -> MutexGuard<'_, BTreeMap<usize, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Waits until each container of the snapshot has been created.
    pub(super) async fn complete(&self) {
        let mut complete = self.complete.subscribe();
        // The sender lives as long as this.
        let _ = complete.wait_for(|complete| *complete).await;
    }

    /// Gives container `id`, called `name` within the pod, its place.
    fn take(&self, id: &str, name: Option<&str>) -> Result<usize, SnapshotError> {
        let mut places = self.places();
        let containers = self.containers().iter().enumerate();
        let free = containers.filter(|(number, _)| !places.contains_key(number));
        let found = free.clone().find(|(_, saved)| {
            // A stand-alone container is the only one, whatever its id.
            saved.name.as_deref() == name && (name.is_some() || self.containers().len() == 1)
        });
        let Some((number, _)) = found else {
            return Err(SnapshotError::Unknown {
                name: name.unwrap_or(id).to_owned(),
                known: free.map(|(_, saved)| saved.name().to_owned()).collect(),
            });
        };
        places.insert(number, Place::Taken(id.to_owned()));
        Ok(number)
    }

    /// Container `id` is not made, or removed before its guest runs: another one may take its place.
    pub(super) fn leave(&self, id: &str) {
        if self.is_complete() {
            return;
        }
        self.places().retain(|_, place| match place {
            Place::Taken(other) => other != id,
            Place::Ready(ready) => ready.id != id,
        });
    }

    fn ready(&self, number: usize, ready: Ready) {
        let mut places = self.places();
        places.insert(number, Place::Ready(ready));
        let all = places.len() == self.containers().len()
            && places.values().all(|place| matches!(place, Place::Ready(_)));
        if all {
            self.complete.send_replace(true);
        }
    }

    /// Disks of the guest by slot, once it is complete.
    pub(super) fn take_disks(&self) -> Vec<(u32, PreparedDisk)> {
        let mut places = self.places();
        let ready = places.values_mut().filter_map(|place| match place {
            Place::Ready(ready) => Some(ready),
            Place::Taken(_) => None,
        });
        ready.flat_map(|ready| std::mem::take(&mut ready.disks)).collect()
    }

    /// The containers of the snapshot with the ids of those in their places, once it is complete.
    fn pairs(&self) -> Vec<(&SavedContainer, String)> {
        let places = self.places();
        let ready = places.iter().filter_map(|(number, place)| match place {
            Place::Ready(ready) => Some((&self.containers()[*number], ready.id.clone())),
            Place::Taken(_) => None,
        });
        ready.collect()
    }

    fn take_stdio(&self, id: &str) -> Stdio {
        let mut places = self.places();
        let found = places.values_mut().find_map(|place| match place {
            Place::Ready(ready) if ready.id == id => Some(&mut ready.stdio),
            _ => None,
        });
        found.map(std::mem::take).unwrap_or_default()
    }
}

impl Sandbox {
    /// The snapshot that the pod still waits to begin from.
    pub(super) fn awaits(&self) -> Option<&Restore> {
        self.0.restore.as_ref().filter(|restore| !restore.is_complete())
    }

    /// Creates a container of the snapshot, and waits for the guest if it is the last one.
    pub(super) async fn create_saved(
        &self,
        restore: &Restore,
        request: ContainerRequest,
    ) -> Result<(), Error> {
        let ContainerRequest {
            id,
            mut spec,
            bundle,
            root,
            stdio,
            role,
            ..
        } = request;
        let name = spec::container_name(&spec);
        let number = restore.take(&id, name.as_deref())?;
        let saved = &restore.containers()[number];
        self.with(&id, |record| {
            record.guest_id.clone_from(&saved.id);
            record.returns = Some(Return::Waits { started: false });
            Ok(())
        })?;
        if role == Role::Container {
            spec::add_mounts(&mut spec, self.0.files.keys().map(String::as_str));
        }
        self.lock().sizing.add(&id, Demand::of_container(&spec));
        let streams = [&stdio.stdin, &stdio.stdout, &stdio.stderr].map(Option::is_some);
        check(saved, "Terminal", &saved.terminal, &stdio.terminal)?;
        let root_spec = spec.root().as_ref().ok_or(spec::SpecError::Missing("root"))?;
        let plan = plan_root(&root, &bundle.join(root_spec.path()))?;
        let destinations = spec::destinations(&spec);
        let rewritten = spec::rewrite(spec, spec::probe)?;
        if let Some(volume) = rewritten.block_volumes.first() {
            return Err(refuse(
                saved,
                format!("it has the block device {}", volume.path.display()),
            )
            .into());
        }
        self.copy_back(restore, saved, &plan).await?;
        let names = volume_names(saved, &destinations, &rewritten.volumes)?;
        let tree = self.0.tree.clone();
        let (folder, volumes, prepare) = (saved.id.clone(), rewritten.volumes.clone(), plan.clone());
        let preparing = tokio::task::spawn_blocking(move || {
            tree.map(|tree| tree.prepare_again(&folder, &prepare, &volumes, &names))
                .transpose()
        });
        let prepared = preparing.await.map_err(Error::Task)??;
        let (prepared, volumes) = prepared.ok_or_else(|| Error::NoContainer(self.0.id.clone()))?;
        let disks = disks(saved, prepared)?;
        let mut made_volumes = Vec::new();
        for (volume, pod_volume) in rewritten.volumes.iter().zip(volumes) {
            let destination = destinations.get(volume.mount).cloned().unwrap_or_default();
            let known = saved
                .volumes
                .iter()
                .find(|known| known.destination == destination);
            if let Some(known) = known {
                let kind = saved_kind(&pod_volume.kind);
                check(
                    saved,
                    &format!("Volume {}", destination.display()),
                    &known.kind,
                    &kind,
                )?;
                // The guest has it already.
                known_volume(&pod_volume, known).await;
            }
            made_volumes.push((destination, pod_volume));
        }
        self.with(&id, |record| {
            record.slots = disks.iter().map(|(slot, _)| *slot).collect();
            record.made = Some(Made {
                name,
                terminal: stdio.terminal,
                streams,
                root: plan,
                volumes: made_volumes,
                block_device: None,
            });
            Ok(())
        })?;
        for (slot, _) in &disks {
            let index = usize::try_from(*slot).unwrap_or(usize::MAX);
            match self.lock().slots.get_mut(index) {
                Some(used) => *used = true,
                None => return Err(StorageError::NoSlot(self.0.config.disk_slots).into()),
            }
        }
        restore.ready(number, Ready { id, stdio, disks });
        if restore.is_complete() {
            let guest = self.guest().await?;
            self.adjust(&guest, Resize::Fit).await?;
        }
        Ok(())
    }

    /// Puts what the container had written where its new root file system keeps what is written.
    async fn copy_back(
        &self,
        restore: &Restore,
        saved: &SavedContainer,
        plan: &RootPlan,
    ) -> Result<(), Error> {
        let failed = |error| SnapshotError::Copy(saved.id.clone(), error);
        match (&saved.root, plan) {
            (SavedRoot::Overlay { lower, upper }, RootPlan::Mounts(mounts)) => {
                let Some((lower_now, upper_now)) = overlay(mounts) else {
                    return Err(
                        refuse(saved, "its root file system is not a writable overlay".to_owned()).into(),
                    );
                };
                check(saved, "Image (lowerdir)", &lower.as_str(), &lower_now)?;
                let from = restore.snapshot.path(upper)?;
                snapshot::copy_tree(&from, upper_now.as_ref())
                    .await
                    .map_err(failed)?;
            }
            (SavedRoot::Disk(disk), RootPlan::Disk(now)) => {
                copy_disk_back(restore, saved, disk, now).await?;
            }
            (
                SavedRoot::Layers { lower, upper, .. },
                RootPlan::Layers {
                    lower: lower_now,
                    upper: upper_now,
                },
            ) => {
                check(saved, "Image layers", lower, lower_now)?;
                match (upper, upper_now) {
                    (Some(disk), Some(now)) => copy_disk_back(restore, saved, disk, now).await?,
                    (None, None) => {}
                    (then, _) => {
                        let [was, is] = match then {
                            Some(_) => ["on a disk", "in memory"],
                            None => ["in memory", "on a disk"],
                        };
                        let reason = format!("its writable layer was {was} and would be {is}");
                        return Err(refuse(saved, reason).into());
                    }
                }
            }
            _ => return Err(refuse(saved, "its root file system is of another kind".to_owned()).into()),
        }
        Ok(())
    }

    /// Gives a restored guest's containers their streams, and lets those go on that were started meanwhile.
    pub(super) async fn rejoin(&self, restore: &Restore, guest: &Guest) -> Result<(), Error> {
        for (saved, id) in restore.pairs() {
            let stdio = restore.take_stdio(&id);
            let size = self.with(&id, |record| Ok(record.sizes.get("").copied()))?;
            let (streams, open) = self.0.streams.open(&guest.vm, stdio, size).await?;
            self.with(&id, |record| {
                record.streams.insert(String::new(), open);
                Ok(())
            })?;
            let joins = |had: bool, port: u32| if had { port } else { 0 };
            let request = ReattachStreamsRequest {
                container_id: saved.id.clone(),
                stdin_port: joins(saved.streams[0], streams.stdin_port),
                stdout_port: joins(saved.streams[1], streams.stdout_port),
                stderr_port: joins(saved.streams[2], streams.stderr_port),
                ..ReattachStreamsRequest::default()
            };
            guest.agent.reattach_streams(&request).await?;
            for exec in &saved.execs {
                self.end_exec(guest, saved, exec).await;
            }
        }
        for (saved, id) in restore.pairs() {
            let volumes = self.with(&id, |record| {
                Ok(record
                    .made
                    .as_ref()
                    .map(|made| made.volumes.clone())
                    .unwrap_or_default())
            })?;
            for (_, volume) in volumes {
                if matches!(volume.kind, VolumeKind::Written(_)) {
                    self.catch_up(guest, &volume).await?;
                }
            }
            let starts = self.with(&id, |record| {
                let before = record.returns.replace(Return::Stands);
                Ok(before == Some(Return::Waits { started: true }))
            })?;
            if starts {
                go_on(guest, &saved.id).await?;
            }
        }
        Ok(())
    }

    /// A process that was added to a container has nobody who could speak to it.
    async fn end_exec(&self, guest: &Guest, saved: &SavedContainer, exec: &str) {
        let request = SignalProcessRequest {
            container_id: saved.id.clone(),
            exec_id: exec.to_owned(),
            signal: libc::SIGKILL.unsigned_abs(),
            ..SignalProcessRequest::default()
        };
        match guest.agent.signal_process(&request).await {
            Ok(_) => log::info!(
                "process {exec} of container {} is not carried over: killed",
                saved.id
            ),
            Err(error) => log::warn!("{}", chain(&error)),
        }
    }

    /// The start of a container of a snapshot; `None` for any other.
    pub(super) async fn start_saved(&self, id: &str) -> Option<Result<(), Error>> {
        let (guest_id, returns) = self
            .with(id, |record| {
                let returns = record.returns;
                if let Some(Return::Waits { started }) = &mut record.returns {
                    *started = true;
                }
                Ok((record.guest_id.clone(), returns))
            })
            .ok()?;
        match returns? {
            Return::Waits { .. } => Some(Ok(())),
            Return::Stands => {
                let guest = match self.guest().await {
                    Ok(guest) => guest,
                    Err(error) => return Some(Err(error)),
                };
                Some(go_on(&guest, &guest_id).await)
            }
        }
    }
}

/// Lets a container's processes run.
async fn go_on(guest: &Guest, guest_id: &str) -> Result<(), Error> {
    let request = ResumeContainerRequest {
        container_id: guest_id.to_owned(),
        ..ResumeContainerRequest::default()
    };
    guest.agent.resume_container(&request).await.map(drop)
}

fn refuse(saved: &SavedContainer, reason: String) -> SnapshotError {
    SnapshotError::Unfit {
        id: saved.name().to_owned(),
        reason,
    }
}

fn check<T: PartialEq + std::fmt::Debug>(
    saved: &SavedContainer,
    what: &str,
    then: &T,
    now: &T,
) -> Result<(), SnapshotError> {
    if then == now {
        return Ok(());
    }
    Err(SnapshotError::Changed {
        what: format!("{what} of container {}", saved.name()),
        saved: format!("{then:?}"),
        now: format!("{now:?}"),
    })
}

/// Copies a disk's content over that of a new one of the same size.
async fn copy_disk_back(
    restore: &Restore,
    saved: &SavedContainer,
    disk: &SavedDisk,
    now: &crate::storage::DiskPlan,
) -> Result<(), Error> {
    check(saved, "Access to the disk", &disk.copy.is_none(), &now.read_only)?;
    if let Some(copy) = &disk.copy {
        let from = restore.snapshot.path(copy)?;
        snapshot::copy_disk(&from, &now.source)
            .await
            .map_err(|error| SnapshotError::Copy(saved.id.clone(), error))?;
    }
    Ok(())
}

/// Disks of a container by the slots they had.
fn disks(saved: &SavedContainer, prepared: PreparedRoot) -> Result<Vec<(u32, PreparedDisk)>, Error> {
    Ok(match (&saved.root, prepared) {
        (SavedRoot::Overlay { .. }, PreparedRoot::Shared(_)) => Vec::new(),
        (SavedRoot::Disk(disk), PreparedRoot::Disk(prepared)) => vec![(disk.slot, prepared)],
        (
            SavedRoot::Layers { slot, upper, .. },
            PreparedRoot::Layers {
                lower,
                upper: prepared,
            },
        ) => {
            let upper = upper.as_ref().map(|disk| disk.slot).zip(prepared);
            std::iter::once((*slot, lower)).chain(upper).collect()
        }
        _ => return Err(refuse(saved, "its root file system is of another kind".to_owned()).into()),
    })
}

/// Names of a container's volumes in their order, as the guest knows them.
fn volume_names(
    saved: &SavedContainer,
    destinations: &[PathBuf],
    volumes: &[spec::Volume],
) -> Result<Vec<VolumeNames>, SnapshotError> {
    let wanted: Vec<_> = volumes
        .iter()
        .filter_map(|volume| destinations.get(volume.mount))
        .collect();
    let known: Vec<_> = saved.volumes.iter().map(|volume| &volume.destination).collect();
    check(saved, "List of volumes", &known, &wanted)?;
    let names = saved.volumes.iter().map(|volume| VolumeNames {
        name: volume.name.clone(),
        whole: volume.whole.clone(),
    });
    Ok(names.collect())
}

async fn known_volume(volume: &PodVolume, known: &SavedVolume) {
    let mut shown = volume.shown.lock().await;
    if shown.is_none() {
        shown.clone_from(&known.shown);
    }
    drop(shown);
    if let VolumeKind::Directory(_, whole, _) = &volume.kind {
        whole.shown.lock().await.get_or_insert_default();
    }
}
