//! Control messages between a sandbox and its VMM process.
//!
//! The two share one `SOCK_SEQPACKET` socket pair, inherited by the VMM as descriptor
//! [`VMM_SOCKET_FD`]. A packet is one JSON message with the descriptors it speaks of attached
//! (`SCM_RIGHTS`); a message names a descriptor by its index in that array ([`Fd`]). The VMM opens
//! nothing itself outside its root directory, the tree it serves: every file, socket and device it uses arrives this way.
//!
//! The sandbox sends [`Request`]s, each answered by one [`Reply`] with the same id, in any order; the
//! VMM also sends [`Event`]s unasked. When either end closes the socket the VM ends.

mod channel;
#[cfg(test)]
mod tests;

pub use channel::{Channel, ChannelError, MAX_FDS, MAX_MESSAGE, Received};
use serde::{Deserialize, Serialize};

/// Descriptor number under which `bulkhead-vmm` inherits its end of the socket pair.
pub const VMM_SOCKET_FD: i32 = 3;

/// Descriptor number under which `bulkhead-vmm` inherits the directory of its own descriptors, `/proc/<pid>/fd`, if it
/// serves a tree: the file server opens a file again by it that it knows by a descriptor. The directory has to be in a
/// procfs in which there is nothing else.
pub const VMM_PROC_FD: i32 = 4;

/// Version of these messages, sent in [`VmConfig::version`]; a VMM of another version refuses.
pub const VERSION: u32 = 6;

/// Most pairs of queues of a network device. Each takes rings in the guest and descriptors on the host, and a worker of the
/// host's kernel once it is on.
pub const MAX_QUEUE_PAIRS: u8 = 4;

/// Pairs of queues that each network device of a VM has: one for each vCPU that it can have, up to [`MAX_QUEUE_PAIRS`].
#[must_use]
pub fn queue_pairs(max_vcpus: u8) -> u8 {
    max_vcpus.clamp(1, MAX_QUEUE_PAIRS)
}

/// Holes of a memory file that are shorter, in bytes, are mapped with the data around them: a mapping costs as much as the
/// zeroes of some pages.
pub const SHORT_HOLE: u64 = 64 << 10;

/// Index of a descriptor among those attached to the same message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub u16);

/// What the sandbox sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RequestMessage {
    /// Chosen by the sender, returned in the reply.
    pub id: u64,
    /// The request.
    pub request: Request,
}

/// A request to the VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Builds the VM and starts its vCPUs. The first request, and sent once.
    Boot(Box<VmConfig>),
    /// Stops all vCPUs and device workers at an instruction boundary.
    Pause,
    /// Lets a paused VM run on.
    Resume,
    /// Attaches a stream to a host vsock port: the next guest connection to `port` is joined to `far_end`
    /// (a socket, FIFO, pipe, terminal or regular file) and the registration is used up.
    VsockListen {
        /// Host port.
        port: u32,
        /// The host end of the stream. A one-way descriptor serves a one-way stream.
        far_end: Fd,
    },
    /// Withdraws a [`Request::VsockListen`] that no guest connection has used.
    VsockUnlisten {
        /// Host port.
        port: u32,
    },
    /// Connects to a port the guest listens on; answered when the guest has accepted or refused.
    VsockConnect {
        /// Guest port.
        port: u32,
        /// The host end of the stream.
        far_end: Fd,
    },
    /// Puts a backing into an empty disk slot; the guest sees the new capacity.
    AttachDisk {
        /// Slot number, below [`VmConfig::disk_slots`].
        slot: u32,
        /// The backing.
        disk: Disk,
    },
    /// Empties a disk slot and closes its files.
    DetachDisk {
        /// Slot number.
        slot: u32,
    },
    /// Puts a network device into an empty network slot. The guest sees it when its virtio-mmio driver is told to
    /// look at that place of the bus again.
    AttachNet {
        /// Slot number, below [`VmConfig::net_slots`].
        slot: u32,
        /// The device.
        net: Net,
    },
    /// Empties a network slot and closes its tap.
    DetachNet {
        /// Slot number.
        slot: u32,
    },
    /// Asks the guest to give back memory until it is left with its size less `mib` MiB.
    SetBalloon {
        /// Size of the balloon in MiB.
        mib: u32,
    },
    /// Makes the vCPUs with numbers below `count` exist, so that the guest can bring them on line. Those that exist
    /// stay.
    AddVcpus {
        /// 1 to [`VmConfig::max_vcpus`].
        count: u8,
    },
    /// Asks the guest to have `mib` MiB beyond [`VmConfig::memory_mib`]; [`Event::MemorySize`] tells what it has.
    SetMemory {
        /// At most [`VmConfig::hotplug_mib`].
        mib: u32,
    },
    /// Writes a paused VM down, so that [`Start::Snapshot`] makes others like it. The VM itself stays as it is.
    Snapshot {
        /// Empty regular file for all but memory.
        state: Fd,
        /// Empty regular file for guest memory; pages of zeroes become holes.
        memory: Fd,
        /// `/proc/<pid>/pagemap` of the VMM (Linux Documentation/admin-guide/mm/pagemap.rst), which tells what memory
        /// has been touched.
        pagemap: Fd,
    },
    /// Lists the memory that a guest which began from a snapshot has written since, of what it had at its start. For
    /// [`Start::Snapshot`].
    ListWritten {
        /// Empty regular file.
        list: Fd,
        /// As that of [`Request::Snapshot`].
        pagemap: Fd,
    },
    /// Last lines of the guest console and the state of the VM.
    Inspect,
}

