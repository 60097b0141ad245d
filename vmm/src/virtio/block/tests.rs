use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::memory::GuestMemory;
use crate::virtio::test_queue::{self, BUFFERS, GAP, LOW, TestQueue};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x100;

struct Guest {
    memory: GuestMemory,
    driver: TestQueue,
    block: Block,
}

fn file(content: &[u8]) -> File {
    let mut file = TempFile::new().unwrap().into_file();
    file.write_all(content).unwrap();
    file
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|index| (index as u8).wrapping_mul(31) ^ (index >> 8) as u8 ^ seed)
        .collect()
}

fn guest(disk: Option<DiskImage>) -> Guest {
    let memory = test_queue::memory();
    let driver = TestQueue::new(&memory, 0, 128);
    let mut block = Block::new(3, disk);
    block
        .activate(test_queue::activation(&memory, &[&driver], block.features()))
        .unwrap();
    Guest {
        memory,
        driver,
        block,
    }
}

fn writable(content: &[u8]) -> (Guest, File) {
    let file = file(content);
    let copy = file.try_clone().unwrap();
    (guest(Some(DiskImage::new(vec![file], false).unwrap())), copy)
}

impl Guest {
    /// Sends one request with `out` behind the header and room for `into` bytes; returns status and data.
    fn request(&mut self, kind: u32, sector: u64, out: &[u8], into: u32) -> (u8, Vec<u8>) {
        let mut header = Vec::new();
        header.extend(kind.to_le_bytes());
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.memory.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
        self.memory.write_slice(out, GuestAddress(DATA)).unwrap();
        self.memory.write_slice(&[0xee], GuestAddress(STATUS)).unwrap();
        let mut buffers = vec![(BUFFERS, 16, false)];
        if !out.is_empty() {
            buffers.push((DATA, out.len() as u32, false));
        }
        if into > 0 {
            buffers.push((DATA, into, true));
        }
        buffers.push((STATUS, 1, true));
        self.driver.add(&buffers);
        self.block.process_queue(0).unwrap();
        let used = self.driver.take_used();
        assert_eq!(used.iter().map(|used| used.1).collect::<Vec<_>>(), [into + 1]);
        let mut data = vec![0; into as usize];
        self.memory.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        (self.memory.read_obj(GuestAddress(STATUS)).unwrap(), data)
    }

    fn config_u64(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.block.read_config(offset, &mut data);
        u64::from_le_bytes(data)
    }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

fn content(mut file: &File) -> Vec<u8> {
    let mut content = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut content).unwrap();
    content
}

