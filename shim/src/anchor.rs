//! Process ids on the host for containers whose processes are in the guest.
//!
//! containerd knows a container by one process id, looks up that process's namespaces in `/proc`, and names a
//! container to another one by it: `kubectl debug --target` asks for `/proc/<id>/ns/pid`. The server's own id
//! cannot say which container is meant, so each container of a pod has a thread of the server, which sleeps.

use std::io;
use std::path::Path;
use std::sync::mpsc;

/// More than enough for a thread that calls nothing.
const STACK: usize = 32 << 10;

/// A sleeping thread. It ends when this is dropped.
#[derive(Debug)]
pub struct Anchor {
    id: u32,
    /// Dropped with it, which wakes the thread.
    _awake: mpsc::Sender<()>,
}

impl Anchor {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel has no thread to give.
    pub fn new() -> io::Result<Self> {
        let (awake, sleep) = mpsc::channel();
        let (tell, told) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name("container".into())
            .stack_size(STACK)
            .spawn(move || {
                let _ = tell.send(nix::unistd::gettid());
                let _ = sleep.recv();
            })?;
        let id = told.recv().map_err(io::Error::other)?;
        Ok(Self {
            id: id.as_raw().unsigned_abs(),
            _awake: awake,
        })
    }

    /// The thread's id, unique among all processes and threads of the host while it lives.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }
}

/// The process id in a path of the form `/proc/<id>/ns/<namespace>`.
#[must_use]
pub fn id_of(namespace: &Path) -> Option<u32> {
    let below = namespace.strip_prefix("/proc").ok()?;
    below.iter().next()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    proptest::proptest! {
        /// What is written into a specification for a process is read back, and nothing else is taken for one.
        #[test]
        fn ids_are_read_from_paths_of_proc(id in 1u32.., name in "pid|net|ipc", other in "/?(proc|run|[0-9./]{0,6}){0,3}/ns/pid") {
            let path = format!("/proc/{id}/ns/{name}");
            proptest::prop_assert_eq!(id_of(Path::new(&path)), Some(id));
            if let Some(id) = id_of(Path::new(&other)) {
                let begin = format!("/proc/{id}/");
                let plain: std::path::PathBuf = Path::new(&other).components().collect();
                proptest::prop_assert!(
                    plain.starts_with(&begin) || other.contains("/0") || other.contains("+"), "{} in {}", id, other
                );
            }
        }
    }

    #[test]
    fn every_anchor_has_an_id_in_proc_as_long_as_it_lives() {
        let (a, b) = (Anchor::new().unwrap(), Anchor::new().unwrap());
        assert!(a.id() != b.id() && a.id() != std::process::id());
        let path = format!("/proc/{}/ns/pid", a.id());
        assert!(std::fs::read_link(&path).is_ok());
        assert_eq!(id_of(Path::new(&path)), Some(a.id()));
        drop(a);
        let gone = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            std::fs::read_link(&path).is_err()
        });
        assert!(gone);
    }

    #[test]
    fn other_paths_have_no_id() {
        for path in ["/var/run/netns/x", "/proc/self/ns/pid", "/proc", ""] {
            assert_eq!(id_of(Path::new(path)), None, "{path}");
        }
    }
}
