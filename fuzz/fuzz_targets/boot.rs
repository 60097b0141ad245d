//! What a VM is booted from: the kernel image, its command line, and the VM's configuration.
//!
//! RAM has unmapped pages around it. A finding is also an entry or a segment that is not in RAM as the image says,
//! boot data outside its place, and a configuration that is taken though its devices have no place on the bus.

#![no_main]

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use arbitrary::Arbitrary;
use bulkhead_fuzz::memory::{discard, guarded};
use bulkhead_protocol::control::{Start, VmConfig};
use bulkhead_vmm::arch::{kernel, layout};
use bulkhead_vmm::command_line;
use bulkhead_vmm::memory::GuestMemory;
use bulkhead_vmm::snapshot::MachineState;
use bulkhead_vmm::virtio::mmio::Slot;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

/// Bytes of RAM.
const RAM: u64 = 4 << 20;

#[derive(Arbitrary, Debug)]
struct Segment {
    kind: u8,
    offset: u16,
    address: u32,
    stored: u16,
    size: u32,
    align: u16,
    wide: bool,
}

#[derive(Arbitrary, Debug)]
enum Case {
    /// Any file.
    Image(Vec<u8>),
    /// A file that is made like an ELF image.
    Elf {
        entry: u32,
        table: u8,
        count: Option<u16>,
        entry_size: Option<u16>,
        segments: Vec<Segment>,
        content: Vec<u8>,
    },
    /// A configuration as it comes from the sandbox.
    Config(Vec<u8>),
    /// A command line.
    Line(Vec<u8>),
}

const LOAD: u32 = 1;
const NOTE: u32 = 4;

fn elf(entry: u32, table: u8, count: u16, entry_size: u16, segments: &[Segment], content: &[u8]) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    // ET_EXEC, EM_X86_64, version.
    for half in [2u16, 62, 1, 0] {
        image.extend(half.to_le_bytes());
    }
    let table = u64::from(table);
    for word in [u64::from(entry), 64 + table, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend([0; 4]);
    for half in [64, entry_size, count, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image.resize(64 + table as usize, 0);
    for segment in segments {
        let kind = [LOAD, NOTE, LOAD, segment.kind.into()][usize::from(segment.kind % 4)];
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        let high = if segment.wide { u64::MAX << 32 } else { 0 };
        let address = u64::from(segment.address) | high;
        for word in [
            segment.offset.into(),
            address,
            address,
            segment.stored.into(),
            segment.size.into(),
            segment.align.into(),
        ] {
            let word: u64 = word;
            image.extend(word.to_le_bytes());
        }
    }
    image.extend(content);
    image
}

fn file(image: &[u8]) -> File {
    // SAFETY: the name is terminated, and the descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"kernel".as_ptr(), libc::MFD_CLOEXEC)) };
    file.write_all_at(image, 0).expect("there is memory");
    file
}

fn load(memory: &GuestMemory, image: &[u8]) {
    let mut file = file(image);
    let known = kernel::check(&file).is_ok();
    let Ok(entry) = kernel::load(memory, &mut file) else {
        return;
    };
    if !known {
        return;
    }
    assert!(entry >= layout::HIGH_MEMORY, "kernel at {entry:?}");
    check_last_segment(memory, image);
}

/// What was loaded last is in RAM as it is in the file.
fn check_last_segment(memory: &GuestMemory, image: &[u8]) {
    let word = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let (table, count) = (word(32) as usize, usize::from(half(56)));
    for index in (0..count).rev() {
        let header = table + 56 * index;
        let stored = word(header + 32) as usize;
        if image[header..header + 4] == LOAD.to_le_bytes() && stored > 0 {
            let offset = word(header + 8) as usize;
            let mut loaded = vec![0; stored];
            let address = GuestAddress(word(header + 24));
            memory.read_slice(&mut loaded, address).expect("it is RAM");
            assert_eq!(loaded, image[offset..offset + stored]);
            return;
        }
    }
}

fn configure(memory: &GuestMemory, text: &[u8]) {
    // The other thing that a VM begins from.
    let _ = MachineState::decode(text);
    let Ok(config) = serde_json::from_slice::<VmConfig>(text) else {
        return;
    };
    let again = serde_json::to_vec(&config).expect("it can be written");
    assert_eq!(
        serde_json::from_slice::<VmConfig>(&again).expect("it was written"),
        config
    );
    if bulkhead_vmm::config::validate(&config).is_err() {
        return;
    }
    let fixed =
        3 + u32::from(config.share.is_some()) + u32::from(config.balloon) + u32::from(config.hotplug_mib > 0);
    let devices = fixed + config.disk_slots + config.net_slots;
    let slots: Vec<Slot> = (0..devices as usize)
        .map(|index| Slot::new(index).expect("the configuration was taken"))
        .collect();
    assert!(config.nets.len() <= config.net_slots as usize);
    assert!(config.disks.iter().all(|(slot, _)| *slot < config.disk_slots));
    let ranges = layout::ram_ranges(config.memory_mib);
    let bytes: u64 = ranges.iter().map(|(_, len)| *len as u64).sum();
    assert_eq!(bytes, u64::from(config.memory_mib) << 20);
    let Start::Kernel { command_line, .. } = &config.start else {
        return;
    };
    let line = command_line::build(
        config.console,
        config.vcpus,
        config.max_vcpus,
        config.hotplug_mib > 0,
        &slots,
        command_line,
    );
    boot_data(memory, line.as_bytes());
}

fn boot_data(memory: &GuestMemory, line: &[u8]) {
    let Ok(line) = std::str::from_utf8(line) else {
        return;
    };
    let result = kernel::write_boot_data(memory, line);
    assert_eq!(result.is_ok(), line.len() < layout::COMMAND_LINE_SIZE);
    let mut high = vec![0; 4096];
    memory
        .read_slice(&mut high, GuestAddress(layout::MP_TABLE.0))
        .expect("it is RAM");
    assert!(high.iter().all(|byte| *byte == 0), "boot data in the MP table");
}

thread_local! {
    static MEMORY: GuestMemory = guarded(&[(0, RAM)]);
}

fuzz_target!(|case: Case| {
    MEMORY.with(|memory| {
        discard(memory);
        match case {
            Case::Image(image) => load(memory, &image),
            Case::Elf {
                entry,
                table,
                count,
                entry_size,
                segments,
                content,
            } => {
                let count = count.unwrap_or(segments.len() as u16);
                let image = elf(entry, table, count, entry_size.unwrap_or(56), &segments, &content);
                load(memory, &image);
            }
            Case::Config(text) => configure(memory, &text),
            Case::Line(line) => boot_data(memory, &line),
        }
    });
});
