//! When each phase of a start ended.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

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
}

/// One phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mark {
    /// Name of the phase that ended, for example `agent_ready`.
    pub phase: String,
    /// `CLOCK_MONOTONIC` in microseconds.
    pub monotonic_us: u64,
}

#[derive(Serialize)]
struct File<'a> {
    sandbox: &'a str,
    marks: Vec<Mark>,
}

impl Timeline {
    /// A timeline; [`Timeline::save`] writes it to `file`.
    #[must_use]
    pub fn new(file: Option<PathBuf>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            marks: Vec::new(),
            file,
        })))
    }

    /// Marks the end of a phase now.
    pub fn mark(&self, phase: &str) {
        self.mark_at(phase, monotonic_us());
    }

    /// Marks the end of a phase at a `CLOCK_MONOTONIC` time in microseconds.
    pub fn mark_at(&self, phase: &str, monotonic_us: u64) {
        log::debug!("timeline {phase} {monotonic_us}");
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.marks.push(Mark {
            phase: phase.to_owned(),
            monotonic_us,
        });
    }

    /// Marks a phase as [`mark_at`](Self::mark_at) unless it is marked already; whether it was not.
    pub fn mark_once(&self, phase: &str, monotonic_us: u64) -> bool {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
        let mut marks = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .marks
            .clone();
        marks.sort_by_key(|mark| mark.monotonic_us);
        marks
    }

    /// Writes the marks as JSON: `{"sandbox":ID,"marks":[{"phase":P,"monotonic_us":T},…]}` by time.
    /// A failure is logged: a timeline never fails a sandbox.
    pub fn save(&self, sandbox: &str) {
        let Some(path) = self.0.lock().unwrap_or_else(PoisonError::into_inner).file.clone() else {
            return;
        };
        let file = File {
            sandbox,
            marks: self.marks(),
        };
        let written = serde_json::to_vec(&file)
            .map_err(std::io::Error::from)
            .and_then(|bytes| {
                if let Some(dir) = path.parent() {
                    std::fs::create_dir_all(dir)?;
                }
                // Written beside and renamed, so that a reader never sees half of it.
                let temporary = path.with_extension("json.new");
                std::fs::write(&temporary, bytes)?;
                std::fs::rename(&temporary, &path)
            });
        if let Err(error) = written {
            log::warn!("cannot write the timeline {}: {error}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::Timeline;

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
}
