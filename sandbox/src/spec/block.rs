//! Block devices of the host that a container asks for: volumes with `volumeMode: Block`.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::{SourceKind, is_bind};
use crate::mount::parse_options;

/// A block device that a container gets as a device node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockVolume {
    /// In the container.
    pub path: PathBuf,
    /// On the host.
    pub source: BlockSource,
    /// The guest may not write.
    pub read_only: bool,
}

/// Which device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockSource {
    /// By its path.
    Path(PathBuf),
    /// By its numbers.
    Number(i64, i64),
}

/// Takes the block devices out of a specification: from `linux.devices`, whose entries stay for the guest to fill
/// in its own numbers, and from bind mounts, which become such entries. The cgroup's rules for them go, because a
/// number of the host's is another device in the guest.
pub(super) fn take(spec: &mut Spec, probe: &impl Fn(&Path) -> io::Result<SourceKind>) -> Vec<BlockVolume> {
    let mut found = Vec::new();
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut devices = linux.devices().clone().unwrap_or_default();
    let mut resources = linux.resources().clone().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    for device in devices.iter().filter(|device| device.typ() == LinuxDeviceType::B) {
        let numbers = (Some(device.major()), Some(device.minor()));
        let is_own = |rule: &LinuxDeviceCgroup| rule.allow() && (rule.major(), rule.minor()) == numbers;
        let mut own = rules.iter().filter(|rule| is_own(rule)).peekable();
        let read_only =
            own.peek().is_some() && own.all(|rule| !rule.access().as_deref().unwrap_or("rwm").contains('w'));
        rules.retain(|rule| !is_own(rule));
        found.push(BlockVolume {
            path: device.path().clone(),
            source: BlockSource::Number(device.major(), device.minor()),
            read_only,
        });
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.retain(|mount| {
        let Some(source) = mount.source().as_ref().filter(|_| is_bind(mount)) else {
            return true;
        };
        if !matches!(probe(source), Ok(SourceKind::BlockDevice)) {
            return true;
        }
        let options = parse_options(mount.options().as_deref().unwrap_or_default());
        let mut device = LinuxDevice::default();
        device
            .set_path(mount.destination().clone())
            .set_typ(LinuxDeviceType::B)
            .set_file_mode(Some(0o660));
        devices.push(device);
        found.push(BlockVolume {
            path: mount.destination().clone(),
            source: BlockSource::Path(source.clone()),
            read_only: options.is_ok_and(|options| options.read_only()),
        });
        false
    });
    if !found.is_empty() {
        resources.set_devices(Some(rules));
        linux.set_devices(Some(devices)).set_resources(Some(resources));
        spec.set_linux(Some(linux)).set_mounts(Some(mounts));
    }
    found
}

/// Path of a block device's node on the host. Links that a device manager makes are not needed.
///
/// # Errors
/// There is no such device, or its node is another one.
pub fn device_path(source: &BlockSource) -> io::Result<PathBuf> {
    let (major, minor) = match source {
        BlockSource::Path(path) => return Ok(path.clone()),
        BlockSource::Number(major, minor) => (*major, *minor),
    };
    let event = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = event.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let path = Path::new("/dev").join(name.ok_or(io::ErrorKind::NotFound)?);
    let node = fs::metadata(&path)?;
    let number = |part: u32| i64::from(part);
    let is_it = node.file_type().is_block_device()
        && number(libc::major(node.rdev())) == major
        && number(libc::minor(node.rdev())) == minor;
    if is_it {
        Ok(path)
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::{Value, json};

    use super::*;

    fn run(value: Value) -> (Value, Vec<BlockVolume>) {
        let mut spec: Spec = serde_json::from_value(value).unwrap();
        let found = take(&mut spec, &|path| {
            Ok(if path.starts_with("/disks") {
                SourceKind::BlockDevice
            } else {
                SourceKind::Directory
            })
        });
        (serde_json::to_value(spec).unwrap(), found)
    }

    #[test]
    fn devices_lose_the_hosts_rules() {
        let (spec, found) = run(json!({"ociVersion": "1.1.0", "linux": {
            "devices": [{"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3},
                        {"path": "/dev/xvdb", "type": "b", "major": 7, "minor": 4}],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 3, "access": "rwm"},
                {"allow": true, "type": "b", "major": 7, "minor": 4, "access": "rm"},
                {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}]}}}));
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].source, BlockSource::Number(7, 3));
        assert!(!found[0].read_only && found[1].read_only);
        assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().len(), 2);
        assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn bind_mounts_of_disks_become_devices() {
        let (spec, found) = run(json!({"ociVersion": "1.1.0", "linux": {}, "mounts": [
            {"destination": "/a", "type": "bind", "source": "/b"},
            {"destination": "/dev/disk", "type": "bind", "source": "/disks/1", "options": ["bind", "ro"]}]}));
        assert_eq!(spec["mounts"].as_array().unwrap().len(), 1);
        assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/disk");
        assert_eq!(found[0].source, BlockSource::Path("/disks/1".into()));
        assert!(found[0].read_only);
    }

    #[test]
    fn without_disks_nothing_changes() {
        let value =
            json!({"ociVersion": "1.1.0", "mounts": [{"destination": "/a", "type": "bind", "source": "/b"}]});
        let before: Spec = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(run(value).0, serde_json::to_value(before).unwrap());
    }

    #[test]
    fn numbers_without_a_device_are_not_found() {
        assert!(device_path(&BlockSource::Number(4095, 1)).is_err());
        assert!(device_path(&BlockSource::Number(-1, -1)).is_err());
    }
}
