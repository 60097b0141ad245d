//! Pairs of queues of the guest's interfaces.
//!
//! The driver has as many on as processors are on line when it takes an interface, and its device has no more. Processors that
//! come later get theirs here. None is turned off when a processor goes: it costs nothing, and a frame that is queued there
//! at that moment would stay there.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::chain;
use crate::processors;

/// Interfaces of this network namespace.
const INTERFACES: &str = "/sys/class/net";

/// `SIOCETHTOOL` (linux/sockios.h), and its commands (linux/ethtool.h).
const SIOCETHTOOL: libc::c_ulong = 0x8946;
const GET_CHANNELS: u32 = 0x3c;
const SET_CHANNELS: u32 = 0x3d;

/// `struct ethtool_channels`. A pair of queues of a virtio interface is a combined channel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Channels {
    command: u32,
    max_receive: u32,
    max_transmit: u32,
    max_other: u32,
    max_combined: u32,
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

const _: () = assert!(size_of::<Channels>() == 36);

impl Channels {
    /// What to ask for with so many processors on line; nothing if the interface has that.
    fn with(self, online: u32) -> Option<Self> {
        let combined = online.min(self.max_combined);
        (combined > self.combined).then_some(Self {
            command: SET_CHANNELS,
            combined,
            ..self
        })
    }
}

/// Turns pairs of queues on until each interface has one for each processor that is on line, or all it has. To be called when
/// an interface or a processor has come. What cannot be done is in the log: frames go by the pairs that are on.
pub fn fit() {
    let online = match processors::online() {
        // Most guests have one, and nothing to do.
        Ok(0 | 1) => return,
        Ok(online) => online,
        Err(error) => return log::warn!("{}", chain(&error)),
    };
    let fit_all = || {
        let control = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        for entry in fs::read_dir(INTERFACES)? {
            let name = entry?.file_name();
            if let Err(error) = fit_interface(&control, name.as_bytes(), online) {
                log::warn!("{} keeps its pairs of queues: {error}", name.display());
            }
        }
        io::Result::Ok(())
    };
    if let Err(error) = fit_all() {
        log::warn!("interfaces keep their pairs of queues: {error}");
    }
}

fn fit_interface(control: &OwnedFd, name: &[u8], online: u32) -> io::Result<()> {
    let mut channels = Channels {
        command: GET_CHANNELS,
        ..Channels::default()
    };
    match ethtool(control, name, &mut channels) {
        // It has no such thing, or has just gone.
        Err(Errno::EOPNOTSUPP | Errno::ENODEV) => return Ok(()),
        asked => asked?,
    }
    let Some(mut wanted) = channels.with(online) else {
        return Ok(());
    };
    // The driver waits for the device's answer for ever, with the lock of all interfaces.
    let status = Path::new(INTERFACES)
        .join(OsStr::from_bytes(name))
        .join("device/status");
    if fs::read_to_string(status).is_ok_and(|status| has_failed(&status)) {
        return Err(io::Error::other("its device has failed"));
    }
    Ok(ethtool(control, name, &mut wanted)?)
}

/// Whether a virtio device with this status, as sysfs has it, waits for a reset (`DEVICE_NEEDS_RESET`, virtio 1.2, 2.1).
fn has_failed(status: &str) -> bool {
    let digits = status.trim().trim_start_matches("0x");
    u32::from_str_radix(digits, 16).is_ok_and(|status| status & 64 != 0)
}

/// Carries out a command on an interface.
fn ethtool(control: &OwnedFd, name: &[u8], channels: &mut Channels) -> Result<(), Errno> {
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(channels).cast();
    // SAFETY: the request and the structure it points to outlive the call. The kernel reads and writes as much of that as
    // belongs to both commands, which is all of it.
    Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), SIOCETHTOOL as _, &raw mut request) }).map(drop)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn of(max_combined: u32, combined: u32) -> Channels {
        Channels {
            command: GET_CHANNELS,
            max_combined,
            combined,
            ..Channels::default()
        }
    }

    #[test]
    fn pairs_are_turned_on_up_to_the_processors_and_none_off() {
        let wanted = |max, now, online| of(max, now).with(online).map(|channels| channels.combined);
        assert_eq!(wanted(4, 1, 2), Some(2));
        assert_eq!(wanted(4, 1, 8), Some(4));
        assert_eq!(wanted(4, 2, 3), Some(3));
        for (max, now, online) in [(4, 4, 2), (4, 2, 2), (4, 4, 8), (1, 1, 8), (0, 0, 8)] {
            assert_eq!(wanted(max, now, online), None, "{max} {now} {online}");
        }
        let asked = of(4, 1).with(2).unwrap();
        assert_eq!(
            asked,
            Channels {
                command: SET_CHANNELS,
                ..of(4, 2)
            }
        );
    }

    #[test]
    fn a_failed_device_is_told_by_its_status() {
        assert!(has_failed("0x0000004f\n"));
        for status in ["0x0000000f\n", "0x00000000\n", "", "\n", "0x", "x"] {
            assert!(!has_failed(status), "{status:?}");
        }
    }

    #[test]
    fn an_interface_without_channels_is_left_alone() {
        let control = socket(
            AddressFamily::Inet,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        for name in ["lo", "no-such", "a-name-that-is-far-too-long-for-one"] {
            fit_interface(&control, name.as_bytes(), 2).unwrap();
        }
    }
}
