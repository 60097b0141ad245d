//! Builds a VM. [`Machine::build`] reads top to bottom as the boot order.

mod devices;
mod error;
mod hotplug;
mod snapshot;

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_protocol::control::{
    self, BootTimes, Disk, ExitReason, Fd, Received, RequestMessage, Start, VmConfig,
};
use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{cpuid, kernel, layout, mptable, registers};
use crate::console::{self, Console, Ring};
use crate::memory::{self, GuestMemory, Image};
use crate::ports::Ports;
use crate::snapshot::written::{Lists, Soon};
use crate::vcpu::{Bus, ExitReport, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, DiskImage};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::net::Net;
use crate::virtio::vsock::Vsock;
use crate::{command_line, config, jail};

use devices::Devices;
use error::kvm;
pub use error::{BuildError, SnapshotError};
pub use hotplug::Hotplug;
use snapshot::Saved;

/// A running VM.
#[derive(Debug)]
pub struct Machine {
    /// virtio devices by slot.
    pub devices: Vec<Arc<MmioTransport>>,
    /// Streams between guest and host.
    pub vsock: Arc<Mutex<Vsock>>,
    /// Disks by slot number.
    pub disks: Vec<Arc<Mutex<Block>>>,
    /// Network devices by slot number.
    pub nets: Vec<Arc<Mutex<Net>>>,
    /// Memory given back by the guest.
    pub balloon: Option<Arc<Mutex<Balloon>>>,
    /// Memory the guest can grow by.
    pub hotplug: Option<Hotplug>,
    /// The processors.
    pub vcpus: Vcpus,
    /// Output of the serial console.
    pub console: Ring,
    /// Readable when it is time to [hand kicks over](Self::hand_kicks_over).
    pub busy_queues: Arc<EventFd>,
    /// Readable when [`exits`](Self::exits) has a reason.
    pub exit_event: EventFd,
    /// Why the VM ended.
    pub exits: Receiver<ExitReason>,
    config: VmConfig,
    supported: CpuId,
    /// Numbers of the MSRs that a snapshot holds.
    msrs: Vec<u32>,
    bus: Arc<Bus>,
    /// What the guest had of memory at its start.
    ram: GuestMemory,
    /// The memory file that the VM was made from.
    origin: Option<File>,
    /// Memory of it that the guest is expected to write after its first answer.
    pub soon: Soon,
    vm: VmFd,
    image: Image,
}

/// Where the guest's first instruction is.
enum Origin {
    /// In a kernel.
    Kernel { file: File, command_line: String },
    /// Where it was when it was saved.
    Snapshot(Box<Saved>),
}

