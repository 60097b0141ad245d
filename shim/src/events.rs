//! containerd's task events, sent in order by one forwarder.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_sandbox::{EventSink, Exit, SandboxEvent};
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::types::mount::Mount;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageFull};
use tokio::sync::{mpsc, oneshot};
use ttrpc::context::Context;
use ttrpc::proto::Code;

use crate::anchor::Anchor;
use crate::io::Paths;

/// Most events that wait for containerd.
const QUEUE: usize = 2048;

/// Topic of the event that says why a virtual machine has ended. containerd has no message for that, and its clients show
/// only those that they know: it is a `google.rpc.Status` with the container's id and the reason as its message.
const LOST_TOPIC: &str = "/tasks/vm-ended";

/// How long one delivery may take.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Attempts at one event; the pause before each is as many seconds as attempts have failed.
const ATTEMPTS: u64 = 5;

/// What the events of a task need to know about it.
#[derive(Clone, Debug, Default)]
pub struct Task {
    /// Bundle directory.
    pub bundle: String,
    /// Root file system's mounts.
    pub rootfs: Vec<Mount>,
    /// Init's streams.
    pub paths: Paths,
    /// Streams of added processes.
    pub execs: HashMap<String, Paths>,
    /// Stands for it on the host; absent: this process does.
    pub anchor: Option<Arc<Anchor>>,
}

impl Task {
    /// Its process id on the host.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.anchor
            .as_ref()
            .map_or_else(std::process::id, |anchor| anchor.id())
    }
}

/// Tasks by container id.
pub type Tasks = Arc<Mutex<HashMap<String, Task>>>;

enum Item {
    Event(Envelope),
    Flush(oneshot::Sender<()>),
}

/// Turns a sandbox's events into containerd's and queues them.
pub struct Publisher {
    queue: mpsc::Sender<Item>,
    namespace: String,
    tasks: Tasks,
}

impl Publisher {
    /// Starts the forwarder to containerd's ttrpc socket at `address`; without one, events go nowhere.
    #[must_use]
    pub fn start(address: Option<String>, namespace: String, tasks: Tasks) -> Arc<Self> {
        let (queue, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(forward(address, receiver));
        Arc::new(Self {
            queue,
            namespace,
            tasks,
        })
    }

    /// Waits until the events queued so far are delivered or given up, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let (sender, receiver) = oneshot::channel();
        let flushed = async {
            if self.queue.send(Item::Flush(sender)).await.is_ok() {
                let _ = receiver.await;
            }
        };
        let _ = tokio::time::timeout(limit, flushed).await;
    }

    fn task(&self, container: &str) -> Task {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.get(container).cloned().unwrap_or_default()
    }

    fn publish<M: Message + MessageFull>(&self, topic: &str, message: &M) {
        self.publish_any(topic, any(message));
    }

    fn publish_any(&self, topic: &str, event: Any) {
        let envelope = Envelope {
            timestamp: Some(timestamp(now_ns())).into(),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(event).into(),
            ..Envelope::default()
        };
        if let Err(error) = self.queue.try_send(Item::Event(envelope)) {
            log::error!("event {topic} is lost: {error}");
        }
    }
}

impl EventSink for Publisher {
    fn event(&self, event: SandboxEvent) {
        match event {
            SandboxEvent::Created { container } => {
                let task = self.task(&container);
                let pid = task.pid();
                let io = event::TaskIO {
                    stdin: task.paths.stdin,
                    stdout: task.paths.stdout,
                    stderr: task.paths.stderr,
                    terminal: task.paths.terminal,
                    ..event::TaskIO::default()
                };
                let message = event::TaskCreate {
                    container_id: container,
                    bundle: task.bundle,
                    rootfs: task.rootfs,
                    io: Some(io).into(),
                    pid,
                    ..event::TaskCreate::default()
                };
                self.publish(topics::TASK_CREATE_EVENT_TOPIC, &message);
            }
            SandboxEvent::Started { container, exec } if exec.is_empty() => {
                let pid = self.task(&container).pid();
                let message = event::TaskStart {
                    container_id: container,
                    pid,
                    ..event::TaskStart::default()
                };
                self.publish(topics::TASK_START_EVENT_TOPIC, &message);
            }
            SandboxEvent::Started { container, exec } => {
                let pid = self.task(&container).pid();
                let message = event::TaskExecStarted {
                    container_id: container,
                    exec_id: exec,
                    pid,
                    ..event::TaskExecStarted::default()
                };
                self.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &message);
            }
            SandboxEvent::ExecAdded { container, exec } => {
                let message = event::TaskExecAdded {
                    container_id: container,
                    exec_id: exec,
                    ..event::TaskExecAdded::default()
                };
                self.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &message);
            }
            SandboxEvent::Exited {
                container,
                exec,
                exit,
            } => {
                let pid = self.task(&container).pid();
                let message = event::TaskExit {
                    id: if exec.is_empty() { container.clone() } else { exec },
                    container_id: container,
                    pid,
                    exit_status: exit.status,
                    exited_at: exited_at(exit),
                    ..event::TaskExit::default()
                };
                self.publish(topics::TASK_EXIT_EVENT_TOPIC, &message);
            }
            SandboxEvent::OutOfMemory { container } => {
                let message = event::TaskOOM {
                    container_id: container,
                    ..event::TaskOOM::default()
                };
                self.publish(topics::TASK_OOM_EVENT_TOPIC, &message);
            }
            SandboxEvent::Lost { container, reason } => {
                let status = ttrpc::get_status(Code::UNAVAILABLE, format!("{container}: {reason}"));
                let event = Any {
                    type_url: "google.rpc.Status".to_owned(),
                    value: status.write_to_bytes().unwrap_or_default(),
                    ..Any::default()
                };
                self.publish_any(LOST_TOPIC, event);
            }
            SandboxEvent::Paused { container } => {
                let message = event::TaskPaused {
                    container_id: container,
                    ..event::TaskPaused::default()
                };
                self.publish(topics::TASK_PAUSED_EVENT_TOPIC, &message);
            }
            SandboxEvent::Resumed { container } => {
                let message = event::TaskResumed {
                    container_id: container,
                    ..event::TaskResumed::default()
                };
                self.publish(topics::TASK_RESUMED_EVENT_TOPIC, &message);
            }
            SandboxEvent::Deleted { container, exit } => {
                let pid = self.task(&container).pid();
                let message = event::TaskDelete {
                    container_id: container,
                    pid,
                    exit_status: exit.status,
                    exited_at: exited_at(exit),
                    ..event::TaskDelete::default()
                };
                self.publish(topics::TASK_DELETE_EVENT_TOPIC, &message);
            }
        }
    }
}