/// Everything a VM is made of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`VERSION`] of the sender.
    pub version: u32,
    /// vCPUs on line at boot, 1 to `max_vcpus`.
    pub vcpus: u8,
    /// vCPUs in the MP table, 1 to 32.
    pub max_vcpus: u8,
    /// Guest memory at boot in MiB, 64 and up.
    pub memory_mib: u32,
    /// Memory in MiB by which the guest can grow, a multiple of 128; 0: it keeps its size.
    pub hotplug_mib: u32,
    /// `/dev/kvm`, read-write.
    pub kvm: Fd,
    /// Where the guest begins.
    pub start: Start,
    /// Root image (EROFS), mapped read-only as virtio-pmem device 0.
    pub root: Fd,
    /// Whether the guest gets a serial console; without one nothing of the kernel's messages is kept.
    pub console: bool,
    /// virtio-blk devices that exist from boot on; those not in `disks` are empty.
    pub disk_slots: u32,
    /// Backings present at boot, by slot.
    pub disks: Vec<(u32, Disk)>,
    /// Places for network devices on the bus.
    pub net_slots: u32,
    /// Network devices present at boot, in the first slots.
    pub nets: Vec<Net>,
    /// The tree shared with the guest over virtio-fs.
    pub share: Option<Share>,
    /// Context id of the guest on vsock, 3 and up. The device is private to its VMM, so it need not be unique; clones
    /// that differ in it can be told apart.
    pub guest_cid: u32,
    /// Streams that await guest connections from the start, as [`Request::VsockListen`].
    pub vsock_listeners: Vec<(u32, Fd)>,
    /// Whether the guest gets a balloon with free page reporting.
    pub balloon: bool,
    /// Whether each thread of the VMM is confined to the system calls it needs.
    pub seccomp: bool,
}

/// Where a guest begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// At the kernel's entry.
    Kernel {
        /// Uncompressed ELF `vmlinux`, readable and seekable.
        kernel: Fd,
        /// Appended to the command line the VMM builds.
        command_line: String,
    },
    /// Where a [`Request::Snapshot`] was taken, on the same kind of processor. All else of the configuration has to be
    /// as it was, but for the backings of disks, network devices and streams, and the context id. The guest is told
    /// that its vsock connections are gone.
    Snapshot {
        /// What is not memory.
        state: Fd,
        /// Memory; mapped privately, so it must not change as long as the VM exists.
        memory: Fd,
        /// Memory that the guest is expected to write soon.
        written: Option<Written>,
    },
}

/// Lists that [`Request::ListWritten`] made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// What a guest has written when it gives its first answer: it gets copies before it runs.
    pub first: Fd,
    /// What it has written later: it gets copies when it has given that answer.
    pub later: Fd,
}

/// A disk: one or more raw files, one behind the other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Regular files or block devices; lengths are rounded down to 512 bytes for all but the last.
    pub files: Vec<Fd>,
    /// The guest may not write. Needed when there is more than one file.
    pub read_only: bool,
}

