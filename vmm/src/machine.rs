//! Builds a VM. [`Machine::build`] reads top to bottom as the boot order.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_protocol::control::{
    BootTimes, ChannelError, Disk, ExitReason, Fd, Received, RequestMessage, VMM_PROC_FD, VmConfig,
};
use bulkhead_protocol::ports;
use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, KVM_PMU_CAP_DISABLE,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{cpuid, kernel, layout, mptable, registers};
use crate::console::{self, Console, Ring};
use crate::memory::{self, GuestMemory, Image};
use crate::ports::Ports;
use crate::vcpu::{Bus, ExitReport, Vcpus};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, DiskError, DiskImage};
use crate::virtio::fs::{Fs, FsError};
use crate::virtio::mem::{self, Mem};
use crate::virtio::mmio::{MmioTransport, Slot, TransportError};
use crate::virtio::net::{Net, NetError, SlotError};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{Vsock, VsockError};
use crate::virtio::{DeviceError, VirtioDevice};
use crate::{command_line, config, jail};

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The configuration is wrong.
    #[error("Invalid VM configuration")]
    Config(#[source] config::ConfigError),
    /// The configuration names a descriptor that did not come with it.
    #[error("Missing descriptor for {what}")]
    Descriptor {
        /// Field.
        what: &'static str,
        /// Reason.
        #[source]
        source: ChannelError,
    },
    /// KVM refused.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// Reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory and the root image behind it end above what the processor addresses.
    #[error(
        "Guest memory is too large: with the root image it ends at {end} MiB, and this processor addresses {limit} MiB"
    )]
    AddressSpace {
        /// End of what the guest needs.
        end: u64,
        /// End of what there is.
        limit: u64,
    },
    /// Guest memory.
    #[error("Cannot set up guest memory")]
    Memory(#[source] memory::MemoryError),
    /// Guest memory has no host address.
    #[error("Cannot find the host address of guest memory")]
    Address(#[source] vm_memory::GuestMemoryError),
    /// The kernel.
    #[error("Cannot prepare the kernel")]
    Kernel(#[source] kernel::KernelError),
    /// MP table.
    #[error("Cannot describe the processors")]
    MpTable(#[source] mptable::MpTableError),
    /// Registers.
    #[error("Cannot initialise a vCPU")]
    Registers(#[source] registers::RegisterError),
    /// Disk.
    #[error("Cannot use the disk of slot {slot}")]
    Disk {
        /// Slot.
        slot: u32,
        /// Reason.
        #[source]
        source: DiskError,
    },
    /// Shared tree.
    #[error("Cannot share a tree")]
    Fs(#[source] FsError),
    /// Network.
    #[error("Cannot set up the network")]
    Net(#[source] NetError),
    /// A network device that is there from the start.
    #[error("Cannot fill a network slot")]
    NetSlot(#[source] SlotError),
    /// vsock.
    #[error("Cannot set up vsock")]
    Vsock(#[source] VsockError),
    /// More devices than interrupt lines.
    #[error("{0} devices are over the limit of {max}", max = layout::MAX_DEVICES)]
    TooManyDevices(usize),
    /// The processor cannot address all memory.
    #[error("hotplug_mib is {0}: the end is beyond the {1} address bits of the host")]
    AddressBits(u32, u32),
    /// More memory than there may be.
    #[error("mib is {0}; the guest can grow by {1}")]
    HotplugSize(u32, u32),
    /// Memory device.
    #[error("Cannot ask the guest to change its memory")]
    Hotplug(#[source] DeviceError),
    /// Number of vCPUs.
    #[error("count is {0}; 1 to max_vcpus ({1}) are possible")]
    VcpuCount(u8, u8),
    /// Transport.
    #[error("Cannot wire a device")]
    Transport(#[source] TransportError),
    /// Descriptor, thread, signal.
    #[error("Cannot get a resource of the host")]
    Host(#[source] std::io::Error),
    /// Jail.
    #[error("Cannot confine the VMM")]
    Jail(#[source] jail::JailError),
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

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
    /// Readable when [`exits`](Self::exits) has a reason.
    pub exit_event: EventFd,
    /// Why the VM ended.
    pub exits: Receiver<ExitReason>,
    max_vcpus: u8,
    supported: CpuId,
    vm: VmFd,
    _image: Image,
}

impl Machine {
    /// Builds the VM the request describes and starts it. `times` gets the end of each phase.
    ///
    /// The configuration is checked before anything is created. On an error the process is to end: parts
    /// of the jail may be in place.
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

        // The VM and its memory.
        let kvm_fd = take("kvm", config.kvm)?;
        // SAFETY: the descriptor is owned and given up here; ioctls on anything but /dev/kvm fail.
        let hypervisor = unsafe { Kvm::from_raw_fd(kvm_fd.into_raw_fd()) };
        let mut kernel_file = File::from(take("kernel", config.kernel)?);
        kernel::check(&kernel_file).map_err(BuildError::Kernel)?;
        let supported = hypervisor
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("tell its CPUID"))?;
        let vm = create_vm(&hypervisor)?;
        disable_performance_monitor(&vm)?;
        let ram = memory::allocate(config.memory_mib).map_err(BuildError::Memory)?;
        let mut memory_slots = add_memory(&vm, &ram)?;
        let image_file = File::from(take("root", config.root)?);
        let image = Image::map(&image_file).map_err(BuildError::Memory)?;
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
        let supported = hypervisor
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("tell its CPUID"))?;
        let (memory, hotplug) = match config.hotplug_mib {
            0 => (ram.clone(), None),
            mib => {
                let start = layout::hotplug_start(image_start + image.length);
                let (memory, hotplug) = Hotplug::new(&ram, start, mib, memory_slots, &supported)?;
                (memory, Some(hotplug))
            }
        };
        // Interrupt controllers in the kernel; no PIT, the guest has the TSC-deadline timer.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(kvm("place its identity map"))?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(kvm("place its task state"))?;
        vm.create_irq_chip()
            .map_err(kvm("create interrupt controllers"))?;
        times.memory = now();

        let entry = kernel::load(&ram, &mut kernel_file).map_err(BuildError::Kernel)?;
        times.kernel = now();

        // Devices, in the order in which the guest needs them.
        let memory = Arc::new(memory);
        let mut devices: Vec<Arc<Mutex<dyn VirtioDevice>>> =
            vec![Arc::new(Mutex::new(Pmem::new(0, image_start, image.length)))];
        let mut vsock = Vsock::new(ports::GUEST_CID).map_err(BuildError::Vsock)?;
        for (port, fd) in &config.vsock_listeners {
            vsock
                .listen(*port, take("vsock_listeners", *fd)?)
                .map_err(BuildError::Vsock)?;
        }
        let vsock = Arc::new(Mutex::new(vsock));
        devices.push(vsock.clone());
        let mut fs = None;
        if let Some(share) = &config.share {
            let root = File::open("/").map_err(BuildError::Host)?;
            let proc_self_fd = File::from(own_files()?);
            let device = Fs::new(0, &share.tag, root, proc_self_fd).map_err(BuildError::Fs)?;
            let device = Arc::new(Mutex::new(device));
            devices.push(device.clone());
            fs = Some(device);
        }
        devices.push(Arc::new(Mutex::new(Rng::new())));
        let balloon = config.balloon.then(|| Arc::new(Mutex::new(Balloon::new())));
        if let Some(balloon) = &balloon {
            devices.push(balloon.clone());
        }
        if let Some(hotplug) = &hotplug {
            devices.push(hotplug.device.clone());
        }
        let mut nets = Vec::new();
        for slot in 0..config.net_slots {
            let mut device = Net::new(slot).map_err(BuildError::Net)?;
            if let Some(net) = config.nets.get(slot as usize) {
                let tap = take("nets.tap", net.tap)?;
                device
                    .attach(tap, net.mac, net.mtu)
                    .map_err(BuildError::NetSlot)?;
            }
            let device = Arc::new(Mutex::new(device));
            devices.push(device.clone());
            nets.push(device);
        }
        let mut disks = Vec::new();
        for slot in 0..config.disk_slots {
            let disk = config.disks.iter().find(|(place, _)| *place == slot);
            let disk = match disk {
                Some((_, disk)) => Some(open_disk(disk, slot, &mut take)?),
                None => None,
            };
            let disk = Arc::new(Mutex::new(Block::new(slot, disk)));
            devices.push(disk.clone());
            disks.push(disk);
        }
        let slots = (0..devices.len())
            .map(|index| Slot::new(index).ok_or(BuildError::TooManyDevices(devices.len())))
            .collect::<Result<Vec<_>, _>>()?;
        let transports = devices
            .into_iter()
            .zip(&slots)
            .map(|(device, slot)| {
                let transport = MmioTransport::new(device, memory.clone())?;
                transport.connect(&vm, *slot)?;
                Ok(Arc::new(transport))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(BuildError::Transport)?;
        let ring = Ring::default();
        let serial = config.console.then(|| connect_console(&vm, &ring)).transpose()?;
        times.devices = now();

        // What the kernel finds in memory, and the processors.
        let line = command_line::build(
            config.console,
            config.vcpus,
            config.max_vcpus,
            config.hotplug_mib > 0,
            &slots,
            &config.command_line,
        );
        kernel::write_boot_data(&ram, &line).map_err(BuildError::Kernel)?;
        mptable::write(&ram, config.max_vcpus).map_err(BuildError::MpTable)?;
        // The others are made when they are wanted.
        let vcpus = (0..config.vcpus)
            .map(|id| create_vcpu(&vm, &supported, id, config.max_vcpus))
            .collect::<Result<Vec<_>, _>>()?;
        registers::set_entry(&vcpus[0], entry).map_err(BuildError::Registers)?;

        // Nothing of the host is needed any more, and no other thread exists yet.
        jail::enter().map_err(BuildError::Jail)?;
        drop((hypervisor, kernel_file, image_file));
        // The file server's calls are not among this thread's: it begins before they are taken from this one.
        if let Some(fs) = &fs {
            let mut fs = fs.lock().unwrap_or_else(PoisonError::into_inner);
            fs.start_thread(config.seccomp).map_err(BuildError::Host)?;
        }
        if config.seccomp {
            jail::confine(jail::Thread::Main).map_err(BuildError::Jail)?;
        }

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
        let vcpus = Vcpus::start(vcpus, bus, report, config.seccomp).map_err(BuildError::Host)?;
        Ok(Self {
            devices: transports,
            vsock,
            disks,
            nets,
            balloon,
            hotplug,
            vcpus,
            console: ring,
            exit_event,
            exits,
            max_vcpus: config.max_vcpus,
            supported,
            vm,
            _image: image,
        })
    }

    /// Makes the vCPUs below `count` exist. They wait for the guest to start them.
    ///
    /// # Errors
    /// [`BuildError`]; those made stay.
    pub fn add_vcpus(&mut self, count: u8) -> Result<(), BuildError> {
        if count == 0 || count > self.max_vcpus {
            return Err(BuildError::VcpuCount(count, self.max_vcpus));
        }
        for id in self.vcpus.len() as u8..count {
            let vcpu = create_vcpu(&self.vm, &self.supported, id, self.max_vcpus)?;
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

/// Memory that the guest can get while it runs.
#[derive(Debug)]
pub struct Hotplug {
    /// The device.
    pub device: Arc<Mutex<Mem>>,
    start: u64,
    size: u64,
    /// Where the range is mapped in this process.
    host: u64,
    /// Bytes from its start that KVM knows.
    registered: u64,
    /// Memory slots in use.
    slots: u32,
}

impl Hotplug {
    /// Maps `mib` MiB at guest-physical `start`; also `ram` with it. `slots` memory slots are in use.
    fn new(
        ram: &GuestMemory,
        start: u64,
        mib: u32,
        slots: u32,
        supported: &CpuId,
    ) -> Result<(GuestMemory, Self), BuildError> {
        let size = u64::from(mib) << 20;
        let bits = cpuid::address_bits(supported);
        if (start + size) >> bits != 0 {
            return Err(BuildError::AddressBits(mib, bits));
        }
        let memory = memory::with_hotplug(ram, start, mib).map_err(BuildError::Memory)?;
        let host = memory
            .get_host_address(GuestAddress(start))
            .map_err(BuildError::Address)? as u64;
        let hotplug = Self {
            device: Arc::new(Mutex::new(Mem::new(start, size))),
            start,
            size,
            host,
            registered: 0,
            slots,
        };
        Ok((memory, hotplug))
    }

    fn request(&mut self, vm: &VmFd, mib: u32) -> Result<(), BuildError> {
        let wanted = u64::from(mib) << 20;
        if wanted > self.size {
            return Err(BuildError::HotplugSize(mib, (self.size >> 20) as u32));
        }
        let usable = wanted.next_multiple_of(mem::ALIGNMENT).min(self.size);
        // KVM keeps books about all of a slot: only what may be used is in one.
        if usable > self.registered {
            let added = self.registered;
            let (guest, host) = (self.start + added, self.host + added);
            add_memory_slot(vm, &mut self.slots, guest, usable - added, host, 0)?;
            self.registered = usable;
        }
        self.device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .request(wanted, usable)
            .map_err(BuildError::Hotplug)
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

/// The inherited directory of this process's descriptors.
fn own_files() -> Result<OwnedFd, BuildError> {
    // SAFETY: fcntl only asks whether the descriptor exists.
    if unsafe { libc::fcntl(VMM_PROC_FD, libc::F_GETFD) } < 0 {
        return Err(BuildError::Host(std::io::Error::last_os_error()));
    }
    // SAFETY: it exists, is meant for this, and a VM is built once in a process.
    Ok(unsafe { OwnedFd::from_raw_fd(VMM_PROC_FD) })
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

fn connect_console(vm: &VmFd, ring: &Ring) -> Result<Console, BuildError> {
    let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(BuildError::Host)?;
    vm.register_irqfd(&interrupt, console::GSI)
        .map_err(kvm("connect the console's interrupt"))?;
    Ok(Console::new(interrupt, ring.clone()))
}

fn create_vcpu(vm: &VmFd, supported: &CpuId, id: u8, count: u8) -> Result<VcpuFd, BuildError> {
    let vcpu = vm.create_vcpu(id.into()).map_err(kvm("create a vCPU"))?;
    vcpu.set_cpuid2(&cpuid::normalize(supported, id, count))
        .map_err(kvm("set a vCPU's CPUID"))?;
    registers::set_msrs(&vcpu).map_err(BuildError::Registers)?;
    registers::set_local_interrupts(&vcpu).map_err(BuildError::Registers)?;
    Ok(vcpu)
}