#[test]
fn what_is_written_is_read_back_and_reaches_the_file() {
    let (mut guest, file) = writable(&pattern(64 << 10, 0));
    assert_eq!(guest.config_u64(0), 128);
    assert_eq!(
        guest.request(IN, 3, &[], 4096),
        (OK, pattern(64 << 10, 0)[1536..1536 + 4096].to_vec())
    );
    let data = pattern(8192, 77);
    assert_eq!(guest.request(OUT, 5, &data, 0).0, OK);
    assert_eq!(guest.request(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(guest.request(IN, 5, &[], 8192), (OK, data.clone()));
    let mut expected = pattern(64 << 10, 0);
    expected[5 * 512..][..8192].copy_from_slice(&data);
    assert_eq!(content(&file), expected);
}

#[test]
fn header_data_and_status_may_be_split_anyhow() {
    let (mut guest, file) = writable(&[0; 4096]);
    let mut request = Vec::new();
    request.extend(OUT.to_le_bytes());
    request.extend([0; 4]);
    request.extend(1u64.to_le_bytes());
    let data = pattern(1024, 9);
    request.extend(&data);
    guest.memory.write_slice(&request, GuestAddress(DATA)).unwrap();
    guest.driver.add(&[
        (DATA, 5, false),
        (DATA + 5, 20, false),
        (DATA + 25, request.len() as u32 - 25, false),
        (STATUS, 1, true),
    ]);
    guest.block.process_queue(0).unwrap();
    assert_eq!(content(&file)[512..1536], data);
    // Read with data and status in one buffer.
    request[..4].copy_from_slice(&IN.to_le_bytes());
    guest
        .memory
        .write_slice(&request[..16], GuestAddress(BUFFERS))
        .unwrap();
    guest
        .driver
        .add(&[(BUFFERS, 16, false), (DATA, 100, true), (DATA + 100, 413, true)]);
    guest.block.process_queue(0).unwrap();
    let mut read = vec![0; 513];
    guest.memory.read_slice(&mut read, GuestAddress(DATA)).unwrap();
    assert_eq!((&read[..512], read[512]), (&data[..512], OK));
}

#[test]
fn several_files_make_one_disk() {
    let parts = [
        pattern(1024 + 100, 1),
        pattern(300, 2),
        pattern(512, 3),
        pattern(700, 4),
    ];
    let files = parts.iter().map(|part| file(part)).collect();
    let disk = DiskImage::new(files, true).unwrap();
    // Whole sectors of all but the last, which is filled up.
    let mut flat = [&parts[0][..1024], &parts[2], &parts[3]].concat();
    flat.resize(2560, 0);
    assert_eq!(disk.sectors(), 5);
    let mut guest = guest(Some(disk));
    assert_eq!(guest.request(IN, 0, &[], 2560), (OK, flat.clone()));
    assert_eq!(guest.request(IN, 1, &[], 1024), (OK, flat[512..1536].to_vec()));
    assert_eq!(guest.request(IN, 4, &[], 512), (OK, flat[2048..].to_vec()));
    assert_eq!(guest.request(IN, 4, &[], 1024).0, IOERR);
}

#[test]
fn a_partial_last_sector_is_zero_filled_and_writable() {
    let (mut guest, file) = writable(&[7; 700]);
    assert_eq!(guest.config_u64(0), 2);
    let mut expected = vec![7; 188];
    expected.resize(512, 0);
    assert_eq!(guest.request(IN, 1, &[], 512), (OK, expected));
    assert_eq!(guest.request(OUT, 1, &[9; 512], 0).0, OK);
    assert_eq!(content(&file)[512..], [9; 512]);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let file = file(&[1; 4096]);
    let copy = file.try_clone().unwrap();
    let mut guest = guest(Some(DiskImage::new(vec![file], true).unwrap()));
    assert_eq!(guest.request(OUT, 0, &[2; 512], 0).0, IOERR);
    assert_eq!(guest.request(DISCARD, 0, &range(0, 1, 0), 0).0, IOERR);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &range(0, 1, 0), 0).0, IOERR);
    assert_eq!(guest.request(FLUSH, 0, &[], 0).0, OK);
    assert_eq!(content(&copy), [1; 4096]);
    assert!(guest.block.save().read_only);
}

#[test]
fn transfers_beyond_the_end_fail_and_change_nothing() {
    let (mut guest, file) = writable(&[1; 4096]);
    for sector in [8, 7, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(guest.request(IN, sector, &[], 1024).0, IOERR);
        assert_eq!(guest.request(OUT, sector, &[2; 1024], 0).0, IOERR);
        assert_eq!(guest.request(DISCARD, 0, &range(sector, 2, 0), 0).0, IOERR);
        assert_eq!(guest.request(WRITE_ZEROES, 0, &range(sector, 2, 1), 0).0, IOERR);
    }
    assert_eq!(guest.request(IN, 0, &[], 100).0, IOERR);
    assert_eq!(guest.request(OUT, 0, &[2; 100], 0).0, IOERR);
    assert_eq!(content(&file), [1; 4096]);
}

#[test]
fn a_file_that_shrank_fails_the_read() {
    let (mut guest, file) = writable(&[1; 4096]);
    file.set_len(1024).unwrap();
    assert_eq!(guest.request(IN, 0, &[], 1024), (OK, vec![1; 1024]));
    assert_eq!(guest.request(IN, 0, &[], 2048).0, IOERR);
}

#[test]
fn discard_and_write_zeroes_clear_their_ranges_only() {
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let (mut guest, file) = writable(&[1; 64 << 10]);
        let ranges = [range(8, 16, flags), range(100, 1, flags)].concat();
        assert_eq!(guest.request(kind, 0, &ranges, 0).0, OK);
        let mut expected = vec![1; 64 << 10];
        expected[8 * 512..24 * 512].fill(0);
        expected[100 * 512..101 * 512].fill(0);
        assert_eq!(content(&file), expected);
    }
}

#[test]
fn bad_ranges_are_refused() {
    let (mut guest, file) = writable(&[1; 4096]);
    assert_eq!(guest.request(DISCARD, 0, &range(0, 1, 1), 0).0, UNSUPP);
    assert_eq!(guest.request(WRITE_ZEROES, 0, &range(0, 1, 2), 0).0, UNSUPP);
    assert_eq!(guest.request(DISCARD, 0, &range(0, 0, 0), 0).0, IOERR);
    assert_eq!(guest.request(DISCARD, 0, &range(0, u32::MAX, 0), 0).0, IOERR);
    assert_eq!(guest.request(DISCARD, 0, &range(0, 1, 0)[..15], 0).0, IOERR);
    assert_eq!(guest.request(DISCARD, 0, &range(0, 1, 0).repeat(17), 0).0, IOERR);
    assert_eq!(guest.request(DISCARD, 0, &[], 0).0, IOERR);
    assert_eq!(content(&file), [1; 4096]);
}

