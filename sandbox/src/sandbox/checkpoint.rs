//! Writing a running pod down: its VM, and what its containers have written on the host, all of one moment.

use bulkhead_protocol::agent::{FreezeRequest, PauseContainerRequest, ResumeContainerRequest, ThawRequest};
use bulkhead_protocol::control::Request;

use super::resize::Applied;
use super::*;
use crate::error::chain;
use crate::limits;
use crate::snapshot::{
    self, Machine, Making, Manifest, Origin, SavedContainer, SavedDisk, SavedRoot, SavedVolume,
    SavedVolumeKind, SnapshotError,
};
use crate::storage::{DiskPlan, PodVolume, RootPlan, VolumeKind};
use crate::template::Identity;

/// What a container was made from, as far as a snapshot has to know.
#[derive(Debug)]
pub(super) struct Made {
    /// Name within its pod.
    pub(super) name: Option<String>,
    pub(super) terminal: bool,
    /// Which of stdin, stdout and stderr it has.
    pub(super) streams: [bool; 3],
    pub(super) root: RootPlan,
    /// Volumes by their path in the container.
    pub(super) volumes: Vec<(PathBuf, Arc<PodVolume>)>,
    /// The first block device that it has as such.
    pub(super) block_device: Option<PathBuf>,
}

/// Something of the host that goes into a snapshot.
#[derive(Debug)]
enum Source {
    /// What is in a directory.
    Tree(PathBuf),
    /// What is on a disk.
    Disk(PathBuf),
}

/// A copy that is to be made.
#[derive(Debug)]
struct Copy {
    /// Id of the container.
    container: String,
    from: Source,
    /// In the snapshot.
    to: PathBuf,
}

impl Sandbox {
    /// Writes the pod, which `origin` has made, down in `directory`, which is empty or not there yet, and lets it go on.
    /// Its processes stand still meanwhile, and what would change its containers is refused. Also when the caller stops
    /// waiting.
    ///
    /// # Errors
    /// [`Error::Snapshot`] with the container that cannot be saved, or what failed; nothing is left in the directory then,
    /// and the pod goes on.
    pub async fn checkpoint(&self, directory: &std::path::Path, origin: Origin) -> Result<(), Error> {
        let directory = directory.to_owned();
        self.to_the_end(
            |sandbox: Self| async move { sandbox.checkpoint_to_the_end(&directory, origin).await },
        )
        .await
    }

    async fn checkpoint_to_the_end(self, directory: &std::path::Path, origin: Origin) -> Result<(), Error> {
        let guest = self.guest().await?;
        // The VM keeps its size.
        let applied = self.0.applied.lock().await;
        let (containers, copies) = self.saved_containers().await?;
        let image = Identity::of(&self.0.config.image).map_err(SnapshotError::Image)?;
        let namespace = self.0.namespace.clone();
        let manifest = Manifest::new(origin, namespace, image, self.machine(&applied), containers);
        let making = Making::begin(directory)?;
        let ids: Vec<&str> = manifest
            .containers
            .iter()
            .map(|container| container.id.as_str())
            .collect();
        let mut paused = Vec::new();
        let written = match pause_all(&guest, &ids, &mut paused).await {
            Ok(()) => self.freeze_and_write(&guest, &making, &copies).await,
            failed => failed,
        };
        resume_all(&guest, &paused).await;
        written?;
        making.finish(&manifest)?;
        log::info!("sandbox {} is saved in {}", self.0.id, directory.display());
        Ok(())
    }

    async fn freeze_and_write(&self, guest: &Guest, making: &Making, copies: &[Copy]) -> Result<(), Error> {
        let freeze = FreezeRequest {
            limit_ms: u32::try_from(limits::FREEZE_TIME.as_millis()).unwrap_or(u32::MAX),
            ..FreezeRequest::default()
        };
        guest.agent.freeze(&freeze).await?;
        let written = write(guest, making, copies).await;
        let thawed = guest.agent.thaw(&ThawRequest::default()).await;
        written?;
        if thawed?.expired {
            return Err(SnapshotError::Expired.into());
        }
        Ok(())
    }

    /// The VM as it is.
    fn machine(&self, applied: &Applied) -> Machine {
        let config = &self.0.config;
        let net_slots = self.network().slots;
        let sizing = &self.lock().sizing;
        let boot = sizing.boot();
        let (vcpus, online) = applied.vcpus(boot.vcpus);
        Machine {
            boot_vcpus: boot.vcpus,
            vcpus,
            online,
            max_vcpus: sizing.max_vcpus(),
            memory_mib: boot.memory_mib,
            added_mib: applied.added_mib(),
            hotplug_mib: sizing.hotplug_mib(),
            console: config.console,
            balloon: config.balloon,
            disk_slots: config.disk_slots,
            net_slots,
        }
    }

