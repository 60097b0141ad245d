//! Why a VM could not be built or written down.

use bulkhead_protocol::control::ChannelError;

use crate::arch::state::StateError;
use crate::arch::{kernel, layout, mptable, registers};
use crate::snapshot::memory::MemoryFileError;
use crate::snapshot::written::WrittenError;
use crate::snapshot::{LoadError, SaveError};
use crate::virtio::block::DiskError;
use crate::virtio::fs::FsError;
use crate::virtio::mmio::TransportError;
use crate::virtio::net::{NetError, SlotError};
use crate::virtio::vsock::VsockError;
use crate::virtio::{DeviceError, RestoreError};
use crate::{config, console, jail, memory};

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
    /// State file.
    #[error("Cannot use the snapshot")]
    Load(#[source] LoadError),
    /// State of a vCPU.
    #[error("Cannot restore vCPU {0}")]
    Vcpu(usize, #[source] StateError),
    /// State of a device.
    #[error("Cannot restore {0}")]
    Device(String, #[source] RestoreError),
    /// State of the console.
    #[error("Cannot restore the console")]
    Console(#[source] console::ConsoleError),
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

pub(super) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

/// Why a VM could not be written down. It can go on.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It runs.
    #[error("Only a paused VM can be written down")]
    Running,
    /// A vCPU.
    #[error("Cannot save a vCPU")]
    Vcpu(#[source] StateError),
    /// KVM refused.
    #[error("KVM cannot {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// Reason.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// State file.
    #[error("Cannot save the state")]
    State(#[source] SaveError),
    /// Memory file.
    #[error("Cannot save guest memory")]
    Memory(#[source] MemoryFileError),
    /// Parts of the memory file.
    #[error("Cannot tell where data is in the memory file")]
    Parts(#[source] memory::MemoryError),
    /// It booted.
    #[error("The VM did not begin from a snapshot")]
    NotRestored,
    /// List of written memory.
    #[error("Cannot list written memory")]
    Written(#[source] WrittenError),
}
