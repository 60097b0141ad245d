//! Large pages of the page cache (`MADV_COLLAPSE`, madvise(2)): for files of tmpfs, and where Linux is built with
//! `READ_ONLY_THP_FOR_FS` for those of other file systems.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

use bulkhead_protocol::control::SHORT_HOLE;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};

/// Bytes of a large page, and how files and addresses are aligned to be mapped in them.
const LARGE: u64 = 2 << 20;

/// Why a file is not in large pages.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// Its length.
    #[error("cannot read the length of a file")]
    Length(#[source] io::Error),
    /// Where its data is.
    #[error("cannot look for data in a memory file")]
    Data(#[source] Errno),
    /// It cannot be mapped.
    #[error("cannot map a file")]
    Map(#[source] io::Error),
    /// The kernel does not do it.
    #[error("cannot make large pages of a file")]
    Collapse(#[source] io::Error),
}

/// Large pages in a file of `length` bytes.
pub fn whole(length: u64) -> Vec<u64> {
    (0..length / LARGE).map(|page| page * LARGE).collect()
}

/// Where in a memory file there are large pages full of data that `list` says nothing of: pairs of offset and length,
/// 64-bit words of little endian.
///
/// # Errors
/// The file system does not tell where data is.
pub fn unwritten(memory: &File, list: &[u8]) -> Result<Vec<u64>, PagesError> {
    let (words, _) = list.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let (pairs, _) = words.as_chunks::<2>();
    let written = |page: u64| {
        let inside =
            |[start, length]: &[u64; 2]| *start < page + LARGE && start.saturating_add(*length) > page;
        pairs.iter().any(inside)
    };
    let length = memory.metadata().map_err(PagesError::Length)?.len();
    let mut pages = Vec::new();
    for part in data(memory, length).map_err(PagesError::Data)? {
        let first = part.start.next_multiple_of(LARGE);
        let within = (0..)
            .map(|page| first + page * LARGE)
            .take_while(|page| page + LARGE <= part.end);
        pages.extend(within.filter(|page| !written(*page)));
    }
    Ok(pages)
}

/// Parts of a file that have data but for short holes.
fn data(file: &File, length: u64) -> Result<Vec<Range<u64>>, Errno> {
    let mut parts: Vec<Range<u64>> = Vec::new();
    let seek = |from: u64, whence| match lseek64(file.as_raw_fd(), from.cast_signed(), whence) {
        Ok(found) => Ok(found.cast_unsigned()),
        Err(Errno::ENXIO) => Ok(length),
        Err(errno) => Err(errno),
    };
    let mut end = 0;
    while end < length {
        let start = seek(end, Whence::SeekData)?;
        if start >= length {
            break;
        }
        end = seek(start, Whence::SeekHole)?;
        match parts.last_mut() {
            Some(last) if start - last.end < SHORT_HOLE => last.end = end,
            _ => parts.push(start..end),
        }
    }
    Ok(parts)
}

/// Makes the parts of `file` that begin at `pages` large pages of the page cache.
///
/// # Errors
/// The first that fails ends it.
pub fn enlarge(file: &File, pages: &[u64]) -> Result<(), PagesError> {
    let reserved = Mapping::reserve(2 * LARGE)?;
    let place = reserved.address.next_multiple_of(LARGE);
    for page in pages {
        let offset = i64::try_from(*page).map_err(|_| PagesError::Map(Errno::EOVERFLOW.into()))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        // SAFETY: the range lies in the one reserved, which nothing else uses.
        let mapped = unsafe {
            libc::mmap(
                place as *mut libc::c_void,
                LARGE as usize,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(PagesError::Map(io::Error::last_os_error()));
        }
        // SAFETY: exactly the mapping just made; its content does not change.
        if unsafe { libc::madvise(mapped, LARGE as usize, libc::MADV_COLLAPSE) } != 0 {
            return Err(PagesError::Collapse(io::Error::last_os_error()));
        }
    }
    Ok(())
}

/// Addresses for mappings.
struct Mapping {
    address: u64,
    length: u64,
}

impl Mapping {
    fn reserve(length: u64) -> Result<Self, PagesError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address the kernel chooses touches no memory in use.
        let start = unsafe { libc::mmap(ptr::null_mut(), length as usize, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(PagesError::Map(io::Error::last_os_error()));
        }
        Ok(Self {
            address: start as u64,
            length,
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that was reserved, of which nobody keeps a reference.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.length as usize) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(name: &str) -> File {
        let path = std::env::temp_dir().join(format!("bulkhead-pages-{name}-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(path).unwrap();
        file
    }

    #[test]
    fn large_pages_without_a_written_one_are_found() {
        let memory = file("unwritten");
        memory.set_len(16 * LARGE).unwrap();
        // Data from the middle of the first to the end of the fifth, with a short hole in the third; a long one in the
        // seventh.
        let fill = |from: u64, to: u64| memory.write_all_at(&vec![1; (to - from) as usize], from).unwrap();
        fill(LARGE / 2, 2 * LARGE + 4096);
        fill(2 * LARGE + 8192, 5 * LARGE);
        fill(6 * LARGE, 6 * LARGE + 4096);
        fill(7 * LARGE - 4096, 8 * LARGE);
        let found = |list: &[[u64; 2]]| -> Vec<u64> {
            let bytes: Vec<u8> = list
                .iter()
                .flatten()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            let pages = unwritten(&memory, &bytes).unwrap();
            pages.iter().map(|page| page / LARGE).collect()
        };
        assert_eq!(found(&[]), [1, 2, 3, 4, 7]);
        assert_eq!(found(&[[2 * LARGE - 4096, 4096], [4 * LARGE, 4096]]), [2, 3, 7]);
        assert_eq!(found(&[[LARGE, 2 * LARGE + 4096], [u64::MAX, u64::MAX]]), [4, 7]);
    }

    #[test]
    fn the_content_stays_as_it_is() {
        assert_eq!(whole(2 * LARGE + 4096), [0, LARGE]);
        let file = file("enlarge");
        file.set_len(2 * LARGE).unwrap();
        file.write_all_at(b"here", LARGE + 4096).unwrap();
        // Not every kernel does it for every file system.
        if let Err(error) = enlarge(&file, &whole(2 * LARGE)) {
            assert!(matches!(error, PagesError::Collapse(_)), "{error}");
        }
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, LARGE + 4096).unwrap();
        assert_eq!(&bytes, b"here");
    }
}
