//! A thread that serves the queues of one device.
//!
//! The thread is there before the guest is, and takes on one [`Worker`] after the other: a driver's activation of its
//! device comes on a vCPU's thread, which may not start threads. The owner can pause a worker between two requests, read the state of its queues then, and stop it. A device
//! whose requests block on the host (a file server) runs on a worker, so that others do not wait for it.

#[cfg(test)]
mod tests;

use std::fmt::{self, Debug};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::DeviceError;
use super::queue::DeviceQueueState;

/// Stack of a worker in bytes; only what is touched takes memory.
const STACK_SIZE: usize = 512 << 10;

/// How long a worker that is dropped gets to finish its request.
const STOP_TIME: Duration = Duration::from_secs(1);

/// How long a worker gets to finish its request before a pause fails. The control socket waits meanwhile.
pub const PAUSE_TIME: Duration = Duration::from_secs(2);

/// Epoll data of the eventfd that wakes the worker; queues have their index.
const WAKE: u64 = u64::MAX;

/// What runs on a worker.
pub trait Work {
    /// Serves queue `index` until it is empty, or returns between two requests when `interrupted` is set;
    /// then it is called again after the pause.
    ///
    /// # Errors
    /// The device cannot go on; the worker ends.
    fn process_queue(&mut self, index: usize, interrupted: &AtomicBool) -> Result<(), DeviceError>;

    /// State of all queues, in order.
    fn save_queues(&self) -> Vec<DeviceQueueState>;
}

/// A thread for workers. It ends when the handle is dropped and its worker has ended.
#[derive(Debug)]
pub struct WorkerThread(Sender<Job>);

/// All that one worker does.
struct Job(Box<dyn FnOnce() + Send>);

impl WorkerThread {
    /// Starts a thread that calls `prepare` first.
    ///
    /// # Errors
    /// The thread cannot be made, or `prepare` fails.
    pub fn start(name: &str, prepare: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<Self> {
        let (jobs, waiting) = channel::<Job>();
        let (ready, prepared) = channel();
        std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                let result = prepare();
                let useless = result.is_err();
                // The other end waits for it.
                let _ = ready.send(result);
                if useless {
                    return;
                }
                for Job(job) in waiting {
                    job();
                }
            })?;
        prepared.recv().map_err(io::Error::other)??;
        Ok(Self(jobs))
    }
}

/// Handle of what runs on a worker's thread. Dropping it stops the worker and waits for it, but for a second at most:
/// [`stop`](Self::stop) waits until it has ended.
pub struct Worker {
    shared: Arc<Shared>,
}

struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
    /// Whether the owner wants anything else than that the worker runs.
    interrupted: AtomicBool,
    wake: EventFd,
    failed: EventFd,
}

