//! Helper processes: forked copies of the agent that do what may block.
//!
//! The agent has one thread and must always answer. Mounting, making a container with libcontainer and
//! removing filesystems can block for long, so each runs in a child. The child is a plain fork(2) without exec:
//! the agent being single-threaded, no lock can be held at that moment. It also keeps what libcontainer does to
//! its own process (OOM score, dumpable flag, working directory, waitpid) away from PID 1, and a deadline can
//! end it.

mod report;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::unistd::{Pid, pipe2};
pub use report::{Report, StatusPipe, send_to};
use tokio::sync::oneshot;

use crate::fd::AsyncFile;
use crate::reaper::{Exit, Reaper};

/// Why a helper process did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// fork(2) failed.
    #[error("cannot start a helper process")]
    Fork(#[source] io::Error),
    /// The helper reported an error.
    #[error("{0}")]
    Failed(String),
    /// What was asked for cannot be had: a program that is not there, a limit the kernel does not take.
    #[error("{0}")]
    Refused(String),
    /// The helper ended without a report.
    #[error("helper process for {job} ended with status {status}")]
    Died {
        /// What it did.
        job: &'static str,
        /// Exit status or 128 + signal.
        status: u32,
    },
    /// The helper took too long and was killed.
    #[error("{job} took longer than {} s", limit.as_secs())]
    Timeout {
        /// What it did.
        job: &'static str,
        /// How long it had.
        limit: Duration,
    },
}

impl JobError {
    /// Whether the host's request is to blame.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused(_))
    }
}

/// A running helper process.
#[derive(Debug)]
pub struct Job {
    name: &'static str,
    pid: Pid,
    status: AsyncFile,
    exit: oneshot::Receiver<Exit>,
}

impl Job {
    /// Starts `work` in a child that has no descriptor of the agent but 0 to 2 and those in `keep`.
    ///
    /// # Errors
    /// The pipe or the process cannot be made.
    pub fn spawn(
        reaper: &Reaper,
        name: &'static str,
        keep: &[RawFd],
        work: impl FnOnce(&StatusPipe) -> Result<(), String>,
    ) -> Result<Self, JobError> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(|e| JobError::Fork(e.into()))?;
        // SAFETY: the agent has a single thread, so the child may use everything the parent may.
        match unsafe { libc::fork() } {
            -1 => Err(JobError::Fork(io::Error::last_os_error())),
            0 => run_child(write, keep, work),
            pid => {
                let pid = Pid::from_raw(pid);
                let (sender, exit) = oneshot::channel();
                reaper.expect(pid, move |exit| {
                    let _ = sender.send(exit);
                });
                drop(write);
                let status = AsyncFile::new(read).map_err(JobError::Fork)?;
                Ok(Self {
                    name,
                    pid,
                    status,
                    exit,
                })
            }
        }
    }

    /// Process id of the helper, for [`kill`].
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Waits for the helper's end, at most for `limit`, and returns what it reported.
    ///
    /// # Errors
    /// The helper failed, died, or had to be killed.
    pub async fn finish(&mut self, limit: Duration) -> Result<Vec<Report>, JobError> {
        let exit = match tokio::time::timeout(limit, &mut self.exit).await {
            Ok(exit) => exit,
            Err(_) => {
                // Not collected yet, so the id is still the helper's.
                let _ = kill(self.pid, Signal::SIGKILL);
                let _ = (&mut self.exit).await;
                return Err(JobError::Timeout {
                    job: self.name,
                    limit,
                });
            }
        };
        let status = exit.map_or(u32::MAX, |exit| exit.status);
        let reports = report::parse(&drain(&self.status));
        if status == 0 {
            return Ok(reports);
        }
        Err(report::failure(&reports).unwrap_or(JobError::Died {
            job: self.name,
            status,
        }))
    }

    /// The read end of the status pipe, which processes the helper left behind may still write to.
    pub fn into_status(self) -> AsyncFile {
        self.status
    }
}

/// Reads what is in a pipe now.
fn drain(pipe: &AsyncFile) -> Vec<u8> {
    let mut data = Vec::new();
    let mut buffer = [0; 4096];
    // A pipe holds 64 KiB; what a hostile writer adds meanwhile is not worth waiting for.
    while data.len() < 64 * 1024 {
        match nix::unistd::read(pipe.as_raw_fd(), &mut buffer) {
            Ok(n @ 1..) => data.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            Err(Errno::EINTR) => (),
            _ => break,
        }
    }
    data
}

/// Waits until the last writer of a status pipe has closed it and returns the failure it reported.
///
/// # Errors
/// What the process reported.
pub async fn outcome(status: AsyncFile) -> Result<(), JobError> {
    let mut data = Vec::new();
    let mut buffer = [0; 1024];
    while data.len() < 64 * 1024 {
        match status.read(&mut buffer).await {
            Ok(n @ 1..) => data.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            _ => break,
        }
    }
    report::failure(&report::parse(&data)).map_or(Ok(()), Err)
}

