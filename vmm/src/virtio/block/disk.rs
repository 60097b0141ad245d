//! A disk made of raw files, one behind the other.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use crate::virtio::queue::{IoVecs, MAX_SEGMENTS};

/// Bytes of a sector, whatever the block size of the medium (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// Zeroes written at a time where a file system cannot zero a range itself.
const ZEROES: &[u8] = &[0; 64 << 10];

/// Why files do not make a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// No file at all.
    #[error("Disk has no file")]
    NoFile,
    /// More than one file, and not read-only.
    #[error("A disk of several files must be read-only")]
    WritableConcatenation,
    /// Neither a regular file nor a block device.
    #[error("File {0} of the disk is neither a regular file nor a block device")]
    FileType(usize),
    /// The size of a file is not known.
    #[error("Cannot get the size of a file of the disk")]
    Size(#[source] io::Error),
}

/// A disk.
#[derive(Debug)]
pub struct DiskImage {
    parts: Vec<Part>,
    sectors: u64,
    read_only: bool,
}

/// The bytes `start..start + len` of the disk.
#[derive(Debug)]
struct Part {
    file: File,
    start: u64,
    /// Whole sectors.
    len: u64,
    /// Bytes of `len` that are in the file; the others, less than a sector at the very end, read as zero.
    stored: u64,
}

impl DiskImage {
    /// Joins `files`. Of all but the last only whole sectors are used; the last is filled up with zeroes to a
    /// whole sector.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn new(files: Vec<File>, read_only: bool) -> Result<Self, DiskError> {
        let last = files.len().checked_sub(1).ok_or(DiskError::NoFile)?;
        if last > 0 && !read_only {
            return Err(DiskError::WritableConcatenation);
        }
        let mut parts = Vec::with_capacity(files.len());
        let mut start = 0;
        for (index, mut file) in files.into_iter().enumerate() {
            let kind = file.metadata().map_err(DiskError::Size)?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                return Err(DiskError::FileType(index));
            }
            // Also gives the size of a block device, which `stat` does not. The offset is not used: all IO
            // is positioned.
            let size = file.seek(SeekFrom::End(0)).map_err(DiskError::Size)?;
            let whole = size - size % SECTOR_SIZE;
            let len = if index == last {
                size.next_multiple_of(SECTOR_SIZE)
            } else {
                whole
            };
            parts.push(Part {
                file,
                start,
                len,
                stored: size.min(len),
            });
            start += len;
        }
        Ok(Self {
            parts,
            sectors: start / SECTOR_SIZE,
            read_only,
        })
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes fail.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Byte offset of a range of whole sectors.
    ///
    /// # Errors
    /// The range is not on the disk.
    pub(super) fn range(&self, sector: u64, bytes: u64) -> io::Result<u64> {
        let end = sector.checked_add(bytes.div_ceil(SECTOR_SIZE));
        if end.is_none_or(|end| end > self.sectors) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(sector * SECTOR_SIZE)
    }

    /// Reads the bytes at `offset`, which must be on the disk.
    pub(super) fn read(&self, offset: u64, mut into: IoVecs<'_>) -> io::Result<()> {
        self.for_each_part(offset, into.len() as u64, |part, offset, len| {
            let stored = part.stored.saturating_sub(offset).min(len);
            transfer(into.split_to(stored as usize), |vectors, done| {
                // SAFETY: the vectors lie in guest memory, mapped while `into` lives; `preadv` takes at most
                // `MAX_SEGMENTS` of them.
                unsafe {
                    libc::preadv64(
                        part.file.as_raw_fd(),
                        vectors.as_ptr(),
                        vectors.len() as libc::c_int,
                        (offset + done) as i64,
                    )
                }
            })?;
            into.split_to((len - stored) as usize).zero();
            Ok(())
        })
    }

    /// Writes the bytes at `offset`, which must be on the disk.
    pub(super) fn write(&self, offset: u64, mut from: IoVecs<'_>) -> io::Result<()> {
        self.check_writable()?;
        self.for_each_part(offset, from.len() as u64, |part, offset, len| {
            transfer(from.split_to(len as usize), |vectors, done| {
                // SAFETY: as for reads.
                unsafe {
                    libc::pwritev64(
                        part.file.as_raw_fd(),
                        vectors.as_ptr(),
                        vectors.len() as libc::c_int,
                        (offset + done) as i64,
                    )
                }
            })
        })
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.parts.iter().try_for_each(|part| part.file.sync_data())
    }

    /// Tells the files that the range is not needed. What it reads as afterwards is not specified, here zero.
    pub(super) fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.for_each_part(offset, len, |part, offset, len| {
            fallocate(
                &part.file,
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                offset,
                len,
            )
        })
    }

    /// Zeroes the range; it stays allocated unless `unmap`.
    pub(super) fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_writable()?;
        let how = if unmap {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        self.for_each_part(offset, len, |part, offset, len| {
            match fallocate(&part.file, how | libc::FALLOC_FL_KEEP_SIZE, offset, len) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    write_zeroes(&part.file, offset, len)
                }
                result => result,
            }
        })
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(())
    }

    /// Calls `each` with the files under a range of the disk, and offset and length in each.
    fn for_each_part(
        &self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(&Part, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let first = self.parts.partition_point(|part| part.start + part.len <= offset);
        for part in &self.parts[first..] {
            if part.start >= end {
                break;
            }
            let from = offset.max(part.start);
            let to = end.min(part.start + part.len);
            each(part, from - part.start, to - from)?;
        }
        Ok(())
    }
}

/// Repeats a vectored call until all bytes went through. `call` gets the vectors left and the number of
/// bytes done.
fn transfer(
    mut vectors: IoVecs<'_>,
    mut call: impl FnMut(&[libc::iovec], u64) -> libc::ssize_t,
) -> io::Result<()> {
    let mut done = 0;
    while !vectors.is_empty() {
        let batch = vectors.as_slice();
        match usize::try_from(call(&batch[..batch.len().min(MAX_SEGMENTS)], done)) {
            // The file is shorter than it was when the disk was made.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                done += count as u64;
                vectors.advance(count);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    loop {
        // SAFETY: no memory is passed.
        let result = unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset as i64, len as i64) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn write_zeroes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    while len > 0 {
        let chunk = len.min(ZEROES.len() as u64);
        file.write_all_at(&ZEROES[..chunk as usize], offset)?;
        offset += chunk;
        len -= chunk;
    }
    Ok(())
}
