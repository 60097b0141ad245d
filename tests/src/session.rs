//! A command that runs beside the test: its output is collected, every wait has a deadline.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};

/// Output collected so far, and whether its end was seen.
#[derive(Debug, Default)]
struct Collected {
    state: Mutex<(Vec<u8>, bool)>,
    changed: Condvar,
}

impl Collected {
    fn from_reader(mut reader: impl Read + Send + 'static) -> Arc<Self> {
        let collected = Arc::new(Collected::default());
        let writer = Arc::clone(&collected);
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            // A pseudo-terminal reports its end as EIO.
            while let Ok(size @ 1..) = reader.read(&mut buffer) {
                writer.lock().0.extend_from_slice(&buffer[..size]);
                writer.changed.notify_all();
            }
            writer.lock().1 = true;
            writer.changed.notify_all();
        });
        collected
    }

    fn lock(&self) -> MutexGuard<'_, (Vec<u8>, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` says so, the stream ends or the deadline passes; returns what `done` said last.
    fn wait(&self, deadline: Instant, mut done: impl FnMut(&[u8], bool) -> bool) -> bool {
        let mut state = self.lock();
        loop {
            if done(&state.0, state.1) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || state.1 {
                return false;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A running command.
#[derive(Debug)]
pub struct Session {
    child: Child,
    label: String,
    deadline: Instant,
    input: Option<File>,
    stdout: Arc<Collected>,
    stderr: Arc<Collected>,
}

impl Session {
    /// Starts `command` with its three streams on pipes. `limit` is for its whole life.
    ///
    /// # Panics
    /// If the command cannot be started.
    #[track_caller]
    pub fn start(mut command: Command, limit: Duration) -> Self {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut session = Self::spawn(command, limit);
        let child = &mut session.child;
        session.input = child.stdin.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        session.stdout = Collected::from_reader(child.stdout.take().expect("stdout is a pipe"));
        session.stderr = Collected::from_reader(child.stderr.take().expect("stderr is a pipe"));
        session
    }

    /// Starts `command` as the leader of a new session on a new terminal of `rows` × `columns`
    /// characters; everything it prints is its standard output.
    ///
    /// # Panics
    /// If the terminal cannot be made or the command cannot be started.
    #[track_caller]
    pub fn start_on_terminal(mut command: Command, rows: u16, columns: u16, limit: Duration) -> Self {
        let pty = openpty(&size(rows, columns), None).expect("a pseudo-terminal");
        let slave = || Stdio::from(pty.slave.try_clone().expect("a descriptor"));
        command.stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: both calls are async-signal-safe and use no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() == -1 || libc::ioctl(0, libc::TIOCSCTTY, 0) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut session = Self::spawn(command, limit);
        let master = File::from(pty.master);
        session.stdout = Collected::from_reader(master.try_clone().expect("a descriptor"));
        session.stderr.lock().1 = true;
        session.input = Some(master);
        session
    }

    #[track_caller]
    fn spawn(mut command: Command, limit: Duration) -> Self {
        let label = format!("{command:?}");
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {label}: {error}"));
        let (stdout, stderr) = (Arc::default(), Arc::default());
        Session {
            child,
            label,
            deadline: Instant::now() + limit,
            input: None,
            stdout,
            stderr,
        }
    }

    /// Sends a line to standard input.
    ///
    /// # Panics
    /// If the input is closed.
    #[track_caller]
    pub fn send(&mut self, text: &str) {
        self.send_bytes(text.as_bytes());
    }

    /// Sends bytes to standard input; blocks while the command does not read.
    ///
    /// # Panics
    /// If the input is closed.
    #[track_caller]
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let result = self
            .input
            .as_mut()
            .expect("standard input is open")
            .write_all(bytes);
        result.unwrap_or_else(|error| panic!("{}: writing to its input: {error}", self.label));
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Changes the size of the terminal; the kernel sends SIGWINCH.
    ///
    /// # Panics
    /// If the command is not on a terminal.
    #[track_caller]
    pub fn resize(&self, rows: u16, columns: u16) {
        let master = self.input.as_ref().expect("a terminal");
        let size = size(rows, columns);
        // SAFETY: the descriptor is open and the argument points to a winsize for the call's duration.
        let result = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(result, 0, "TIOCSWINSZ");
    }

    /// Waits until standard output contains `text`.
    ///
    /// # Panics
    /// If the output ends or the deadline passes before.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        self.wait_for_count(text, 1);
    }

    /// Waits until standard output contains `text` `count` times.
    ///
    /// # Panics
    /// If the output ends or the deadline passes before.
    #[track_caller]
    pub fn wait_for_count(&self, text: &str, count: usize) {
        let seen = self.stdout.wait(self.deadline, |bytes, _| {
            String::from_utf8_lossy(bytes).matches(text).count() >= count
        });
        assert!(seen, "{text:?} ({count}×) never came from {self}");
    }

    /// Standard output so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout.lock().0).into_owned()
    }

    /// Waits for the command's end.
    ///
    /// # Panics
    /// If the deadline passes first; the command is killed then.
    #[track_caller]
    #[must_use]
    pub fn finish(mut self) -> Finished {
        let ended =
            self.stdout.wait(self.deadline, |_, end| end) && self.stderr.wait(self.deadline, |_, end| end);
        // The streams' end comes just before the exit, unless something else holds them.
        while ended && Instant::now() < self.deadline + Duration::from_secs(1) {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                let stdout = std::mem::take(&mut self.stdout.lock().0);
                let stderr = std::mem::take(&mut self.stderr.lock().0);
                return Finished {
                    label: std::mem::take(&mut self.label),
                    status,
                    stdout,
                    stderr,
                };
            }
            thread::sleep(Duration::from_millis(2));
        }
        panic!("still running at its deadline, killed: {self}");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It is gone already if these fail.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_outcome(f, &self.label, &self.stdout.lock().0, &self.stderr.lock().0)
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    label: String,
    /// How it ended.
    pub status: ExitStatus,
    /// All it printed.
    pub stdout: Vec<u8>,
    /// All it printed as errors.
    pub stderr: Vec<u8>,
}

impl Finished {
    /// Checks the exit code.
    ///
    /// # Panics
    /// If it is another one, with the command and its output.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.status.code(),
            Some(code),
            "signal {:?}, {self}",
            self.status.signal()
        );
        self
    }

    /// Checks for success and returns the output as text.
    ///
    /// # Panics
    /// If the command failed, with its output.
    #[track_caller]
    #[must_use]
    pub fn text(self) -> String {
        let done = self.expect_code(0);
        String::from_utf8(done.stdout).expect("the output is UTF-8")
    }

    /// Checks that the command failed and said one of `reasons`; returns what it said.
    ///
    /// # Panics
    /// If it succeeded, or failed for another reason.
    #[track_caller]
    pub fn expect_error(self, reasons: &[&str]) -> String {
        assert_ne!(self.status.code(), Some(0), "this should have failed: {self}");
        let said = String::from_utf8_lossy(&self.stderr).into_owned();
        let lower = said.to_lowercase();
        assert!(
            reasons
                .iter()
                .any(|reason| lower.contains(&reason.to_lowercase())),
            "no {reasons:?} in: {self}"
        );
        said
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] ", self.status)?;
        write_outcome(f, &self.label, &self.stdout, &self.stderr)
    }
}

fn write_outcome(f: &mut fmt::Formatter<'_>, label: &str, stdout: &[u8], stderr: &[u8]) -> fmt::Result {
    let tail =
        |bytes: &[u8]| String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4000)..]).into_owned();
    write!(
        f,
        "{label}\n--- stdout\n{}\n--- stderr\n{}\n---",
        tail(stdout),
        tail(stderr)
    )
}
