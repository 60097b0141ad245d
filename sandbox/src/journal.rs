//! What a sandbox has acquired outside its private mount namespace, written down before it is used.
//!
//! The journal is a file of JSON lines in the sandbox's state directory. A sandbox that ends undoes its
//! entries in reverse order; whoever cleans up after a crash replays the same file. Undoing is
//! idempotent: an entry that was never acquired, or is undone already, is no error. The file goes last.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::fault::{self, Step};
use crate::network::{self, NetworkError};
use crate::spawn;

#[cfg(test)]
mod tests;

const FILE: &str = "journal";

/// How long a killed process may take to go.
const KILL_WAIT: Duration = Duration::from_secs(2);

/// How long a sandbox on its way out may take to let go of its journal.
const TAKE_OVER_WAIT: Duration = Duration::from_secs(5);

/// Why the journal cannot be kept or replayed.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The sandbox's state directory exists already, or cannot be made.
    #[error("Cannot create the state directory {}", .0.display())]
    Create(PathBuf, #[source] std::io::Error),
    /// The file cannot be written.
    #[error("Cannot write the journal {}", .0.display())]
    Write(PathBuf, #[source] std::io::Error),
    /// The file cannot be read.
    #[error("Cannot read the journal {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// Something could not be undone; the journal stays.
    #[error("Cannot undo {0}")]
    Undo(String, #[source] UndoError),
}

/// Why one entry cannot be undone.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// A file or directory stays.
    #[error("Cannot remove {}", .0.display())]
    Remove(PathBuf, #[source] std::io::Error),
    /// A mount is in the way; what is below it is not ours to remove.
    #[error("{} is a mount point", .0.display())]
    Mounted(PathBuf),
    /// A process does not end.
    #[error("Process {0} does not end")]
    Process(i32),
    /// An interface stays redirected.
    #[error("Interface stays redirected")]
    Redirection(#[source] Box<NetworkError>),
    /// The cgroup stays.
    #[error("The cgroup stays")]
    Cgroup(#[source] crate::cgroup::CgroupError),
}

/// Something acquired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "acquired")]
pub enum Entry {
    /// A socket's file.
    Socket {
        /// Its path.
        path: PathBuf,
    },
    /// A cgroup, relative to the root of the hierarchy.
    Cgroup {
        /// Its relative path.
        path: PathBuf,
    },
    /// The redirection of an interface's frames to a tap.
    Redirection {
        /// Path of the network namespace.
        namespace: PathBuf,
        /// Its inode number, which tells it from a later one with the same path.
        inode: u64,
        /// Name of the interface.
        interface: String,
    },
    /// A process. The start time (clock ticks since boot) tells it from a later one with the same id.
    Process {
        /// Process id.
        pid: i32,
        /// Field 22 of /proc/PID/stat.
        start_time: u64,
        /// What it is, for messages.
        role: Role,
    },
}

/// What a process of the sandbox does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Serves the sandbox; the owner of the journal.
    Shim,
    /// Runs the virtual machine.
    Vmm,
    /// Receives a container's output.
    Logger,
}

/// The journal of a live sandbox. Its file is locked (flock(2)) for as long as a process has it, so that others can tell
/// what a crash has left.
#[derive(Debug)]
pub struct Journal {
    directory: PathBuf,
    file: Flock<File>,
}

impl Journal {
    /// Makes the state directory (mode 0700) and an empty journal in it.
    ///
    /// # Errors
    /// [`JournalError::Create`], also when the directory exists: it belongs to another sandbox, or to a
    /// crashed one that has not been replayed.
    pub fn create(directory: &Path) -> Result<Self, JournalError> {
        let fail = |error| JournalError::Create(directory.into(), error);
        if let Some(parent) = directory.parent() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)
                .map_err(fail)?;
        }
        // Until the file is locked, a sweep would take it for a dead one's.
        let _no_sweep = directory
            .parent()
            .map(|parent| lock(parent, FlockArg::LockShared))
            .transpose()
            .map_err(fail)?;
        fault::point(Step::JournalMade).map_err(fail)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(directory)
            .map_err(fail)?;
        let path = directory.join(FILE);
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .and_then(|file| {
                Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno.into())
            });
        match file {
            Ok(file) => Ok(Self {
                directory: directory.into(),
                file,
            }),
            Err(error) => {
                let _ = fs::remove_file(&path);
                let _ = fs::remove_dir(directory);
                Err(JournalError::Write(path, error))
            }
        }
    }

    /// The state directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes down what is about to be acquired.
    ///
    /// # Errors
    /// [`JournalError::Write`]; the thing must then not be acquired.
    pub fn record(&self, entry: &Entry) -> Result<(), JournalError> {
        let fail = |error| JournalError::Write(self.directory.join(FILE), error);
        let mut line = serde_json::to_vec(entry).map_err(|error| fail(error.into()))?;
        line.push(b'\n');
        // One write of one line: a crash leaves a whole line or none that parses.
        (&*self.file).write_all(&line).map_err(fail)
    }

    /// Undoes everything but the calling process, and removes the state directory.
    ///
    /// # Errors
    /// [`JournalError::Undo`] for the first entry that could not be undone; the others are.
    pub fn finish(self) -> Result<(), JournalError> {
        self.undo()
    }

    /// As [`Journal::finish`], for who wants to try once more.
    ///
    /// # Errors
    /// As [`Journal::finish`].
    pub fn undo(&self) -> Result<(), JournalError> {
        let step = |step: Step| fault::point(step).map_err(|error| self.failed(step, error));
        step(Step::JournalReplayed)?;
        undo_entries(&self.directory)?;
        step(Step::StateRemoved)?;
        remove_state(&self.directory)
    }

    fn failed(&self, step: Step, error: std::io::Error) -> JournalError {
        JournalError::Undo(
            step.words().to_owned(),
            UndoError::Remove(self.directory.clone(), error),
        )
    }
}