impl Machine {
    /// Builds the VM the request describes and starts it. `times` gets the end of each phase.
    ///
    /// The configuration, and what it begins from, is checked before anything is created. On an error the process is
    /// to end: parts of the jail may be in place.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn build(
        config: &VmConfig,
        request: &mut Received<RequestMessage>,
        times: &mut BootTimes,
    ) -> Result<Self, BuildError> {
        config::validate(config).map_err(BuildError::Config)?;
        let mut take = |what, fd| take_fd(request, what, fd);

        let kvm_fd = take("kvm", config.kvm)?;
        // SAFETY: the descriptor is owned and given up here; ioctls on anything but /dev/kvm fail.
        let hypervisor = unsafe { Kvm::from_raw_fd(kvm_fd.into_raw_fd()) };
        let supported = hypervisor
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("tell its CPUID"))?;
        let msrs = hypervisor.get_msr_index_list();
        let msrs = msrs.map_err(kvm("tell its MSRs"))?.as_slice().to_vec();
        let image_file = File::from(take("root", config.root)?);
        let image = Image::map(&image_file).map_err(BuildError::Memory)?;
        let mut origin = match &config.start {
            Start::Kernel { kernel, command_line } => {
                let file = File::from(take("kernel", *kernel)?);
                kernel::check(&file).map_err(BuildError::Kernel)?;
                let command_line = command_line.clone();
                Origin::Kernel { file, command_line }
            }
            Start::Snapshot {
                state,
                memory,
                written,
            } => {
                let state = File::from(take("state", *state)?);
                let memory = File::from(take("memory", *memory)?);
                let mut saved = Saved::load(state, memory, config, &image, &supported)?;
                if let Some(lists) = written {
                    let mut take = |what, fd| take(what, fd).map(File::from);
                    saved.expect_written(Lists {
                        first: take("first", lists.first)?,
                        later: take("later", lists.later)?,
                    });
                }
                Origin::Snapshot(Box::new(saved))
            }
        };

        // The VM and its memory.
        let vm = create_vm(&hypervisor)?;
        disable_performance_monitor(&vm)?;
        let ram = match &origin {
            Origin::Kernel { .. } => memory::allocate(config.memory_mib),
            Origin::Snapshot(saved) => saved.memory(config.memory_mib),
        }
        .map_err(BuildError::Memory)?;
        let mut memory_slots = add_memory(&vm, &ram)?;
        let image_start = layout::persistent_memory_start(config.memory_mib);
        check_address_space(&supported, image_start + image.length)?;
        add_memory_slot(
            &vm,
            &mut memory_slots,
            image_start,
            image.length,
            image.address,
            KVM_MEM_READONLY,
        )?;
        let (memory, mut hotplug) = match config.hotplug_mib {
            0 => (ram.clone(), None),
            mib => {
                let start = layout::hotplug_start(image_start + image.length);
                let (memory, hotplug) = Hotplug::new(&ram, start, mib, memory_slots, &supported)?;
                (memory, Some(hotplug))
            }
        };
        if let (Some(hotplug), Origin::Snapshot(saved)) = (&mut hotplug, &origin) {
            saved.add_memory(&vm, &ram, hotplug)?;
        }
        // Interrupt controllers in the kernel; no PIT, the guest has the TSC-deadline timer.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(kvm("place its identity map"))?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(kvm("place its task state"))?;
        vm.create_irq_chip()
            .map_err(kvm("create interrupt controllers"))?;
        times.memory = now();

        let entry = match &mut origin {
            Origin::Kernel { file, .. } => Some(kernel::load(&ram, file).map_err(BuildError::Kernel)?),
            Origin::Snapshot(_) => None,
        };
        times.kernel = now();

        // Devices, in the order in which the guest needs them.
        let memory = Arc::new(memory);
        let devices = Devices::new(config, (image_start, image.length), hotplug.as_ref(), &mut take)?;
        let busy_queues =
            Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Host)?);
        let (transports, slots) = devices.connect(&vm, &memory, &busy_queues)?;
        let ring = Ring::default();
        let serial = config
            .console
            .then(|| connect_console(&vm, &ring, &origin))
            .transpose()?;
        times.devices = now();

        // What the kernel finds in memory, and the processors. The others are made when they are wanted.
        let vcpus = (0..config.vcpus)
            .map(|id| create_vcpu(&vm, &supported, id, config.max_vcpus))
            .collect::<Result<Vec<_>, _>>()?;
        let mut soon = Soon::default();
        match (&origin, entry) {
            (Origin::Kernel { command_line, .. }, Some(entry)) => {
                let line = command_line::build(
                    config.console,
                    config.vcpus,
                    config.max_vcpus,
                    config.hotplug_mib > 0,
                    &slots,
                    command_line,
                );
                kernel::write_boot_data(&ram, &line).map_err(BuildError::Kernel)?;
                mptable::write(&ram, config.max_vcpus).map_err(BuildError::MpTable)?;
                registers::set_entry(&vcpus[0], entry).map_err(BuildError::Registers)?;
            }
            (Origin::Snapshot(saved), _) => {
                saved.restore(&vm, &vcpus, &transports)?;
                soon = saved.prepare_memory(&ram);
            }
            (Origin::Kernel { .. }, None) => {}
        }

        // Nothing of the host is needed any more, and no other thread exists yet.
        jail::enter().map_err(BuildError::Jail)?;
        drop((hypervisor, image_file));
        // The file server's calls are not among this thread's: it begins before they are taken from this one.
        if let Some(fs) = &devices.fs {
            let mut fs = fs.lock().unwrap_or_else(PoisonError::into_inner);
            fs.start_thread(config.seccomp).map_err(BuildError::Host)?;
        }
        if config.seccomp {
            jail::confine(jail::Thread::Main).map_err(BuildError::Jail)?;
        }
        // The kernel's workers for them get the confinement of this thread.
        devices.attach_nets(config, &mut take)?;
        // Last, for what devices have to say to the guest is said by interrupts.
        if let Origin::Snapshot(saved) = &origin {
            saved.start(&transports)?;
        }
        let origin = match origin {
            Origin::Snapshot(saved) => Some(saved.into_memory()),
            Origin::Kernel { .. } => None,
        };

        let bus = Arc::new(Bus {
            ports: Ports::new(serial, memory),
            devices: transports.clone(),
        });
        let exit_event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Host)?;
        let (reasons, exits) = std::sync::mpsc::channel();
        times.running = now();
        let report = ExitReport {
            reasons,
            event: exit_event.try_clone().map_err(BuildError::Host)?,
        };
        let vcpus = Vcpus::start(vcpus, bus.clone(), report, config.seccomp).map_err(BuildError::Host)?;
        Ok(Self {
            devices: transports,
            vsock: devices.vsock,
            disks: devices.disks,
            nets: devices.nets,
            balloon: devices.balloon,
            hotplug,
            vcpus,
            console: ring,
            busy_queues,
            exit_event,
            exits,
            config: config.clone(),
            supported,
            msrs,
            bus,
            ram,
            origin,
            soon,
            vm,
            image,
        })
    }

    /// Has KVM take the kicks of queues that are kicked often.
    pub fn hand_kicks_over(&self) {
        // Readable or not.
        let _ = self.busy_queues.read();
        for device in &self.devices {
            device.hand_kicks_over(&self.vm);
        }
    }

    /// Makes the vCPUs below `count` exist. They wait for the guest to start them.
    ///
    /// # Errors
    /// [`BuildError`]; those made stay.
    pub fn add_vcpus(&mut self, count: u8) -> Result<(), BuildError> {
        let max = self.config.max_vcpus;
        if count == 0 || count > max {
            return Err(BuildError::VcpuCount(count, max));
        }
        for id in self.vcpus.len() as u8..count {
            let vcpu = create_vcpu(&self.vm, &self.supported, id, max)?;
            self.vcpus.add(vcpu).map_err(BuildError::Host)?;
        }
        Ok(())
    }

    /// Asks the guest to have `mib` MiB more than at boot.
    ///
    /// # Errors
    /// [`BuildError`]; the guest has been asked for nothing then.
    pub fn set_memory(&mut self, mib: u32) -> Result<(), BuildError> {
        match &mut self.hotplug {
            Some(hotplug) => hotplug.request(&self.vm, mib),
            None if mib == 0 => Ok(()),
            None => Err(BuildError::HotplugSize(mib, 0)),
        }
    }
}