    /// The pod's containers and what has to be copied of them.
    async fn saved_containers(&self) -> Result<(Vec<SavedContainer>, Vec<Copy>), Error> {
        let mut copies = Vec::new();
        let mut volumes = Vec::new();
        let mut containers = Vec::new();
        {
            let state = self.lock();
            let mut records: Vec<_> = state
                .containers
                .iter()
                .filter(|(_, record)| !record.is_sandbox)
                .collect();
            records.sort_by_key(|(id, _)| id.as_str());
            for (id, record) in records {
                let refuse = |reason: String| SnapshotError::Container {
                    id: id.clone(),
                    reason,
                };
                let status = record.machine.status("")?;
                let made = match (&record.made, status) {
                    (Some(made), Status::Running | Status::Paused) => made,
                    _ => return Err(refuse("it does not run".to_owned()).into()),
                };
                let root = saved_root(made, &record.slots, containers.len(), |from, to| {
                    copies.push(Copy {
                        container: id.clone(),
                        from,
                        to,
                    });
                })
                .map_err(refuse)?;
                let is_running = |exec: &&str| {
                    record
                        .machine
                        .status(exec)
                        .is_ok_and(|status| status == Status::Running)
                };
                containers.push(SavedContainer {
                    id: record.guest_id.clone(),
                    container: id.clone(),
                    name: made.name.clone(),
                    terminal: made.terminal,
                    streams: made.streams,
                    execs: record
                        .machine
                        .execs()
                        .filter(is_running)
                        .map(str::to_owned)
                        .collect(),
                    root,
                    volumes: Vec::new(),
                });
                volumes.push(made.volumes.clone());
            }
        }
        for (container, volumes) in containers.iter_mut().zip(volumes) {
            for (destination, volume) in volumes {
                container.volumes.push(saved_volume(destination, &volume).await);
            }
        }
        Ok((containers, copies))
    }
}

