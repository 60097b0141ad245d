//! When each phase of a start ended.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Name of the timeline in a sandbox's state directory.
pub const FILE: &str = "timeline.json";

/// `CLOCK_MONOTONIC` in microseconds.
#[must_use]
pub fn monotonic_us() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(|time| time.tv_sec().unsigned_abs() * 1_000_000 + time.tv_nsec().unsigned_abs() / 1000)
        .unwrap_or(0)
}

/// Marks of one sandbox, in the order they were made.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    marks: Vec<Mark>,
    file: Option<PathBuf>,
    /// In the state directory. Opened once: a save that comes after the directory has been removed makes nothing.
    kept: Option<File>,
}

/// One phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Name of the phase that ended, for example `agent_ready`.
    pub phase: String,
    /// `CLOCK_MONOTONIC` in microseconds.
    pub monotonic_us: u64,
}

/// A timeline as it is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The sandbox's id.
    pub sandbox: String,
    /// By time.
    pub marks: Vec<Mark>,
}

impl Record {
    /// Reads a saved timeline; none: nothing has been saved there yet.
    ///
    /// # Errors
    /// The file cannot be read or holds something else.
    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        let bytes = std::fs::read(path)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&bytes)?))
    }
}

impl Timeline {
    /// A timeline; [`Timeline::save`] writes it to `file`.
    #[must_use]
    pub fn new(file: Option<PathBuf>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            marks: Vec::new(),
            file,
            kept: None,
        })))
    }

    /// Lets [`Timeline::save`] also write to the sandbox's state directory, where `bulkhead timeline` looks. A failure is
    /// logged.
    pub fn keep_in(&self, directory: &Path) {
        let path = directory.join(FILE);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path);
        match file {
            Ok(file) => self.lock().kept = Some(file),
            Err(error) => log::warn!("cannot make the timeline {}: {error}", path.display()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks the end of a phase now.
    pub fn mark(&self, phase: &str) {
        self.mark_at(phase, monotonic_us());
    }

    /// Marks the end of a phase at a `CLOCK_MONOTONIC` time in microseconds.
    pub fn mark_at(&self, phase: &str, monotonic_us: u64) {
        log::debug!("timeline {phase} {monotonic_us}");
        let mut inner = self.lock();
        inner.marks.push(Mark {
            phase: phase.to_owned(),
            monotonic_us,
        });
    }

    /// Marks a phase as [`mark_at`](Self::mark_at) unless it is marked already; whether it was not.
    pub fn mark_once(&self, phase: &str, monotonic_us: u64) -> bool {
        let mut inner = self.lock();
        let new = inner.marks.iter().all(|mark| mark.phase != phase);
        if new {
            log::debug!("timeline {phase} {monotonic_us}");
            inner.marks.push(Mark {
                phase: phase.to_owned(),
                monotonic_us,
            });
        }
        new
    }

    /// The marks so far, by time.
    #[must_use]
    pub fn marks(&self) -> Vec<Mark> {
        let mut marks = self.lock().marks.clone();
        marks.sort_by_key(|mark| mark.monotonic_us);
        marks
    }

    /// Writes the marks as JSON: `{"sandbox":ID,"marks":[{"phase":P,"monotonic_us":T},…]}` by time.
    /// A failure is logged: a timeline never fails a sandbox.
    pub fn save(&self, sandbox: &str) {
        let record = Record {
            sandbox: sandbox.to_owned(),
            marks: self.marks(),
        };
        let inner = self.lock();
        if inner.file.is_none() && inner.kept.is_none() {
            return;
        }
        let written = serde_json::to_vec(&record)
            .map_err(io::Error::from)
            .and_then(|bytes| {
                // Marks are only added: what is written covers what was there.
                inner
                    .kept
                    .as_ref()
                    .map_or(Ok(()), |file| file.write_all_at(&bytes, 0))?;
                inner.file.as_ref().map_or(Ok(()), |path| replace(path, &bytes))
            });
        if let Err(error) = written {
            log::warn!("cannot write the timeline of {sandbox}: {error}");
        }
    }
}

/// Written beside and renamed, so that a reader never sees half of it.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let temporary = path.with_extension("json.new");
    std::fs::write(&temporary, bytes)?;
    std::fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{FILE, Mark, Record, Timeline};

    #[test]
    fn is_saved_by_time() {
        let dir = std::env::temp_dir().join(format!("bulkhead-timeline-{}", std::process::id()));
        let timeline = Timeline::new(Some(dir.join("x.json")));
        timeline.mark_at("b", 2);
        assert!(timeline.mark_once("a", 1));
        assert!(!timeline.mark_once("a", 7));
        timeline.save("x");
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("x.json")).unwrap()).unwrap();
        assert_eq!(json["sandbox"], "x");
        assert_eq!(json["marks"][0]["phase"], "a");
        assert_eq!(json["marks"][0]["monotonic_us"], 1);
        assert_eq!(json["marks"][1]["monotonic_us"], 2);
        assert_eq!(json["marks"][2], serde_json::Value::Null);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn is_kept_with_the_state_and_goes_with_it() {
        let dir = std::env::temp_dir().join(format!("bulkhead-timeline-kept-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let timeline = Timeline::default();
        timeline.keep_in(&dir);
        assert_eq!(Record::read(&dir.join(FILE)).unwrap(), None);
        let mark = |phase: &str, monotonic_us| Mark {
            phase: phase.into(),
            monotonic_us,
        };
        let mut marks = Vec::new();
        for (phase, time) in [("a", 1), ("b", 2)] {
            timeline.mark_at(phase, time);
            timeline.save("x");
            marks.push(mark(phase, time));
            let record = Record::read(&dir.join(FILE)).unwrap().unwrap();
            assert_eq!((record.sandbox.as_str(), &record.marks), ("x", &marks));
        }
        std::fs::remove_dir_all(&dir).unwrap();
        timeline.save("x");
        assert!(!dir.exists());
    }
}