struct Control {
    wanted: Wanted,
    parked: bool,
    ended: bool,
    failure: Option<DeviceError>,
    queues: Vec<DeviceQueueState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

impl Worker {
    /// Starts a worker that serves a queue whenever its eventfd of `kicks` is signalled. `build` runs on
    /// `thread`, when the worker before has ended. If it or the work fails, `failed` is signalled and [`take_failure`](Self::take_failure)
    /// tells why.
    ///
    /// # Errors
    /// One of its descriptors cannot be made, or the thread has ended.
    pub fn start<W: Work>(
        thread: &WorkerThread,
        kicks: Arc<Vec<EventFd>>,
        failed: EventFd,
        build: impl FnOnce() -> Result<W, DeviceError> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            control: Mutex::new(Control {
                wanted: Wanted::Run,
                parked: false,
                ended: false,
                failure: None,
                queues: Vec::new(),
            }),
            changed: Condvar::new(),
            interrupted: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            failed,
        });
        let epoll = Epoll::new()?;
        let add = |event: &EventFd, flags, data| {
            let interest = EpollEvent::new(EventSet::IN | flags, data);
            epoll.ctl(ControlOperation::Add, event.as_raw_fd(), interest)
        };
        add(&shared.wake, EventSet::empty(), WAKE)?;
        for (index, kick) in kicks.iter().enumerate() {
            // Edge-triggered, so that the counter need not be read.
            add(kick, EventSet::EDGE_TRIGGERED, index as u64)?;
        }
        let for_thread = shared.clone();
        let job = Job(Box::new(move || {
            let result = build().and_then(|work| for_thread.run(work, &epoll, kicks.len()));
            for_thread.end(result);
        }));
        thread.0.send(job).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(Self { shared })
    }

    /// Stops work between two requests and returns the state of the queues. Returns at once if the
    /// worker has ended.
    ///
    /// # Errors
    /// A request takes more than [`PAUSE_TIME`]; the worker stops behind it unless it is resumed before.
    pub fn pause(&self) -> io::Result<Vec<DeviceQueueState>> {
        self.shared.want(Wanted::Pause);
        let control = self.shared.lock();
        let wait = self
            .shared
            .changed
            .wait_timeout_while(control, PAUSE_TIME, |control| !control.parked && !control.ended);
        let (control, waited) = wait.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(control.queues.clone())
    }

    /// Goes on after [`pause`](Self::pause).
    pub fn resume(&self) {
        self.shared.want(Wanted::Run);
    }

    /// Stops work between two requests and waits for its end.
    pub fn stop(self) {
        self.shared.want(Wanted::Stop);
        let mut control = self.shared.lock();
        while !control.ended {
            control = self
                .shared
                .changed
                .wait(control)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Why the worker ended, if it failed and nobody asked before.
    pub fn take_failure(&self) -> Option<DeviceError> {
        self.shared.lock().failure.take()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.want(Wanted::Stop);
        let control = self.shared.lock();
        // A request that hangs on the host must not keep the process from ending, which ends the thread too.
        drop(
            self.shared
                .changed
                .wait_timeout_while(control, STOP_TIME, |control| !control.ended),
        );
    }
}

impl Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker")
            .field("wanted", &self.shared.lock().wanted)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        // Nothing is left half-changed by a panic while the lock is held.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        self.lock().wanted = wanted;
        self.interrupted.store(wanted != Wanted::Run, Ordering::Release);
        self.changed.notify_all();
        // Fails only if the counter is full, and then the worker wakes anyway.
        let _ = self.wake.write(1);
    }

    fn run<W: Work>(&self, mut work: W, epoll: &Epoll, queues: usize) -> Result<(), DeviceError> {
        let mut events = vec![EpollEvent::default(); queues + 1];
        while self.may_run(&work) {
            // At the start and after a pause: kicks may have come meanwhile.
            for index in 0..queues {
                work.process_queue(index, &self.interrupted)?;
            }
            while !self.interrupted.load(Ordering::Acquire) {
                let count = match epoll.wait(-1, &mut events) {
                    Ok(count) => count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(DeviceError::Backend(error)),
                };
                for event in &events[..count] {
                    match event.data() {
                        // Empty if two wishes came together.
                        WAKE => drop(self.wake.read()),
                        index => work.process_queue(index as usize, &self.interrupted)?,
                    }
                }
            }
        }
        Ok(())
    }

    /// Waits as long as the owner wants a pause. Whether to run on.
    fn may_run<W: Work>(&self, work: &W) -> bool {
        let mut control = self.lock();
        if control.wanted == Wanted::Pause {
            control.queues = work.save_queues();
        }
        while control.wanted == Wanted::Pause {
            control.parked = true;
            self.changed.notify_all();
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.parked = false;
        control.wanted == Wanted::Run
    }

    fn end(&self, result: Result<(), DeviceError>) {
        let mut control = self.lock();
        control.ended = true;
        self.changed.notify_all();
        if let Err(error) = result {
            control.failure = Some(error);
            // Fails only if the counter is full: the owner has been told.
            let _ = self.failed.write(1);
        }
    }
}
