//! Checks of a VM's configuration, before anything is created.

use bulkhead_protocol::control::{Start, VERSION, VmConfig};
use bulkhead_protocol::ports;

use crate::arch::layout;
use crate::virtio::mem;

/// A configuration that cannot be a VM; each names the field and the value.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Another version of the messages.
    #[error("version is {0}, this VMM speaks {VERSION}")]
    Version(u32),
    /// Number of vCPUs.
    #[error("max_vcpus is {0}; 1 to {max} are possible", max = layout::MAX_VCPUS)]
    MaxVcpus(u8),
    /// vCPUs at boot.
    #[error("vcpus is {vcpus}; 1 to max_vcpus ({max}) are possible")]
    Vcpus {
        /// Asked for.
        vcpus: u8,
        /// Limit.
        max: u8,
    },
    /// Memory.
    #[error("memory_mib is {0}; {min} to {max} are possible", min = layout::MIN_MEMORY_MIB, max = layout::MAX_MEMORY_MIB)]
    Memory(u32),
    /// Memory to grow by.
    #[error("hotplug_mib is {0}; a multiple of {align} is needed", align = mem::ALIGNMENT >> 20)]
    Hotplug(u32),
    /// Context id of the host or a reserved one.
    #[error("guest_cid is {0}; {first} and up are possible", first = ports::FIRST_GUEST_CID)]
    GuestCid(u32),
    /// Kernel parameters.
    #[error("command_line has a character that is not printable ASCII")]
    CommandLine,
    /// More devices than interrupt lines.
    #[error("disk_slots ({disk_slots}) and net_slots ({net_slots}) make {devices} devices; {max} are possible", max = layout::MAX_DEVICES)]
    Devices {
        /// Disk slots asked for.
        disk_slots: u32,
        /// Network slots asked for.
        net_slots: u32,
        /// All devices together.
        devices: u64,
    },
    /// More network devices than slots.
    #[error("nets has {nets} entries; net_slots is {slots}")]
    NetSlots {
        /// Network devices.
        nets: usize,
        /// Number of slots.
        slots: u32,
    },
    /// A disk in a slot that does not exist, or two in one.
    #[error("disks names slot {slot}, which is taken or not below disk_slots ({slots})")]
    DiskSlot {
        /// Slot.
        slot: u32,
        /// Number of slots.
        slots: u32,
    },
}

/// Checks what can be checked without a descriptor.
///
/// # Errors
/// [`ConfigError`].
pub fn validate(config: &VmConfig) -> Result<(), ConfigError> {
    if config.version != VERSION {
        return Err(ConfigError::Version(config.version));
    }
    if config.max_vcpus == 0 || config.max_vcpus > layout::MAX_VCPUS {
        return Err(ConfigError::MaxVcpus(config.max_vcpus));
    }
    if config.vcpus == 0 || config.vcpus > config.max_vcpus {
        return Err(ConfigError::Vcpus {
            vcpus: config.vcpus,
            max: config.max_vcpus,
        });
    }
    if !(layout::MIN_MEMORY_MIB..=layout::MAX_MEMORY_MIB).contains(&config.memory_mib) {
        return Err(ConfigError::Memory(config.memory_mib));
    }
    if !(u64::from(config.hotplug_mib) << 20).is_multiple_of(mem::ALIGNMENT) {
        return Err(ConfigError::Hotplug(config.hotplug_mib));
    }
    // The highest one is `VMADDR_CID_ANY`.
    if !(ports::FIRST_GUEST_CID..u32::MAX).contains(&config.guest_cid) {
        return Err(ConfigError::GuestCid(config.guest_cid));
    }
    let printable = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    if let Start::Kernel { command_line, .. } = &config.start
        && !command_line.bytes().all(printable)
    {
        return Err(ConfigError::CommandLine);
    }
    // Persistent memory, vsock and entropy are always there.
    let fixed =
        3 + u64::from(config.share.is_some()) + u64::from(config.balloon) + u64::from(config.hotplug_mib > 0);
    let devices = fixed + u64::from(config.net_slots) + u64::from(config.disk_slots);
    if devices > u64::from(layout::MAX_DEVICES) {
        return Err(ConfigError::Devices {
            disk_slots: config.disk_slots,
            net_slots: config.net_slots,
            devices,
        });
    }
    if config.nets.len() as u64 > u64::from(config.net_slots) {
        return Err(ConfigError::NetSlots {
            nets: config.nets.len(),
            slots: config.net_slots,
        });
    }
    for (index, (slot, _)) in config.disks.iter().enumerate() {
        let taken = config.disks[..index].iter().any(|(other, _)| other == slot);
        if taken || *slot >= config.disk_slots {
            return Err(ConfigError::DiskSlot {
                slot: *slot,
                slots: config.disk_slots,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::control::{Disk, Fd, Net, Start};

    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            version: VERSION,
            vcpus: 1,
            max_vcpus: 4,
            memory_mib: 128,
            hotplug_mib: 256,
            kvm: Fd(0),
            start: Start::Kernel {
                kernel: Fd(1),
                command_line: "quiet a=\"b c\"".into(),
            },
            guest_cid: 3,
            root: Fd(2),
            console: true,
            disk_slots: 2,
            disks: vec![(
                1,
                Disk {
                    files: vec![Fd(3)],
                    read_only: true,
                },
            )],
            nets: vec![],
            net_slots: 1,
            share: None,
            vsock_listeners: vec![],
            balloon: true,
            seccomp: true,
        }
    }

    #[test]
    fn every_bad_field_is_named_with_its_value() {
        assert_eq!(validate(&config()), Ok(()));
        let bad = |change: fn(&mut VmConfig)| {
            let mut config = config();
            change(&mut config);
            validate(&config).map_err(|error| error.to_string())
        };
        type Case = (fn(&mut VmConfig), &'static str);
        let cases: [Case; 14] = [
            (|config| config.version = 9, "version is 9"),
            (|config| config.vcpus = 0, "vcpus is 0"),
            (|config| config.vcpus = 5, "vcpus is 5"),
            (|config| config.max_vcpus = 0, "max_vcpus is 0"),
            (|config| config.max_vcpus = 33, "max_vcpus is 33"),
            (|config| config.memory_mib = 63, "memory_mib is 63"),
            (
                |config| config.memory_mib = (1 << 20) + 1,
                "64 to 1048576 are possible",
            ),
            (|config| config.hotplug_mib = 100, "hotplug_mib is 100"),
            (|config| config.guest_cid = 2, "guest_cid is 2"),
            (
                |config| {
                    config.start = Start::Kernel {
                        kernel: Fd(1),
                        command_line: "a\nb".into(),
                    }
                },
                "command_line",
            ),
            (|config| config.disk_slots = 1, "slot 1"),
            (|config| config.disk_slots = 16, "disk_slots (16)"),
            (|config| config.net_slots = 16, "net_slots (16)"),
            (
                |config| {
                    config.net_slots = 0;
                    config.nets = vec![Net {
                        taps: vec![Fd(4)],
                        vhosts: Vec::new(),
                        mac: [2; 6],
                        mtu: 1500,
                    }];
                },
                "nets has 1",
            ),
        ];
        for (change, words) in cases {
            let error = bad(change).expect_err(words);
            assert!(error.contains(words), "{error}");
        }
    }
}
