//! Calls of containerd's services of containers, snapshots and tasks.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::api::*;
use crate::grpc::{self, Status};

/// How long containerd may take over a call that runs nothing.
const LIMIT: Duration = Duration::from_secs(60);

/// How long it may take over one that a pod takes part in: disks are copied, a VM begins.
const LONG_LIMIT: Duration = Duration::from_secs(600);

/// Carries a call: its method, the request's message, and how long it may take; gives the answer's message.
type Transport = dyn Fn(&str, Vec<u8>, Duration) -> Result<Vec<u8>, Status> + Send + Sync;

/// A namespace of a containerd.
#[derive(Clone)]
pub struct Client(Arc<Transport>);

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Client").finish_non_exhaustive()
    }
}

macro_rules! calls {
    ($($(#[$meta:meta])* $name:ident, $method:literal, $limit:ident, $request:ident, $answer:ident;)*) => {
        impl Client {
            $(
                $(#[$meta])*
                ///
                /// # Errors
                /// containerd's refusal, or that it gives no answer in time.
                pub fn $name(&self, request: &$request) -> Result<$answer, Status> {
                    let method = concat!("containerd.services.", $method);
                    grpc::typed(request, |message| (self.0)(method, message, $limit))
                }
            )*
        }
    };
}

calls! {
    /// What containerd knows of a container.
    container, "containers.v1.Containers/Get", LIMIT, ContainerId, OneContainer;
    /// Makes it know a container. Nothing runs yet.
    create_container, "containers.v1.Containers/Create", LIMIT, OneContainer, OneContainer;
    /// Makes it forget a container.
    delete_container, "containers.v1.Containers/Delete", LIMIT, ContainerId, Empty;
    /// What a snapshotter knows of a snapshot.
    stat_snapshot, "snapshots.v1.Snapshots/Stat", LIMIT, SnapshotKey, OneSnapshot;
    /// Makes a snapshot that can be written.
    prepare_snapshot, "snapshots.v1.Snapshots/Prepare", LIMIT, NewSnapshot, Mounts;
    /// Makes a snapshot that cannot be written.
    view_snapshot, "snapshots.v1.Snapshots/View", LIMIT, NewSnapshot, Mounts;
    /// Removes a snapshot.
    remove_snapshot, "snapshots.v1.Snapshots/Remove", LIMIT, SnapshotKey, Empty;
    /// Makes the task of a container.
    create_task, "tasks.v1.Tasks/Create", LONG_LIMIT, NewTask, NewTaskAnswer;
    /// Lets the task run.
    start_task, "tasks.v1.Tasks/Start", LONG_LIMIT, Process, StartAnswer;
    /// Sends a signal to a process.
    kill, "tasks.v1.Tasks/Kill", LIMIT, Signal, Empty;
    /// Waits for the end of a process.
    wait, "tasks.v1.Tasks/Wait", LIMIT, Process, WaitAnswer;
    /// Removes a task that has ended.
    delete_task, "tasks.v1.Tasks/Delete", LIMIT, TaskId, DeleteAnswer;
}

impl Client {
    /// For `namespace` of the containerd whose API is served at `socket`.
    #[must_use]
    pub fn new(socket: PathBuf, namespace: String) -> Self {
        Self::through(move |method, message, limit| {
            grpc::call_bytes(&socket, method, Some(&namespace), message, limit)
        })
    }

    /// For whoever answers calls; in tests, no containerd.
    #[must_use]
    pub fn through(
        transport: impl Fn(&str, Vec<u8>, Duration) -> Result<Vec<u8>, Status> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(transport))
    }
}
