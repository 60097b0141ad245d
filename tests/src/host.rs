//! What the host's `/proc` says of processes.

use std::fs;

/// A process of the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Parent's process id.
    pub parent: i32,
    /// `comm`, at most 15 characters.
    pub name: String,
    /// State letter; `Z` is a zombie.
    pub state: char,
    /// Arguments, joined by blanks.
    pub command: String,
}

impl Process {
    /// Reads one process; `None` when there is none.
    #[must_use]
    pub fn read(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (open, close) = (stat.find('(')?, stat.rfind(')')?);
        let mut rest = stat[close + 1..].split_whitespace();
        let state = rest.next()?.chars().next()?;
        let parent = rest.next()?.parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command)
            .trim_end_matches('\0')
            .replace('\0', " ");
        Some(Process {
            pid,
            parent,
            name: stat[open + 1..close].to_owned(),
            state,
            command,
        })
    }

    /// Whether it is a shim, a VMM or a runtime's helper.
    #[must_use]
    pub fn is_runtime(&self) -> bool {
        ["containerd-shim", "bulkhead", "runc"]
            .iter()
            .any(|prefix| self.name.starts_with(prefix))
            || self.command.contains("containerd-shim-")
    }

    /// Whether it is a VMM. Its main thread's name is the program's.
    #[must_use]
    pub fn is_vmm(&self) -> bool {
        self.name.starts_with("bulkhead-vmm")
    }
}

/// All processes.
#[must_use]
pub fn processes() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut processes: Vec<_> = pids.filter_map(Process::read).collect();
    processes.sort();
    processes
}

/// The VMM processes below `ancestor`.
#[must_use]
pub fn vmms_of(ancestor: i32) -> Vec<i32> {
    let all = processes();
    let below = |mut pid: i32| {
        while let Some(process) = all.iter().find(|process| process.pid == pid) {
            if process.parent == ancestor {
                return true;
            }
            pid = process.parent;
        }
        false
    };
    all.iter()
        .filter(|process| process.is_vmm() && below(process.pid))
        .map(|process| process.pid)
        .collect()
}

/// Whether the process exists and is not a zombie.
#[must_use]
pub fn is_alive(pid: i32) -> bool {
    Process::read(pid).is_some_and(|process| process.state != 'Z')
}