/// Reads the entries of the journal in `directory`, oldest first; none if there is no journal.
///
/// # Errors
/// [`JournalError::Read`].
pub fn read(directory: &Path) -> Result<Vec<Entry>, JournalError> {
    let path = directory.join(FILE);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(JournalError::Read(path, error)),
    };
    // A crash may have cut the last line short: what it names was never acquired.
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect())
}

/// Undoes every journal below `parent` whose owner is dead: one that was killed before anybody knew of it is undone by
/// the next. What cannot be undone is logged.
pub fn sweep(parent: &Path) {
    let dead = match lock(parent, FlockArg::LockExclusiveNonblock) {
        Ok(_no_creation) => dead_below(parent),
        // Somebody makes a journal, or sweeps already; or there is none.
        Err(_) => return,
    };
    for (directory, _lock) in dead {
        log::warn!("cleaning up after a crash: {}", directory.display());
        if let Err(error) = replay(&directory) {
            log::warn!("{}", crate::error::chain(&error));
        }
    }
}

/// Directories with a journal that nobody has locked, now locked.
fn dead_below(parent: &Path) -> Vec<(PathBuf, Flock<File>)> {
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    let directories = entries.flatten().map(|entry| entry.path());
    directories
        .filter_map(|directory| {
            let lock = lock(&directory.join(FILE), FlockArg::LockExclusiveNonblock).ok()?;
            // One of an earlier version has no lock.
            let lives = read(&directory).ok()?.iter().any(|entry| match entry {
                Entry::Process {
                    pid,
                    start_time,
                    role: Role::Shim,
                } => spawn::start_time(*pid) == Some(*start_time),
                _ => false,
            });
            (!lives).then_some((directory, lock))
        })
        .collect()
}

fn lock(path: &Path, how: FlockArg) -> std::io::Result<Flock<File>> {
    Flock::lock(File::open(path)?, how).map_err(|(_, errno)| errno.into())
}

/// Undoes what a crashed sandbox left in `directory`, for one that takes its place. One that is on its way out has a while
/// to go by itself. No directory is no error.
///
/// # Errors
/// As [`replay`].
pub fn take_over(directory: &Path) -> Result<(), JournalError> {
    let deadline = std::time::Instant::now() + TAKE_OVER_WAIT;
    loop {
        match lock(&directory.join(FILE), FlockArg::LockExclusiveNonblock) {
            // It stays locked until it is gone.
            Ok(_lock) => return replay(directory),
            Err(error) if error.kind() == ErrorKind::NotFound => return replay(directory),
            Err(_) if std::time::Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            // It does not end by itself: the replay ends it.
            Err(_) => return replay(directory),
        }
    }
}