/// A network device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// Queues of a tap device with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, non-blocking: as many as [`queue_pairs`] says. If
    /// there are several it has `IFF_MULTI_QUEUE`, the first is attached, and the others are detached
    /// (`TUNSETQUEUE`): the VMM attaches them as the guest turns their pairs on.
    pub taps: Vec<Fd>,
    /// `/dev/vhost-net` for each queue, read-write, owned by nobody yet: the kernel serves the rings. Empty: the VMM does.
    pub vhosts: Vec<Fd>,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Largest frame payload in bytes of a guest without segmentation offload.
    pub mtu: u16,
}

/// A virtio-fs device. It serves the root directory of the VMM's process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Mount tag, 1 to 36 bytes.
    pub tag: String,
}

/// What the VMM sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmMessage {
    /// Answer to a request.
    Reply {
        /// Id of the request.
        id: u64,
        /// What came of it; an error is the whole chain of causes in one line.
        result: Result<Reply, String>,
    },
    /// Something happened.
    Event(Event),
}

/// Successful answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Nothing to say.
    Done,
    /// The VM runs.
    Booted(Booted),
    /// Answer to [`Request::Inspect`].
    Inspected(Inspection),
}

/// What there is to tell of a VM that has just begun.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Booted {
    /// When.
    pub times: BootTimes,
    /// Names of the virtio devices in order of their place on the bus, for example `blk2`.
    pub devices: Vec<String>,
}

/// Phases of a boot: `CLOCK_MONOTONIC` in microseconds at the end of each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootTimes {
    /// `main` entered.
    pub started: u64,
    /// Configuration received.
    pub configured: u64,
    /// VM created, guest memory mapped.
    pub memory: u64,
    /// Kernel loaded.
    pub kernel: u64,
    /// Devices wired.
    pub devices: u64,
    /// First vCPU about to enter the guest.
    pub running: u64,
}

/// State of a VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// Whether the vCPUs are stopped by [`Request::Pause`].
    pub paused: bool,
    /// The last console output, at most 16 KiB, invalid UTF-8 replaced.
    pub console: String,
    /// Virtio devices in order of their place on the bus, with state.
    pub devices: Vec<DeviceStatus>,
}

/// State of one virtio device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// For example `blk2`.
    pub name: String,
    /// Device status register (virtio 1.2, 2.1); bit 6 set: the device stopped on a malformed queue.
    pub status: u8,
}

/// Unasked messages.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A guest connection took the registration of this host port.
    VsockConnected {
        /// Host port.
        port: u32,
    },
    /// The first byte the guest sent on this host port has come; told once for each registration.
    VsockFirstData {
        /// Host port.
        port: u32,
        /// When: `CLOCK_MONOTONIC` in microseconds.
        monotonic_us: u64,
    },
    /// The stream of this host port (or connection to a guest port) is over in both directions and every
    /// byte the guest sent has been written to the far end, or cannot be.
    VsockClosed {
        /// Port of the `VsockListen` or `VsockConnect` request.
        port: u32,
    },
    /// The guest has this many MiB beyond [`VmConfig::memory_mib`] now; what it gave back is the host's again.
    MemorySize {
        /// MiB.
        mib: u32,
    },
    /// The VM has ended; the process exits after this message.
    Exited(Exit),
}

/// Why a VM ended, with the end of its console.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exit {
    /// The reason.
    pub reason: ExitReason,
    /// The last console output, at most 4 KiB.
    pub console: String,
}

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The agent powered the guest off.
    PowerOff,
    /// The guest asked for a reboot.
    Reboot,
    /// The guest kernel panicked.
    Panic,
    /// A vCPU shut down (triple fault).
    TripleFault,
    /// KVM could not run the guest.
    KvmError(String),
    /// The VMM failed.
    VmmError(String),
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PowerOff => f.write_str("guest powered off"),
            Self::Reboot => f.write_str("guest rebooted"),
            Self::Panic => f.write_str("guest kernel panicked"),
            Self::TripleFault => f.write_str("guest triple fault"),
            Self::KvmError(error) => write!(f, "KVM could not run the guest: {error}"),
            Self::VmmError(error) => write!(f, "VMM failed: {error}"),
        }
    }
}

/// I/O port by which the agent powers the guest off: it writes the byte [`POWER_OFF`].
///
/// x86 without ACPI has no power switch. The port is outside every range a PC device uses.
pub const POWER_PORT: u16 = 0x600;

/// Value written to [`POWER_PORT`].
pub const POWER_OFF: u8 = 0x34;
