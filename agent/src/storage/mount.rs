//! mount(2), its options, and the list of what is mounted.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};

/// A mount or unmount that failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// mount(2).
    #[error("cannot mount {source_name} on {} as {kind}", target.display())]
    Mount {
        /// Device or tag.
        source_name: String,
        /// Mount point.
        target: PathBuf,
        /// Filesystem type.
        kind: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// umount(2).
    #[error("cannot unmount {}", target.display())]
    Unmount {
        /// Mount point.
        target: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// Mounts a filesystem.
///
/// # Errors
/// Those of mount(2).
pub fn mount(source: &str, target: &Path, kind: &str, flags: MsFlags, data: &str) -> Result<(), MountError> {
    let data = (!data.is_empty()).then_some(data);
    nix::mount::mount(Some(source), target, Some(kind), flags, data).map_err(|errno| MountError::Mount {
        source_name: source.into(),
        target: target.into(),
        kind: kind.into(),
        source: errno,
    })
}

/// Unmounts a filesystem, when its last user is gone if it is busy. Nothing mounted there is fine.
///
/// # Errors
/// Those of umount(2).
pub fn unmount(target: &Path) -> Result<(), MountError> {
    let result = match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
        Err(Errno::EBUSY) => {
            log::warn!("{} is busy and unmounted later", target.display());
            umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
        }
        result => result,
    };
    match result {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        Err(source) => Err(MountError::Unmount {
            target: target.into(),
            source,
        }),
    }
}

/// Mount points at or below a directory, the latest first.
///
/// # Errors
/// `/proc` is not mounted.
pub fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(points(&text)
        .filter(|point| point.starts_with(directory))
        .collect())
}

/// Writable filesystems on disks, the latest mount first.
///
/// # Errors
/// `/proc` is not mounted.
pub fn writable_disks() -> io::Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(writable_disks_in(&text).map(|disk| disk.point).collect())
}

/// A mount of a writable filesystem on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritableDisk {
    /// Number of the filesystem, as stat(2) gives it.
    pub device: u64,
    /// Its node.
    pub source: String,
    /// Where.
    pub point: PathBuf,
}

/// The writable disks in a mountinfo file (proc(5)), the latest mount first.
pub fn writable_disks_in(mountinfo: &str) -> impl Iterator<Item = WritableDisk> {
    mountinfo.lines().rev().filter_map(writable_disk)
}

fn writable_disk(line: &str) -> Option<WritableDisk> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = after.split(' ');
    let source = fields.nth(1)?;
    let options = fields.next()?;
    if !source.starts_with("/dev/") || !options.split(',').any(|option| option == "rw") {
        return None;
    }
    let mut fields = before.split(' ');
    let (major, minor) = fields.nth(2)?.split_once(':')?;
    Some(WritableDisk {
        device: libc::makedev(major.parse().ok()?, minor.parse().ok()?),
        source: source.to_owned(),
        point: fields.nth(1).map(unescape)?,
    })
}

/// The mount points of a mountinfo file (proc(5)), the latest first.
fn points(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    mountinfo
        .lines()
        .rev()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let digits = bytes
            .get(at + 1..at + 4)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if *byte == b'\\' => {
                path.push(escaped);
                at += 4;
            }
            _ => {
                path.push(*byte);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(path))
}

/// Splits mount options, as in fstab(5), into flags and the filesystem's own.
pub fn parse_options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options.iter().flat_map(|options| options.split(',')) {
        let (flag, set) = match option {
            "" | "defaults" => continue,
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            own => {
                data.push(own);
                continue;
            }
        };
        flags.set(flag, set);
    }
    (flags, data.join(","))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOUNTINFO: &str = "\
22 1 259:0 / / ro,relatime - erofs /dev/root ro
30 22 0:25 / /run rw - tmpfs tmpfs rw
31 30 254:1 / /run/bulkhead/v\\040one rw,relatime - ext4 /dev/vda1 rw,discard
32 30 254:16 / /run/bulkhead/c/l0 ro - erofs /dev/vdb ro
33 32 0:30 / /run/bulkhead/c/l0/x rw - tmpfs tmpfs rw
";

    #[test]
    fn latest_mounts_come_first() {
        let below: Vec<_> = points(MOUNTINFO)
            .filter(|p| p.starts_with("/run/bulkhead/c"))
            .collect();
        assert_eq!(
            below,
            [Path::new("/run/bulkhead/c/l0/x"), Path::new("/run/bulkhead/c/l0")]
        );
        assert_eq!(points(MOUNTINFO).nth(2), Some("/run/bulkhead/v one".into()));
    }

    #[test]
    fn writable_disks_are_told_from_the_rest() {
        let found: Vec<_> = writable_disks_in(MOUNTINFO).collect();
        let disk = WritableDisk {
            device: libc::makedev(254, 1),
            source: "/dev/vda1".into(),
            point: "/run/bulkhead/v one".into(),
        };
        assert_eq!(found, [disk]);
    }

    #[test]
    fn options_split_into_flags_and_data() {
        let options = [
            "ro,noatime".to_owned(),
            "rw".into(),
            "noload".into(),
            "commit=5".into(),
        ];
        assert_eq!(
            parse_options(&options),
            (MsFlags::MS_NOATIME, "noload,commit=5".into())
        );
    }

    proptest! {
        #[test]
        fn any_text_parses(text in "[\\\\0-9a /-]{0,60}") {
            unescape(&text);
            points(&text).count();
            writable_disks_in(&text).count();
        }
    }
}
