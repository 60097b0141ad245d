//! Calls that take their time: how long they may, and that what they began is brought to its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinError;
use ttrpc::r#async::TtrpcContext;

use super::Service;
use crate::container::spec::valid_path;
use crate::error::Error;
use crate::job::Job;
use crate::storage::SHARED;

/// How long a call that starts something may take if the host does not say: longer than a host waits.
const DEFAULT_LIMIT: Duration = Duration::from_secs(600);

/// How long a call may take: a little less than the host waits for it, so that the host hears what took so long.
pub(super) fn limit(context: &TtrpcContext) -> Duration {
    match u64::try_from(context.timeout_nano) {
        Ok(nanos @ 1..) => Duration::from_nanos(nanos) * 9 / 10,
        _ => DEFAULT_LIMIT,
    }
}

/// What a task has done, unless it panicked.
pub(super) fn joined<T>(task: Result<T, JoinError>) -> ttrpc::Result<T> {
    task.map_err(|error| ttrpc::Error::Others(error.to_string()))
}

impl Service {
    /// Runs a call to its end even if the host stops waiting for it: what is half done cannot be left so.
    pub(super) async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let working = self.gate.work();
        let work = async move {
            let _working = working;
            work.await
        };
        Ok(joined(tokio::spawn(work).await)??)
    }

    /// Works on a volume in a helper process: files of the host and memory can take their time.
    pub(super) async fn volume_job(
        &self,
        context: &TtrpcContext,
        name: &'static str,
        work: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> ttrpc::Result<()> {
        let limit = limit(context);
        let containers = Arc::clone(&self.containers);
        self.detached(async move {
            let mut job = Job::spawn(&containers.reaper, name, &[], move |_| work())?;
            job.finish(limit).await?;
            Ok(())
        })
        .await
    }
}

/// A directory of the shared tree.
pub(super) fn checked_source(path: &str) -> Result<PathBuf, Error> {
    if valid_path(path) && Path::new(path).starts_with(SHARED) {
        return Ok(PathBuf::from(path));
    }
    Err(Error::Invalid {
        field: "source",
        value: path.to_owned(),
    })
}
