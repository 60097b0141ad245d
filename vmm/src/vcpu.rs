//! Threads that run the vCPUs.

#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bulkhead_protocol::control::ExitReason;
use kvm_bindings::KVM_SYSTEM_EVENT_CRASH;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::layout;
use crate::arch::state::{StateError, VcpuState};
use crate::error_chain;
use crate::jail::{self, Thread};
use crate::ports::Ports;
use crate::virtio::mmio::MmioTransport;

/// Stack of a vCPU thread in bytes.
const STACK_SIZE: usize = 128 << 10;

/// How long vCPUs get to stop before a pause fails. The control socket waits meanwhile.
const PAUSE_TIME: Duration = Duration::from_secs(2);

const RUN: u8 = 0;
const PAUSE: u8 = 1;

/// What a vCPU's exits lead to.
#[derive(Debug)]
pub struct Bus {
    /// I/O ports.
    pub ports: Ports,
    /// virtio devices, by slot.
    pub devices: Vec<Arc<MmioTransport>>,
}

impl Bus {
    fn read(&self, address: u64, data: &mut [u8]) {
        match self.device(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(address) {
            device.write(offset, data);
        }
    }

    fn device(&self, address: u64) -> Option<(&MmioTransport, u64)> {
        let offset = address.checked_sub(layout::VIRTIO_MMIO)?;
        let index = usize::try_from(offset / layout::VIRTIO_MMIO_SIZE).ok()?;
        Some((self.devices.get(index)?, offset % layout::VIRTIO_MMIO_SIZE))
    }
}

/// Where vCPU threads report that the VM has ended.
#[derive(Debug)]
pub struct ExitReport {
    /// The first reason counts.
    pub reasons: Sender<ExitReason>,
    /// Signalled with each reason.
    pub event: EventFd,
}

impl ExitReport {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            reasons: self.reasons.clone(),
            event: self.event.try_clone()?,
        })
    }

    fn send(&self, reason: ExitReason) {
        // The receiver and the eventfd live as long as the process.
        let _ = self.reasons.send(reason);
        let _ = self.event.write(1);
    }
}

#[derive(Debug, Default)]
struct Gate {
    wanted: AtomicU8,
    parked: Mutex<usize>,
    changed: Condvar,
}

/// `immediate_exit` of a vCPU's shared page: not zero makes `KVM_RUN` return at once.
#[derive(Clone, Copy, Debug)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointer is to memory shared with the kernel that stays mapped as long as the vCPU's thread,
// which owns the VcpuFd, lives; it is only used through an atomic type.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn set(self, value: u8) {
        // SAFETY: see the `Send` implementation; vCPU threads end only with the process.
        unsafe { &*self.0 }.store(value, Ordering::SeqCst);
    }
}

/// All vCPUs of a VM, running or paused.
#[derive(Debug)]
pub struct Vcpus {
    gate: Arc<Gate>,
    bus: Arc<Bus>,
    report: ExitReport,
    confined: bool,
    threads: Vec<(JoinHandle<()>, ImmediateExit)>,
    /// Each locked by its thread but for pauses.
    vcpus: Vec<Arc<Mutex<VcpuFd>>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they run at once. They are `confined` to the system calls that takes.
    ///
    /// # Errors
    /// The signal handler or a thread could not be made; threads already started go on until the process
    /// ends.
    pub fn start(vcpus: Vec<VcpuFd>, bus: Arc<Bus>, report: ExitReport, confined: bool) -> io::Result<Self> {
        register_signal_handler(SIGRTMIN(), interrupt).map_err(io::Error::from)?;
        let mut started = Self {
            gate: Arc::new(Gate::default()),
            bus,
            report,
            confined,
            threads: Vec::new(),
            vcpus: Vec::new(),
        };
        for vcpu in vcpus {
            started.add(vcpu)?;
        }
        Ok(started)
    }

