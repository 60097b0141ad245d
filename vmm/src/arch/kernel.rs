//! Loading the kernel and what its 64-bit entry expects in memory.
//!
//! The VM starts at the ELF entry of `vmlinux` in long mode (Linux Documentation/arch/x86/boot.rst, "64-bit
//! boot protocol"): it skips the 16- and 32-bit set-up code, and any x86-64 `vmlinux` has it, with or
//! without a PVH note.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion};

use super::layout;
use crate::memory::GuestMemory;

/// Start of an ELF file's `e_ident`: magic number, 64-bit class, little endian (elf(5)).
const ELF64_LITTLE_ENDIAN: [u8; 6] = *b"\x7fELF\x02\x01";
/// `e_machine` of x86-64, at offset 18.
const EM_X86_64: u16 = 62;

/// `type` of an e820 entry.
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why the kernel could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The image cannot be read.
    #[error("Cannot read the kernel image")]
    Read(#[source] std::io::Error),
    /// Not an ELF image, or one of another processor.
    #[error("The kernel image is not an uncompressed ELF vmlinux for x86-64")]
    NotElf,
    /// Damaged, or one that does not fit in memory.
    #[error("Cannot load the kernel image, an ELF vmlinux")]
    Load(#[source] linux_loader::loader::Error),
    /// The command line is too long.
    #[error("Kernel command line of {0} bytes is over the limit of {limit}", limit = layout::COMMAND_LINE_SIZE - 1)]
    CommandLine(usize),
    /// Guest memory.
    #[error("Cannot write boot data")]
    Memory(#[source] GuestMemoryError),
    /// The zero page.
    #[error("Cannot write the boot parameters")]
    BootParameters(#[source] linux_loader::configurator::Error),
}

/// Checks that the image is an ELF file for x86-64, before anything is made for it.
///
/// # Errors
/// [`KernelError::Read`], [`KernelError::NotElf`].
pub fn check(image: &File) -> Result<(), KernelError> {
    let mut header = [0; 20];
    match image.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(KernelError::NotElf),
        result => result.map_err(KernelError::Read)?,
    }
    if header.starts_with(&ELF64_LITTLE_ENDIAN) && header[18..] == EM_X86_64.to_le_bytes() {
        Ok(())
    } else {
        Err(KernelError::NotElf)
    }
}

/// Loads an ELF `vmlinux`; the address of its 64-bit entry.
///
/// # Errors
/// [`KernelError::Load`].
pub fn load(memory: &GuestMemory, image: &mut File) -> Result<GuestAddress, KernelError> {
    Elf::load(memory, None, image, Some(layout::HIGH_MEMORY))
        .map(|loaded| loaded.kernel_load)
        .map_err(KernelError::Load)
}

/// Writes GDT, page tables, command line and zero page.
///
/// # Errors
/// [`KernelError`].
pub fn write_boot_data(memory: &GuestMemory, command_line: &str) -> Result<(), KernelError> {
    if command_line.len() >= layout::COMMAND_LINE_SIZE {
        return Err(KernelError::CommandLine(command_line.len()));
    }
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    memory
        .write_slice(&line, layout::COMMAND_LINE)
        .map_err(KernelError::Memory)?;
    write_tables(memory).map_err(KernelError::Memory)?;
    let parameters = boot_parameters(memory, command_line.len());
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&parameters, layout::ZERO_PAGE), memory)
        .map_err(KernelError::BootParameters)
}

/// Segment descriptors the entry protocol wants: null, unused, `__BOOT_CS` (0x10), `__BOOT_DS` (0x18), flat.
pub const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// GDT, and page tables that map the first GiB one to one; the kernel builds its own at once.
fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    for (index, entry) in GDT_ENTRIES.iter().enumerate() {
        memory.write_obj(*entry, GuestAddress(layout::GDT.0 + 8 * index as u64))?;
    }
    memory.write_obj(0u64, layout::IDT)?;
    memory.write_obj(layout::PDPT.0 | PRESENT_WRITABLE, layout::PML4)?;
    memory.write_obj(layout::PAGE_DIRECTORY.0 | PRESENT_WRITABLE, layout::PDPT)?;
    let directory: Vec<u8> = (0..512u64)
        .flat_map(|index| (index << 21 | PRESENT_WRITABLE | LARGE).to_le_bytes())
        .collect();
    memory.write_slice(&directory, layout::PAGE_DIRECTORY)
}

