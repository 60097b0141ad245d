//! Volumes of the pod in the guest: made before the first container that mounts them, brought up to date when the
//! host's content is swapped, removed after the last.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Weak;

use bulkhead_protocol::agent::{
    BlockDevice, CommitVolumeRequest, CreateVolumeRequest, HugePagesVolume, MemoryVolume,
    RemoveVolumeRequest, StageVolumeRequest, SubVolume, create_volume_request,
};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use super::*;
use crate::error::chain;
use crate::spec::{BlockVolume, device_path};
use crate::storage::{
    DATA, DiskPlan, Owner, PodVolume, StorageError, VolumeKind, is_version, open_block_device,
};

/// How often new content is copied again because the host has swapped it meanwhile.
const ATTEMPTS: usize = 16;

/// Bits of a path that the protocol carries.
fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// The kernel's notification queue, for the runtime.
#[derive(Debug)]
struct Queue(Inotify);

impl AsRawFd for Queue {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Tells when the host swaps the content of volumes.
#[derive(Debug)]
pub(super) struct Watch {
    queue: AsyncFd<Queue>,
    volumes: Mutex<HashMap<WatchDescriptor, Weak<PodVolume>>>,
}

impl Watch {
    fn new() -> std::io::Result<Self> {
        let queue = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: the queue owns its descriptor, keeps it open and never replaces it.
        let queue = unsafe { AsyncFd::register(Queue(queue)) }?;
        Ok(Self {
            queue,
            volumes: Mutex::default(),
        })
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, Weak<PodVolume>>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, volume: &Arc<PodVolume>) -> std::io::Result<()> {
        let Some(directory) = &volume.directory else {
            return Ok(());
        };
        let what = AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_ONLYDIR;
        let watch = self.queue.get_ref().0.add_watch(directory, what)?;
        self.volumes().insert(watch, Arc::downgrade(volume));
        Ok(())
    }

    fn remove(&self, volume: &PodVolume) {
        self.volumes().retain(|watch, other| {
            let keep = other.upgrade().is_some_and(|other| *other != *volume);
            if !keep {
                // The directory may be gone, and the watch with it.
                let _ = self.queue.get_ref().0.rm_watch(*watch);
            }
            keep
        });
    }

    /// Waits for the next swaps; the volumes concerned, each once.
    async fn next(&self) -> std::io::Result<Vec<Arc<PodVolume>>> {
        loop {
            let mut ready = self.queue.readable().await?;
            let events = match self.queue.get_ref().0.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN) => {
                    ready.clear_ready();
                    continue;
                }
                Err(errno) => return Err(errno.into()),
            };
            let changed = self.changed(&events);
            if !changed.is_empty() {
                return Ok(changed);
            }
        }
    }

    fn changed(&self, events: &[InotifyEvent]) -> Vec<Arc<PodVolume>> {
        let lost = events
            .iter()
            .any(|event| event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW));
        let volumes = self.volumes();
        let concerned = volumes.iter().filter(|(watch, _)| {
            lost || events
                .iter()
                .any(|event| event.wd == **watch && event.name.as_deref() == Some(OsStr::new(DATA)))
        });
        concerned.filter_map(|(_, volume)| volume.upgrade()).collect()
    }
}

impl Sandbox {
    /// Makes sure that the guest has a volume; where containers mount it from.
    pub(super) async fn provide_volume(
        &self,
        guest: &Guest,
        volume: &Arc<PodVolume>,
    ) -> Result<PathBuf, Error> {
        if let VolumeKind::Directory(_, whole, _) = &volume.kind {
            self.provide_one(guest, whole).await?;
        }
        self.provide_one(guest, volume).await?;
        Ok(volume.guest_path())
    }

    async fn provide_one(&self, guest: &Guest, volume: &Arc<PodVolume>) -> Result<(), Error> {
        let mut shown = volume.shown.lock().await;
        if shown.is_some() {
            return Ok(());
        }
        let (owner, kind) = match &volume.kind {
            VolumeKind::Shared => return Ok(()),
            VolumeKind::Written(owner) => (owner, memory(0)),
            VolumeKind::Memory(owner, size) => (owner, memory(*size)),
            VolumeKind::HugePages(owner, page_size) => {
                let pages = HugePagesVolume {
                    page_size: *page_size,
                    ..HugePagesVolume::default()
                };
                (owner, create_volume_request::Kind::HugePages(pages))
            }
            VolumeKind::Directory(owner, whole, path) => {
                let directory = SubVolume {
                    volume: whole.name.clone(),
                    path: text(path),
                    ..SubVolume::default()
                };
                (owner, create_volume_request::Kind::Directory(directory))
            }
        };
        let Owner { mode, uid, gid } = *owner;
        let request = CreateVolumeRequest {
            name: volume.name.clone(),
            mode,
            uid,
            gid,
            kind: Some(kind),
            ..CreateVolumeRequest::default()
        };
        guest.agent.create_volume(&request).await?;
        if matches!(volume.kind, VolumeKind::Written(_)) {
            // Watched before it is read: no swap is missed.
            self.watch(volume)?;
            self.bring_up_to_date(guest, volume, &mut shown).await?;
        } else {
            *shown = Some(PathBuf::new());
        }
        Ok(())
    }

