//! A VM is written down, and made again.

use std::fs::File;
use std::sync::Arc;

use bulkhead_protocol::control::VmConfig;
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::{GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::error::kvm;
use super::{BuildError, Hotplug, Machine, SnapshotError};
use crate::arch::layout;
use crate::console::{Console, Ring};
use crate::memory::{self, GuestMemory, Image, MemoryError};
use crate::snapshot::{
    DeviceState, LoadError, MachineState, Processor, SavedDevice, Shape, memory as memory_file,
    written::{self, Lists, Soon},
};
use crate::virtio::RestoreError;
use crate::virtio::mmio::MmioTransport;

impl Machine {
    /// Writes the VM, which is paused, into two empty files. `pagemap` is this process's.
    ///
    /// # Errors
    /// [`SnapshotError`]; the files are then to be thrown away.
    pub fn save(
        &self,
        state_file: &mut File,
        memory_file: &File,
        pagemap: &File,
    ) -> Result<(), SnapshotError> {
        let get = |what| move |source| SnapshotError::Kvm { what, source };
        let vcpus = self.vcpus.save(&self.msrs).map_err(SnapshotError::Vcpu)?;
        let mut interrupt_controllers = interrupt_controllers();
        for chip in &mut interrupt_controllers {
            self.vm
                .get_irqchip(chip)
                .map_err(get("read an interrupt controller"))?;
        }
        let clock = self.vm.get_clock().map_err(get("read the guest's clock"))?;
        let devices = self.devices.iter().map(|transport| {
            let (registers, device) = transport.save();
            SavedDevice {
                name: transport.name().to_owned(),
                transport: registers,
                device,
            }
        });
        let added = self.hotplug.as_ref().map(Hotplug::usable);
        let mut state = MachineState {
            shape: Shape::new(&self.config, self.image.length, self.vcpus.len() as u8),
            processor: Processor::new(&self.supported, self.config.max_vcpus),
            tsc_khz: self
                .vcpus
                .tsc_khz()
                .map_err(get("tell the frequency of the TSC"))?,
            clock,
            interrupt_controllers,
            vcpus,
            console: self.bus.ports.save(),
            devices: devices.collect(),
            added_memory: added.map_or(0, |(_, length)| length),
            memory_parts: Vec::new(),
        };
        let mut ranges: Vec<_> = layout::ram_ranges(self.config.memory_mib)
            .into_iter()
            .map(|(start, length)| (start, length as u64))
            .collect();
        ranges.extend(added);
        let source = memory_file::Source {
            memory: &self.bus.ports.memory,
            pagemap,
            origin: self.origin.as_ref(),
        };
        source
            .write(&ranges, memory_file)
            .map_err(SnapshotError::Memory)?;
        let length = ranges.iter().map(|(_, length)| length).sum();
        state.memory_parts = memory::data(memory_file, 0, length).map_err(SnapshotError::Parts)?;
        state.write(state_file).map_err(SnapshotError::State)
    }
}

impl Machine {
    /// Lists what the guest has written since it began from a snapshot, in an empty file. `pagemap` is this process's.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn list_written(&self, list: &File, pagemap: &File) -> Result<(), SnapshotError> {
        let memory = self.origin.as_ref().ok_or(SnapshotError::NotRestored)?;
        written::write(&self.ram, memory, pagemap, list).map_err(SnapshotError::Written)
    }
}

/// The interrupt controllers, to be read.
fn interrupt_controllers() -> [kvm_irqchip; 3] {
    [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC].map(|chip_id| kvm_irqchip {
        chip_id,
        ..Default::default()
    })
}

/// A snapshot that fits.
pub(super) struct Saved {
    state: MachineState,
    memory: File,
    written: Option<Lists>,
}

impl Saved {
    /// Reads a snapshot and checks that `config` can go on from it. Nothing has been made yet.
    pub(super) fn load(
        mut state: File,
        memory: File,
        config: &VmConfig,
        image: &Image,
        supported: &CpuId,
    ) -> Result<Self, BuildError> {
        let state = MachineState::read(&mut state).map_err(BuildError::Load)?;
        let saved = Self {
            state,
            memory,
            written: None,
        };
        saved.check(config, image, supported).map_err(BuildError::Load)?;
        let ram = u64::from(config.memory_mib) << 20;
        let wanted = ram.saturating_add(saved.state.added_memory);
        let found = saved.memory.metadata().map_err(BuildError::Host)?.len();
        if found != wanted {
            return Err(BuildError::Memory(MemoryError::FileLength { found, wanted }));
        }
        if !memory::are_parts(&saved.state.memory_parts, wanted) {
            return Err(BuildError::Load(LoadError::Parts(wanted)));
        }
        Ok(saved)
    }

