//! Guest memory in which every access beyond a range is a fault.

use bulkhead_vmm::memory::GuestMemory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap};

/// Bytes of each of the two ranges of RAM.
pub const SIZE: u64 = 128 << 10;
/// The ranges of RAM: there is a hole between them.
pub const LOW: u64 = 0;
/// The second range.
pub const HIGH: u64 = 2 * SIZE;
/// Memory that can be plugged in.
pub const PLUG: u64 = 1 << 28;
/// Its size in bytes.
pub const PLUG_SIZE: u64 = 8 << 20;

/// Unmapped bytes on both sides of every range.
const GUARD: usize = 1 << 20;

/// RAM of a guest, mapped once for the life of the process.
pub struct Ram {
    /// As the devices see it.
    pub memory: GuestMemory,
}

impl Ram {
    /// Maps the ranges.
    pub fn map() -> Self {
        Self {
            memory: guarded(&[(LOW, SIZE), (HIGH, SIZE), (PLUG, PLUG_SIZE)]),
        }
    }

    /// Zeroes the RAM, not what can be plugged.
    pub fn clear(&self) {
        for start in [LOW, HIGH] {
            self.memory
                .write_slice(&[0; SIZE as usize], GuestAddress(start))
                .expect("it is RAM");
        }
    }

    /// A copy of all RAM.
    pub fn copy(&self, into: &mut Vec<u8>) {
        into.resize(2 * SIZE as usize, 0);
        let (low, high) = into.split_at_mut(SIZE as usize);
        self.memory.read_slice(low, GuestAddress(LOW)).expect("it is RAM");
        self.memory
            .read_slice(high, GuestAddress(HIGH))
            .expect("it is RAM");
    }
}

/// Guest memory of these ranges, with nothing mapped around them. It stays for the life of the process.
pub fn guarded(ranges: &[(u64, u64)]) -> GuestMemory {
    GuestMemory::from_regions(ranges.iter().copied().map(range).collect()).expect("ranges are apart")
}

/// Empties guest memory made by [`guarded`].
pub fn discard(memory: &GuestMemory) {
    for region in memory.iter() {
        // SAFETY: the range is that of an anonymous mapping, of which no reference exists.
        let result =
            unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}

/// Guest address of a byte of a copy.
pub fn address(index: usize) -> u64 {
    let index = index as u64;
    if index < SIZE {
        LOW + index
    } else {
        HIGH + index - SIZE
    }
}

fn range((start, size): (u64, u64)) -> GuestRegionMmap {
    let size = size as usize;
    // SAFETY: a new mapping without access, and one inside it, replace no other.
    let mapping = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let outer = libc::mmap(
            std::ptr::null_mut(),
            size + 2 * GUARD,
            libc::PROT_NONE,
            flags,
            -1,
            0,
        );
        assert_ne!(outer, libc::MAP_FAILED);
        let inner = outer.byte_add(GUARD);
        let access = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mprotect(inner, size, access), 0);
        MmapRegionBuilder::new(size)
            .with_raw_mmap_pointer(inner.cast())
            .with_mmap_prot(access)
            .with_mmap_flags(flags)
            .build()
            .expect("it is aligned")
    };
    GuestRegionMmap::new(mapping, GuestAddress(start)).expect("it does not wrap")
}
