//! Disks and their partitions.
//!
//! The VMM numbers its disk slots and gives each disk the serial `slot<N>`. Slots exist from boot on, empty; a
//! disk that the host has just attached may still be on its way when a request names it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType};

/// Unit of offsets and lengths in bytes.
pub const SECTOR: u64 = 512;

/// How long a disk may take to appear.
const APPEAR_LIMIT: Duration = Duration::from_secs(10);

/// When to look at a disk's size again: the kernel announces new disks and changes of size, but not the change from
/// empty to some size. The VMM reports a disk as attached only after it has told the guest, so the first look
/// is nearly always the last.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How long a partition may stay in use after it was unmounted, by a container that is being made and still has a
/// copy of the mount.
const BUSY_LIMIT: Duration = Duration::from_secs(2);

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It never appeared.
    #[error("disk slot {slot} has {size} bytes after {} s, expected {expected}", APPEAR_LIMIT.as_secs())]
    Absent {
        /// Slot number.
        slot: u32,
        /// Size seen last.
        size: u64,
        /// What was waited for.
        expected: Expected,
    },
    /// No notifications of devices.
    #[error("cannot watch devices")]
    Watch(#[source] Errno),
    /// The kernel does not make it read-only, or writable.
    #[error("cannot set who may write to disk slot {slot}")]
    Access {
        /// Slot.
        slot: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The partition cannot be made or deleted.
    #[error("cannot {verb} partition {number} of disk slot {slot}")]
    Partition {
        /// What was tried.
        verb: &'static str,
        /// Slot number.
        slot: u32,
        /// Partition number.
        number: i32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The size a disk must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Exactly this many bytes.
    Exactly(u64),
    /// This many bytes or more.
    AtLeast(u64),
}

impl std::fmt::Display for Expected {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exactly(size) => write!(f, "{size}"),
            Self::AtLeast(size) => write!(f, "at least {size}"),
        }
    }
}

impl Expected {
    fn met(self, size: u64) -> bool {
        match self {
            Self::Exactly(wanted) => size == wanted,
            Self::AtLeast(wanted) => size >= wanted,
        }
    }
}

/// A part of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Number, from 1.
    pub number: i32,
    /// First byte.
    pub offset: u64,
    /// Bytes; 0: to the end of the disk.
    pub length: u64,
}

/// Device node of a disk slot, whatever is in it.
pub fn node(slot: u32) -> Option<PathBuf> {
    find(slot).map(|(name, _)| Path::new("/dev").join(name))
}

/// Waits for a disk, makes the partition if one is given, and returns the device node.
///
/// # Errors
/// The disk does not appear in time, or the range is outside of it or overlaps another.
pub fn open(slot: u32, capacity: u64, partition: Option<&Partition>) -> Result<PathBuf, DiskError> {
    let expected = match (capacity, partition) {
        (0, Some(partition)) => Expected::AtLeast((partition.offset + partition.length).max(SECTOR)),
        (0, None) => Expected::AtLeast(SECTOR),
        (capacity, _) => Expected::Exactly(capacity),
    };
    let (name, size) = wait_for(slot, expected)?;
    let node = Path::new("/dev").join(&name);
    let Some(partition) = partition else {
        return Ok(node);
    };
    let length = match partition.length {
        0 => size.saturating_sub(partition.offset),
        length => length,
    };
    blkpg(
        &node,
        BLKPG_ADD_PARTITION,
        partition.number,
        partition.offset,
        length,
    )
    .map_err(|source| DiskError::Partition {
        verb: "add",
        slot,
        number: partition.number,
        source,
    })?;
    Ok(Path::new("/dev").join(partition_name(&name, partition.number)))
}

/// Says whether a whole disk may be opened for writing: a slot has no such feature of its own, because its disks come
/// and go (virtio 1.2, 5.2.3).
///
/// # Errors
/// The kernel refuses.
pub fn set_read_only(node: &Path, slot: u32, read_only: bool) -> Result<(), DiskError> {
    let set = || -> io::Result<()> {
        let disk = File::open(node)?;
        let value = libc::c_int::from(read_only);
        // SAFETY: the argument is valid for reads.
        Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKROSET, &raw const value) })?;
        Ok(())
    };
    set().map_err(|source| DiskError::Access { slot, source })
}

