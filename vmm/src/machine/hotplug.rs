//! Memory that the guest can get while it runs.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemory as _};

use super::{BuildError, add_memory_slot};
use crate::arch::cpuid;
use crate::memory::{self, GuestMemory};
use crate::virtio::mem::{self, Mem};

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
    pub(super) fn new(
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

    pub(super) fn request(&mut self, vm: &VmFd, mib: u32) -> Result<(), BuildError> {
        let wanted = u64::from(mib) << 20;
        if wanted > self.size {
            return Err(BuildError::HotplugSize(mib, (self.size >> 20) as u32));
        }
        let usable = wanted.next_multiple_of(mem::ALIGNMENT).min(self.size);
        self.register(vm, usable)?;
        self.device
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .request(wanted, usable)
            .map_err(BuildError::Hotplug)
    }

    /// Lets KVM know the first `usable` bytes. It keeps books about all of a slot: only what may be used is in one.
    fn register(&mut self, vm: &VmFd, usable: u64) -> Result<(), BuildError> {
        if usable > self.registered {
            let added = self.registered;
            let (guest, host) = (self.start + added, self.host + added);
            add_memory_slot(vm, &mut self.slots, guest, usable - added, host, 0)?;
            self.registered = usable;
        }
        Ok(())
    }

    /// Guest-physical start and length in bytes of what the guest may use.
    pub(super) fn usable(&self) -> (GuestAddress, u64) {
        (GuestAddress(self.start), self.registered)
    }

    /// Puts the first `usable` bytes of a snapshot in place, which are in `file` from `offset` on, with data in `parts`.
    pub(super) fn restore(
        &mut self,
        vm: &VmFd,
        file: &File,
        parts: &[Range<u64>],
        offset: u64,
        usable: u64,
    ) -> Result<(), BuildError> {
        if usable > self.size {
            return Err(BuildError::HotplugSize(
                (usable >> 20) as u32,
                (self.size >> 20) as u32,
            ));
        }
        memory::map_over(self.host, usable, file, parts, offset).map_err(BuildError::Memory)?;
        self.register(vm, usable)
    }
}