/// A message in an `Any` with the bare name containerd compares.
#[must_use]
pub fn any<M: Message + MessageFull>(message: &M) -> Any {
    Any {
        type_url: M::descriptor().full_name().to_owned(),
        // Encoding into memory fails only for messages over 2 GiB.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// A protobuf time from nanoseconds since the epoch.
#[must_use]
pub fn timestamp(ns: u64) -> Timestamp {
    const SECOND: u64 = 1_000_000_000;
    Timestamp {
        seconds: i64::try_from(ns / SECOND).unwrap_or(i64::MAX),
        nanos: i32::try_from(ns % SECOND).unwrap_or(0),
        ..Timestamp::default()
    }
}

fn exited_at(exit: Exit) -> protobuf::MessageField<Timestamp> {
    Some(timestamp(exit.at_ns)).into()
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

async fn forward(address: Option<String>, mut queue: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = queue.recv().await {
        match item {
            Item::Flush(done) => {
                let _ = done.send(());
            }
            Item::Event(envelope) => {
                if let Some(address) = &address {
                    deliver(address, &mut client, envelope).await;
                }
            }
        }
    }
}

async fn deliver(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let request = ForwardRequest {
        envelope: Some(envelope).into(),
        ..ForwardRequest::default()
    };
    for failures in 0..ATTEMPTS {
        tokio::time::sleep(Duration::from_secs(failures)).await;
        match try_deliver(address, client, &request).await {
            Ok(()) => return,
            Err(error) => {
                log::warn!("cannot deliver event {}: {error}", request.envelope.topic);
                *client = None;
            }
        }
    }
    log::error!("event {} is lost", request.envelope.topic);
}

async fn try_deliver(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> Result<(), ttrpc::Error> {
    let connected = match client {
        Some(client) => client,
        None => client.insert(EventsClient::new(
            Client::connect(&format!("unix://{address}")).await?,
        )),
    };
    match tokio::time::timeout(CALL_LIMIT, connected.forward(Context::default(), request)).await {
        Ok(result) => result.map(drop),
        Err(_) => Err(ttrpc::Error::Others("no answer in time".into())),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    proptest! {
        /// The time of an exit is the same in containerd's terms.
        #[test]
        fn times_arrive(at_ns in 0..=u64::MAX) {
            let time = timestamp(at_ns);
            prop_assert!((0..1_000_000_000).contains(&time.nanos));
            let seconds = u128::try_from(time.seconds).unwrap_or(u128::MAX);
            prop_assert_eq!(seconds * 1_000_000_000 + u128::from(time.nanos.unsigned_abs()), u128::from(at_ns));
        }
    }

    #[test]
    fn type_urls_are_bare_names() {
        assert_eq!(
            any(&event::TaskExit::default()).type_url,
            "containerd.events.TaskExit"
        );
        assert_eq!(
            any(&event::TaskOOM::default()).type_url,
            "containerd.events.TaskOOM"
        );
        let metrics = containerd_shim_protos::cgroups_v2::metrics::Metrics::default();
        assert_eq!(any(&metrics).type_url, "io.containerd.cgroups.v2.Metrics");
    }

    #[test]
    fn times_are_split_into_seconds_and_nanoseconds() {
        let time = timestamp(1_500_000_001);
        assert_eq!((time.seconds, time.nanos), (1, 500_000_001));
    }
}
