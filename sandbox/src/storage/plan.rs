//! What a list of mounts means as a root file system.

use super::*;
use crate::mount::parse_options;

/// File systems the guest mounts itself from a disk.
const DISK_TYPES: [&str; 2] = ["ext4", "xfs"];

/// How a root file system reaches the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootPlan {
    /// Mounted on the host, in this order, and shared.
    Mounts(Vec<Mount>),
    /// A disk that holds it.
    Disk(DiskPlan),
    /// EROFS images, topmost first, joined by an overlay in the guest.
    Layers {
        /// Image files.
        lower: Vec<PathBuf>,
        /// Holds what is written; absent: guest memory.
        upper: Option<DiskPlan>,
    },
}

/// A disk with one file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    /// Regular file or block device.
    pub source: PathBuf,
    /// Type of the file system.
    pub kind: String,
    /// Options for the guest's mount.
    pub options: Vec<String>,
    /// The guest may not write.
    pub read_only: bool,
}

/// Decides how `mounts` reach the guest; without any, `root` (absolute) is shared as it is, and writable: a
/// read-only root file system becomes so in the guest, after its mount points have been made.
///
/// # Errors
/// [`StorageError::Root`] for a list that makes no sense.
pub fn plan_root(mounts: &[Mount], root: &Path) -> Result<RootPlan, StorageError> {
    match mounts {
        [] => Ok(RootPlan::Mounts(vec![Mount {
            kind: "bind".into(),
            source: root
                .to_str()
                .ok_or_else(|| StorageError::Root("root.path is not UTF-8".into()))?
                .into(),
            target: String::new(),
            options: vec!["rbind".into(), "rw".into()],
        }])),
        [single] => plan_single(single),
        list if list.iter().any(|mount| mount.kind == "erofs") => plan_layers(list),
        list => Ok(RootPlan::Mounts(list.to_vec())),
    }
}

fn plan_single(single: &Mount) -> Result<RootPlan, StorageError> {
    if single.kind == "erofs" {
        return Ok(RootPlan::Layers {
            lower: vec![PathBuf::from(&single.source)],
            upper: None,
        });
    }
    match plan_disk(single)? {
        Some(disk) => Ok(RootPlan::Disk(disk)),
        None => Ok(RootPlan::Mounts(vec![single.clone()])),
    }
}

/// A mount of a disk: ext4 or XFS from a block device or a file with the `loop` option.
fn plan_disk(request: &Mount) -> Result<Option<DiskPlan>, StorageError> {
    let kind = request.kind.rsplit('/').next().unwrap_or_default();
    if !DISK_TYPES.contains(&kind) {
        return Ok(None);
    }
    let parsed = parse_options(&request.options)?;
    let is_device =
        fs::metadata(&request.source).is_ok_and(|metadata| metadata.file_type().is_block_device());
    if !parsed.is_loop && !is_device {
        return Ok(None);
    }
    let read_only = parsed.read_only();
    let mut options = parsed.data;
    if kind == "xfs" && !options.iter().any(|option| option == "nouuid") {
        // Snapshots of one device share its identifier, and XFS refuses the second.
        options.push("nouuid".into());
    }
    Ok(Some(DiskPlan {
        source: PathBuf::from(&request.source),
        kind: kind.into(),
        options,
        read_only,
    }))
}

/// EROFS layers, maybe a writable disk before them, and the overlay that names them by number:
/// `lowerdir={{ overlay 1 3 }}`, `{{ mount 1 }}`, `upperdir={{ mount 0 }}/upper`.
fn plan_layers(list: &[Mount]) -> Result<RootPlan, StorageError> {
    let bad = |what: &str| StorageError::Root(what.to_owned());
    let (top, parts) = list.split_last().ok_or_else(|| bad("no mounts"))?;
    let is_overlay = top.kind.rsplit('/').next() == Some("overlay");
    let is_bind = top.kind.rsplit('/').next() == Some("bind");
    let numbers = if is_overlay {
        let lower = option_value(top, "lowerdir").ok_or_else(|| bad("overlay without lowerdir"))?;
        template_numbers(lower).ok_or_else(|| bad("lowerdir does not name the layers"))?
    } else if is_bind {
        template_numbers(&top.source).ok_or_else(|| bad("the last mount does not name a layer"))?
    } else {
        return Err(bad("layers without an overlay"));
    };
    let mut lower = Vec::new();
    for number in numbers {
        match parts.get(number) {
            Some(mount) if mount.kind == "erofs" => lower.push(PathBuf::from(&mount.source)),
            _ => return Err(bad("lowerdir names something that is not an EROFS layer")),
        }
    }
    let upper = match option_value(top, "upperdir") {
        None => None,
        Some(text) => {
            let number = template_numbers(text).and_then(|numbers| numbers.first().copied()).ok_or_else(|| {
                bad(
                    "EROFS layers with a writable directory of the host; set the snapshotter's default_size, \
                     so that the writable layer is a disk",
                )
            })?;
            let mount = parts.get(number).ok_or_else(|| bad("upperdir names no mount"))?;
            Some(plan_disk(mount)?.ok_or_else(|| bad("upperdir is not on a disk"))?)
        }
    };
    Ok(RootPlan::Layers { lower, upper })
}

fn option_value<'a>(mount: &'a Mount, key: &str) -> Option<&'a str> {
    mount
        .options
        .iter()
        .find_map(|option| option.strip_prefix(key)?.strip_prefix('='))
}

/// The mount numbers a template names, in its order.
pub(super) fn template_numbers(text: &str) -> Option<Vec<usize>> {
    let inner = text.split_once("{{")?.1.split_once("}}")?.0;
    let words: Vec<&str> = inner.split_whitespace().collect();
    match words.as_slice() {
        ["mount", number] => Some(vec![number.parse().ok()?]),
        ["overlay", first, last] => {
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            // A span is bounded so that a wild number cannot make a huge list.
            if first.abs_diff(last) > 1024 {
                return None;
            }
            Some(if first <= last {
                (first..=last).collect()
            } else {
                (last..=first).rev().collect()
            })
        }
        _ => None,
    }
}