/// Undoes the journal in `directory` in reverse order and removes the directory; the calling process is
/// left alone. No directory is no error.
///
/// # Errors
/// [`JournalError::Undo`] for the first entry that could not be undone. The rest is undone all the same;
/// the journal stays for the next attempt.
pub fn replay(directory: &Path) -> Result<(), JournalError> {
    undo_entries(directory)?;
    remove_state(directory)
}

fn undo_entries(directory: &Path) -> Result<(), JournalError> {
    let mut first_error = None;
    for entry in read(directory)?.iter().rev() {
        if let Err(error) = undo(entry) {
            log::warn!("cannot undo {entry:?}: {error}");
            first_error.get_or_insert(JournalError::Undo(format!("{entry:?}"), error));
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn remove_state(directory: &Path) -> Result<(), JournalError> {
    remove_tree(directory)
        .map_err(|error| JournalError::Undo(format!("state directory {}", directory.display()), error))
}

fn undo(entry: &Entry) -> Result<(), UndoError> {
    match entry {
        Entry::Socket { path } => remove_file(path),
        Entry::Cgroup { path } => Cgroup::new(path.clone()).remove().map_err(UndoError::Cgroup),
        Entry::Redirection {
            namespace,
            inode,
            interface,
        } => network::undo_redirection(namespace, *inode, interface)
            .map_err(|error| UndoError::Redirection(Box::new(error))),
        Entry::Process { pid, start_time, .. } => kill(*pid, *start_time),
    }
}

fn remove_file(path: &Path) -> Result<(), UndoError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(UndoError::Remove(path.into(), error)),
    }
}

/// Kills a process and waits for its end, if it is still the one that was recorded.
fn kill(pid: i32, start_time: u64) -> Result<(), UndoError> {
    if u32::try_from(pid).is_ok_and(|pid| pid == std::process::id()) {
        return Ok(());
    }
    let Ok(pidfd) = spawn::pidfd_open(pid) else {
        return Ok(());
    };
    // Checked after the pidfd is open: from here on it names this process and no other.
    if spawn::start_time(pid) != Some(start_time) {
        return Ok(());
    }
    match spawn::pidfd_kill(&pidfd) {
        Ok(()) => {}
        Err(Errno::ESRCH) => return Ok(()),
        Err(_) => return Err(UndoError::Process(pid)),
    }
    if wait_for_end(&pidfd, KILL_WAIT) {
        Ok(())
    } else {
        Err(UndoError::Process(pid))
    }
}

/// Waits until the process of `pidfd` has ended; whether it has in time.
#[must_use]
pub fn wait_for_end(pidfd: impl AsFd, limit: Duration) -> bool {
    let deadline = std::time::Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) if left.is_zero() => return false,
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return true,
            Err(_) => return false,
        }
    }
}

/// Removes a directory tree that this runtime made. Mount points are never entered.
///
/// # Errors
/// [`UndoError`] for the first thing that stays.
fn remove_tree(path: &Path) -> Result<(), UndoError> {
    let fail = |error| UndoError::Remove(path.into(), error);
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    if is_mount_root(path) {
        return Err(UndoError::Mounted(path.into()));
    }
    if !metadata.is_dir() {
        return remove_file(path);
    }
    let mut names: Vec<_> = fs::read_dir(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(fail)?
        .into_iter()
        .map(|entry| entry.file_name())
        .collect();
    // The journal is the last file to go: until then a replay can be repeated.
    names.sort_by_key(|name| name == FILE);
    for name in names {
        remove_tree(&path.join(name))?;
    }
    match fs::remove_dir(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(fail(error)),
    }
}

/// Whether something is mounted on `path` (`STATX_ATTR_MOUNT_ROOT`); also when that cannot be told.
fn is_mount_root(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else {
        return true;
    };
    // SAFETY: an all-zero statx is a valid value of that plain struct.
    let mut buffer: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: path is a C string and buffer a writable statx, both alive during the call.
    let result = unsafe {
        libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_SYMLINK_NOFOLLOW,
            0,
            &raw mut buffer,
        )
    };
    let attribute = u64::from(libc::STATX_ATTR_MOUNT_ROOT.unsigned_abs());
    result != 0 || buffer.stx_attributes & attribute != 0
}
