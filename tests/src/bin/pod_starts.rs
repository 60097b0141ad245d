//! Measures starts of pods through containerd's CRI socket, for `cargo xtask bench`.
//!
//! `pod-starts ROUNDS HANDLER…` prints a line for each value, `bench NAME_HANDLER MICROSECONDS`:
//!
//! - `sandbox`: `RunPodSandbox`, with what a kubelet makes before it: the pod's cgroup and directory of logs;
//! - `ready`: from there until `StartContainer` of one container has answered and its first line is in its log.
//!
//! Time is this host's monotonic clock. Every handler has a turn in every round, on the same containerd, with the same
//! images and the same CNI configuration; one pod at a time. Needs what the tests need: see `bulkhead_tests::config`.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::{Fixture, config, host};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// What containerd and the kernel still do after a pod was removed belongs to no start.
const SETTLE: Duration = Duration::from_secs(1);

/// What the container writes first.
const LINE: &str = "ready";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [rounds, handlers @ ..] = arguments.as_slice() else {
        return usage();
    };
    let Ok(rounds) = rounds.parse::<u32>() else {
        return usage();
    };
    if handlers.is_empty() {
        return usage();
    }
    let probe = std::env::current_exe().map(|path| path.with_file_name("bulkhead-probe"));
    let test = Fixture::for_pods("starts", &probe.expect("this program has a path"));
    // Page caches and containerd's own first-time work belong to no round.
    for handler in handlers {
        let _ = start(&test, handler, "warm");
    }
    for round in 1..=rounds {
        for handler in handlers {
            let (sandbox, ready) = start(&test, handler, &round.to_string());
            println!("bench sandbox_{handler} {}", sandbox.as_micros());
            println!("bench ready_{handler} {}", ready.as_micros());
        }
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!("usage: pod-starts ROUNDS HANDLER…");
    ExitCode::FAILURE
}

/// Starts a pod with one container and removes it. How long `RunPodSandbox` took, and how long it was until the
/// container's first line.
fn start(test: &Fixture, handler: &str, suffix: &str) -> (Duration, Duration) {
    let pod = test.pod(&format!("{handler}-{suffix}")).handler(handler);
    let log = PathBuf::from(&pod.config.log_directory).join("main.log");
    let begin = Instant::now();
    let pod = pod.run();
    let sandbox = begin.elapsed();
    let writer = format!("echo {LINE}; exec sleep 1000");
    let main = pod.container("main", &["sh", "-c", &writer]).create();
    let watch = Watch::new(&pod.config.log_directory);
    main.start();
    watch.wait_for(|| has_line(&log));
    let ready = begin.elapsed();
    assert!(main.is_running(), "the container of {handler} has ended");
    drop(pod);
    let mut left = Vec::new();
    let gone = wait_until(config().seconds(10), || {
        left = host::processes();
        left.retain(host::Process::is_runtime);
        left.is_empty()
    });
    assert!(gone, "the pod of {handler} was removed, but there is {left:?}");
    thread::sleep(SETTLE);
    (sandbox, ready)
}

fn has_line(log: &Path) -> bool {
    let text = fs::read_to_string(log).unwrap_or_default();
    // The rest of a line that is being written is not there yet.
    let Some((whole, _)) = text.rsplit_once('\n') else {
        return false;
    };
    bulkhead_tests::log::parse(whole)
        .iter()
        .any(|line| line.full && line.text == LINE)
}

/// Waits for writes to files of a directory without looking again and again, which would take time from the writers.
struct Watch(Inotify);

impl Watch {
    fn new(directory: &str) -> Self {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).expect("inotify");
        let events = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MODIFY;
        inotify.add_watch(directory, events).expect("a watch of the logs");
        Self(inotify)
    }

    /// Returns once `done`, which is asked again after every event.
    fn wait_for(&self, done: impl Fn() -> bool) {
        let limit = PollTimeout::try_from(config().seconds(30)).expect("a short time");
        while !done() {
            let mut wanted = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, limit) {
                Err(Errno::EINTR) => continue,
                other => assert_eq!(other, Ok(1), "nothing was written to the log"),
            }
            let _ = self.0.read_events().expect("events");
        }
    }
}
