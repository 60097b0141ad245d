//! The devices of a VM.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_protocol::control::{self, Fd, VMM_PROC_FD, VmConfig};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::{BuildError, Hotplug, attach_net, open_disk};
use crate::memory::GuestMemory;
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::fs::Fs;
use crate::virtio::mmio::{MmioTransport, Slot};
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// All devices, and those that somebody asks for by name.
pub(super) struct Devices {
    all: Vec<Arc<Mutex<dyn VirtioDevice>>>,
    pub(super) vsock: Arc<Mutex<Vsock>>,
    pub(super) fs: Option<Arc<Mutex<Fs>>>,
    pub(super) balloon: Option<Arc<Mutex<Balloon>>>,
    pub(super) nets: Vec<Arc<Mutex<Net>>>,
    pub(super) disks: Vec<Arc<Mutex<Block>>>,
}

impl Devices {
    /// Makes the devices in the order of their places; the network's are empty. The root image is at `root`: guest-physical start, length.
    pub(super) fn new(
        config: &VmConfig,
        root: (u64, u64),
        hotplug: Option<&Hotplug>,
        take: &mut impl FnMut(&'static str, Fd) -> Result<OwnedFd, BuildError>,
    ) -> Result<Self, BuildError> {
        let mut all: Vec<Arc<Mutex<dyn VirtioDevice>>> =
            vec![Arc::new(Mutex::new(Pmem::new(0, root.0, root.1)))];
        let mut vsock = Vsock::new(config.guest_cid).map_err(BuildError::Vsock)?;
        for (port, fd) in &config.vsock_listeners {
            vsock
                .listen(*port, take("vsock_listeners", *fd)?)
                .map_err(BuildError::Vsock)?;
        }
        let vsock = Arc::new(Mutex::new(vsock));
        all.push(vsock.clone());
        let mut fs = None;
        if let Some(share) = &config.share {
            let root = File::open("/").map_err(BuildError::Host)?;
            let proc_self_fd = File::from(own_files()?);
            let device = Fs::new(0, &share.tag, root, proc_self_fd).map_err(BuildError::Fs)?;
            let device = Arc::new(Mutex::new(device));
            all.push(device.clone());
            fs = Some(device);
        }
        all.push(Arc::new(Mutex::new(Rng::new())));
        let balloon = config.balloon.then(|| Arc::new(Mutex::new(Balloon::new())));
        if let Some(balloon) = &balloon {
            all.push(balloon.clone());
        }
        if let Some(hotplug) = hotplug {
            all.push(hotplug.device.clone());
        }
        let mut nets = Vec::new();
        let pairs = control::queue_pairs(config.max_vcpus);
        for slot in 0..config.net_slots {
            let device = Arc::new(Mutex::new(Net::new(slot, pairs).map_err(BuildError::Net)?));
            all.push(device.clone());
            nets.push(device);
        }
        let mut disks = Vec::new();
        for slot in 0..config.disk_slots {
            let disk = config.disks.iter().find(|(place, _)| *place == slot);
            let disk = match disk {
                Some((_, disk)) => Some(open_disk(disk, slot, &mut *take)?),
                None => None,
            };
            let disk = Arc::new(Mutex::new(Block::new(slot, disk)));
            all.push(disk.clone());
            disks.push(disk);
        }
        Ok(Self {
            all,
            vsock,
            fs,
            balloon,
            nets,
            disks,
        })
    }

    /// Fills the network slots of devices that are there from the start.
    pub(super) fn attach_nets(
        &self,
        config: &VmConfig,
        take: &mut impl FnMut(&'static str, Fd) -> Result<OwnedFd, BuildError>,
    ) -> Result<(), BuildError> {
        for (device, net) in self.nets.iter().zip(&config.nets) {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            attach_net(&mut device, net, &mut *take)?;
        }
        Ok(())
    }

    /// Gives each its place on the bus, and connects it to KVM. `busy` is signalled when one of them wants KVM to take its
    /// kicks.
    pub(super) fn connect(
        &self,
        vm: &VmFd,
        memory: &Arc<GuestMemory>,
        busy: &Arc<EventFd>,
    ) -> Result<(Vec<Arc<MmioTransport>>, Vec<Slot>), BuildError> {
        let slots = (0..self.all.len())
            .map(|index| Slot::new(index).ok_or(BuildError::TooManyDevices(self.all.len())))
            .collect::<Result<Vec<_>, _>>()?;
        let transports = self
            .all
            .iter()
            .zip(&slots)
            .map(|(device, slot)| {
                let mut transport = MmioTransport::new(device.clone(), memory.clone())?;
                transport.connect(vm, *slot, busy.clone())?;
                Ok(Arc::new(transport))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(BuildError::Transport)?;
        Ok((transports, slots))
    }
}

/// The inherited directory of this process's descriptors.
fn own_files() -> Result<OwnedFd, BuildError> {
    // SAFETY: fcntl only asks whether the descriptor exists.
    if unsafe { libc::fcntl(VMM_PROC_FD, libc::F_GETFD) } < 0 {
        return Err(BuildError::Host(std::io::Error::last_os_error()));
    }
    // SAFETY: it exists, is meant for this, and a VM is built once in a process.
    Ok(unsafe { OwnedFd::from_raw_fd(VMM_PROC_FD) })
}
