use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use super::*;

/// Counts calls; fails on queue 2.
struct Counter(Arc<AtomicUsize>);

impl Work for Counter {
    fn process_queue(&mut self, index: usize, _interrupted: &AtomicBool) -> Result<(), DeviceError> {
        if index == 2 && self.0.load(Ordering::SeqCst) > 0 {
            return Err(DeviceError::Protocol("test"));
        }
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn save(&mut self, _cancelled: &Arc<AtomicBool>) -> io::Result<WorkState> {
        Ok(WorkState::default())
    }
}

/// Never finishes a queue unless interrupted, as with a driver that feeds it for ever.
struct Endless(Arc<AtomicUsize>);

impl Work for Endless {
    fn process_queue(&mut self, _index: usize, interrupted: &AtomicBool) -> Result<(), DeviceError> {
        while !interrupted.load(Ordering::Acquire) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn save(&mut self, _cancelled: &Arc<AtomicBool>) -> io::Result<WorkState> {
        Ok(WorkState::default())
    }
}

fn thread() -> WorkerThread {
    WorkerThread::start("test", || Ok(())).unwrap()
}

#[test]
fn a_thread_that_cannot_be_prepared_is_refused() {
    let refused = WorkerThread::start("test", || Err(io::ErrorKind::OutOfMemory.into()));
    assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::OutOfMemory);
}

#[test]
fn a_thread_takes_one_worker_after_the_other() {
    let thread = thread();
    for _ in 0..3 {
        let count = Arc::new(AtomicUsize::new(0));
        let for_worker = count.clone();
        let worker = Worker::start(&thread, Arc::new(vec![event()]), event(), move || {
            Ok(Counter(for_worker))
        })
        .unwrap();
        wait_until("start", || count.load(Ordering::SeqCst) == 1);
        worker.stop();
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn counter(queues: usize) -> (Worker, Arc<Vec<EventFd>>, EventFd, Arc<AtomicUsize>) {
    let kicks = Arc::new((0..queues).map(|_| event()).collect::<Vec<_>>());
    let failed = event();
    let count = Arc::new(AtomicUsize::new(0));
    let for_worker = count.clone();
    let worker = Worker::start(&thread(), kicks.clone(), failed.try_clone().unwrap(), move || {
        Ok(Counter(for_worker))
    })
    .unwrap();
    (worker, kicks, failed, count)
}

#[test]
fn kicks_are_served_at_start_and_later() {
    let (_worker, kicks, _, count) = counter(2);
    wait_until("first look", || count.load(Ordering::SeqCst) == 2);
    for served in 3..10 {
        kicks[served % 2].write(1).unwrap();
        wait_until("kick", || count.load(Ordering::SeqCst) == served);
    }
}

#[test]
fn a_paused_worker_does_nothing_until_resumed() {
    let (worker, kicks, _, count) = counter(1);
    worker.pause().unwrap();
    let before = count.load(Ordering::SeqCst);
    kicks[0].write(1).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(count.load(Ordering::SeqCst), before);
    worker.resume();
    wait_until("kick during the pause", || count.load(Ordering::SeqCst) > before);
    worker.pause().unwrap();
    worker.pause().unwrap();
    worker.resume();
}

#[test]
fn endless_work_is_paused_and_stopped() {
    let count = Arc::new(AtomicUsize::new(0));
    let for_worker = count.clone();
    let worker = Worker::start(&thread(), Arc::new(vec![event()]), event(), move || {
        Ok(Endless(for_worker))
    })
    .unwrap();
    wait_until("start", || count.load(Ordering::SeqCst) > 0);
    worker.pause().unwrap();
    let paused = count.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(count.load(Ordering::SeqCst), paused);
    worker.resume();
    wait_until("resume", || count.load(Ordering::SeqCst) > paused);
    drop(worker);
}

/// Hangs in its first request.
struct Stuck(EventFd);

impl Work for Stuck {
    fn process_queue(&mut self, _index: usize, _interrupted: &AtomicBool) -> Result<(), DeviceError> {
        self.0.write(1).unwrap();
        loop {
            std::thread::park();
        }
    }

    fn save(&mut self, _cancelled: &Arc<AtomicBool>) -> io::Result<WorkState> {
        Ok(WorkState::default())
    }
}

#[test]
fn a_request_that_hangs_does_not_hold_up_the_end() {
    let started = event();
    let for_worker = started.try_clone().unwrap();
    let worker = Worker::start(&thread(), Arc::new(vec![event()]), event(), move || {
        Ok(Stuck(for_worker))
    })
    .unwrap();
    wait_until("start", || started.read().is_ok());
    let start = Instant::now();
    drop(worker);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_failure_is_reported_once_and_pausing_still_works() {
    let (worker, _kicks, failed, _) = counter(3);
    wait_until("failure", || failed.read().is_ok());
    assert!(matches!(
        worker.take_failure(),
        Some(DeviceError::Protocol("test"))
    ));
    assert!(worker.take_failure().is_none());
    worker.pause().unwrap();
    worker.resume();
}

#[test]
fn a_worker_that_cannot_be_built_reports_it() {
    let failed = event();
    let worker = Worker::start::<Counter>(
        &thread(),
        Arc::new(Vec::new()),
        failed.try_clone().unwrap(),
        || Err(DeviceError::Protocol("build")),
    )
    .unwrap();
    wait_until("failure", || failed.read().is_ok());
    assert!(matches!(
        worker.take_failure(),
        Some(DeviceError::Protocol("build"))
    ));
}

/// Takes its time to write its state down, until it is cancelled `times` times.
struct Slow {
    saves: Arc<AtomicUsize>,
    times: usize,
}

impl Work for Slow {
    fn process_queue(&mut self, _index: usize, _interrupted: &AtomicBool) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self, cancelled: &Arc<AtomicBool>) -> io::Result<WorkState> {
        let number = self.saves.fetch_add(1, Ordering::SeqCst);
        while number < self.times && !cancelled.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        match cancelled.load(Ordering::Acquire) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(WorkState {
                queues: Vec::new(),
                known: vec![1, 2, 3],
            }),
        }
    }
}

fn slow(times: usize) -> (Worker, Arc<AtomicUsize>) {
    let saves = Arc::new(AtomicUsize::new(0));
    let work = Slow {
        saves: saves.clone(),
        times,
    };
    let worker = Worker::start(&thread(), Arc::new(vec![event()]), event(), move || Ok(work)).unwrap();
    (worker, saves)
}

#[test]
fn a_state_that_takes_too_long_is_given_up_at_the_resume() {
    let (worker, saves) = slow(1);
    let error = worker.pause().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(error.to_string().contains("write down"), "{error}");
    worker.resume();
    assert_eq!(worker.pause().unwrap().known, [1, 2, 3]);
    // Once for one pause, however often it is asked for.
    assert_eq!(worker.pause().unwrap().known, [1, 2, 3]);
    assert_eq!(saves.load(Ordering::SeqCst), 2);
    worker.resume();
}

#[test]
fn a_stop_does_not_wait_for_a_state() {
    let (worker, saves) = slow(usize::MAX);
    worker.shared.want(Wanted::Pause);
    wait_until("save", || saves.load(Ordering::SeqCst) == 1);
    let start = Instant::now();
    worker.stop();
    assert!(start.elapsed() < SAVE_TIME);
}

/// Cannot be written down.
struct Unwritable;

impl Work for Unwritable {
    fn process_queue(&mut self, _index: usize, _interrupted: &AtomicBool) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&mut self, _cancelled: &Arc<AtomicBool>) -> io::Result<WorkState> {
        Err(io::Error::other("no ink"))
    }
}

#[test]
fn every_pause_tells_that_the_state_cannot_be_written_down() {
    let worker = Worker::start(&thread(), Arc::new(vec![event()]), event(), || Ok(Unwritable)).unwrap();
    for _ in 0..3 {
        assert_eq!(worker.pause().unwrap_err().to_string(), "no ink");
    }
    worker.resume();
    assert_eq!(worker.pause().unwrap_err().to_string(), "no ink");
}

#[test]
fn whoever_waits_for_a_worker_hears_why_it_cannot_be_built() {
    let build = || Err(DeviceError::Protocol("build"));
    let worker = Worker::start::<Counter>(&thread(), Arc::new(Vec::new()), event(), build).unwrap();
    assert!(matches!(worker.built(), Err(DeviceError::Protocol("build"))));
    let (worker, _) = slow(0);
    worker.built().unwrap();
}
