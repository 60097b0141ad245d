//! Finding the writable disks of all mount namespaces, freezing and thawing them.

use std::collections::BTreeSet;
use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::storage::mount::{WritableDisk, writable_disks_in};

// From linux/fs.h; the size in the number is that of an int, which is not passed.
nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);

/// A filesystem, and where it can be reached.
#[derive(Debug)]
struct Target {
    disk: WritableDisk,
    /// Root directory of a process that has it mounted.
    root: PathBuf,
}

/// Freezes every writable filesystem on a disk, the latest mounted first: it may lie on another one. Returns their
/// mount points.
pub fn freeze_all() -> Result<Vec<String>, String> {
    // What is not on a disk of the guest: files of the shared tree.
    nix::unistd::sync();
    let mut frozen: Vec<(OwnedFd, String)> = Vec::new();
    for target in targets().map_err(|error| format!("cannot read what is mounted: {error}"))? {
        let name = target.disk.point.display().to_string();
        let result = open(&target).and_then(|fd| {
            // SAFETY: the argument is not used.
            unsafe { fifreeze(fd.as_raw_fd(), std::ptr::null_mut()) }?;
            Ok(fd)
        });
        match result {
            Ok(fd) => frozen.push((fd, name)),
            // Gone since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => (),
            Err(error) => {
                for (fd, _) in frozen.iter().rev() {
                    // SAFETY: as above.
                    let _ = unsafe { fithaw(fd.as_raw_fd(), std::ptr::null_mut()) };
                }
                let error = match error.raw_os_error() {
                    Some(libc::EBUSY) => "it is frozen already, not by this agent".to_owned(),
                    _ => error.to_string(),
                };
                return Err(format!("cannot freeze {name} ({}): {error}", target.disk.source));
            }
        }
    }
    Ok(frozen.into_iter().map(|(_, name)| name).collect())
}

/// Thaws every writable filesystem on a disk, the earliest mounted first. One that is not frozen is left alone.
pub fn thaw_all() -> Result<(), String> {
    let mut errors = Vec::new();
    let targets = targets().map_err(|error| format!("cannot read what is mounted: {error}"))?;
    for target in targets.iter().rev() {
        let result = open(target).and_then(|fd| {
            // SAFETY: the argument is not used.
            match unsafe { fithaw(fd.as_raw_fd(), std::ptr::null_mut()) } {
                Ok(_) | Err(Errno::EINVAL) => Ok(()),
                Err(errno) => Err(errno.into()),
            }
        });
        if let Err(error) = result
            && error.kind() != io::ErrorKind::NotFound
        {
            errors.push(format!("cannot thaw {}: {error}", target.disk.point.display()));
        }
    }
    if errors.is_empty() {
        Ok(())
    } else {
        Err(errors.join("; "))
    }
}

/// Every writable disk once: those that the agent has mounted, then those that containers have in their own mount
/// namespaces. Never the root: the agent runs from it, and a guest's is a read-only image.
fn targets() -> io::Result<Vec<Target>> {
    let mut devices = BTreeSet::from([fs::metadata("/")?.dev()]);
    let mut targets = Vec::new();
    let mut add = |process: &Path| -> io::Result<()> {
        let text = fs::read_to_string(process.join("mountinfo"))?;
        for disk in writable_disks_in(&text) {
            if devices.insert(disk.device) {
                let root = process.join("root");
                targets.push(Target { disk, root });
            }
        }
        Ok(())
    };
    add(Path::new("/proc/self"))?;
    let mut namespaces: BTreeSet<OsString> = BTreeSet::new();
    let own = fs::read_link("/proc/self/ns/mnt")?;
    namespaces.insert(own.into_os_string());
    for entry in fs::read_dir("/proc")?.flatten() {
        if !entry.file_name().as_bytes().iter().all(u8::is_ascii_digit) {
            continue;
        }
        // A process that ends meanwhile has nothing more to tell.
        if let Ok(namespace) = fs::read_link(entry.path().join("ns/mnt"))
            && namespaces.insert(namespace.into_os_string())
        {
            let _ = add(&entry.path());
        }
    }
    Ok(targets)
}

/// Opens the mount point for ioctl(2). In a container's namespace its processes can put something else in the way:
/// no symbolic link is followed, and what is opened must be on the device.
fn open(target: &Target) -> io::Result<OwnedFd> {
    let root = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(&target.root)?;
    let point = CString::new(target.disk.point.as_os_str().as_bytes())?;
    // SAFETY: zero is a value of every field.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_SYMLINKS;
    // SAFETY: path and structure are valid for reads while borrowed.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_raw_fd(),
            point.as_ptr(),
            &raw const how,
            size_of::<libc::open_how>(),
        )
    };
    let fd = Errno::result(i32::try_from(fd).unwrap_or(-1))?;
    // SAFETY: the kernel has just made this descriptor for us.
    let place = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let metadata = place.metadata()?;
    let usual = metadata.is_dir() || metadata.is_file();
    if metadata.dev() != target.disk.device || !usual {
        return Err(io::ErrorKind::NotFound.into());
    }
    let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
    Ok(file.into())
}