fn run_child(write: OwnedFd, keep: &[RawFd], work: impl FnOnce(&StatusPipe) -> Result<(), String>) -> ! {
    reset_signals();
    close_others(keep, write.as_raw_fd());
    // Processes inherit it; a container's own value replaces it.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    let status = StatusPipe::new(write);
    report::capture_library_errors(&status);
    let code = match work(&status) {
        Ok(()) => 0,
        Err(text) => {
            status.send(&Report::Failed(text));
            1
        }
    };
    // SAFETY: ends this process without running the exit handlers of the agent it was copied from.
    unsafe { libc::_exit(code) }
}

/// Gives every signal its default action back and unblocks it: exec(2) keeps ignored and blocked signals, and a
/// container's program must not inherit the agent's.
pub(crate) fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is a valid disposition; the calls for SIGKILL and SIGSTOP fail without effect.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

/// Closes all descriptors from 3 on but those in `keep` and `status`. A copy of another container's stream, kept
/// open by a process that waits to be started, would keep its reader from seeing the end.
pub(crate) fn close_others(keep: &[RawFd], status: RawFd) {
    for (first, last) in gaps(keep, status) {
        // SAFETY: nothing in this process uses the closed descriptors any more.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// Ranges of descriptor numbers from 3 on that contain none of the given ones.
fn gaps(keep: &[RawFd], status: RawFd) -> Vec<(u32, u32)> {
    let mut kept: Vec<u32> = keep
        .iter()
        .chain([&status])
        .filter_map(|fd| u32::try_from(*fd).ok())
        .collect();
    kept.sort_unstable();
    let mut first = 3;
    let mut ranges = Vec::new();
    for fd in kept {
        if fd > first {
            ranges.push((first, fd - 1));
        }
        first = first.max(fd.saturating_add(1));
    }
    ranges.push((first, u32::MAX));
    ranges
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn gaps_and_kept_descriptors_cover_everything_once(keep in prop::collection::vec(0i32..40, 0..8), status in 3i32..40) {
            let ranges = gaps(&keep, status);
            for fd in 0..60u32 {
                let closed = ranges.iter().filter(|(first, last)| (*first..=*last).contains(&fd)).count();
                let kept = fd < 3 || keep.contains(&(fd as i32)) || status == fd as i32;
                prop_assert_eq!(closed, usize::from(!kept), "fd {}", fd);
            }
        }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap()
    }

    fn run(
        limit: Duration,
        work: impl FnOnce(&StatusPipe) -> Result<(), String>,
    ) -> Result<Vec<Report>, JobError> {
        runtime().block_on(async {
            let reaper = Reaper::default();
            reaper.start().unwrap();
            Job::spawn(&reaper, "test", &[], work)?.finish(limit).await
        })
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn reports_arrive_in_order() {
        let reports = run(LONG, |status| {
            status.send(&Report::Pid(17));
            status.send(&Report::Pid(18));
            Ok(())
        });
        assert_eq!(reports.unwrap(), [Report::Pid(17), Report::Pid(18)]);
    }

    #[test]
    fn failure_carries_the_text() {
        let error = run(LONG, |_| Err("no such thing".into())).unwrap_err();
        assert_eq!(error.to_string(), "no such thing");
    }

    #[test]
    fn death_and_delay_are_told_apart() {
        // SAFETY: ends the helper process only.
        let error = run(LONG, |_| unsafe { libc::_exit(9) }).unwrap_err();
        assert!(matches!(error, JobError::Died { status: 9, .. }), "{error:?}");
        let error = run(Duration::from_millis(50), |_| {
            std::thread::sleep(LONG);
            Ok(())
        });
        assert!(matches!(error, Err(JobError::Timeout { .. })), "{error:?}");
    }

    #[test]
    fn child_has_default_signals_and_no_foreign_descriptor() {
        let (read, _write) = nix::unistd::pipe().unwrap();
        let foreign = read.as_raw_fd();
        let result = run(LONG, move |_| {
            let status = std::fs::read_to_string("/proc/self/status").map_err(|e| e.to_string())?;
            for field in ["SigBlk", "SigIgn", "SigCgt"] {
                let line = status
                    .lines()
                    .find(|line| line.starts_with(field))
                    .unwrap_or_default();
                // The C library keeps two real-time signals for itself.
                let set = u64::from_str_radix(line.rsplit('\t').next().unwrap_or_default(), 16).unwrap_or(1);
                if set & !(0b11 << 31) != 0 {
                    return Err(line.to_owned());
                }
            }
            // SAFETY: asks for flags only.
            match unsafe { libc::fcntl(foreign, libc::F_GETFD) } {
                -1 => Ok(()),
                _ => Err("descriptor is open".into()),
            }
        });
        assert_eq!(result.unwrap(), []);
    }
}