#[test]
fn the_serial_number_names_the_slot() {
    let mut guest = guest(None);
    let (status, id) = guest.request(GET_ID, 0, &[], 20);
    assert_eq!(
        (status, &id[..]),
        (OK, &b"slot3\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..])
    );
    assert_eq!(guest.request(GET_ID, 0, &[], 19).0, IOERR);
}

#[test]
fn unknown_types_are_unsupported() {
    let (mut guest, _) = writable(&[1; 4096]);
    for kind in [2, 3, 10, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[], 512).0, UNSUPP);
    }
}

#[test]
fn a_disk_comes_and_goes() {
    let mut guest = guest(None);
    let interrupt = guest.block.changes.interrupt.clone().unwrap();
    assert_eq!(guest.config_u64(0), 0);
    assert_eq!(guest.request(IN, 0, &[], 512).0, IOERR);
    assert_eq!(guest.request(FLUSH, 0, &[], 0).0, IOERR);
    assert!(matches!(guest.block.detach(), Err(SlotError::Empty(3))));
    interrupt.acknowledge(u32::MAX);

    guest
        .block
        .attach(DiskImage::new(vec![file(&[5; 1024])], true).unwrap())
        .unwrap();
    assert_eq!(
        (
            interrupt.status(),
            guest.block.config_generation(),
            guest.config_u64(0)
        ),
        (2, 1, 2)
    );
    assert_eq!(guest.request(IN, 1, &[], 512), (OK, vec![5; 512]));
    let other = DiskImage::new(vec![file(&[6; 1024])], true).unwrap();
    assert!(matches!(guest.block.attach(other), Err(SlotError::Occupied(3))));

    guest.block.detach().unwrap();
    assert_eq!((guest.block.config_generation(), guest.config_u64(0)), (2, 0));
    assert_eq!(guest.request(IN, 0, &[], 512).0, IOERR);
}

#[test]
fn what_is_no_disk_is_refused() {
    assert!(matches!(DiskImage::new(Vec::new(), true), Err(DiskError::NoFile)));
    let two = vec![file(b"a"), file(b"b")];
    assert!(matches!(
        DiskImage::new(two, false),
        Err(DiskError::WritableConcatenation)
    ));
    let directory = File::open("/").unwrap();
    assert!(matches!(
        DiskImage::new(vec![directory], true),
        Err(DiskError::FileType(0))
    ));
}

#[test]
fn malformed_requests_stop_the_device() {
    for buffers in [
        // No room for a status, no header, half a header, wrong direction, status out of range, zero length.
        &[(BUFFERS, 16, false)][..],
        &[(STATUS, 1, true)],
        &[(BUFFERS, 15, false), (STATUS, 1, true)],
        &[(BUFFERS, 16, true), (STATUS, 1, true)],
        &[(BUFFERS, 16, false), (GAP, 1, true)],
        &[(BUFFERS, 16, false), (DATA, 0, true), (STATUS, 1, true)],
        &[(STATUS, 1, true), (BUFFERS, 16, false)],
    ] {
        let (mut guest, _) = writable(&[1; 4096]);
        guest.memory.write_slice(&[0; 16], GuestAddress(BUFFERS)).unwrap();
        guest.driver.add(buffers);
        guest.block.process_queue(0).expect_err("malformed");
        assert!(guest.driver.take_used().is_empty());
    }
}

