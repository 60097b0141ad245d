#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;

use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::queue::DeviceQueueState;

fn empty_file(name: &str) -> File {
    let path = std::env::temp_dir().join(format!("bulkhead-snapshot-{name}-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    fs::remove_file(&path).unwrap();
    file.unwrap()
}

fn shape() -> Shape {
    Shape {
        vcpus: 1,
        max_vcpus: 4,
        memory_mib: 128,
        hotplug_mib: 256,
        root_length: 2 << 20,
        console: false,
        disk_slots: 2,
        net_slots: 1,
        share: Some("tag".into()),
        balloon: true,
    }
}

fn state() -> MachineState {
    let leaf = kvm_cpuid_entry2 {
        function: 1,
        eax: 0xabcd,
        ..Default::default()
    };
    let queue = DeviceQueueState {
        max_size: 64,
        size: 64,
        ready: true,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        next_available: 7,
        next_used: 7,
    };
    MachineState {
        shape: shape(),
        processor: Processor::new(&CpuId::from_entries(&[leaf]).unwrap(), 4),
        tsc_khz: 2_000_000,
        clock: kvm_clock_data {
            clock: 12345,
            ..Default::default()
        },
        interrupt_controllers: Default::default(),
        vcpus: vec![VcpuState::blank()],
        console: None,
        devices: vec![SavedDevice {
            name: "pmem0".into(),
            transport: TransportState {
                status: 15,
                device_features_select: 0,
                driver_features_select: 1,
                driver_features: 1 << 32,
                queue_select: 0,
                interrupt_status: 1,
                queues: Vec::new(),
            },
            device: DeviceState::Pmem(Some(queue)),
        }],
        added_memory: 0,
        memory_parts: vec![4096..8192, 65536 * 2..65536 * 3],
    }
}

fn bytes() -> Vec<u8> {
    let mut file = empty_file("bytes");
    state().write(&mut file).unwrap();
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// `bytes` with a payload and a checksum that fits.
fn sealed(payload: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for number in [VERSION, payload.len() as u32, crc32fast::hash(payload)] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

#[test]
fn a_state_comes_back_as_it_was() {
    let bytes = bytes();
    let read = MachineState::decode(&bytes).unwrap();
    assert_eq!(read.shape, shape());
    assert_eq!(read.devices, state().devices);
    assert_eq!((read.tsc_khz, read.clock.clock), (2_000_000, 12345));
    // What follows from it is the same to the last byte.
    let mut file = empty_file("again");
    read.write(&mut file).unwrap();
    assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
    let again = MachineState::read(&mut file).unwrap();
    assert_eq!(
        postcard::to_stdvec(&again).unwrap(),
        postcard::to_stdvec(&read).unwrap()
    );
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    let bytes = bytes();
    for length in 0..bytes.len() {
        let error = MachineState::decode(&bytes[..length]).unwrap_err();
        let expected = if length < HEADER_SIZE {
            matches!(error, LoadError::Magic)
        } else {
            matches!(error, LoadError::Length { found, .. } if found == (length - HEADER_SIZE) as u64)
        };
        assert!(expected, "{length}: {error}");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(
        MachineState::decode(&longer),
        Err(LoadError::Length { .. })
    ));
}

#[test]
fn a_file_with_one_bit_turned_is_refused() {
    let bytes = bytes();
    for index in 0..bytes.len() {
        let mut altered = bytes.clone();
        altered[index] ^= 1 << (index % 8);
        let error = MachineState::decode(&altered).unwrap_err();
        let expected = match index {
            0..8 => matches!(error, LoadError::Magic),
            8..12 => matches!(error, LoadError::Version(_)),
            12..16 => matches!(error, LoadError::Length { .. }),
            _ => matches!(error, LoadError::Checksum { .. }),
        };
        assert!(expected, "byte {index}: {error}");
    }
}

#[test]
fn foreign_and_newer_files_are_told_by_their_first_bytes() {
    let error = |bytes: &[u8]| MachineState::decode(bytes).unwrap_err().to_string();
    assert_eq!(error(b"\x7fELF and so on"), "State file does not begin as one");
    let mut newer = bytes();
    newer[8] += 1;
    assert_eq!(
        error(&newer),
        format!("State file has version {}, this VMM reads {VERSION}", VERSION + 1)
    );
    assert!(matches!(
        MachineState::decode(&sealed(b"")),
        Err(LoadError::Payload(_))
    ));
    let trailing = [&bytes()[HEADER_SIZE..], b"x"].concat();
    assert!(matches!(
        MachineState::decode(&sealed(&trailing)),
        Err(LoadError::Payload(_))
    ));
}

#[test]
fn the_field_that_differs_is_named() {
    assert!(shape().check(&shape()).is_ok());
    type Case = (fn(&mut Shape), &'static str);
    let cases: [Case; 10] = [
        (|shape| shape.vcpus = 2, "vcpus was 1 and is 2"),
        (|shape| shape.max_vcpus = 8, "max_vcpus was 4 and is 8"),
        (|shape| shape.memory_mib = 64, "memory_mib was 128 and is 64"),
        (|shape| shape.hotplug_mib = 0, "hotplug_mib was 256 and is 0"),
        (
            |shape| shape.root_length = 1,
            "length of root was 2097152 and is 1",
        ),
        (|shape| shape.console = true, "console was false and is true"),
        (|shape| shape.disk_slots = 0, "disk_slots was 2 and is 0"),
        (|shape| shape.net_slots = 3, "net_slots was 1 and is 3"),
        (|shape| shape.share = None, "share was Some(\"tag\") and is None"),
        (|shape| shape.balloon = false, "balloon was true and is false"),
    ];
    for (change, words) in cases {
        let mut now = shape();
        change(&mut now);
        let LoadError::Shape(error) = shape().check(&now).unwrap_err() else {
            panic!("{words}")
        };
        assert_eq!(error.to_string(), words);
    }
}

fn clone_of(file: &File) -> crate::memory::GuestMemory {
    let parts = crate::memory::data(file, 0, 64 << 20).unwrap();
    crate::memory::map_file(64, file, &parts).unwrap()
}

#[test]
fn memory_comes_back_and_zeroes_take_no_room() {
    let memory = crate::memory::allocate(64).unwrap();
    memory.write_obj(7u8, GuestAddress(0x1000)).unwrap();
    memory.write_obj(8u8, GuestAddress((5 << 20) + 4095)).unwrap();
    memory
        .write_slice(&[9; 3 << 20], GuestAddress((20 << 20) + 5))
        .unwrap();
    let file = empty_file("memory");
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let source = memory::Source {
        memory: &memory,
        pagemap: &pagemap,
        origin: None,
    };
    let all = [(GuestAddress(0), 64 << 20)];
    source.write(&all, &file).unwrap();
    let metadata = file.metadata().unwrap();
    assert_eq!(metadata.len(), 64 << 20);
    assert!(metadata.blocks() * 512 < 4 << 20, "{} blocks", metadata.blocks());

    let clones = [(); 2].map(|()| clone_of(&file));
    for clone in &clones {
        for address in [
            0,
            0x1000,
            (5 << 20) + 4095,
            (20 << 20) + 4,
            (20 << 20) + 5,
            23 << 20,
        ] {
            let address = GuestAddress(address);
            assert_eq!(
                clone.read_obj::<u8>(address).unwrap(),
                memory.read_obj::<u8>(address).unwrap()
            );
        }
        // A clone's writes are its own.
        clone.write_obj(1u8, GuestAddress(0x1000)).unwrap();
    }
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0x1000).unwrap();
    assert_eq!(byte, [7]);

    // A clone of a clone has what neither has touched.
    let clone = clone_of(&file);
    clone.write_obj(2u8, GuestAddress(40 << 20)).unwrap();
    let second = empty_file("memory-2");
    let source = memory::Source {
        memory: &clone,
        pagemap: &pagemap,
        origin: Some(&file),
    };
    source.write(&all, &second).unwrap();
    assert!(second.metadata().unwrap().blocks() * 512 < 4 << 20);
    let clone = clone_of(&second);
    for (address, value) in [
        (0x1000, 7),
        ((5 << 20) + 4095, 8),
        (23 << 20, 9),
        (40 << 20, 2),
        (41 << 20, 0),
    ] {
        assert_eq!(clone.read_obj::<u8>(GuestAddress(address)).unwrap(), value);
    }
}

#[test]
fn ranges_follow_each_other_in_the_file() {
    let ram = crate::memory::allocate(64).unwrap();
    let memory = crate::memory::with_hotplug(&ram, 4 << 30, 128).unwrap();
    memory.write_obj(3u8, GuestAddress((4 << 30) + 1)).unwrap();
    let file = empty_file("ranges");
    let ranges = [(GuestAddress(0), 64 << 20), (GuestAddress(4 << 30), 128 << 20)];
    let source = super::memory::Source {
        memory: &memory,
        pagemap: &File::open("/proc/self/pagemap").unwrap(),
        origin: None,
    };
    source.write(&ranges, &file).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 192 << 20);
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, (64 << 20) + 1).unwrap();
    assert_eq!(byte, [3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_a_state_or_an_error(payload in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = MachineState::decode(&payload);
        let _ = MachineState::decode(&sealed(&payload));
    }

    #[test]
    fn a_state_with_some_bytes_changed_is_a_state_or_an_error(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut payload = postcard::to_stdvec(&state()).unwrap();
        for (index, value) in changes {
            let index = index.index(payload.len());
            payload[index] = value;
        }
        let _ = MachineState::decode(&sealed(&payload));
    }
}
