//! Collects every child that exits.
//!
//! The agent is PID 1: besides its own children it inherits orphans. One loop owns waitpid(2), so no exit is
//! collected twice or lost. A child that the agent knows has a callback, which runs in the order of
//! collection. A container's init process becomes known only after the helper that makes it has reported
//! its id, which may be after it exited: while a [`Birth`] is held, exits of unknown children are kept.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};

/// How and when a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, or 128 + signal.
    pub status: u32,
    /// Since the Unix epoch, by the guest's clock.
    pub at: Duration,
}

type Callback = Box<dyn FnOnce(Exit) + Send>;

#[derive(Default)]
struct Table {
    known: HashMap<i32, Callback>,
    early: HashMap<i32, Exit>,
    births: usize,
}

/// The process table. Clones share it.
#[derive(Clone, Default)]
pub struct Reaper(Arc<Mutex<Table>>);

impl std::fmt::Debug for Reaper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reaper")
            .field("known", &self.table().known.len())
            .finish()
    }
}

/// Held while a process is being made whose id the agent does not know yet.
#[derive(Debug)]
pub struct Birth(Reaper);

impl Drop for Birth {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.births -= 1;
        if table.births == 0 {
            table.early = HashMap::new();
        }
    }
}

impl Reaper {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Callbacks run outside the lock, so the table is consistent even after a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the exits of unknown children until the guard is dropped.
    pub fn birth(&self) -> Birth {
        self.table().births += 1;
        Birth(self.clone())
    }

    /// Calls `callback` when the child `pid` exits; at once if it has, under a [`Birth`].
    pub fn expect(&self, pid: Pid, callback: impl FnOnce(Exit) + Send + 'static) {
        let early = {
            let mut table = self.table();
            match table.early.remove(&pid.as_raw()) {
                Some(exit) => exit,
                None => {
                    table.known.insert(pid.as_raw(), Box::new(callback));
                    return;
                }
            }
        };
        callback(early);
    }

    /// Collects children for as long as the runtime lives.
    ///
    /// # Errors
    /// The signal handler cannot be installed.
    pub fn start(&self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        let reaper = self.clone();
        tokio::spawn(async move {
            loop {
                reaper.collect();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Collects all children that have exited by now.
    pub fn collect(&self) {
        loop {
            let mut status = 0;
            // `__WALL`: also children whose parent at birth asked for no signal. Not nix's waitpid: it fails on a
            // death by a real-time signal and loses the process id.
            // SAFETY: `status` is valid for writes.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) };
            match pid {
                1.. if libc::WIFEXITED(status) => self.exited(pid, libc::WEXITSTATUS(status).unsigned_abs()),
                1.. if libc::WIFSIGNALED(status) => {
                    self.exited(pid, 128 + libc::WTERMSIG(status).unsigned_abs());
                }
                1.. => (),
                0 => return,
                _ if Errno::last() == Errno::EINTR => (),
                _ => return,
            }
        }
    }

    fn exited(&self, pid: i32, status: u32) {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let exit = Exit { status, at };
        let callback = {
            let mut table = self.table();
            let callback = table.known.remove(&pid);
            if callback.is_none() && table.births > 0 {
                table.early.insert(pid, exit);
            }
            callback
        };
        if let Some(callback) = callback {
            callback(exit);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;

    use super::*;

    fn table_of(reaper: &Reaper) -> (usize, usize) {
        let table = reaper.table();
        (table.known.len(), table.early.len())
    }

    #[test]
    fn exit_before_the_id_is_known_is_kept_while_a_birth_is_held() {
        let reaper = Reaper::default();
        let (sender, receiver) = mpsc::channel();
        let birth = reaper.birth();
        let other = reaper.birth();
        reaper.exited(4711, 137);
        drop(other);
        reaper.expect(Pid::from_raw(4711), move |exit| sender.send(exit.status).unwrap());
        assert_eq!(receiver.try_recv(), Ok(137));
        drop(birth);
        assert_eq!(table_of(&reaper), (0, 0));
    }

    #[test]
    fn orphans_leave_nothing_behind() {
        let reaper = Reaper::default();
        reaper.exited(1, 0);
        assert_eq!(table_of(&reaper), (0, 0));
        let birth = reaper.birth();
        reaper.exited(2, 0);
        assert_eq!(table_of(&reaper), (0, 1));
        drop(birth);
        assert_eq!(table_of(&reaper), (0, 0));
    }

    #[test]
    fn callbacks_may_use_the_reaper() {
        let reaper = Reaper::default();
        let (sender, receiver) = mpsc::channel();
        let inner = reaper.clone();
        reaper.expect(Pid::from_raw(10), move |_| {
            inner.expect(Pid::from_raw(11), move |exit| sender.send(exit.status).unwrap());
        });
        reaper.exited(10, 0);
        reaper.exited(11, 3);
        assert_eq!(receiver.try_recv(), Ok(3));
    }
}