/// Has every process of the containers stand still, and notes in `paused` those that did not before.
async fn pause_all<'a>(guest: &Guest, ids: &[&'a str], paused: &mut Vec<&'a str>) -> Result<(), Error> {
    for id in ids {
        let request = PauseContainerRequest {
            container_id: (*id).to_owned(),
            ..PauseContainerRequest::default()
        };
        match guest.agent.pause_container(&request).await {
            Ok(_) => paused.push(*id),
            // Its user has paused it, and will resume it.
            Err(Error::Agent {
                kind: crate::Kind::FailedPrecondition,
                ..
            }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn resume_all(guest: &Guest, ids: &[&str]) {
    for id in ids {
        let request = ResumeContainerRequest {
            container_id: (*id).to_owned(),
            ..ResumeContainerRequest::default()
        };
        if let Err(error) = guest.agent.resume_container(&request).await {
            log::error!("container {id} does not go on: {}", chain(&error));
        }
    }
}

/// Writes the VM down and makes the copies while it is stopped.
async fn write(guest: &Guest, making: &Making, copies: &[Copy]) -> Result<(), Error> {
    let (state, memory) = making.files()?;
    guest.vm.ask(Request::Pause, Vec::new()).await?;
    let written = async {
        guest.vm.snapshot(state.into(), memory.into()).await?;
        for Copy { container, from, to } in copies {
            let to = making.directory().join(to);
            let copied = match from {
                Source::Tree(from) => snapshot::copy_tree(from, &to).await,
                Source::Disk(from) => snapshot::copy_disk(from, &to).await,
            };
            copied.map_err(|error| SnapshotError::Copy(container.clone(), error))?;
        }
        Ok::<_, Error>(())
    }
    .await;
    guest.vm.ask(Request::Resume, Vec::new()).await?;
    written
}

/// Where the root file system of the container with this number comes from, and what of it is to be copied; the error says
/// why it cannot be.
fn saved_root(
    made: &Made,
    slots: &[u32],
    number: usize,
    mut copy: impl FnMut(Source, PathBuf),
) -> Result<SavedRoot, String> {
    if let Some(device) = &made.block_device {
        return Err(format!("it has the block device {}", device.display()));
    }
    let mut disk = |plan: &DiskPlan, slot: Option<&u32>| -> Result<SavedDisk, String> {
        let to = PathBuf::from(format!("{number}.disk"));
        if !plan.read_only {
            copy(Source::Disk(plan.source.clone()), to.clone());
        }
        Ok(SavedDisk {
            slot: *slot.ok_or("its disk has no slot")?,
            copy: (!plan.read_only).then_some(to),
        })
    };
    match &made.root {
        RootPlan::Mounts(mounts) => {
            let Some((lower, upper)) = overlay(mounts) else {
                return Err("its root file system is neither a writable overlay nor on a disk".to_owned());
            };
            let to = PathBuf::from(format!("{number}.upper"));
            let lower = lower.to_owned();
            copy(Source::Tree(upper.into()), to.clone());
            Ok(SavedRoot::Overlay { lower, upper: to })
        }
        RootPlan::Disk(plan) => Ok(SavedRoot::Disk(disk(plan, slots.first())?)),
        RootPlan::Layers { lower, upper } => Ok(SavedRoot::Layers {
            lower: lower.clone(),
            slot: *slots.first().ok_or("its layers have no slot")?,
            upper: upper.as_ref().map(|plan| disk(plan, slots.get(1))).transpose()?,
        }),
    }
}

/// The layers below and the upper directory of a root that is one overlay.
pub(super) fn overlay(mounts: &[Mount]) -> Option<(&str, &str)> {
    let [mount] = mounts else { return None };
    let option = |key: &str| {
        let mut options = mount.options.iter();
        options.find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
    };
    if mount.kind != "overlay" {
        return None;
    }
    Some((option("lowerdir")?, option("upperdir")?))
}

async fn saved_volume(destination: PathBuf, volume: &PodVolume) -> SavedVolume {
    let whole = match &volume.kind {
        VolumeKind::Directory(_, whole, _) => Some(whole.name.clone()),
        _ => None,
    };
    SavedVolume {
        destination,
        name: volume.name.clone(),
        whole,
        kind: saved_kind(&volume.kind),
        shown: volume.shown.lock().await.clone(),
    }
}

/// How a volume of this kind is saved.
pub(super) fn saved_kind(kind: &VolumeKind) -> SavedVolumeKind {
    match kind {
        VolumeKind::Shared => SavedVolumeKind::Shared,
        VolumeKind::Written(_) => SavedVolumeKind::Written,
        VolumeKind::Memory(..) | VolumeKind::HugePages(..) | VolumeKind::Directory(..) => {
            SavedVolumeKind::Memory
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn layers(upper: Option<DiskPlan>) -> Made {
        Made {
            name: None,
            terminal: false,
            streams: [false; 3],
            root: RootPlan::Layers {
                lower: vec!["/top".into(), "/base".into()],
                upper,
            },
            volumes: Vec::new(),
            block_device: None,
        }
    }

    fn disk(read_only: bool) -> DiskPlan {
        DiskPlan {
            source: "/disk".into(),
            kind: "ext4".into(),
            options: Vec::new(),
            read_only,
        }
    }

    #[test]
    fn of_layers_only_the_disk_above_them_is_copied() {
        let save = |upper, slots: &[u32]| {
            let mut copies = Vec::new();
            let root = saved_root(&layers(upper), slots, 7, |from, to| copies.push((from, to)));
            let SavedRoot::Layers { lower, slot, upper } = root? else {
                panic!("no layers")
            };
            assert_eq!(lower, [PathBuf::from("/top"), PathBuf::from("/base")]);
            Ok::<_, String>((slot, upper, copies))
        };
        let at = |slot, copy: Option<&str>| SavedDisk {
            slot,
            copy: copy.map(PathBuf::from),
        };
        let (slot, upper, copies) = save(Some(disk(false)), &[1, 0]).unwrap();
        assert_eq!((slot, upper), (1, Some(at(0, Some("7.disk")))));
        let [(Source::Disk(from), to)] = copies.as_slice() else {
            panic!("{copies:?}")
        };
        assert_eq!(
            (from.as_path(), to.as_path()),
            ("/disk".as_ref(), "7.disk".as_ref())
        );

        let (slot, upper, copies) = save(Some(disk(true)), &[0, 1]).unwrap();
        assert_eq!((slot, upper, copies.len()), (0, Some(at(1, None)), 0));
        // What is in guest memory needs no copy.
        let (slot, upper, copies) = save(None, &[1]).unwrap();
        assert_eq!((slot, upper, copies.len()), (1, None, 0));
        assert!(save(None, &[]).is_err() && save(Some(disk(false)), &[0]).is_err());
    }
}
