//! The memory file of a snapshot.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::pagemap::{self, PRESENT, SWAPPED};
use crate::memory::{GuestMemory, extents};

/// Bytes looked at in one go.
const CHUNK: usize = 1 << 20;

/// The unit of holes in bytes.
const PAGE: usize = pagemap::PAGE as usize;

/// Why guest memory could not be written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryFileError {
    /// Reading guest memory.
    #[error("Cannot read guest memory")]
    Read(#[source] vm_memory::GuestMemoryError),
    /// Looking for memory that was touched.
    #[error("Cannot read the pagemap of this process")]
    Pagemap(#[source] io::Error),
    /// Looking for data in the file that memory came from.
    #[error("Cannot look for data in the memory file of this VM")]
    Origin(#[source] Errno),
    /// Writing the file.
    #[error("Cannot write the memory file")]
    Write(#[source] io::Error),
}

/// Guest memory to be written.
#[derive(Debug)]
pub struct Source<'a> {
    /// The memory.
    pub memory: &'a GuestMemory,
    /// Pagemap of this process: what was never touched is not read, which would make it take memory.
    pub pagemap: &'a File,
    /// The memory file that the VM was made from, if it was: memory that was not touched is as in it.
    pub origin: Option<&'a File>,
}

impl Source<'_> {
    /// Writes `ranges` (guest-physical start, length in bytes) one behind the other into `file`, which is empty. Pages
    /// of zeroes become holes.
    ///
    /// # Errors
    /// [`MemoryFileError`].
    pub fn write(&self, ranges: &[(GuestAddress, u64)], file: &File) -> Result<(), MemoryFileError> {
        let mut buffer = vec![0; CHUNK];
        let mut wanted = Vec::new();
        let mut offset = 0;
        for (start, length) in ranges {
            let mut done = 0;
            while done < *length {
                let size = (length - done).min(CHUNK as u64) as usize;
                let address = GuestAddress(start.0 + done);
                self.find(address, offset + done, size, &mut wanted)?;
                for run in runs(&wanted) {
                    let chunk = &mut buffer[..run.len() * PAGE];
                    let skipped = (run.start * PAGE) as u64;
                    self.memory
                        .read_slice(chunk, GuestAddress(address.0 + skipped))
                        .map_err(MemoryFileError::Read)?;
                    write_pages(chunk, offset + done + skipped, file).map_err(MemoryFileError::Write)?;
                }
                done += size as u64;
            }
            offset += length;
        }
        // The last byte gives the file its length.
        if let Some(last) = offset.checked_sub(1) {
            let mut byte = [0];
            if file.read_at(&mut byte, last).map_err(MemoryFileError::Write)? == 0 {
                file.write_all_at(&byte, last).map_err(MemoryFileError::Write)?;
            }
        }
        Ok(())
    }

    /// Which pages of `size` bytes at `address`, which are at `offset` in the files, may be other than zero.
    fn find(
        &self,
        address: GuestAddress,
        offset: u64,
        size: usize,
        wanted: &mut Vec<bool>,
    ) -> Result<(), MemoryFileError> {
        let host = self.memory.get_host_address(address);
        let host = host.map_err(MemoryFileError::Read)? as u64;
        let entries = pagemap::entries(self.pagemap, host, size as u64).map_err(MemoryFileError::Pagemap)?;
        wanted.clear();
        wanted.extend(entries.iter().map(|entry| entry & (PRESENT | SWAPPED) != 0));
        if let Some(origin) = self.origin {
            let end = offset + size as u64;
            for data in extents(origin, offset, end).map_err(MemoryFileError::Origin)? {
                let page = |at: u64| ((at - offset) / pagemap::PAGE) as usize;
                wanted[page(data.start)..page(data.end)].fill(true);
            }
        }
        Ok(())
    }
}

/// Runs of `true`.
fn runs(wanted: &[bool]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next + wanted[next..].iter().position(|page| *page)?;
        let length = wanted[start..].iter().take_while(|page| **page).count();
        next = start + length;
        Some(start..next)
    })
}

/// Writes the pages of `chunk` that are not all zero, neighbours in one go.
fn write_pages(chunk: &[u8], offset: u64, file: &File) -> io::Result<()> {
    let mut run = 0..0;
    for (index, page) in chunk.chunks(PAGE).enumerate() {
        let start = index * PAGE;
        if page.iter().any(|byte| *byte != 0) {
            if run.end != start {
                file.write_all_at(&chunk[run.clone()], offset + run.start as u64)?;
                run.start = start;
            }
            run.end = start + page.len();
        }
    }
    file.write_all_at(&chunk[run.clone()], offset + run.start as u64)
}
