//! Devices that come and go at a fixed place of the bus.
//!
//! A place without a device has the virtio device id 0, which the kernel's virtio-mmio driver refuses at boot. It
//! looks again when it is bound by hand, and gives a device up when it is unbound (sysfs, Documentation/driver-api/
//! driver-model/binding.rst).

use std::fs;
use std::io;
use std::path::Path;

/// The virtio-mmio driver in sysfs.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Why the driver did not take or give up a device.
#[derive(Debug, thiserror::Error)]
#[error("cannot {} the device at place {place}", if *.present { "use" } else { "give up" })]
pub struct PlugError {
    /// Place on the bus.
    place: u32,
    present: bool,
    /// Why.
    #[source]
    source: io::Error,
}

/// Has the driver take the device at `place`, or give it up; nothing happens if it has already.
///
/// # Errors
/// There is no such place, or no device at it.
pub fn plug(place: u32, present: bool) -> Result<(), PlugError> {
    plug_at(Path::new(DRIVER), place, present)
}

fn plug_at(driver: &Path, place: u32, present: bool) -> Result<(), PlugError> {
    let name = format!("virtio-mmio.{place}");
    if driver.join(&name).exists() == present {
        return Ok(());
    }
    let file = driver.join(if present { "bind" } else { "unbind" });
    fs::OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut file| io::Write::write_all(&mut file, name.as_bytes()))
        .map_err(|source| PlugError {
            place,
            present,
            source,
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_a_change_is_written() {
        let directory = std::env::temp_dir().join(format!("bulkhead-plug-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap();
        for name in ["bind", "unbind", "virtio-mmio.4"] {
            fs::write(directory.join(name), "").unwrap();
        }
        plug_at(&directory, 4, true).unwrap();
        plug_at(&directory, 5, false).unwrap();
        assert_eq!((read("bind"), read("unbind")), (String::new(), String::new()));
        plug_at(&directory, 5, true).unwrap();
        plug_at(&directory, 4, false).unwrap();
        assert_eq!(read("bind"), "virtio-mmio.5");
        assert_eq!(read("unbind"), "virtio-mmio.4");
        fs::remove_dir_all(&directory).unwrap();
        let error = plug_at(&directory, 4, true).unwrap_err();
        assert!(error.to_string().contains("use the device at place 4"), "{error}");
    }
}
