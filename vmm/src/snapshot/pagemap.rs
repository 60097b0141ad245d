//! What the kernel tells of each page of this process (Linux Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// The page is in memory.
pub const PRESENT: u64 = 1 << 63;
/// It is in swap.
pub const SWAPPED: u64 = 1 << 62;
/// It is a file's. A private copy of one is not.
pub const OF_FILE: u64 = 1 << 61;

/// Entries of the pages from `address` on, `length` bytes of them; both are multiples of [`PAGE`].
///
/// # Errors
/// The file is not this process's pagemap, or cannot be read.
pub fn entries(pagemap: &File, address: u64, length: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; (length / PAGE) as usize * size_of::<u64>()];
    pagemap.read_exact_at(&mut bytes, address / PAGE * size_of::<u64>() as u64)?;
    let words = bytes.as_chunks::<{ size_of::<u64>() }>().0.iter();
    Ok(words.map(|entry| u64::from_ne_bytes(*entry)).collect())
}