fn boot_parameters(memory: &GuestMemory, command_line: usize) -> boot_params {
    let mut parameters = boot_params::default();
    parameters.hdr.boot_flag = 0xaa55;
    parameters.hdr.header = 0x5372_6448; // "HdrS"
    parameters.hdr.type_of_loader = 0xff; // no assigned id
    parameters.hdr.kernel_alignment = 0x100_0000;
    parameters.hdr.cmd_line_ptr = layout::COMMAND_LINE.0 as u32;
    parameters.hdr.cmdline_size = command_line as u32;
    let mut map = vec![
        (0, layout::MP_TABLE.0, E820_RAM),
        (layout::MP_TABLE.0, layout::HIGH_MEMORY.0, E820_RESERVED),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY.0);
        map.push((start, region.start_addr().0 + region.len(), E820_RAM));
    }
    for (entry, (start, end, kind)) in parameters.e820_table.iter_mut().zip(&map) {
        entry.addr = *start;
        entry.size = end - start;
        entry.type_ = *kind;
    }
    parameters.e820_entries = map.len() as u8;
    parameters
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    fn memory(mib: u32) -> GuestMemory {
        GuestMemory::from_ranges(&layout::ram_ranges(mib)).unwrap()
    }

    #[test]
    fn memory_map_covers_all_ram_and_no_hole() {
        let parameters = boot_parameters(&memory(4096), 0);
        let entries: Vec<(u64, u64, u32)> = parameters.e820_table[..usize::from(parameters.e820_entries)]
            .iter()
            .map(|entry| (entry.addr, entry.addr + entry.size, entry.type_))
            .collect();
        assert_eq!(
            entries,
            [
                (0, 0x9_fc00, E820_RAM),
                (0x9_fc00, 0x10_0000, E820_RESERVED),
                (0x10_0000, layout::HOLE_START, E820_RAM),
                (layout::HOLE_END, layout::HOLE_END + (1 << 30), E820_RAM),
            ]
        );
    }

    #[test]
    fn page_tables_map_the_first_gib_one_to_one() {
        let memory = memory(64);
        write_boot_data(&memory, "quiet").unwrap();
        let pdpt: u64 = memory.read_obj(layout::PML4).unwrap();
        assert_eq!(pdpt & !0xfff, layout::PDPT.0);
        for index in [0u64, 1, 511] {
            let entry: u64 = memory
                .read_obj(GuestAddress(layout::PAGE_DIRECTORY.0 + 8 * index))
                .unwrap();
            assert_eq!(entry, index << 21 | 0x83);
        }
        let mut line = [0; 6];
        memory.read_slice(&mut line, layout::COMMAND_LINE).unwrap();
        assert_eq!(&line, b"quiet\0");
    }

    #[test]
    fn command_line_over_the_limit_is_refused_with_its_length() {
        let long = "x".repeat(layout::COMMAND_LINE_SIZE);
        assert!(matches!(
            write_boot_data(&memory(64), &long),
            Err(KernelError::CommandLine(2048))
        ));
    }

    #[test]
    fn image_that_is_not_elf_for_this_processor_is_refused() {
        let mut file = TempFile::new().unwrap().into_file();
        assert!(matches!(check(&file), Err(KernelError::NotElf)), "empty");
        let mut header = [0; 64];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[18] = 62;
        file.write_all(&header).unwrap();
        check(&file).unwrap();
        for (offset, byte) in [(0, b'#'), (4, 1), (18, 183)] {
            file.write_all_at(&[byte], offset).unwrap();
            assert!(matches!(check(&file), Err(KernelError::NotElf)));
            file.write_all_at(&header, 0).unwrap();
        }
        let error = load(&memory(64), &mut file).expect_err("nothing but a header");
        assert!(error.to_string().contains("ELF vmlinux"), "{error}");
    }
}
