//! One request of a block device (virtio 1.2, 5.2.6).

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::{DiskImage, SECTOR_SIZE};
use super::{MAX_RANGE_SECTORS, MAX_RANGES, SEG_MAX, SIZE_MAX};
use crate::memory::GuestMemory;
use crate::virtio::DeviceError;
use crate::virtio::queue::Chain;

/// Type, reserved field and sector.
const HEADER_SIZE: usize = 16;

/// Sector, number of sectors and flags of a discard or write-zeroes range.
const RANGE_SIZE: usize = 16;

/// Why a request is answered with another status than OK.
enum Failure {
    Io,
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Self::Unsupported,
            _ => Self::Io,
        }
    }
}

/// A request without its header and status.
struct Request<'a> {
    memory: &'a GuestMemory,
    chain: &'a Chain,
    sector: u64,
    /// Bytes from the driver.
    data_out: usize,
    /// Bytes to the driver.
    data_in: usize,
}

/// Carries out the request in `chain` and returns the number of bytes written to it.
///
/// # Errors
/// There is no room for a status, or no whole header: the request cannot be answered.
pub(super) fn serve(
    memory: &GuestMemory,
    chain: &Chain,
    disk: Option<&DiskImage>,
    slot: u32,
) -> Result<u32, DeviceError> {
    let header: [u8; HEADER_SIZE] = chain.read_obj(memory, 0)?;
    let [kind, _, low, high] = split(&header);
    let Some(data_in) = chain.writable_len().checked_sub(1) else {
        return Err(DeviceError::Protocol("block request without room for a status"));
    };
    let request = Request {
        memory,
        chain,
        sector: u64::from(low) | u64::from(high) << 32,
        data_out: chain.readable_len() - HEADER_SIZE,
        data_in,
    };
    let result = match kind {
        VIRTIO_BLK_T_GET_ID => request.identify(slot),
        VIRTIO_BLK_T_IN
        | VIRTIO_BLK_T_OUT
        | VIRTIO_BLK_T_FLUSH
        | VIRTIO_BLK_T_DISCARD
        | VIRTIO_BLK_T_WRITE_ZEROES => disk
            .ok_or(Failure::Io)
            .and_then(|disk| request.transfer(kind, disk)),
        _ => Err(Failure::Unsupported),
    };
    let status = match result {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(Failure::Io) => VIRTIO_BLK_S_IOERR,
        Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
    };
    chain.write_at(memory, data_in, &[status as u8])?;
    // The status is the last byte, so everything before it counts, whatever it holds.
    Ok(chain.writable_len() as u32)
}

impl Request<'_> {
    fn transfer(&self, kind: u32, disk: &DiskImage) -> Result<(), Failure> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let offset = self.data_range(disk, self.data_in)?;
                Ok(disk.read(
                    offset,
                    vectors(self.chain.write_vectors(self.memory, 0, self.data_in))?,
                )?)
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.data_range(disk, self.data_out)?;
                let data = vectors(self.chain.read_vectors(self.memory, HEADER_SIZE, self.data_out))?;
                Ok(disk.write(offset, data)?)
            }
            VIRTIO_BLK_T_FLUSH => Ok(disk.flush()?),
            _ => self.zero_ranges(kind, disk),
        }
    }

    /// Byte offset of the request's data, checked to be whole sectors on the disk, and no more than a driver
    /// may ask for.
    fn data_range(&self, disk: &DiskImage, len: usize) -> Result<u64, Failure> {
        let too_long = len as u64 > u64::from(SEG_MAX) * u64::from(SIZE_MAX);
        if too_long || !(len as u64).is_multiple_of(SECTOR_SIZE) {
            return Err(Failure::Io);
        }
        Ok(disk.range(self.sector, len as u64)?)
    }

    fn zero_ranges(&self, kind: u32, disk: &DiskImage) -> Result<(), Failure> {
        let count = self.data_out / RANGE_SIZE;
        if count == 0 || !self.data_out.is_multiple_of(RANGE_SIZE) || count > MAX_RANGES as usize {
            return Err(Failure::Io);
        }
        for index in 0..count {
            let offset = HEADER_SIZE + index * RANGE_SIZE;
            let range: [u8; RANGE_SIZE] = self
                .chain
                .read_obj(self.memory, offset)
                .map_err(|_| Failure::Io)?;
            let [low, high, sectors, flags] = split(&range);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            // Reserved flags, and the unmap flag of a discard, are not supported: virtio 1.2, 5.2.6.2.
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || unmap && kind == VIRTIO_BLK_T_DISCARD {
                return Err(Failure::Unsupported);
            }
            if sectors == 0 || sectors > MAX_RANGE_SECTORS {
                return Err(Failure::Io);
            }
            let len = u64::from(sectors) * SECTOR_SIZE;
            let offset = disk.range(u64::from(low) | u64::from(high) << 32, len)?;
            if kind == VIRTIO_BLK_T_DISCARD {
                disk.discard(offset, len)?;
            } else {
                disk.write_zeroes(offset, len, unmap)?;
            }
        }
        Ok(())
    }

    fn identify(&self, slot: u32) -> Result<(), Failure> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let text = format!("slot{slot}");
        id[..text.len()].copy_from_slice(text.as_bytes());
        if self.data_in < id.len() {
            return Err(Failure::Io);
        }
        self.chain.write_at(self.memory, 0, &id).map_err(|_| Failure::Io)
    }
}

fn vectors<T>(result: Result<T, DeviceError>) -> Result<T, Failure> {
    result.map_err(|_| Failure::Io)
}

fn split(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    [0, 1, 2, 3].map(|index| u32::from_le_bytes(words[index]))
}
