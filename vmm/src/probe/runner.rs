//! Runs the guest on a thread of its own and watches the clock.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::guest::{self, Step, port};
use super::machine::{Machine, SetupError};
use crate::memory::GuestMemory;

/// How long a vCPU thread that has been told to stop may take, beyond the limit.
const GRACE: Duration = Duration::from_secs(1);

/// Interval of the signals that get the vCPU out of the guest.
const KICK_INTERVAL: Duration = Duration::from_millis(10);

/// What came of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Executed with the right result.
    Passed,
    /// CPUID does not offer it, so no kernel will use it.
    NotOffered,
    /// Began and did not end; [`Report::failure`] says why.
    Failed,
    /// The guest did not get that far.
    NotReached,
}

/// Why the guest did not reach its end.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The VM could not be built.
    #[error("Cannot build the virtual machine")]
    Setup(#[source] SetupError),
    /// The vCPU thread could not be started or signalled.
    #[error("Cannot run a vCPU thread")]
    Thread(#[source] std::io::Error),
    /// `KVM_RUN` failed.
    #[error("KVM_RUN failed")]
    Run(#[source] errno::Error),
    /// KVM gave up on an instruction: it runs guests in software, or the hardware is broken.
    #[error(
        "KVM cannot emulate the guest's instruction [{code}] at offset {offset:#x} (internal error {suberror})"
    )]
    Emulation {
        /// `suberror` of `KVM_EXIT_INTERNAL_ERROR`.
        suberror: u32,
        /// Offset of the instruction in the guest program.
        offset: u64,
        /// Its first bytes in hexadecimal.
        code: String,
    },
    /// The processor refused to enter the guest.
    #[error("The processor cannot enter the guest (hardware reason {0:#x})")]
    Entry(u64),
    /// Triple fault.
    #[error("The guest shut down (triple fault)")]
    TripleFault,
    /// An exception without cause.
    #[error("The guest got exception {0}, which its program does not raise")]
    Exception(u8),
    /// The instructions ran, but not as the processor manual says.
    #[error("The instructions gave a wrong result")]
    WrongResult,
    /// An exit that the program does not cause.
    #[error("Unexpected exit from the guest: {0}")]
    Exit(String),
    /// An eventfd failed.
    #[error("Cannot signal the guest")]
    Signal(#[source] std::io::Error),
    /// The guest made no progress within the limit.
    #[error("The guest hangs: not done after {0:?}")]
    Hung(Duration),
    /// The guest hangs and KVM does not return from it.
    #[error("The guest hangs and KVM does not let go of it: not stopped after {0:?}")]
    Stuck(Duration),
}

/// Result of [`run`].
#[derive(Debug)]
pub struct Report {
    /// All steps in order.
    pub steps: Vec<(Step, Outcome)>,
    /// Why it ended early; `None`: every step passed or is not offered.
    pub failure: Option<Failure>,
    /// Wall-clock time from the first KVM call to the end.
    pub elapsed: Duration,
}

enum Message {
    Outcome(Step, Outcome),
    End(Result<(), Failure>),
}

/// Runs the guest on an open `/dev/kvm`.
///
/// Returns within `limit` plus about a second. If KVM does not even return from a signalled `KVM_RUN`, the
/// vCPU thread is left behind.
#[must_use]
pub fn run(kvm: File, limit: Duration) -> Report {
    run_program(kvm, limit, guest::code())
}

/// [`run`] with any program in place of the guest's.
pub(super) fn run_program(kvm: File, limit: Duration, program: &'static [u8]) -> Report {
    let start = Instant::now();
    let mut steps: Vec<(Step, Outcome)> = Step::ALL
        .into_iter()
        .map(|step| (step, Outcome::NotReached))
        .collect();
    let failure = watch(kvm, limit, program, &mut |step, outcome| {
        if let Some(entry) = steps.iter_mut().find(|(other, _)| *other == step) {
            entry.1 = outcome;
        }
    })
    .err();
    Report {
        steps,
        failure,
        elapsed: start.elapsed(),
    }
}

fn watch(
    kvm: File,
    limit: Duration,
    program: &'static [u8],
    record: &mut dyn FnMut(Step, Outcome),
) -> Result<(), Failure> {
    // Any signal with a handler that does nothing makes KVM_RUN return EINTR.
    let signal = SIGRTMIN() + 6;
    register_signal_handler(signal, ignore)
        .map_err(|error| Failure::Thread(std::io::Error::from_raw_os_error(error.errno())))?;
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, receiver) = channel();
    let thread = std::thread::Builder::new()
        .name("probe-vcpu".into())
        .spawn({
            let stop = Arc::clone(&stop);
            move || {
                let result = run_guest(kvm, program, &stop, &sender);
                // The watcher is gone only if it gave up on this thread.
                let _ = sender.send(Message::End(result));
            }
        })
        .map_err(Failure::Thread)?;

    let deadline = Instant::now() + limit;
    if let Some(end) = receive(&receiver, deadline, record) {
        return end;
    }
    stop.store(true, Ordering::Release);
    if stop_thread(&thread, signal, &receiver, record) {
        Err(Failure::Hung(limit))
    } else {
        Err(Failure::Stuck(limit + GRACE))
    }
}

