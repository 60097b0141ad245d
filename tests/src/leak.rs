//! Finds what a test left on the host.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::host;

/// How often each thing exists.
type Things = BTreeMap<String, usize>;

/// The kind of what containerd has open.
const DESCRIPTORS: &str = "descriptor of containerd";

/// Everything a container may leave behind, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<&'static str, Things>);

/// Directories whose entries come and go with containers.
const DIRECTORIES: [(&str, u32); 7] = [
    ("/var/lib/cni", 2),
    ("/run/bulkhead", 4),
    ("/run/containerd", 3),
    ("/run/kata", 3),
    ("/run/netns", 1),
    ("/tmp", 1),
    ("/dev/shm", 1),
];

impl Snapshot {
    /// Looks at the host. `containerd` is its process id, `state` its state directory.
    #[must_use]
    pub fn take(containerd: i32, state: &Path) -> Self {
        let mut files = Things::new();
        for (directory, depth) in DIRECTORIES {
            list(Path::new(directory), depth, &mut files);
        }
        // containerd's root directory is beside the one of its state.
        let root = state.with_file_name("root");
        for (directory, depth) in [
            (state.join("io.containerd.runtime.v2.task"), 2),
            (state.join("io.containerd.sandbox.controller.v1.shim"), 2),
            (state.join("io.containerd.grpc.v1.cri"), 2),
            (root.join("io.containerd.grpc.v1.cri"), 2),
            (root.join("io.containerd.sandbox.controller.v1.shim"), 2),
        ] {
            list(&directory, depth, &mut files);
        }
        let mut cgroups = Things::new();
        list_directories(Path::new("/sys/fs/cgroup"), &mut cgroups);
        let mut links = Things::new();
        list(Path::new("/sys/class/net"), 1, &mut links);
        Snapshot(BTreeMap::from([
            (
                "process",
                count(
                    host::processes()
                        .into_iter()
                        .filter(host::Process::is_runtime)
                        .map(describe),
                ),
            ),
            ("mount", count(mounts())),
            ("cgroup", cgroups),
            ("network link", links),
            ("file", files),
            ("loop device", count(loop_devices())),
            (DESCRIPTORS, count(descriptors(containerd))),
        ]))
    }

    /// Takes the descriptors that the process has now for what was there.
    pub fn accept_descriptors_of(&mut self, containerd: i32) {
        self.0.insert(DESCRIPTORS, count(descriptors(containerd)));
    }

    /// What is in `later` and not in `self`, one line each.
    #[must_use]
    pub fn leaked(&self, later: &Self) -> String {
        let mut text = String::new();
        for (kind, things) in &later.0 {
            for (thing, &now) in things {
                let before = self
                    .0
                    .get(kind)
                    .and_then(|things| things.get(thing))
                    .copied()
                    .unwrap_or(0);
                if now > before {
                    let _ = writeln!(text, "  {kind}: {thing} ({before} before, {now} now)");
                }
            }
        }
        text
    }

    /// Waits until nothing that `self` does not have exists, at most for `limit`.
    ///
    /// # Errors
    /// What is left then.
    pub fn wait_clean(&self, containerd: i32, state: &Path, limit: Duration) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        loop {
            let leaked = self.leaked(&Snapshot::take(containerd, state));
            if leaked.is_empty() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(leaked);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn count(things: impl IntoIterator<Item = String>) -> Things {
    let mut counted = Things::new();
    for thing in things {
        *counted.entry(thing).or_default() += 1;
    }
    counted
}

fn describe(process: host::Process) -> String {
    format!(
        "{} {} [{}] {}",
        process.pid, process.name, process.state, process.command
    )
}

fn mounts() -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(mount_of_line).collect()
}

/// Mount point, type and source of a line of mountinfo; its ids are not stable.
fn mount_of_line(line: &str) -> Option<String> {
    let (left, right) = line.split_once(" - ")?;
    let point = left.split(' ').nth(4)?;
    let mut right = right.split(' ');
    Some(format!("{point} {} {}", right.next()?, right.next()?))
}

fn list(directory: &Path, depth: u32, found: &mut Things) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        found.insert(path.display().to_string(), 1);
        if depth > 1 && path.is_dir() && !path.is_symlink() {
            list(&path, depth - 1, found);
        }
    }
}

fn list_directories(directory: &Path, found: &mut Things) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        // The service manager's own come and go.
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_directory && !name.ends_with(".service") && !name.ends_with(".scope") {
            found.insert(entry.path().display().to_string(), 1);
            list_directories(&entry.path(), found);
        }
    }
}

fn loop_devices() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let backing = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("loop/backing_file")).ok();
    entries
        .flatten()
        .filter_map(backing)
        .map(|file| file.trim().to_owned())
        .collect()
}

/// Kinds of open descriptors: sockets, pipes and event descriptors by kind, files by path. Databases and
/// content that containerd opens once and keeps are not counted.
fn descriptors(pid: i32) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let targets = entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok());
    targets
        .map(|target| target.display().to_string())
        .filter(|target| !target.ends_with(".db"))
        .map(|target| target.split(":[").next().unwrap_or_default().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(kind: &'static str, things: &[&str]) -> Snapshot {
        Snapshot(BTreeMap::from([(
            kind,
            count(things.iter().map(ToString::to_string)),
        )]))
    }

    #[test]
    fn leaked_names_what_is_new_and_what_is_more() {
        let before = snapshot("mount", &["/a", "/b"]);
        assert_eq!(before.leaked(&snapshot("mount", &["/a"])), "");
        let text = before.leaked(&snapshot("mount", &["/a", "/b", "/b", "/c"]));
        assert_eq!(
            text,
            "  mount: /b (1 before, 2 now)\n  mount: /c (0 before, 1 now)\n"
        );
    }

    #[test]
    fn mount_lines_are_told_apart_by_point_type_and_source() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount_of_line(line).unwrap(), "/mnt2 ext3 /dev/root");
        assert_eq!(mount_of_line("36 35 98:0 / /x rw"), None);
    }

    #[test]
    fn this_process_has_mounts_and_descriptors() {
        assert!(!mounts().is_empty());
        assert!(!descriptors(std::process::id().cast_signed()).is_empty());
    }
}
