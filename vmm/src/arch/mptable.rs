//! The multiprocessor table (Intel MultiProcessor Specification 1.4, chapter 4): without ACPI it is how
//! the kernel learns of processors, the IOAPIC and interrupt lines.

use vm_memory::{Bytes, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemory;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Version register of the integrated local APIC and the IOAPIC.
const APIC_VERSION: u8 = 0x14;
/// Processor flags: enabled (bit 0), bootstrap (bit 1).
const ENABLED: u8 = 1;
const BOOTSTRAP: u8 = 2;
/// Interrupt types (4.3.3).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Why the table could not be written.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// Too many processors for its place.
    #[error("MP table of {0} bytes does not fit")]
    TooLarge(usize),
    /// Guest memory.
    #[error("Cannot write the MP table")]
    Memory(#[source] GuestMemoryError),
}

/// Writes the table for `processors` vCPUs (APIC ids 0 and up).
///
/// # Errors
/// [`MpTableError`].
pub fn write(memory: &GuestMemory, processors: u8) -> Result<(), MpTableError> {
    let table = build(processors);
    if layout::MP_TABLE.0 + table.len() as u64 > layout::MP_TABLE_END {
        return Err(MpTableError::TooLarge(table.len()));
    }
    memory
        .write_slice(&table, layout::MP_TABLE)
        .map_err(MpTableError::Memory)
}

/// Floating pointer structure (16 bytes) and, right behind it, the configuration table.
fn build(processors: u8) -> Vec<u8> {
    let io_apic_id = processors;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for id in 0..processors {
        let flags = if id == 0 { ENABLED | BOOTSTRAP } else { ENABLED };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, id, APIC_VERSION, flags]);
        // Signature: family 6 (the kernel takes the real one from CPUID); features: FPU and APIC.
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes());
        add(&entry);
    }
    add(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let [a, b, c, d] = layout::IOAPIC.to_le_bytes();
    add(&[IO_APIC, io_apic_id, APIC_VERSION, 1, a, b, c, d]);
    for line in 0..=layout::LAST_GSI as u8 {
        add(&[IO_INTERRUPT, INT, 0, 0, 0, line, io_apic_id, line]);
    }
    // The 8259 reaches the bootstrap processor's LINT0, NMI every processor's LINT1.
    add(&[LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    add(&[LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, 0xff, 1]);

    let mut table = vec![0u8; 44];
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    table[6] = 4; // specification 1.4
    table[8..16].copy_from_slice(b"BULKHEAD");
    table[16..28].copy_from_slice(b"MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);

    let mut pointer = vec![0u8; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(layout::MP_TABLE.0 as u32 + 16).to_le_bytes());
    pointer[8] = 1; // length in 16-byte units
    pointer[9] = 4; // specification 1.4
    pointer[10] = checksum(&pointer);
    pointer.extend_from_slice(&table);
    pointer
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_entries_counted() {
        for processors in [1, 2, 32] {
            let bytes = build(processors);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(count, u16::from(processors) + 1 + 1 + 24 + 2);
            let expected =
                44 + usize::from(processors) * 20 + (usize::from(count) - usize::from(processors)) * 8;
            assert_eq!(table.len(), expected);
        }
    }

    #[test]
    fn largest_table_fits_its_place() {
        let length = build(layout::MAX_VCPUS).len() as u64;
        assert!(layout::MP_TABLE.0 + length <= layout::MP_TABLE_END);
    }

    #[test]
    fn only_the_first_processor_bootstraps() {
        let table = &build(3)[16 + 44..];
        assert_eq!([table[3], table[23], table[43]], [3, 1, 1]);
        assert_eq!([table[1], table[21], table[41]], [0, 1, 2]);
    }
}