    /// Number of vCPUs.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Starts the thread of one more vCPU. While the VM is paused it waits.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn add(&mut self, mut vcpu: VcpuFd) -> io::Result<()> {
        let immediate_exit = ImmediateExit(ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit).cast());
        let (bus, gate, report) = (self.bus.clone(), self.gate.clone(), self.report.try_clone()?);
        let confined = self.confined;
        let vcpu = Arc::new(Mutex::new(vcpu));
        let for_thread = vcpu.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.threads.len()))
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let immediate_exit = immediate_exit;
                // No guest code runs on a thread that is not confined.
                match if confined {
                    jail::confine(Thread::Vcpu)
                } else {
                    Ok(())
                } {
                    Ok(()) => run(&for_thread, &bus, &gate, immediate_exit, &report),
                    Err(error) => report.send(ExitReason::VmmError(error_chain(&error))),
                }
                gate.leave();
                // Its page must stay mapped for `ImmediateExit`.
                std::mem::forget(for_thread);
            })?;
        self.threads.push((thread, immediate_exit));
        self.vcpus.push(vcpu);
        Ok(())
    }

    /// Stops all vCPUs at an instruction boundary; returns when they have stopped.
    ///
    /// # Errors
    /// One has not within [`PAUSE_TIME`], because a device's reset waits for the host. It stops behind that
    /// unless [`resume`](Self::resume) comes before.
    pub fn pause(&self) -> io::Result<()> {
        let parked = lock(&self.gate.parked);
        self.gate.wanted.store(PAUSE, Ordering::SeqCst);
        for (thread, immediate_exit) in &self.threads {
            immediate_exit.set(1);
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
        }
        let all = self.threads.len();
        let wait = self
            .gate
            .changed
            .wait_timeout_while(parked, PAUSE_TIME, |parked| *parked < all);
        let (_parked, waited) = wait.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "a vCPU does not stop"));
        }
        Ok(())
    }

    /// Lets paused vCPUs go on.
    pub fn resume(&self) {
        let _parked = lock(&self.gate.parked);
        self.gate.wanted.store(RUN, Ordering::SeqCst);
        // One that had not stopped would never run again.
        for (_, immediate_exit) in &self.threads {
            immediate_exit.set(0);
        }
        self.gate.changed.notify_all();
    }

    /// Frequency of the first vCPU's time-stamp counter in kHz, in a pause.
    ///
    /// # Errors
    /// KVM cannot tell.
    pub fn tsc_khz(&self) -> Result<u32, kvm_ioctls::Error> {
        match self.vcpus.first() {
            Some(vcpu) => lock(vcpu).get_tsc_khz(),
            None => Err(kvm_ioctls::Error::new(libc::ENXIO)),
        }
    }

    /// State of all vCPUs in order, in a pause; `msrs` as in [`VcpuState::save`].
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(&self, msrs: &[u32]) -> Result<Vec<VcpuState>, StateError> {
        let vcpus = self.vcpus.iter();
        vcpus.map(|vcpu| VcpuState::save(&lock(vcpu), msrs)).collect()
    }
}

/// Does nothing: the signal is there to interrupt `KVM_RUN`.
extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Gate {
    /// A vCPU that has ended stands still for good.
    fn leave(&self) {
        *lock(&self.parked) += 1;
        self.changed.notify_all();
    }

    fn wait(&self, immediate_exit: ImmediateExit) {
        let mut parked = lock(&self.parked);
        *parked += 1;
        self.changed.notify_all();
        while self.wanted.load(Ordering::SeqCst) != RUN {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked -= 1;
        // Under the lock, so that the next pause sets it after this.
        immediate_exit.set(0);
    }
}

fn run(shared: &Mutex<VcpuFd>, bus: &Bus, gate: &Gate, immediate_exit: ImmediateExit, report: &ExitReport) {
    let mut vcpu = lock(shared);
    loop {
        let pausing = gate.wanted.load(Ordering::Relaxed) != RUN;
        if pausing {
            // What a device answered reaches the guest's registers by the next call; it must be there before they
            // are saved (Linux Documentation/virt/kvm/api.rst, KVM_RUN).
            immediate_exit.set(1);
        }
        let reason = match vcpu.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.read(address, data);
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.write(address, data);
                None
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                bus.ports.read(port, data);
                None
            }
            Ok(VcpuExit::IoOut(port, data)) => bus.ports.write(port, data),
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => None,
            Ok(VcpuExit::Shutdown) => Some(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => Some(ExitReason::Panic),
            Ok(VcpuExit::SystemEvent(..)) => Some(ExitReason::Reboot),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Some(ExitReason::KvmError(format!(
                "entry failed with hardware reason {reason:#x} on CPU {cpu}"
            ))),
            Ok(VcpuExit::InternalError) => Some(internal_error(&mut vcpu)),
            Ok(other) => Some(ExitReason::KvmError(format!("unexpected exit {other:?}"))),
            Err(error) if pausing && error.errno() == libc::EINTR => {
                drop(vcpu);
                gate.wait(immediate_exit);
                vcpu = lock(shared);
                // The guest's watchdogs shall not take the pause for a hang. KVM refuses with EINVAL as long as
                // the guest has no clock of KVM's, and nothing is lost then.
                let _ = vcpu.kvmclock_ctrl();
                None
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(error) if error.errno() == libc::EFAULT => Some(ExitReason::KvmError(
                "a page behind the guest's memory is gone: the root image was truncated, or cannot be read"
                    .into(),
            )),
            Err(error) => Some(ExitReason::KvmError(format!("KVM_RUN: {error}"))),
        };
        if let Some(reason) = reason {
            report.send(reason);
            return;
        }
    }
}

/// Words for `KVM_EXIT_INTERNAL_ERROR` (Linux Documentation/virt/kvm/api.rst): what, where, on which bytes.
fn internal_error(vcpu: &mut VcpuFd) -> ExitReason {
    // SAFETY: the exit reason says that this member of the union is the valid one.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let (suberror, data) = (internal.suberror, internal.data);
    let what = match suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "instruction emulation failed",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "exception during event delivery",
        _ => "internal error",
    };
    let rip = vcpu.get_regs().map_or(0, |regs| regs.rip);
    ExitReason::KvmError(format!(
        "{what} (suberror {suberror}, data {:#x}) at {rip:#x}",
        data[0]
    ))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
