//! The guest-physical address map.
//!
//! ```text
//! 0x0000_0000_0000  boot data: GDT, page tables, zero page, command line
//! 0x0000_0009_fc00  MP table (where a PC has its extended BIOS data area; the kernel looks there)
//! 0x0000_000a_0000  hole up to 1 MiB, never RAM in a PC
//! 0x0000_0010_0000  RAM: kernel and everything else
//! 0x0000_c000_0000  virtio-mmio devices, 4 KiB each; end of low RAM
//! 0x0000_fec0_0000  IOAPIC
//! 0x0000_fee0_0000  local APICs
//! 0x0000_fffb_c000  pages KVM needs on Intel processors
//! 0x0001_0000_0000  RAM that does not fit below
//! …                 persistent memory devices, above the end of RAM
//! …                 memory that can be added, above all else
//! ```

use vm_memory::GuestAddress;

/// Boot GDT (Intel SDM vol. 3, 3.5.1), four entries.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// Empty interrupt descriptor table: an exception before the kernel's own ends in a triple fault.
pub const IDT: GuestAddress = GuestAddress(0x520);
/// `boot_params`, the "zero page" (Linux Documentation/arch/x86/boot.rst, 64-bit boot protocol).
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Initial stack pointer; the kernel leaves it at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Top-level page table, followed by one page directory pointer table and one page directory.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Page directory pointer table of the first 512 GiB.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// Page directory of the first GiB, identity-mapped in 2 MiB pages.
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
/// Command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// Room for the command line in bytes, its terminating zero included (`COMMAND_LINE_SIZE` of x86).
pub const COMMAND_LINE_SIZE: usize = 2048;
/// MP floating pointer and configuration table.
pub const MP_TABLE: GuestAddress = GuestAddress(0x9_fc00);
/// End of the room for the MP table, and of conventional memory.
pub const MP_TABLE_END: u64 = 0xa_0000;
/// Start of extended memory; the lowest address a kernel segment may have.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// End of low RAM, start of the 32-bit device hole.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// First virtio-mmio device.
pub const VIRTIO_MMIO: u64 = HOLE_START;
/// Size of the register window of one device.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// IOAPIC registers; KVM's in-kernel IOAPIC answers here.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: usize = 0xfffb_d000;

/// First interrupt line for virtio devices; those below belong to legacy PC devices.
pub const FIRST_GSI: u32 = 5;
/// Last line of the IOAPIC.
pub const LAST_GSI: u32 = 23;

/// Most virtio devices: each has a line of its own.
pub const MAX_DEVICES: u32 = LAST_GSI - FIRST_GSI + 1;

/// Smallest guest memory in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;
/// Largest guest memory in MiB: 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// Most vCPUs.
pub const MAX_VCPUS: u8 = 32;

// The boot data does not overlap.
const _: () = assert!(IDT.0 >= GDT.0 + 4 * 8);
const _: () = assert!(PAGE_DIRECTORY.0 + 0x1000 <= COMMAND_LINE.0);
const _: () = assert!(COMMAND_LINE.0 + COMMAND_LINE_SIZE as u64 <= MP_TABLE.0);

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// RAM ranges (start, length in bytes) of a guest with `mib` MiB, split around the hole.
pub fn ram_ranges(mib: u32) -> Vec<(GuestAddress, usize)> {
    let size = u64::from(mib) * MIB;
    let low = size.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(HOLE_END), (size - low) as usize));
    }
    ranges
}

/// Where persistent memory devices start: the first GiB boundary above RAM and the hole, so that the
/// kernel can map them in 2 MiB and 1 GiB pages.
pub fn persistent_memory_start(mib: u32) -> u64 {
    let size = u64::from(mib) * MIB;
    let end = if size > HOLE_START {
        HOLE_END + (size - HOLE_START)
    } else {
        HOLE_END
    };
    end.next_multiple_of(GIB)
}

/// Where memory that can be added starts: the first GiB boundary above persistent memory that ends at `end`.
pub fn hotplug_start(end: u64) -> u64 {
    end.next_multiple_of(GIB)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_guest_has_one_range_below_the_hole() {
        assert_eq!(ram_ranges(64), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ram_ranges(3072), [(GuestAddress(0), 3072 << 20)]);
        assert_eq!(persistent_memory_start(64), HOLE_END);
    }

    #[test]
    fn large_guest_goes_on_above_the_hole() {
        let ranges = ram_ranges(8193);
        assert_eq!(ranges[0], (GuestAddress(0), HOLE_START as usize));
        assert_eq!(ranges[1], (GuestAddress(HOLE_END), (8193 - 3072) << 20));
        assert_eq!(ranges.iter().map(|range| range.1).sum::<usize>(), 8193 << 20);
        let end = HOLE_END + ranges[1].1 as u64;
        assert!(persistent_memory_start(8193) >= end);
        assert_eq!(persistent_memory_start(8193) % GIB, 0);
    }
}
