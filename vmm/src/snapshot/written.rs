//! Which memory a guest wrote soon after it began from a snapshot. The next one that begins there will write most of it
//! as well, so it gets copies of these pages before it writes them: page by page a guest reads, then writes, and what was
//! mapped is no longer valid when the page has been copied, with an exit of the vCPU each time. There are two lists: what
//! is written up to the guest's first answer is copied before it runs, the rest when it has answered, beside it.
//!
//! The list is a file of pairs of 64-bit words, little endian: the offset in the memory file, and the length in bytes.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vm_memory::{GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::pagemap::{self, OF_FILE, PAGE, PRESENT};
use crate::memory::{GuestMemory, MemoryError, data};

/// Most bytes that a list is followed for: so much memory each guest takes at once.
pub const MOST: u64 = 16 << 20;

/// Bytes of an entry of a list, and most of them: each is at least a page.
const ENTRY: usize = 16;
const MOST_ENTRIES: u64 = MOST / PAGE;

/// Why a list could not be made.
#[derive(Debug, thiserror::Error)]
pub enum WrittenError {
    /// A region is not mapped.
    #[error("Cannot find guest memory")]
    Address(#[source] vm_memory::GuestMemoryError),
    /// Looking for the data of the memory file.
    #[error("Cannot list the data of the memory file")]
    Data(#[source] MemoryError),
    /// Looking for memory that was written.
    #[error("Cannot read the pagemap of this process")]
    Pagemap(#[source] io::Error),
    /// The list.
    #[error("Cannot write the list of written memory")]
    Write(#[source] io::Error),
}

/// Writes the list of what was written of `ram`, the memory that a guest has at its start, into `list`, which is empty.
/// What `memory`, the memory file it began from, has no data for is left out: the host gives that in larger pieces.
///
/// # Errors
/// [`WrittenError`].
pub fn write(ram: &GuestMemory, memory: &File, pagemap: &File, list: &File) -> Result<(), WrittenError> {
    let mut bytes = Vec::new();
    let mut left = MOST;
    let mut start = 0;
    for region in ram.iter() {
        let host = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(WrittenError::Address)? as u64;
        for part in data(memory, start, start + region.len()).map_err(WrittenError::Data)? {
            let first = host + (part.start - start);
            let entries = pagemap::entries(pagemap, first, part.end - part.start);
            let entries = entries.map_err(WrittenError::Pagemap)?;
            for run in runs(&entries) {
                let length = (run.end - run.start).min(left);
                if length > 0 {
                    bytes.extend((part.start + run.start).to_le_bytes());
                    bytes.extend(length.to_le_bytes());
                    left -= length;
                }
            }
        }
        start += region.len();
    }
    list.write_all_at(&bytes, 0).map_err(WrittenError::Write)
}

/// Runs of written pages in a pagemap, in bytes from its start.
fn runs(entries: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for (index, entry) in (0u64..).zip(entries) {
        if entry & (PRESENT | OF_FILE) != PRESENT {
            continue;
        }
        let start = index * PAGE;
        match runs.last_mut() {
            Some(last) if last.end == start => last.end += PAGE,
            _ => runs.push(start..start + PAGE),
        }
    }
    runs
}

/// Lists that were made of guests before this one.
#[derive(Debug)]
pub struct Lists {
    /// What a guest has written when it gives its first answer.
    pub first: File,
    /// What it has written later; there may be the same in it.
    pub later: File,
}

/// Memory that the guest is expected to write soon, and that becomes this process's own before. What the host does not do,
/// or the list does not say right, is left to the guest's first access.
#[derive(Debug, Default)]
pub struct Soon(Vec<(u64, u64)>);

impl Soon {
    /// What a list names of `ram`.
    pub fn read(list: &File, ram: &GuestMemory) -> Self {
        let mut places = places(list, ram);
        // From the end on it is taken.
        places.reverse();
        Self(places)
    }

    /// Whether there is nothing left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Prepares all of it.
    pub fn prepare_all(&mut self) {
        while !self.is_empty() {
            self.prepare_step(MOST);
        }
    }

    /// Prepares up to `step` bytes, a multiple of [`PAGE`], of what comes next.
    pub fn prepare_step(&mut self, step: u64) {
        let Some((start, length)) = self.0.pop() else {
            return;
        };
        let now = length.min(step);
        if now < length {
            self.0.push((start + now, length - now));
        }
        // SAFETY: the range is guest memory, of which there are no Rust references, and its content does not change.
        if unsafe {
            libc::madvise(
                start as *mut libc::c_void,
                now as usize,
                libc::MADV_POPULATE_WRITE,
            )
        } != 0
        {
            self.0.clear();
        }
    }
}

/// Address in this process and length in bytes of each entry that lies in `ram`.
fn places(list: &File, ram: &GuestMemory) -> Vec<(u64, u64)> {
    let (mut list, mut bytes) = (list, Vec::new());
    if list.rewind().is_err() {
        return Vec::new();
    }
    if list
        .take(MOST_ENTRIES * ENTRY as u64)
        .read_to_end(&mut bytes)
        .is_err()
    {
        return Vec::new();
    }
    let mut left = MOST;
    let entries = bytes.as_chunks::<ENTRY>().0.iter();
    entries
        .filter_map(|entry| {
            let (offset, length) = entry.split_at(ENTRY / 2);
            let offset = u64::from_le_bytes(offset.try_into().ok()?);
            let length = u64::from_le_bytes(length.try_into().ok()?);
            if length == 0 || length > left || (offset | length) % PAGE != 0 {
                return None;
            }
            let mut start = 0;
            for region in ram.iter() {
                let inside = offset.checked_sub(start).filter(|inside| *inside < region.len());
                if let Some(inside) = inside {
                    if length > region.len() - inside {
                        return None;
                    }
                    let host = region.get_host_address(MemoryRegionAddress(inside)).ok()? as u64;
                    left -= length;
                    return Some((host, length));
                }
                start += region.len();
            }
            None
        })
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::memory::map_file;

    fn file() -> File {
        TempFile::new().unwrap().into_file()
    }

    #[test]
    fn what_a_guest_wrote_is_listed_and_found_again() {
        let saved = file();
        saved.set_len(64 << 20).unwrap();
        saved.write_all_at(&[1; 3 * 4096], 4096).unwrap();
        let ram = map_file(64, &saved, &data(&saved, 0, 64 << 20).unwrap()).unwrap();
        // Reading is no writing, of a page of the file.
        assert_eq!(ram.read_obj::<u8>(GuestAddress(4096)).unwrap(), 1);
        saved.write_all_at(&[1; 4096], 1000 * 4096).unwrap();
        let ram = map_file(64, &saved, &data(&saved, 0, 64 << 20).unwrap()).unwrap();
        for page in [2u64, 3, 1000, 2000] {
            ram.write_obj(7u8, GuestAddress(page * 4096)).unwrap();
        }
        let list = file();
        write(&ram, &saved, &File::open("/proc/self/pagemap").unwrap(), &list).unwrap();
        let other = map_file(64, &saved, &data(&saved, 0, 64 << 20).unwrap()).unwrap();
        let start = other.get_host_address(GuestAddress(0)).unwrap() as u64;
        let found: Vec<_> = places(&list, &other)
            .into_iter()
            .map(|(host, length)| (host - start, length))
            .collect();
        assert_eq!(found, [(2 * 4096, 2 * 4096), (1000 * 4096, 4096)]);

        let present = |page: u64| {
            let entries = pagemap::entries(
                &File::open("/proc/self/pagemap").unwrap(),
                start + page * 4096,
                4096,
            );
            entries.unwrap()[0] & (PRESENT | OF_FILE) == PRESENT
        };
        let mut soon = Soon::read(&list, &other);
        soon.prepare_step(PAGE);
        assert_eq!([2, 3, 1000].map(present), [true, false, false]);
        soon.prepare_all();
        assert_eq!([2, 3, 1000, 2000].map(present), [true, true, true, false]);
        assert!(soon.is_empty());
        assert_eq!(other.read_obj::<u8>(GuestAddress(4096)).unwrap(), 1);
    }

    #[test]
    fn only_places_in_memory_are_taken_of_a_list_and_not_too_many() {
        let ram = crate::memory::allocate(64).unwrap();
        let list = |entries: &[(u64, u64)]| {
            let bytes: Vec<u8> = entries
                .iter()
                .flat_map(|(offset, length)| [offset.to_le_bytes(), length.to_le_bytes()].concat())
                .collect();
            let list = file();
            list.write_all_at(&bytes, 0).unwrap();
            places(&list, &ram).len()
        };
        assert_eq!(list(&[(0, 4096), (4096, 8192)]), 2);
        let end = 64 << 20;
        for wrong in [
            (1, 4096),
            (0, 1),
            (0, 0),
            (end, 4096),
            (end - 4096, 8192),
            (u64::MAX - 4095, 8192),
            (0, MOST + 4096),
        ] {
            assert_eq!(list(&[wrong, (0, 4096)]), 1, "{wrong:?}");
        }
        // The second would be more than a guest takes at once.
        assert_eq!(list(&[(0, MOST), (MOST, 4096)]), 1);
        let torn = file();
        torn.write_all_at(&[0; 7], 0).unwrap();
        assert!(places(&torn, &ram).is_empty());
    }
}
