//! virtio over MMIO, version 2 (virtio 1.2, 4.2).

mod kicks;
mod registers;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kicks::Kicks;
use kvm_ioctls::{IoEventAddress, VmFd};
use registers::Registers;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::queue::DeviceQueueState;
use super::{Activation, DeviceError, DeviceState, Interrupt, RestoreError, Turn, VirtioDevice};
use crate::arch::layout;
use crate::error_chain;
use crate::memory::GuestMemory;

pub use registers::TransportState;

/// Failures of one device that are told of.
const MOST_REPORTS: u32 = if cfg!(fuzzing) { 0 } else { 8 };

/// Place of a device: its register window and interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u32);

impl Slot {
    /// The slot of the device with this index; `None` when the interrupt lines are used up.
    pub fn new(index: usize) -> Option<Self> {
        let index = u32::try_from(index).ok()?;
        (index < layout::MAX_DEVICES).then_some(Self(index))
    }

    /// Guest-physical address of the register window.
    pub fn address(self) -> u64 {
        layout::VIRTIO_MMIO + u64::from(self.0) * layout::VIRTIO_MMIO_SIZE
    }

    /// Interrupt line.
    pub fn gsi(self) -> u32 {
        layout::FIRST_GSI + self.0
    }
}

/// Why a device could not be wired.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Eventfd.
    #[error("Cannot create an eventfd")]
    EventFd(#[source] std::io::Error),
    /// A queue size the device offers is not a power of two.
    #[error("Cannot create a virtqueue")]
    Queue(#[source] virtio_queue::Error),
    /// Interrupt line.
    #[error("Cannot connect a device's interrupt to KVM")]
    Irqfd(#[source] kvm_ioctls::Error),
    /// Notification register.
    #[error("Cannot connect a device's notification register to KVM")]
    Ioeventfd(#[source] kvm_ioctls::Error),
}

/// A device behind its register window.
#[derive(Debug)]
pub struct MmioTransport {
    registers: Mutex<Registers>,
    device: Arc<Mutex<dyn VirtioDevice>>,
    /// Whether the device is activated. Changes only under the device's lock.
    active: AtomicBool,
    /// Whether the device has failed since its last reset; nothing of it runs then.
    failed: AtomicBool,
    /// Device status register, for those who must not wait while the driver holds the registers.
    status: AtomicU8,
    /// Failures told of on standard error, which a guest could otherwise flood.
    reports: AtomicU32,
    interrupt: Arc<Interrupt>,
    queue_events: Vec<EventFd>,
    kicks: Kicks,
    /// On the bus of a VM.
    slot: Option<Slot>,
    event_fd: Option<RawFd>,
    owns_queue_events: bool,
    memory: Arc<GuestMemory>,
    name: String,
}

impl MmioTransport {
    /// Puts `device` behind a register window. Nothing is connected to KVM yet.
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn new(
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: Arc<GuestMemory>,
    ) -> Result<Self, TransportError> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(TransportError::EventFd);
        let interrupt = Arc::new(Interrupt::new(event()?));
        let mut guard = lock(&device);
        let registers =
            Registers::new(guard.features(), guard.queue_sizes()).map_err(TransportError::Queue)?;
        let queue_events = guard
            .queue_sizes()
            .iter()
            .map(|_| event())
            .collect::<Result<Vec<_>, _>>()?;
        let owns_queue_events = guard.owns_queue_events();
        if owns_queue_events {
            let clones = queue_events
                .iter()
                .map(EventFd::try_clone)
                .collect::<Result<_, _>>();
            guard.set_queue_events(clones.map_err(TransportError::EventFd)?);
        }
        let event_fd = guard.event_fd();
        let name = guard.name().to_owned();
        drop(guard);
        Ok(Self {
            registers: Mutex::new(registers),
            device,
            active: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            status: AtomicU8::new(0),
            reports: AtomicU32::new(0),
            interrupt,
            kicks: Kicks::new(queue_events.len()),
            slot: None,
            queue_events,
            event_fd,
            owns_queue_events,
            memory,
            name,
        })
    }

    /// Connects the interrupt of a device in `slot` to KVM. `busy` is signalled when it is time to
    /// [hand kicks over](Self::hand_kicks_over).
    ///
    /// # Errors
    /// [`TransportError`].
    pub fn connect(&mut self, vm: &VmFd, slot: Slot, busy: Arc<EventFd>) -> Result<(), TransportError> {
        vm.register_irqfd(self.interrupt.event(), slot.gsi())
            .map_err(TransportError::Irqfd)?;
        self.slot = Some(slot);
        self.kicks.tell(busy);
        Ok(())
    }

    /// Has KVM signal the queues that are kicked often by itself. One that it refuses is kicked as before.
    pub fn hand_kicks_over(&self, vm: &VmFd) {
        let Some(slot) = self.slot else { return };
        let register = IoEventAddress::Mmio(slot.address() + registers::QUEUE_NOTIFY);
        let handed_over =
            self.kicks.hand_over(
                |index| match (self.queue_events.get(index), u32::try_from(index)) {
                    (Some(event), Ok(number)) => vm.register_ioevent(event, &register, number),
                    _ => Ok(()),
                },
            );
        if let Err(error) = handed_over {
            let error = TransportError::Ioeventfd(error);
            let _ = writeln!(io::stderr(), "{}: {}", self.name, error_chain(&error));
        }
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Kick eventfds the event loop has to watch, by queue.
    pub fn watched_queues(&self) -> &[EventFd] {
        if self.owns_queue_events {
            &[]
        } else {
            &self.queue_events
        }
    }

    /// The device's own descriptor the event loop has to watch.
    pub fn watched_event(&self) -> Option<RawFd> {
        self.event_fd
    }

    /// Device status register. Never waits.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// State of registers and device, for a snapshot, in a pause.
    pub fn save(&self) -> (TransportState, DeviceState) {
        let registers = lock(&self.registers).save(self.interrupt.status());
        (registers, lock(&self.device).save_state())
    }

    /// Brings registers and device to a saved state. An active device does nothing until [`start`](Self::start).
    ///
    /// # Errors
    /// [`RestoreError`]; parts of the state may be in place.
    pub fn restore(&self, registers: &TransportState, device: &DeviceState) -> Result<(), RestoreError> {
        let mut own = lock(&self.registers);
        own.restore(registers)?;
        let queues = device.queues();
        if !queues.is_empty() && queues.len() != self.queue_events.len() {
            return Err(RestoreError::Queues {
                queues: self.queue_events.len(),
                saved: queues.len(),
            });
        }
        self.status.store(own.status(), Ordering::SeqCst);
        self.failed.store(own.needs_reset(), Ordering::SeqCst);
        self.interrupt.restore(registers.interrupt_status);
        lock(&self.device).restore_state(device)
    }

    /// Activates a restored device that was active, and makes up for notifications that were under way either way:
    /// one too many does nothing.
    ///
    /// # Errors
    /// [`RestoreError::Queue`], [`RestoreError::Activate`].
    pub fn start(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let queues = state.queues().iter().map(DeviceQueueState::restore);
        let queues = queues
            .collect::<Result<Vec<_>, _>>()
            .map_err(RestoreError::Queue)?;
        if queues.is_empty() || self.failed.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.activate(&lock(&self.registers), queues)
            .map_err(RestoreError::Activate)?;
        for (event, queue) in self.queue_events.iter().zip(state.queues()) {
            if queue.ready {
                // It can fail only if the counter is full: then it is readable.
                let _ = event.write(1);
            }
        }
        if self.interrupt.status() != 0 {
            let _ = self.interrupt.event().write(1);
        }
        Ok(())
    }

    /// A watched kick eventfd is readable.
    pub fn process_queue(&self, index: usize) {
        if let Some(event) = self.queue_events.get(index) {
            // Readable or not, the queue is looked at.
            let _ = event.read();
        }
        let turn = self.run(|device, active| {
            if active {
                device.process_queue(index)
            } else {
                Ok(Turn::Done)
            }
        });
        if turn == Turn::Again
            && let Some(event) = self.queue_events.get(index)
        {
            // It can fail only if the counter is full: then it is readable.
            let _ = event.write(1);
        }
    }

    /// The device's own descriptor is readable.
    pub fn process_event(&self) {
        self.run(|device, _| device.process_event().map(|()| Turn::Done));
    }

    /// Stops the device's workers until [`resume`](Self::resume), which follows also after an error.
    ///
    /// # Errors
    /// A request hangs on the host.
    pub fn pause(&self) -> Result<(), DeviceError> {
        lock(&self.device).pause()
    }

    /// Lets the device's workers go on.
    pub fn resume(&self) {
        lock(&self.device).resume();
    }

    /// Marks the device as broken; the driver has to reset it (virtio 1.2, 2.1.2).
    pub fn fail(&self, error: &DeviceError) {
        self.failed.store(true, Ordering::SeqCst);
        if self.reports.fetch_add(1, Ordering::Relaxed) < MOST_REPORTS {
            // Nobody reads it once the sandbox has gone.
            let _ = writeln!(io::stderr(), "{}: {}", self.name, error_chain(error));
        }
        let mut registers = lock(&self.registers);
        let driver_listens = registers.set_needs_reset();
        self.status.store(registers.status(), Ordering::SeqCst);
        drop(registers);
        if driver_listens {
            // A driver that hears nothing finds the bit when it next looks.
            let _ = self.interrupt.config_change();
        }
    }

    fn run(&self, work: impl FnOnce(&mut dyn VirtioDevice, bool) -> Result<Turn, DeviceError>) -> Turn {
        if self.failed.load(Ordering::SeqCst) {
            return Turn::Done;
        }
        let result = {
            let mut device = lock(&self.device);
            work(&mut *device, self.active.load(Ordering::Relaxed))
        };
        result.unwrap_or_else(|error| {
            self.fail(&error);
            Turn::Done
        })
    }

    /// The guest reads `data.len()` bytes at `offset` of the register window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= registers::CONFIG {
            lock(&self.device).read_config(offset - registers::CONFIG, data);
            return;
        }
        if data.len() != 4 {
            return;
        }
        let value = match offset {
            registers::INTERRUPT_STATUS => self.interrupt.status(),
            // A slot may be filled and emptied.
            registers::DEVICE_ID => lock(&self.device).device_type(),
            registers::CONFIG_GENERATION => lock(&self.device).config_generation(),
            _ => lock(&self.registers).read(offset),
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    /// The guest writes `data` at `offset` of the register window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= registers::CONFIG {
            let registers = lock(&self.registers);
            if registers.driver_present() {
                lock(&self.device).write_config(offset - registers::CONFIG, data);
            }
            drop(registers);
            return;
        }
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        match offset {
            registers::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            // KVM takes those of busy queues itself.
            registers::QUEUE_NOTIFY => {
                if let Some(event) = self.queue_events.get(value as usize) {
                    let _ = event.write(1);
                    self.kicks.count(value as usize);
                }
            }
            registers::STATUS => self.write_status(value),
            _ => lock(&self.registers).write(offset, value, &self.memory),
        }
    }

    fn write_status(&self, value: u32) {
        let mut registers = lock(&self.registers);
        let change = registers.write_status(value);
        self.status.store(registers.status(), Ordering::SeqCst);
        match change {
            registers::StatusChange::None => {}
            registers::StatusChange::Reset => {
                let mut device = lock(&self.device);
                if self.active.swap(false, Ordering::Relaxed) {
                    device.reset();
                }
                self.failed.store(false, Ordering::SeqCst);
                self.interrupt.acknowledge(u32::MAX);
                for event in &self.queue_events {
                    let _ = event.read();
                }
            }
            registers::StatusChange::Activate => {
                let queues = registers.take_queues();
                let result = self.activate(&registers, queues);
                drop(registers);
                if let Err(error) = result {
                    self.fail(&error);
                }
            }
        }
    }

    fn activate(&self, registers: &Registers, queues: Vec<Queue>) -> Result<(), DeviceError> {
        let activation = Activation {
            memory: (*self.memory).clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: registers.features(),
        };
        let mut device = lock(&self.device);
        let result = device.activate(activation);
        self.active.store(result.is_ok(), Ordering::Relaxed);
        result
    }
}

/// A panic of another holder is a bug, but no reason for the guest to take the VMM down with a second one.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
