//! A device's interrupt: one irqfd and the status register behind it.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// `InterruptStatus` bit 0: the device used a buffer (virtio 1.2, 4.2.2).
const USED_BUFFER: u32 = 1;
/// `InterruptStatus` bit 1: the configuration changed.
const CONFIG_CHANGE: u32 = 2;

/// Interrupt line of a device on the MMIO transport.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    /// Bits that are set whatever the driver acknowledges.
    always: AtomicU32,
    event: EventFd,
}

impl Interrupt {
    /// Wraps the eventfd registered with KVM as the irqfd of the device's GSI.
    pub fn new(event: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            always: AtomicU32::new(0),
            event,
        }
    }

    /// Tells the driver that buffers were used.
    ///
    /// # Errors
    /// The write to the eventfd failed.
    pub fn used_buffer(&self) -> io::Result<()> {
        self.raise(USED_BUFFER)
    }

    /// Tells the driver that the configuration space (or the status register) changed.
    ///
    /// # Errors
    /// The write to the eventfd failed.
    pub fn config_change(&self) -> io::Result<()> {
        self.raise(CONFIG_CHANGE)
    }

    /// The status register.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst) | self.always.load(Ordering::SeqCst)
    }

    /// Whether the kernel signals the eventfd by itself when buffers were used. It does not set the bit then, so the
    /// register has it set all the time: a driver that looks at its queues in vain finds them empty.
    pub fn raised_by_kernel(&self, whether: bool) {
        let bits = if whether { USED_BUFFER } else { 0 };
        self.always.store(bits, Ordering::SeqCst);
    }

    /// Sets the status register of a restored device.
    pub fn restore(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Clears the given bits of the status register.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The eventfd, to be registered as an irqfd.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.event.write(1)
    }
}