/// Deletes a partition; one that does not exist is fine.
///
/// # Errors
/// It stays in use.
pub fn delete_partition(slot: u32, number: i32) -> Result<(), DiskError> {
    let Some((name, _)) = find(slot) else {
        return Ok(());
    };
    let node = Path::new("/dev").join(name);
    let start = Instant::now();
    loop {
        match blkpg(&node, BLKPG_DEL_PARTITION, number, 0, 0) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(()),
            // Nothing tells when the last user of a detached mount is gone.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && start.elapsed() < BUSY_LIMIT => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(source) => {
                return Err(DiskError::Partition {
                    verb: "delete",
                    slot,
                    number,
                    source,
                });
            }
        }
    }
}

/// Name of a partition's node: a `p` after names that end in a digit, as the kernel does.
fn partition_name(disk: &str, number: i32) -> String {
    let separator = if disk.ends_with(|c: char| c.is_ascii_digit()) {
        "p"
    } else {
        ""
    };
    format!("{disk}{separator}{number}")
}

/// The disk in a slot and its size in bytes.
fn find(slot: u32) -> Option<(String, u64)> {
    let serial = format!("slot{slot}");
    for entry in fs::read_dir("/sys/block").ok()?.flatten() {
        let path = entry.path();
        if fs::read_to_string(path.join("serial")).is_ok_and(|text| text.trim() == serial) {
            let sectors = fs::read_to_string(path.join("size"))
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()?;
            return Some((
                entry.file_name().into_string().ok()?,
                sectors.saturating_mul(SECTOR),
            ));
        }
    }
    None
}

fn wait_for(slot: u32, expected: Expected) -> Result<(String, u64), DiskError> {
    // Listening before looking: a change in between is not missed.
    let socket = socket::socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .map_err(DiskError::Watch)?;
    socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1)).map_err(DiskError::Watch)?;
    let deadline = Instant::now() + APPEAR_LIMIT;
    loop {
        let size = match find(slot) {
            Some((name, size)) if expected.met(size) => return Ok((name, size)),
            found => found.map_or(0, |(_, size)| size),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(DiskError::Absent { slot, size, expected });
        }
        let timeout = PollTimeout::try_from(left.min(LOOK_AGAIN)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => (),
            Err(errno) => return Err(DiskError::Watch(errno)),
        }
        let mut buffer = [0; 4096];
        while socket::recv(socket.as_raw_fd(), &mut buffer, socket::MsgFlags::empty()).is_ok() {}
    }
}

// Linux, include/uapi/linux/fs.h.
const BLKROSET: libc::c_ulong = 0x125d;

// Linux, include/uapi/linux/blkpg.h.
const BLKPG: libc::c_ulong = 0x1269;
const BLKPG_ADD_PARTITION: libc::c_int = 1;
const BLKPG_DEL_PARTITION: libc::c_int = 2;

#[repr(C)]
struct BlkpgIoctlArg {
    op: libc::c_int,
    flags: libc::c_int,
    datalen: libc::c_int,
    data: *const BlkpgPartition,
}

#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    pno: libc::c_int,
    devname: [u8; 64],
    volname: [u8; 64],
}

fn blkpg(disk: &Path, op: libc::c_int, number: i32, offset: u64, length: u64) -> io::Result<()> {
    let signed = |value: u64| i64::try_from(value).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL));
    let disk = File::open(disk)?;
    let partition = BlkpgPartition {
        start: signed(offset)?,
        length: signed(length)?,
        pno: number,
        devname: [0; 64],
        volname: [0; 64],
    };
    let argument = BlkpgIoctlArg {
        op,
        flags: 0,
        datalen: size_of::<BlkpgPartition>() as libc::c_int,
        data: &raw const partition,
    };
    // SAFETY: the argument and what it points to are valid for reads.
    Errno::result(unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG, &raw const argument) })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_named_as_the_kernel_names_them() {
        assert_eq!(partition_name("vda", 2), "vda2");
        assert_eq!(partition_name("pmem0", 2), "pmem0p2");
    }

    #[test]
    fn sizes() {
        assert!(Expected::AtLeast(512).met(1024) && !Expected::AtLeast(512).met(0));
        assert!(Expected::Exactly(512).met(512) && !Expected::Exactly(512).met(1024));
    }
}
