//! `delete`: cleans up after a task, whether its server ended well, crashed, or never came to be.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_sandbox::error::chain;
use bulkhead_sandbox::journal::{self, Entry, Role};
use bulkhead_sandbox::{mount, spawn};
use containerd_shim_protos::api::DeleteResponse;

use crate::args::Args;
use crate::events;
use crate::start::STATE_FILE;

/// Status of a task whose end nobody saw.
const KILLED: u32 = 128 + 9;

/// How long a server on its way out is waited for; containerd gives the whole call 5 s.
const SERVER_WAIT: Duration = Duration::from_secs(2);

/// Cleans up and returns the answer for containerd. What cannot be cleaned up is logged.
///
/// A container of a pod has nothing of its own outside the sandbox's mount namespace: only the task that
/// made the sandbox names its state directory in its bundle, so that no other can touch a live VM.
#[must_use]
pub fn run(args: &Args) -> DeleteResponse {
    let bundle = if args.bundle.is_empty() {
        std::env::current_dir().unwrap_or_default()
    } else {
        PathBuf::from(&args.bundle)
    };
    let pid = match fs::read_to_string(bundle.join(STATE_FILE)) {
        Ok(directory) => clean_up(Path::new(directory.trim_end())),
        Err(_) => 0,
    };
    if let Err(error) = mount::detach(&bundle.join("rootfs")) {
        log::warn!("{}", chain(&error));
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    DeleteResponse {
        pid,
        exit_status: KILLED,
        exited_at: Some(events::timestamp(
            u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        ))
        .into(),
        ..DeleteResponse::default()
    }
}

/// Undoes the sandbox's journal; the server's process id, if it is known.
fn clean_up(directory: &Path) -> u32 {
    let entries = journal::read(directory).unwrap_or_default();
    let server = entries.iter().find_map(|entry| match entry {
        Entry::Process {
            pid,
            start_time,
            role: Role::Shim,
        } => Some((*pid, *start_time)),
        _ => None,
    });
    if let Some((pid, start_time)) = server
        && let Ok(pidfd) = spawn::pidfd_open(pid)
        && spawn::start_time(pid) == Some(start_time)
        && !journal::wait_for_end(&pidfd, SERVER_WAIT)
    {
        log::warn!("the server of the sandbox, process {pid}, is still there: ending it");
    }
    if let Err(error) = journal::replay(directory) {
        log::warn!("{}", chain(&error));
    }
    server.and_then(|(pid, _)| u32::try_from(pid).ok()).unwrap_or(0)
}
