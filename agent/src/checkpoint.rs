//! Filesystems that stand still while a running guest is saved.
//!
//! A snapshot holds the guest's memory and, beside it, copies of its writable disks. Both are of one moment only if no
//! filesystem writes between the two: each is frozen (`FIFREEZE`, which writes everything back first). Processes that
//! write wait in the kernel until the thaw, and find nothing odd about it.

mod freeze;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::error::{Error, chain};
use crate::gate::Gate;
use crate::job::{Job, JobError, Report};
use crate::reaper::Reaper;

/// Longest time a guest stays frozen without being told again.
const MAX_LIMIT: Duration = Duration::from_secs(600);

/// How long a thaw may take: it writes a superblock or two.
const THAW_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct State {
    /// Mount points of the frozen filesystems.
    frozen: Option<Vec<String>>,
    /// The last freeze ended by itself.
    expired: bool,
    timer: Option<AbortHandle>,
}

/// Freezes and thaws the guest.
#[derive(Debug)]
pub struct Checkpoint {
    reaper: Reaper,
    gate: Arc<Gate>,
    state: Mutex<State>,
    /// One change at a time.
    turn: tokio::sync::Mutex<()>,
}

impl Checkpoint {
    /// A guest that is not frozen.
    pub fn new(reaper: Reaper, gate: Arc<Gate>) -> Arc<Self> {
        Arc::new(Self {
            reaper,
            gate,
            state: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest is frozen.
    pub fn is_frozen(&self) -> bool {
        self.state().frozen.is_some()
    }

    /// Freezes the guest within `limit`, for `duration` at most; returns the mount points.
    ///
    /// # Errors
    /// Calls that change something do not end, or a filesystem cannot be frozen: then none is.
    pub async fn freeze(self: &Arc<Self>, duration: Duration, limit: Duration) -> Result<Vec<String>, Error> {
        if !(Duration::from_millis(1)..=MAX_LIMIT).contains(&duration) {
            return Err(Error::Invalid {
                field: "limit_ms",
                value: duration.as_millis().to_string(),
            });
        }
        let _turn = self.turn.lock().await;
        let known = self.state().frozen.clone();
        let frozen = match known {
            Some(frozen) => frozen,
            None => {
                self.gate.close();
                let result = self.freeze_all(limit).await;
                if result.is_err() {
                    self.gate.open();
                }
                result?
            }
        };
        let mut state = self.state();
        state.frozen = Some(frozen.clone());
        state.expired = false;
        self.set_timer(&mut state, duration);
        Ok(frozen)
    }

    async fn freeze_all(&self, limit: Duration) -> Result<Vec<String>, Error> {
        let deadline = tokio::time::Instant::now() + limit;
        self.gate.idle(limit).await?;
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let mut job = Job::spawn(&self.reaper, "freezing of the filesystems", &[], |status| {
            for point in freeze::freeze_all()? {
                status.send(&Report::Item(point));
            }
            Ok(())
        })?;
        match job.finish(left).await {
            Ok(reports) => Ok(items(reports)),
            Err(error) => {
                // One that reports an error has undone everything, one that was killed has not.
                if !matches!(error, JobError::Failed(_)) {
                    self.thaw_all().await;
                }
                Err(error.into())
            }
        }
    }

    fn set_timer(self: &Arc<Self>, state: &mut State, duration: Duration) {
        if let Some(timer) = state.timer.take() {
            timer.abort();
        }
        let checkpoint = Arc::downgrade(self);
        let timer = tokio::spawn(async move {
            tokio::time::sleep(duration).await;
            if let Some(checkpoint) = checkpoint.upgrade() {
                log::warn!("no thaw within {} ms", duration.as_millis());
                // Apart: the thaw ends this timer.
                tokio::spawn(async move {
                    let _turn = checkpoint.turn.lock().await;
                    checkpoint.thaw_now(true).await;
                });
            }
        });
        state.timer = Some(timer.abort_handle());
    }

    /// Thaws the guest; returns whether it had thawed itself since the last freeze.
    pub async fn thaw(&self) -> bool {
        let _turn = self.turn.lock().await;
        self.thaw_now(false).await;
        std::mem::take(&mut self.state().expired)
    }

    async fn thaw_now(&self, expired: bool) {
        if !self.is_frozen() {
            return;
        }
        self.thaw_all().await;
        let mut state = self.state();
        state.frozen = None;
        state.expired = expired;
        if let Some(timer) = state.timer.take() {
            timer.abort();
        }
        self.gate.open();
    }

    async fn thaw_all(&self) {
        let job = Job::spawn(&self.reaper, "thawing of the filesystems", &[], |_| {
            freeze::thaw_all()
        });
        let result = match job {
            Ok(mut job) => job.finish(THAW_LIMIT).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            log::error!("{}", chain(&error));
        }
    }
}

fn items(reports: Vec<Report>) -> Vec<String> {
    let item = |report| match report {
        Report::Item(text) => Some(text),
        _ => None,
    };
    reports.into_iter().filter_map(item).collect()
}