/// Records outcomes until the guest's end or the deadline (`None`).
fn receive(
    receiver: &Receiver<Message>,
    deadline: Instant,
    record: &mut dyn FnMut(Step, Outcome),
) -> Option<Result<(), Failure>> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(Message::Outcome(step, outcome)) => record(step, outcome),
            Ok(Message::End(end)) => return Some(end),
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                return Some(Err(Failure::Thread(std::io::Error::other(
                    "the vCPU thread panicked",
                ))));
            }
        }
    }
}

/// Signals the thread until it has ended. A signal that comes before `KVM_RUN` is lost, hence the repetition.
fn stop_thread(
    thread: &JoinHandle<()>,
    signal: libc::c_int,
    receiver: &Receiver<Message>,
    record: &mut dyn FnMut(Step, Outcome),
) -> bool {
    let end = Instant::now() + GRACE;
    while Instant::now() < end {
        // Fails only when the thread has ended, which the channel tells.
        let _ = thread.kill(signal);
        if receive(receiver, Instant::now() + KICK_INTERVAL, record).is_some() {
            return true;
        }
    }
    false
}

extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn run_guest(
    kvm: File,
    program: &[u8],
    stop: &AtomicBool,
    messages: &Sender<Message>,
) -> Result<(), Failure> {
    let mut machine = Machine::new(kvm, program).map_err(Failure::Setup)?;
    // The value the guest wrote last to its MMIO range.
    let mut mmio = [0u8; 4];
    let report = |number: u8, outcome: Outcome| match Step::from_number(number) {
        // The watcher may have given up; the stop flag ends the loop then.
        Some(step) => {
            let _ = messages.send(Message::Outcome(step, outcome));
            Ok(())
        }
        None => Err(Failure::Exit(format!("report of step {number}"))),
    };
    while !stop.load(Ordering::Acquire) {
        let Machine {
            vcpu, notify, line, ..
        } = &mut machine;
        match vcpu.run() {
            Ok(VcpuExit::IoOut(number, &[value])) => match number {
                port::BEGIN => report(value, Outcome::Failed)?,
                port::PASS => report(value, Outcome::Passed)?,
                port::NOT_OFFERED => report(value, Outcome::NotOffered)?,
                port::WRONG => return Err(Failure::WrongResult),
                port::EXCEPTION => return Err(Failure::Exception(value)),
                port::RAISE => line.write(1).map_err(Failure::Signal)?,
                port::DONE => return Ok(()),
                _ => return Err(Failure::Exit(format!("output to port {number:#x}"))),
            },
            Ok(VcpuExit::IoIn(number, [value])) => match number {
                port::ECHO => *value = guest::ECHO_VALUE,
                // An empty eventfd is no error here: the guest finds a wrong count.
                port::NOTIFIED => *value = notify.read().unwrap_or(0).min(255) as u8,
                _ => return Err(Failure::Exit(format!("input from port {number:#x}"))),
            },
            Ok(VcpuExit::MmioWrite(super::machine::MMIO, data)) if data.len() == mmio.len() => {
                mmio.copy_from_slice(data);
            }
            Ok(VcpuExit::MmioRead(super::machine::MMIO, data)) if data.len() == mmio.len() => {
                data.copy_from_slice(&mmio);
            }
            Ok(VcpuExit::Shutdown) => return Err(Failure::TripleFault),
            Ok(VcpuExit::FailEntry(reason, _)) => return Err(Failure::Entry(reason)),
            Ok(VcpuExit::InternalError) => return Err(emulation_failure(&mut machine)),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => return Err(Failure::Exit(format!("{other:?}"))),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Err(Failure::Run(error)),
        }
    }
    // The watcher reports the reason.
    Ok(())
}

fn emulation_failure(machine: &mut Machine) -> Failure {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which this member of the union is valid; it is
    // plain integers.
    let suberror = unsafe { machine.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let address = machine.vcpu.get_regs().map(|regs| regs.rip).unwrap_or_default();
    Failure::Emulation {
        suberror,
        offset: address.wrapping_sub(super::machine::CODE),
        code: code_at(&machine.memory, address),
    }
}

/// Eight bytes of guest code in hexadecimal; empty outside memory.
fn code_at(memory: &GuestMemory, address: u64) -> String {
    let mut bytes = [0u8; 8];
    match memory.read_slice(&mut bytes, GuestAddress(address)) {
        Ok(()) => bytes.map(|byte| format!("{byte:02x}")).join(" "),
        Err(_) => String::new(),
    }
}
