#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_vcpu_that_does_not_stop_in_time_runs_on_after_the_resume() {
    register_signal_handler(SIGRTMIN(), interrupt).unwrap();
    let flag = Box::leak(Box::new(AtomicU8::new(0)));
    let (busy, done) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let _ = done.recv();
    });
    let memory = Arc::new(crate::memory::allocate(64).unwrap());
    let vcpus = Vcpus {
        gate: Arc::default(),
        bus: Arc::new(Bus {
            ports: Ports::new(None, memory),
            devices: Vec::new(),
        }),
        report: ExitReport {
            reasons: std::sync::mpsc::channel().0,
            event: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        },
        confined: false,
        threads: vec![(thread, ImmediateExit(ptr::from_ref::<AtomicU8>(flag)))],
        vcpus: Vec::new(),
    };
    assert_eq!(vcpus.pause().unwrap_err().kind(), io::ErrorKind::TimedOut);
    assert_eq!(flag.load(Ordering::SeqCst), 1);
    vcpus.resume();
    assert_eq!(flag.load(Ordering::SeqCst), 0);
    assert_eq!(vcpus.gate.wanted.load(Ordering::SeqCst), RUN);
    drop(busy);
    for (thread, _) in vcpus.threads {
        thread.join().unwrap();
    }
}

#[test]
fn ended_vcpus_do_not_hold_up_a_pause() {
    let gate = Arc::new(Gate::default());
    let flags = [AtomicU8::new(1), AtomicU8::new(1)].map(Box::new).map(Box::leak);
    gate.wanted.store(PAUSE, Ordering::SeqCst);
    let threads = flags.each_ref().map(|flag| {
        let (gate, immediate_exit) = (gate.clone(), ImmediateExit(ptr::from_ref::<AtomicU8>(flag)));
        std::thread::spawn(move || {
            let immediate_exit = immediate_exit;
            gate.wait(immediate_exit);
        })
    });
    gate.leave();
    let mut parked = lock(&gate.parked);
    while *parked < 3 {
        parked = gate.changed.wait(parked).unwrap();
    }
    drop(parked);
    gate.wanted.store(RUN, Ordering::SeqCst);
    gate.changed.notify_all();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(*lock(&gate.parked), 1);
    assert_eq!(flags.map(|flag| flag.load(Ordering::SeqCst)), [0, 0]);
}
