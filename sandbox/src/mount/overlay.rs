//! Overlays of so many layers that their paths do not fit the data of a mount.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::mount;

use super::{DATA_LIMIT, Mount, MountError, ParsedOptions, mount_error};

/// Mounts an overlay whose options do not fit a page: in the lower directories' common parent, with
/// relative paths. The working directory is changed on a thread of its own.
pub(super) fn mount_long(request: &Mount, target: &Path, parsed: &ParsedOptions) -> Result<(), MountError> {
    let too_long = || MountError::OptionsTooLong {
        target: target.into(),
        length: parsed.data_string().len(),
    };
    if request.kind != "overlay" {
        return Err(too_long());
    }
    let (parent, data) = shorten_lower_dirs(&parsed.data).ok_or_else(too_long)?;
    if data.len() > DATA_LIMIT {
        return Err(too_long());
    }
    let (source, flags) = (request.source.clone(), parsed.flags);
    let owned_target = target.to_path_buf();
    let result = std::thread::scope(|scope| {
        let worker = std::thread::Builder::new().spawn_scoped(scope, move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(&parent)?;
            mount(
                Some(source.as_str()),
                &owned_target,
                Some("overlay"),
                flags,
                Some(data.as_str()),
            )
        });
        worker.map(|thread| thread.join().unwrap_or(Err(Errno::EIO)))
    });
    result
        .map_err(MountError::Thread)?
        .map_err(|errno| mount_error(&request.source, &request.kind, target, errno))
}

/// The common parent of the lower directories, and the data with them relative to it.
pub(super) fn shorten_lower_dirs(data: &[String]) -> Option<(PathBuf, String)> {
    let lower = data.iter().find_map(|option| option.strip_prefix("lowerdir="))?;
    let dirs: Vec<&Path> = lower.split(':').map(Path::new).collect();
    let mut common = dirs.first()?.parent()?;
    while !dirs.iter().all(|dir| dir.starts_with(common)) {
        common = common.parent()?;
    }
    let relative: Option<Vec<&str>> = dirs
        .iter()
        .map(|dir| dir.strip_prefix(common).ok().and_then(Path::to_str))
        .collect();
    let relative = format!("lowerdir={}", relative?.join(":"));
    let shortened: Vec<&str> = data
        .iter()
        .map(|option| {
            if option.starts_with("lowerdir=") {
                relative.as_str()
            } else {
                option.as_str()
            }
        })
        .collect();
    Some((common.to_path_buf(), shortened.join(",")))
}