#[test]
fn the_configuration_states_the_limits() {
    let (guest, _) = writable(&[1; 4096]);
    let u32_at = |offset| guest.config_u64(offset) as u32;
    assert_eq!(
        (u32_at(12), u32_at(20), u32_at(36), u32_at(40)),
        (126, 512, MAX_RANGE_SECTORS, MAX_RANGES)
    );
    assert_eq!(
        (u32_at(48), u32_at(52), u32_at(56) as u8, u32_at(60)),
        (MAX_RANGE_SECTORS, MAX_RANGES, 1, 0)
    );
    assert_eq!(guest.block.features() & (1 << 5), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any layout of files reads like the bytes joined by hand.
    #[test]
    fn a_concatenation_reads_like_the_joined_bytes(
        sizes in prop::collection::vec(0..3000usize, 1..6),
        sector in 0..20u64,
        sectors in 1..16u32,
    ) {
        let last = sizes.len() - 1;
        let mut flat = Vec::new();
        let mut files = Vec::new();
        for (index, &size) in sizes.iter().enumerate() {
            let bytes = pattern(size, index as u8);
            let whole = if index == last { size } else { size / 512 * 512 };
            flat.extend(&bytes[..whole]);
            let part = file(&[]);
            part.write_all_at(&bytes, 0).unwrap();
            files.push(part);
        }
        flat.resize(flat.len().next_multiple_of(512), 0);
        let mut guest = guest(Some(DiskImage::new(files, true).unwrap()));
        let (status, data) = guest.request(IN, sector, &[], sectors * 512);
        match flat.get(sector as usize * 512..(sector as usize + sectors as usize) * 512) {
            Some(expected) => prop_assert_eq!((status, &data[..]), (OK, expected)),
            None => prop_assert_eq!(status, IOERR),
        }
    }

    /// Whatever a request says, the device answers or stops, and a read-only file stays as it was.
    #[test]
    fn any_request_is_survived(
        kind in prop_oneof![0..16u32, any::<u32>()],
        sector in prop_oneof![0..20u64, any::<u64>()],
        out in prop::collection::vec(any::<u8>(), 0..600),
        into in 0..2000u32,
    ) {
        let file = file(&pattern(4096, 5));
        let copy = file.try_clone().unwrap();
        let mut guest = guest(Some(DiskImage::new(vec![file], true).unwrap()));
        guest.request(kind, sector, &out, into);
        prop_assert_eq!(content(&copy), pattern(4096, 5));
    }
}

#[test]
fn a_queue_that_never_empties_lets_others_have_their_turn() {
    let (mut guest, _) = writable(&[0; 4096]);
    guest.request(FLUSH, 0, &[], 0);
    let head = guest.driver.add(&[(BUFFERS, 16, false), (STATUS, 1, true)]);
    for _ in 0..3 {
        let turn = guest
            .driver
            .while_full(head, || guest.block.process_queue(0).unwrap());
        assert_eq!(turn, Turn::Again);
        assert_eq!(guest.driver.take_used().len(), BUDGET);
    }
}

#[test]
fn a_request_is_no_longer_than_the_configuration_allows() {
    let file = file(&[]);
    file.set_len(256 << 20).unwrap();
    let mut guest = guest(Some(DiskImage::new(vec![file], false).unwrap()));
    assert_eq!(guest.config_u64(8) as u32, SIZE_MAX);
    let mut header = [0; 16];
    header[..4].copy_from_slice(&IN.to_le_bytes());
    for (size, status) in [(SIZE_MAX, OK), (SIZE_MAX + 512, IOERR)] {
        guest.memory.write_slice(&header, GuestAddress(BUFFERS)).unwrap();
        let data = (2 * LOW, size, true);
        let buffers = [
            vec![(BUFFERS, 16, false)],
            vec![data; SEG_MAX as usize],
            vec![(STATUS, 1, true)],
        ];
        guest.driver.add(&buffers.concat());
        guest.block.process_queue(0).unwrap();
        assert_eq!(guest.driver.take_used().len(), 1);
        assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), status);
    }
}

#[test]
fn a_disk_larger_than_the_largest_file_works_up_to_there() {
    use crate::jail::FILE_SIZE;
    use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigHandler, Signal, signal};

    // Of a file system that has larger ones.
    let file: File = memfd_create(c"disk", MemFdCreateFlag::empty()).unwrap().into();
    file.set_len(FILE_SIZE + 8192).unwrap();
    // As in the jail and in `main`; no other test writes so far.
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, FILE_SIZE, hard).unwrap();
    // SAFETY: ignoring a signal runs no handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
    let copy = file.try_clone().unwrap();
    let mut guest = guest(Some(DiskImage::new(vec![file], false).unwrap()));
    assert_eq!(guest.config_u64(0), (FILE_SIZE + 8192) / 512);
    let last = (FILE_SIZE - 4096) / 512;
    let data = pattern(4096, 7);
    assert_eq!(guest.request(OUT, last, &data, 0).0, OK);
    assert_eq!(guest.request(IN, last, &[], 4096), (OK, data.clone()));
    let mut read = vec![0; 4096];
    copy.read_exact_at(&mut read, FILE_SIZE - 4096).unwrap();
    assert_eq!(read, data);
    // A short write at the border and one beyond it are errors of the disk, and not the end of the machine.
    assert_eq!(guest.request(OUT, last + 4, &data, 0).0, IOERR);
    assert_eq!(guest.request(OUT, last + 8, &data, 0).0, IOERR);
    assert_eq!(guest.request(IN, last + 8, &[], 4096), (OK, vec![0; 4096]));
    assert_eq!(guest.request(OUT, 0, &data, 0).0, OK);
}
