//! A thread that serves the queues of one device.
//!
//! The thread is there before the guest is, and takes on one [`Worker`] after the other: a driver's activation of its
//! device comes on a vCPU's thread, which may not start threads. The owner can pause a worker between two requests, get
//! its state then, and stop it. A device whose requests block on the host (a file server) runs on a worker, so that others
//! do not wait for it.

#[cfg(test)]
mod tests;

use std::fmt::{self, Debug};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
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

/// How long it gets to write its state down then: a file server takes tens of microseconds for each file the guest knows.
/// With [`PAUSE_TIME`] it is less than whoever asks for a pause waits.
pub const SAVE_TIME: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 10 });

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

    /// What another worker goes on from. Work that takes long ends early, with any error, when `cancelled` is set: the
    /// pause is over and nobody wants the state.
    ///
    /// # Errors
    /// Something of it cannot be written down. The worker can go on.
    fn save(&mut self, cancelled: &Arc<AtomicBool>) -> io::Result<WorkState>;
}

/// State of what runs on a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkState {
    /// Queues in order.
    pub queues: Vec<DeviceQueueState>,
    /// What else the work knows, in a form of its own; empty: nothing.
    pub known: Vec<u8>,
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
    /// Set when the pause is over whose state is being written down.
    cancelled: Arc<AtomicBool>,
    built: bool,
    stage: Stage,
    ended: bool,
    failure: Option<DeviceError>,
    /// Written down by the pause that lasts.
    saved: Option<io::Result<WorkState>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// How far the worker is with a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Between pauses, or in a request.
    Running,
    /// Its state is being written down.
    Saving,
    /// It waits.
    Parked,
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
                cancelled: Arc::default(),
                built: false,
                stage: Stage::Running,
                ended: false,
                failure: None,
                saved: None,
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
            let result = build().and_then(|work| {
                for_thread.lock().built = true;
                for_thread.changed.notify_all();
                for_thread.run(work, &epoll, kicks.len())
            });
            for_thread.end(result);
        }));
        thread.0.send(job).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(Self { shared })
    }

    /// Waits until the work is built.
    ///
    /// # Errors
    /// Why it could not be; nobody else is told then.
    pub fn built(&self) -> Result<(), DeviceError> {
        let control = self.shared.lock();
        let wait = self
            .shared
            .changed
            .wait_while(control, |control| !control.built && !control.ended);
        let mut control = wait.unwrap_or_else(PoisonError::into_inner);
        if control.built {
            return Ok(());
        }
        control.failure.take().map_or(Ok(()), Err)
    }

    /// Stops work between two requests and returns its state; that of a worker that has ended is empty.
    ///
    /// # Errors
    /// A request takes more than [`PAUSE_TIME`], or the state cannot be written down, or not in [`SAVE_TIME`]. The worker
    /// stays stopped, or stops behind the request, until it is resumed.
    pub fn pause(&self) -> io::Result<WorkState> {
        self.shared.want(Wanted::Pause);
        let late = |what| io::Error::new(io::ErrorKind::TimedOut, what);
        let control = self
            .shared
            .wait_while_in(self.shared.lock(), Stage::Running, PAUSE_TIME)
            .ok_or_else(|| late("a request takes too long"))?;
        let control = self
            .shared
            .wait_while_in(control, Stage::Saving, SAVE_TIME)
            .ok_or_else(|| late("its state takes too long to write down"))?;
        match &control.saved {
            None => Ok(WorkState::default()),
            // Copies, for a second pause on top of this one.
            Some(Ok(state)) => Ok(state.clone()),
            Some(Err(error)) => Err(io::Error::new(error.kind(), error.to_string())),
        }
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
        let mut control = self.lock();
        if control.wanted != wanted {
            control.wanted = wanted;
            control.cancelled.store(true, Ordering::Release);
        }
        drop(control);
        self.interrupted.store(wanted != Wanted::Run, Ordering::Release);
        self.changed.notify_all();
        // Fails only if the counter is full, and then the worker wakes anyway.
        let _ = self.wake.write(1);
    }

    /// Waits as long as the worker is in `stage` and has not ended; `None`: longer than `limit`.
    fn wait_while_in<'a>(
        &self,
        control: MutexGuard<'a, Control>,
        stage: Stage,
        limit: Duration,
    ) -> Option<MutexGuard<'a, Control>> {
        let wait = self
            .changed
            .wait_timeout_while(control, limit, |control| control.stage == stage && !control.ended);
        let (control, waited) = wait.unwrap_or_else(PoisonError::into_inner);
        (!waited.timed_out()).then_some(control)
    }

    fn run<W: Work>(&self, mut work: W, epoll: &Epoll, queues: usize) -> Result<(), DeviceError> {
        let mut events = vec![EpollEvent::default(); queues + 1];
        while self.may_run(&mut work) {
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
    fn may_run<W: Work>(&self, work: &mut W) -> bool {
        let mut control = self.lock();
        while control.wanted == Wanted::Pause {
            if control.saved.is_none() {
                let cancelled = Arc::default();
                control.cancelled = Arc::clone(&cancelled);
                control.stage = Stage::Saving;
                self.changed.notify_all();
                // Without the lock, because it may take longer than the owner waits.
                drop(control);
                let saved = work.save(&cancelled);
                control = self.lock();
                // There may be another pause by now.
                control.saved = (!cancelled.load(Ordering::Acquire)).then_some(saved);
                continue;
            }
            control.stage = Stage::Parked;
            self.changed.notify_all();
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        control.stage = Stage::Running;
        control.saved = None;
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