    fn check(&self, config: &VmConfig, image: &Image, supported: &CpuId) -> Result<(), LoadError> {
        let state = &self.state;
        state
            .shape
            .check(&Shape::new(config, image.length, config.vcpus))?;
        state
            .processor
            .check(&Processor::new(supported, config.max_vcpus))
            .map_err(LoadError::Processor)?;
        RestoreError::check("number of vCPUs", &state.vcpus.len(), &usize::from(config.vcpus))
            .map_err(LoadError::Shape)
    }

    /// Gives lists of memory that the guest will write soon.
    pub(super) fn expect_written(&mut self, lists: Lists) {
        self.written = Some(lists);
    }

    /// Prepares what is on the first of those lists; returns what is on the other.
    pub(super) fn prepare_memory(&self, ram: &GuestMemory) -> Soon {
        match &self.written {
            Some(lists) => {
                Soon::read(&lists.first, ram).prepare_all();
                Soon::read(&lists.later, ram)
            }
            None => Soon::default(),
        }
    }

    /// The memory file, which untouched memory still is in.
    pub(super) fn into_memory(self) -> File {
        self.memory
    }

    /// Maps the memory a guest boots with.
    pub(super) fn memory(&self, mib: u32) -> Result<GuestMemory, MemoryError> {
        memory::map_file(mib, &self.memory, &self.state.memory_parts)
    }

    /// Puts memory that was added in place. `ram` comes before it in the file.
    pub(super) fn add_memory(
        &self,
        vm: &VmFd,
        ram: &GuestMemory,
        hotplug: &mut Hotplug,
    ) -> Result<(), BuildError> {
        let offset = ram.iter().map(GuestMemoryRegion::len).sum();
        let state = &self.state;
        hotplug.restore(vm, &self.memory, &state.memory_parts, offset, state.added_memory)
    }

    /// The console as it was.
    pub(super) fn console(&self, interrupt: EventFd, ring: Ring) -> Result<Console, BuildError> {
        match &self.state.console {
            Some(state) => Console::restore(interrupt, ring, state).map_err(BuildError::Console),
            None => Ok(Console::new(interrupt, ring)),
        }
    }

    /// Sets the state of everything but active devices: vCPUs, interrupt controllers, clock, registers of devices.
    pub(super) fn restore(
        &self,
        vm: &VmFd,
        vcpus: &[VcpuFd],
        transports: &[Arc<MmioTransport>],
    ) -> Result<(), BuildError> {
        for (index, (vcpu, state)) in vcpus.iter().zip(&self.state.vcpus).enumerate() {
            self.set_frequency(vcpu)?;
            state
                .restore(vcpu)
                .map_err(|source| BuildError::Vcpu(index, source))?;
        }
        for chip in &self.state.interrupt_controllers {
            vm.set_irqchip(chip).map_err(kvm("set an interrupt controller"))?;
        }
        let clock = kvm_clock_data {
            clock: self.state.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(kvm("set the guest's clock"))?;
        let devices = &self.state.devices;
        RestoreError::check("number of devices", &devices.len(), &transports.len())
            .map_err(LoadError::Shape)
            .map_err(BuildError::Load)?;
        for (transport, saved) in transports.iter().zip(devices) {
            let failed = |source| BuildError::Device(saved.name.clone(), source);
            RestoreError::check("name", &&*saved.name, &transport.name()).map_err(failed)?;
            transport
                .restore(&saved.transport, &saved.device)
                .map_err(failed)?;
        }
        Ok(())
    }

    /// The guest has measured the frequency of its time-stamp counter. KVM scales it where the host's is another.
    fn set_frequency(&self, vcpu: &VcpuFd) -> Result<(), BuildError> {
        let now = vcpu.get_tsc_khz().map_err(kvm("tell the frequency of the TSC"))?;
        let saved = self.state.tsc_khz;
        // 250 in a million: what NTP corrects, and what KVM puts up with before it scales.
        if u64::from(now.abs_diff(saved)) * 4000 <= u64::from(saved) {
            return Ok(());
        }
        vcpu.set_tsc_khz(saved)
            .map_err(kvm("scale the TSC to the frequency the guest knows"))
    }

    /// Lets devices go on that were active.
    pub(super) fn start(&self, transports: &[Arc<MmioTransport>]) -> Result<(), BuildError> {
        for (transport, saved) in transports.iter().zip(&self.state.devices) {
            let device: &DeviceState = &saved.device;
            transport
                .start(device)
                .map_err(|source| BuildError::Device(saved.name.clone(), source))?;
        }
        Ok(())
    }
}
