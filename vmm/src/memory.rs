//! Guest memory: private, anonymous or over a snapshot's file, never in a core dump.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::{io, ptr};

use bulkhead_protocol::control::SHORT_HOLE;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use crate::arch::layout;
use crate::snapshot::pagemap::PAGE;

/// The guest's memory. Cloning shares the mapping.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Length of persistent memory the kernel maps is a multiple of this (bytes): one sub-section of its
/// memory map.
pub const PERSISTENT_ALIGNMENT: u64 = 2 << 20;

/// Most parts of a memory file that are mapped: a process may have 65,530 mappings (`vm.max_map_count`), and where data lies
/// is up to the guest.
const MOST_PARTS: usize = 4096;

/// Why memory could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("Cannot map guest memory of {mib} MiB")]
    Map {
        /// Size asked for.
        mib: u32,
        /// Reason.
        #[source]
        source: vm_memory::mmap::FromRangesError,
    },
    /// Memory to grow by does not fit in.
    #[error("Cannot place memory that can be added")]
    Insert(#[source] vm_memory::GuestRegionCollectionError),
    /// An address does not exist in the mapping just made.
    #[error("Cannot find guest memory just mapped")]
    Address(#[source] vm_memory::GuestMemoryError),
    /// The memory file of a snapshot has another length.
    #[error("Memory file has {found} bytes; {wanted} are needed")]
    FileLength {
        /// Bytes it has.
        found: u64,
        /// Bytes it should have.
        wanted: u64,
    },
    /// The memory file could not be mapped.
    #[error("Cannot map a memory file")]
    MapFile(#[source] io::Error),
    /// Looking for the data in a memory file.
    #[error("Cannot look for data in a memory file")]
    Data(#[source] Errno),
    /// `madvise` failed.
    #[error("Cannot keep guest memory out of core dumps")]
    Advise(#[source] io::Error),
    /// The image's length could not be read.
    #[error("Cannot read the length of the root image")]
    ImageLength(#[source] std::io::Error),
    /// The image's length is wrong.
    #[error("Root image has {0} bytes; a multiple of {PERSISTENT_ALIGNMENT} above 0 is needed")]
    ImageAlignment(u64),
    /// The image could not be mapped.
    #[error("Cannot map the root image")]
    MapImage(#[source] io::Error),
}

/// Maps `mib` MiB of zeroed guest memory as [`layout::ram_ranges`] places it.
///
/// # Errors
/// [`MemoryError`].
pub fn allocate(mib: u32) -> Result<GuestMemory, MemoryError> {
    map(mib, &layout::ram_ranges(mib))
}

/// Guest memory made larger by `mib` MiB from `start` on, behind which there is nothing until it is touched. The rest
/// is shared with `memory`.
///
/// # Errors
/// [`MemoryError`].
pub fn with_hotplug(memory: &GuestMemory, start: u64, mib: u32) -> Result<GuestMemory, MemoryError> {
    let size = (mib as usize) << 20;
    let added = map(mib, &[(GuestAddress(start), size)])?;
    let (_, region) = added
        .remove_region(GuestAddress(start), size as u64)
        .map_err(MemoryError::Insert)?;
    memory.insert_region(region).map_err(MemoryError::Insert)
}

/// Maps `mib` MiB of guest memory as it is in `file`, whose [`data`] lies in `parts`, placed as by [`allocate`]. What the
/// guest writes stays private.
///
/// # Errors
/// [`MemoryError`].
pub fn map_file(mib: u32, file: &File, parts: &[Range<u64>]) -> Result<GuestMemory, MemoryError> {
    let memory = allocate(mib)?;
    let mut offset = 0;
    for region in memory.iter() {
        let start = region.get_host_address(MemoryRegionAddress(0));
        let start = start.map_err(MemoryError::Address)? as u64;
        map_over(start, region.len(), file, parts, offset)?;
        offset += region.len();
    }
    Ok(memory)
}

/// Makes `length` bytes at `address` of this process, a part of guest memory that is all zero, those of `file` from
/// `offset` on. What the file has no data for stays as it is: a page of zeroes is made when it is written, and for a
/// mapped hole two would be, one of them in the page cache.
///
/// # Errors
/// [`MemoryError::MapFile`].
pub fn map_over(
    address: u64,
    length: u64,
    file: &File,
    parts: &[Range<u64>],
    offset: u64,
) -> Result<(), MemoryError> {
    for part in parts {
        let (start, end) = (part.start.max(offset), part.end.min(offset + length));
        if start < end {
            map_part(address + (start - offset), end - start, file, start)?;
        }
    }
    Ok(())
}

/// Whether `parts` can be those of a memory file of `length` bytes, as [`data`] finds them.
pub fn are_parts(parts: &[Range<u64>], length: u64) -> bool {
    let mut last = 0;
    parts.len() <= MOST_PARTS
        && parts.iter().all(|part| {
            let follows = last <= part.start && part.start < part.end;
            last = part.end;
            follows && (part.start | part.end) % PAGE == 0
        })
        && last <= length
}

/// Pages of `file` between two offsets that have data.
///
/// # Errors
/// The file system does not tell.
pub fn extents(file: &File, start: u64, end: u64) -> Result<Vec<Range<u64>>, Errno> {
    let seek = |from: u64, whence| match lseek64(file.as_raw_fd(), from as i64, whence) {
        Ok(found) => Ok(found.unsigned_abs().min(end)),
        // Nothing but a hole up to the end.
        Err(Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno),
    };
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut position = start;
    while position < end {
        let from = seek(position, Whence::SeekData)?;
        if from == end {
            break;
        }
        let to = seek(from, Whence::SeekHole)?;
        // Blocks of a file system may be smaller than pages, which are what can be mapped.
        let pages = from / PAGE * PAGE..to.next_multiple_of(PAGE).min(end);
        join(&mut parts, pages, 1);
        position = to;
    }
    Ok(parts)
}

/// Parts of `file` between two offsets that have data, and the short holes between them: each part is a mapping.
///
/// # Errors
/// [`MemoryError::Data`].
pub fn data(file: &File, start: u64, end: u64) -> Result<Vec<Range<u64>>, MemoryError> {
    let mut parts = extents(file, start, end).map_err(MemoryError::Data)?;
    let mut hole = SHORT_HOLE;
    loop {
        let mut fewer = Vec::with_capacity(parts.len());
        for part in parts {
            join(&mut fewer, part, hole);
        }
        if fewer.len() <= MOST_PARTS {
            return Ok(fewer);
        }
        parts = fewer;
        hole *= 4;
    }
}

/// Adds a part that lies behind the others, or makes the last one longer if the hole before it is shorter than `hole`.
fn join(parts: &mut Vec<Range<u64>>, part: Range<u64>, hole: u64) {
    match parts.last_mut() {
        Some(last) if part.start.saturating_sub(last.end) < hole => last.end = part.end,
        _ => parts.push(part),
    }
}

fn map_part(address: u64, length: u64, file: &File, offset: u64) -> Result<(), MemoryError> {
    let start = address as *mut libc::c_void;
    let failed = || MemoryError::MapFile(io::Error::last_os_error());
    let offset = i64::try_from(offset).map_err(|_| failed())?;
    // SAFETY: the range is guest memory, of which there are no Rust references; the mapping that takes its place is as
    // long, and as writable.
    let mapped = unsafe {
        libc::mmap(
            start,
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(failed());
    }
    // SAFETY: exactly the mapping just made, and the advice changes no content.
    if unsafe { libc::madvise(start, length as usize, libc::MADV_DONTDUMP) } != 0 {
        return Err(MemoryError::Advise(io::Error::last_os_error()));
    }
    Ok(())
}

fn map(mib: u32, ranges: &[(GuestAddress, usize)]) -> Result<GuestMemory, MemoryError> {
    let memory = GuestMemory::from_ranges(ranges).map_err(|source| MemoryError::Map { mib, source })?;
    keep_out_of_dumps(&memory)?;
    Ok(memory)
}

fn keep_out_of_dumps(memory: &GuestMemory) -> Result<(), MemoryError> {
    for region in memory.iter() {
        let start = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(MemoryError::Address)?;
        // SAFETY: the range is exactly the mapping of this region, and the advice changes no content.
        if unsafe { libc::madvise(start.cast(), region.len() as usize, libc::MADV_DONTDUMP) } != 0 {
            return Err(MemoryError::Advise(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// A read-only shared mapping of a file for the whole life of the process: every VM that maps the same
/// image shares its page cache.
#[derive(Debug)]
pub struct Image {
    /// Host address.
    pub address: u64,
    /// Length in bytes, a multiple of [`PERSISTENT_ALIGNMENT`].
    pub length: u64,
}

impl Image {
    /// Maps all of `file`.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn map(file: &File) -> Result<Self, MemoryError> {
        let length = file.metadata().map_err(MemoryError::ImageLength)?.len();
        if length == 0 || !length.is_multiple_of(PERSISTENT_ALIGNMENT) {
            return Err(MemoryError::ImageAlignment(length));
        }
        // Aligned as it is in the guest, so that it can be mapped there in the large pages in which the page cache may
        // have it. What is reserved around it takes addresses only.
        let reserved = (length + PERSISTENT_ALIGNMENT) as usize;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let place = unsafe { libc::mmap(ptr::null_mut(), reserved, libc::PROT_NONE, flags, -1, 0) };
        if place == libc::MAP_FAILED {
            return Err(MemoryError::MapImage(io::Error::last_os_error()));
        }
        let address = (place as u64).next_multiple_of(PERSISTENT_ALIGNMENT);
        // SAFETY: the range lies in the one just reserved, which nothing else uses.
        let start = unsafe {
            libc::mmap(
                address as *mut libc::c_void,
                length as usize,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_FIXED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(MemoryError::MapImage(io::Error::last_os_error()));
        }
        Ok(Self { address, length })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn image_of_odd_length_is_refused_with_its_length() {
        let mut file = TempFile::new().unwrap().into_file();
        assert!(matches!(Image::map(&file), Err(MemoryError::ImageAlignment(0))));
        file.write_all(&[1; 4096]).unwrap();
        assert!(matches!(
            Image::map(&file),
            Err(MemoryError::ImageAlignment(4096))
        ));
        file.set_len(PERSISTENT_ALIGNMENT).unwrap();
        let image = Image::map(&file).unwrap();
        assert_eq!(image.length, PERSISTENT_ALIGNMENT);
        assert_eq!(image.address % PERSISTENT_ALIGNMENT, 0);
    }

    #[test]
    fn only_data_of_a_file_is_mapped() {
        let path = std::env::temp_dir().join(format!("bulkhead-holes-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        let write = |value: u8, at: u64| file.write_all_at(&[value; 4096], at).unwrap();
        write(1, 0);
        write(2, 8192);
        write(3, 32 << 20);
        let parts = data(&file, 0, 64 << 20).unwrap();
        assert_eq!(parts, [0..12288, 32 << 20..(32 << 20) + 4096]);
        let part = data(&file, 4096, 32 << 20).unwrap();
        assert!(part.into_iter().eq([(8192, 12288)].map(|(from, to)| from..to)));
        let parts = data(&file, 0, 64 << 20).unwrap();
        let memory = map_file(64, &file, &parts).unwrap();
        let value = |at: u64| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        assert_eq!([0, 4096, 8192, 1 << 20, 32 << 20].map(value), [1, 0, 2, 0, 3]);
        memory.write_obj(9u8, GuestAddress(1 << 20)).unwrap();
        memory.write_obj(9u8, GuestAddress(0)).unwrap();
        assert_eq!(
            map_file(64, &file, &parts)
                .unwrap()
                .read_obj::<u8>(GuestAddress(0))
                .unwrap(),
            1
        );
        assert_eq!(
            data(&file, 0, 64 << 20).unwrap().len(),
            2,
            "nothing was made in the file"
        );
    }

    #[test]
    fn only_parts_in_order_and_in_the_file_are_parts() {
        let length = 10 * PAGE;
        let pages = |list: &[(u64, u64)]| -> Vec<Range<u64>> {
            list.iter().map(|(start, end)| start * PAGE..end * PAGE).collect()
        };
        assert!(are_parts(&[], length));
        assert!(are_parts(&pages(&[(0, 2), (2, 3), (5, 10)]), length));
        for wrong in [&[(0, 11)][..], &[(3, 3)], &[(4, 5), (3, 4)], &[(0, 3), (2, 4)]] {
            assert!(!are_parts(&pages(wrong), length), "{wrong:?}");
        }
        assert!(!are_parts(&[1..PAGE, PAGE..length], length));
        assert!(!are_parts(&[0..PAGE + 1, 2 * PAGE..length], length));
        let many: Vec<_> = (0..=MOST_PARTS as u64)
            .map(|page| page * PAGE..(page + 1) * PAGE)
            .collect();
        assert!(!are_parts(&many, u64::MAX));
    }

    #[test]
    fn data_in_many_places_is_mapped_in_few() {
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let (step, count) = (2 * SHORT_HOLE, MOST_PARTS as u64 + 1);
        file.set_len(step * count).unwrap();
        for place in 0..count {
            file.write_all_at(&[1; 4096], place * step).unwrap();
        }
        let parts = data(&file, 0, step * count).unwrap();
        assert!(parts.len() <= MOST_PARTS, "{}", parts.len());
        let last = (count - 1) * step;
        assert_eq!((parts[0].start, parts.last().unwrap().end), (0, last + 4096));
        // One part less is mapped as it is.
        assert_eq!(data(&file, 0, last).unwrap().len(), MOST_PARTS);
    }

    #[test]
    fn added_memory_is_behind_the_rest() {
        let ram = allocate(64).unwrap();
        ram.write_obj(5u8, GuestAddress(0x1000)).unwrap();
        let memory = with_hotplug(&ram, 4 << 30, 256).unwrap();
        let regions: Vec<_> = memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect();
        assert_eq!(regions, [(0, 64 << 20), (4 << 30, 256 << 20)]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1000)).unwrap(), 5);
        assert_eq!(ram.num_regions(), 1);
        assert!(with_hotplug(&ram, 32 << 20, 128).is_err());
    }

    #[test]
    fn memory_has_the_size_asked_for() {
        let memory = allocate(64).unwrap();
        assert_eq!(memory.iter().map(GuestMemoryRegion::len).sum::<u64>(), 64 << 20);
    }
}
