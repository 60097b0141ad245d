//! What is being done, and for how long: step k of n, elapsed seconds.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// On a terminal the line of a running step is rewritten this often.
const TERMINAL_PERIOD: Duration = Duration::from_secs(1);

/// In a log, a long step says this often that it is still running.
const LOG_PERIOD: Duration = Duration::from_secs(30);

/// A command's steps, some of which may run beside others. Everything goes to the standard error.
#[derive(Debug)]
pub struct Progress {
    total: AtomicUsize,
    begun: AtomicUsize,
}

/// A running step.
#[derive(Debug)]
pub struct Step {
    note: Cell<Option<&'static str>>,
}

impl Step {
    /// Says at the end that the work was found done.
    pub fn cached(&self) {
        self.note.set(Some("cached"));
    }
}

impl Progress {
    /// Of a command that will take `total` steps.
    #[must_use]
    pub fn new(total: usize) -> Self {
        Self {
            total: AtomicUsize::new(total),
            begun: AtomicUsize::new(0),
        }
    }

    /// Plans `steps` more, once it is known that they are needed.
    pub fn extend(&self, steps: usize) {
        self.total.fetch_add(steps, Ordering::Relaxed);
    }

    /// Does the next step.
    ///
    /// # Errors
    /// The work's.
    pub fn step<T>(&self, title: &str, work: impl FnOnce(&Step) -> Result<T>) -> Result<T> {
        let begun = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let total = self.total.load(Ordering::Relaxed).max(begun);
        let title = format!("[{begun}/{total}] {title}");
        let start = Instant::now();
        let step = Step {
            note: Cell::new(None),
        };
        let (done, ticks) = mpsc::channel::<()>();
        let result = thread::scope(|scope| {
            let title = &title;
            scope.spawn(move || tick(title, start, &ticks));
            let result = work(&step);
            drop(done);
            result
        });
        let outcome = match (&result, step.note.get()) {
            (Err(_), _) => "failed",
            (Ok(_), Some(note)) => note,
            (Ok(_), None) => "done",
        };
        let clear = if std::io::stderr().is_terminal() {
            "\r\x1b[K"
        } else {
            ""
        };
        eprintln!(
            "{clear}{title}: {outcome} ({:.1} s)",
            start.elapsed().as_secs_f32()
        );
        result
    }
}

/// Shows the elapsed time until the other end of `ticks` is dropped.
fn tick(title: &str, start: Instant, ticks: &mpsc::Receiver<()>) {
    let mut stderr = std::io::stderr();
    let terminal = stderr.is_terminal();
    let period = if terminal { TERMINAL_PERIOD } else { LOG_PERIOD };
    while ticks.recv_timeout(period) == Err(RecvTimeoutError::Timeout) {
        let elapsed = start.elapsed().as_secs();
        let _ = if terminal {
            write!(stderr, "\r\x1b[K{title} … {elapsed} s").and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "{title} … {elapsed} s")
        };
    }
}
