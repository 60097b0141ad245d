//! The end of the guest.

use std::arch::asm;

use bulkhead_protocol::control::{POWER_OFF, POWER_PORT};
use nix::sys::reboot::{RebootMode, reboot};

use crate::storage::mount::{unmount, writable_disks};

/// Writes everything back and unmounts writable disks.
pub fn flush() {
    nix::unistd::sync();
    for point in writable_disks().unwrap_or_default() {
        if let Err(error) = unmount(&point) {
            log::error!("{}", crate::error::chain(&error));
        }
    }
}

/// Ends the guest. Returns only if nothing works.
pub fn off() {
    // SAFETY: gives this process access to one I/O port and writes a byte to it. x86 without ACPI has no
    // other way to switch off; the VMM takes the byte as the order to end the VM.
    unsafe {
        if libc::ioperm(POWER_PORT.into(), 1, 1) == 0 {
            asm!("out dx, al", in("dx") POWER_PORT, in("al") POWER_OFF, options(nomem, nostack, preserves_flags));
        }
    }
    // Another VMM: without ACPI a power-off only halts, a reboot ends in a triple fault.
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}