/// Microseconds of `CLOCK_MONOTONIC`.
pub fn now() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| {
        time.tv_sec().unsigned_abs() * 1_000_000 + time.tv_nsec().unsigned_abs() / 1000
    })
}

/// Takes a descriptor out of a request.
///
/// # Errors
/// [`BuildError::Descriptor`] names the field.
pub fn take_fd(
    request: &mut Received<RequestMessage>,
    what: &'static str,
    fd: Fd,
) -> Result<OwnedFd, BuildError> {
    request
        .take(fd)
        .map_err(|source| BuildError::Descriptor { what, source })
}

/// Opens the files of a disk.
///
/// # Errors
/// [`BuildError::Descriptor`], [`BuildError::Disk`].
pub fn open_disk(
    disk: &Disk,
    slot: u32,
    mut take: impl FnMut(&'static str, Fd) -> Result<OwnedFd, BuildError>,
) -> Result<DiskImage, BuildError> {
    let files = disk
        .files
        .iter()
        .map(|fd| take("disk.files", *fd).map(File::from))
        .collect::<Result<_, _>>()?;
    DiskImage::new(files, disk.read_only).map_err(|source| BuildError::Disk { slot, source })
}

/// Puts a network device into an empty slot.
///
/// # Errors
/// [`BuildError::Descriptor`], [`BuildError::NetSlot`]; the slot is as it was.
pub fn attach_net(
    slot: &mut Net,
    net: &control::Net,
    mut take: impl FnMut(&'static str, Fd) -> Result<OwnedFd, BuildError>,
) -> Result<(), BuildError> {
    let mut all = |what, fds: &[Fd]| -> Result<Vec<_>, _> { fds.iter().map(|fd| take(what, *fd)).collect() };
    let taps = all("net.taps", &net.taps)?;
    let vhosts = all("net.vhosts", &net.vhosts)?;
    slot.attach(taps, net.mac, net.mtu).map_err(BuildError::NetSlot)?;
    if !vhosts.is_empty()
        && let Err(error) = slot.serve_by(vhosts)
    {
        // It has just been filled.
        let _ = slot.detach();
        return Err(BuildError::NetSlot(error));
    }
    Ok(())
}

fn create_vm(hypervisor: &Kvm) -> Result<VmFd, BuildError> {
    loop {
        match hypervisor.create_vm() {
            // A signal to a busy host's process interrupts the creation of the VM's kernel threads.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(kvm("create a VM")),
        }
    }
}

/// Takes the performance monitor from the guest. On AMD processors four counters exist whatever CPUID says.
fn disable_performance_monitor(vm: &VmFd) -> Result<(), BuildError> {
    let capability = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
        ..Default::default()
    };
    // Linux 5.18 has it. Before, and without a monitor on the host, there is nothing to switch.
    let switches = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if switches <= 0 || switches & KVM_PMU_CAP_DISABLE as i32 == 0 {
        return Ok(());
    }
    vm.enable_cap(&capability)
        .map_err(kvm("hide its performance monitor"))
}

/// Checks that guest-physical addresses below `end` exist.
fn check_address_space(supported: &CpuId, end: u64) -> Result<(), BuildError> {
    let limit = 1u64
        .checked_shl(cpuid::address_bits(supported))
        .unwrap_or(u64::MAX);
    if end <= limit {
        return Ok(());
    }
    Err(BuildError::AddressSpace {
        end: end >> 20,
        limit: limit >> 20,
    })
}

fn add_memory(vm: &VmFd, memory: &GuestMemory) -> Result<u32, BuildError> {
    let mut slots = 0;
    for region in memory.iter() {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(BuildError::Address)?;
        add_memory_slot(
            vm,
            &mut slots,
            region.start_addr().0,
            region.len(),
            host as u64,
            0,
        )?;
    }
    Ok(slots)
}

fn add_memory_slot(
    vm: &VmFd,
    slots: &mut u32,
    guest: u64,
    size: u64,
    host: u64,
    flags: u32,
) -> Result<(), BuildError> {
    let region = kvm_userspace_memory_region {
        slot: *slots,
        flags,
        guest_phys_addr: guest,
        memory_size: size,
        userspace_addr: host,
    };
    // SAFETY: the range is a mapping of this process that is never unmapped while the VM exists.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("use guest memory"))?;
    *slots += 1;
    Ok(())
}

fn connect_console(vm: &VmFd, ring: &Ring, origin: &Origin) -> Result<Console, BuildError> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Host)?;
    vm.register_irqfd(&interrupt, console::GSI)
        .map_err(kvm("connect the console's interrupt"))?;
    match origin {
        Origin::Snapshot(saved) => saved.console(interrupt, ring.clone()),
        Origin::Kernel { .. } => Ok(Console::new(interrupt, ring.clone())),
    }
}

fn create_vcpu(vm: &VmFd, supported: &CpuId, id: u8, count: u8) -> Result<VcpuFd, BuildError> {
    let vcpu = vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
    vcpu.set_cpuid2(&cpuid::normalize(supported, id, count))
        .map_err(kvm("set a vCPU's CPUID"))?;
    registers::set_msrs(&vcpu).map_err(BuildError::Registers)?;
    registers::set_local_interrupts(&vcpu).map_err(BuildError::Registers)?;
    Ok(vcpu)
}