    /// Copies the host's content to the guest until the guest shows what the host has.
    async fn bring_up_to_date(
        &self,
        guest: &Guest,
        volume: &PodVolume,
        shown: &mut Option<PathBuf>,
    ) -> Result<(), Error> {
        let fail = |error| StorageError::Update(volume.name.clone(), error);
        for _ in 0..ATTEMPTS {
            let version = volume.version().map_err(fail)?;
            if shown.as_ref() == Some(&version) {
                return Ok(());
            }
            let version_text = text(&version);
            if !is_version(&version_text) {
                return Err(fail(std::io::ErrorKind::InvalidData.into()).into());
            }
            let stage = StageVolumeRequest {
                name: volume.name.clone(),
                source: text(&volume.guest_shared_path()),
                version: version_text.clone(),
                ..StageVolumeRequest::default()
            };
            let staged = guest.agent.stage_volume(&stage).await;
            // The host removes a version once another has taken its place: what was copied since may lack files.
            if volume.version().map_err(fail)? != version {
                continue;
            }
            staged?;
            let commit = CommitVolumeRequest {
                name: volume.name.clone(),
                version: version_text,
                ..CommitVolumeRequest::default()
            };
            guest.agent.commit_volume(&commit).await?;
            *shown = Some(version);
        }
        Err(fail(std::io::ErrorKind::ResourceBusy.into()).into())
    }

    /// Follows a volume that a restored guest has, and brings it up to date.
    pub(super) async fn catch_up(&self, guest: &Guest, volume: &Arc<PodVolume>) -> Result<(), Error> {
        let mut shown = volume.shown.lock().await;
        self.watch(volume)?;
        self.bring_up_to_date(guest, volume, &mut shown).await
    }

    /// Has a volume followed from now on.
    fn watch(&self, volume: &Arc<PodVolume>) -> Result<(), Error> {
        let fail = |error| StorageError::Update(volume.name.clone(), error);
        let mut slot = self.0.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = match &*slot {
            Some(watch) => watch.clone(),
            None => {
                let watch = Arc::new(Watch::new().map_err(fail)?);
                *slot = Some(watch.clone());
                tokio::spawn(self.clone().follow_volumes(watch.clone()));
                watch
            }
        };
        drop(slot);
        Ok(watch.add(volume).map_err(fail)?)
    }

    async fn follow_volumes(self, watch: Arc<Watch>) {
        loop {
            let changed = match watch.next().await {
                Ok(changed) => changed,
                Err(error) => {
                    log::error!(
                        "sandbox {}: volumes are not followed any more: {error}",
                        self.0.id
                    );
                    return;
                }
            };
            for volume in changed {
                // Each on its own: a large one keeps no other waiting.
                let sandbox = self.clone();
                tokio::spawn(async move {
                    let Ok(guest) = sandbox.guest().await else { return };
                    let mut shown = volume.shown.lock().await;
                    if shown.is_none() {
                        // Whoever is making it reads what is new.
                        return;
                    }
                    if let Err(error) = sandbox.bring_up_to_date(&guest, &volume, &mut shown).await {
                        log::error!("sandbox {}: {}", sandbox.0.id, chain(&error));
                    }
                });
            }
        }
    }

    /// Gives back the volumes that only container `id` used.
    pub(super) async fn release_volumes(&self, id: &str) {
        let Some(tree) = self.0.tree.clone() else { return };
        let released = tree.release(&self.guest_id(id));
        for volume in released {
            let watch = self
                .0
                .watch
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(watch) = watch {
                watch.remove(&volume);
            }
            let request = RemoveVolumeRequest {
                name: volume.name.clone(),
                ..RemoveVolumeRequest::default()
            };
            if let Ok(agent) = self.agent_now()
                && let Err(error) = agent.remove_volume(&request).await
                && !matches!(error, Error::Ended(_))
            {
                log::warn!("{}", chain(&error));
            }
            let tree = tree.clone();
            let phase = Step::VolumesReleased.words();
            if let Err(error) = on_thread(phase, move || tree.remove_volume(&volume)).await {
                log::warn!("{}", chain(&error));
            }
        }
    }

    /// Puts a container's block devices into disk slots.
    pub(super) async fn attach_block_volumes(
        &self,
        guest: &Guest,
        id: &str,
        volumes: Vec<BlockVolume>,
    ) -> Result<Vec<BlockDevice>, Error> {
        let mut devices = Vec::new();
        for volume in volumes {
            let (path, read_only) = (text(&volume.path), volume.read_only);
            let disk = tokio::task::spawn_blocking(move || {
                let source = device_path(&volume.source)
                    .map_err(|error| StorageError::Disk(volume.path.clone(), error))?;
                open_block_device(&DiskPlan {
                    source,
                    kind: String::new(),
                    options: Vec::new(),
                    read_only: volume.read_only,
                })
            });
            let disk = disk.await.map_err(Error::Task)??;
            let part = self.attach_disk(guest, id, disk).await?.into_iter().next();
            devices.push(BlockDevice {
                disk: part.and_then(|part| part.range.0).map(|range| *range).into(),
                path,
                read_only,
                ..BlockDevice::default()
            });
        }
        Ok(devices)
    }
}

fn memory(size: u64) -> create_volume_request::Kind {
    create_volume_request::Kind::Memory(MemoryVolume {
        size,
        ..MemoryVolume::default()
    })
}
