//! The list of what is mounted, `/proc/self/mountinfo` (proc(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Its number.
    pub id: u64,
    /// Number of the mount it is on.
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: String,
    /// Directory or file of the file system that is mounted.
    pub root: PathBuf,
    /// Where.
    pub point: PathBuf,
}

/// All mounts of this mount namespace.
///
/// # Errors
/// `/proc` is not mounted.
pub fn list() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// Whether something is mounted below `path`, a directory of mount `id`.
#[must_use]
pub fn has_below(mounts: &[MountInfo], id: u64, path: &Path) -> bool {
    mounts
        .iter()
        .any(|mount| mount.parent == id && mount.point != path && mount.point.starts_with(path))
}

pub(super) fn parse(text: &[u8]) -> Vec<MountInfo> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut text = || fields.next().and_then(|field| std::str::from_utf8(field).ok());
    let id = text()?.parse().ok()?;
    let parent = text()?.parse().ok()?;
    let device = text()?.to_owned();
    Some(MountInfo {
        id,
        parent,
        device,
        root: unescape(fields.next()?),
        point: unescape(fields.next()?),
    })
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(mut text: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(text.len());
    while let Some((first, rest)) = text.split_first() {
        let digits = rest.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if *first == b'\\' => {
                path.push(escaped);
                text = &rest[3..];
            }
            _ => {
                path.push(*first);
                text = rest;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}
