//! Client of the guest agent.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bulkhead_protocol::agent::{
    self, AgentClient, CommitVolumeRequest, ConfigureNetworkRequest, ContainerStatsRequest,
    ContainerStatsResponse, CreateContainerRequest, CreateVolumeRequest, Event, EventsRequest,
    ExecProcessRequest, ForwardRequest, FreezeRequest, HelloRequest, HelloResponse, ListProcessesRequest,
    ListProcessesResponse, PauseContainerRequest, PlugDeviceRequest, PrepareRequest, ReattachStreamsRequest,
    RemoveContainerRequest, RemoveVolumeRequest, ResizeTerminalRequest, ResumeContainerRequest,
    ResumeRequest, ResumeResponse, SetProcessorsRequest, SetupSandboxRequest, ShutdownRequest,
    SignalProcessRequest, StageVolumeRequest, StartContainerRequest, ThawRequest, UpdateContainerRequest,
    event,
};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};
use ttrpc::context::Context;

use crate::error::Error;
use crate::limits;
use crate::vm::Vm;

#[cfg(test)]
pub(crate) mod fake;
mod guard;
#[cfg(test)]
mod tests;

pub use guard::Violation;
use guard::{Guarded, Watch};

/// How long after a lost connection the end of the VM, its likely cause, is waited for.
const END_WAIT: Duration = Duration::from_secs(1);

/// Connection to the agent of one VM.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    vm: Vm,
    limit: Duration,
    watch: Arc<Watch>,
    /// Whether it has let a question time out and answered none since.
    late: Arc<AtomicBool>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("vm", &self.vm)
            .finish_non_exhaustive()
    }
}

/// Stream of the agent's events.
pub struct Events {
    stream: ClientStreamReceiver<Event>,
    watch: Arc<Watch>,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    /// The next event; `None` when there will be no more, whatever the reason.
    pub async fn next(&mut self) -> Option<event::Kind> {
        let event = self.stream.recv().await.ok().flatten()?;
        self.watch.took_event();
        let known = event
            .kind
            .filter(|kind| matches!(kind, event::Kind::Exited(_) | event::Kind::Oom(_)));
        if known.is_none() {
            self.watch.broke(Violation::Event);
        }
        known
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident, $phase:literal, $request:ty => $response:ty;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// The agent's refusal, [`Error::Timeout`], or the end of the VM.
        pub async fn $name(&self, request: &$request) -> Result<$response, Error> {
            self.call($phase, self.limit, self.client.$name(Context::default(), request)).await
        }
    )*};
}

impl Agent {
    /// Uses the host's end of the agent's stream; requests have `limit` as their deadline.
    ///
    /// # Errors
    /// The descriptor is not a usable socket.
    pub fn new(stream: OwnedFd, vm: Vm, limit: Duration) -> std::io::Result<Self> {
        let stream = std::os::unix::net::UnixStream::from(stream);
        stream.set_nonblocking(true)?;
        let watch = Arc::new(Watch::default());
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let stream = Guarded::new(stream, watch.clone(), limits::MESSAGE_TIME);
        Ok(Self {
            client: AgentClient::new(Client::new(Socket::new(stream))),
            vm,
            limit,
            watch,
            late: Arc::default(),
        })
    }

    /// The same agent, whose requests have a deadline of at most `limit`.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Self {
            limit: limit.min(self.limit),
            ..self.clone()
        }
    }

    /// The same agent for a question that is asked about every pod in turn: an agent that has not answered before
    /// is hardly waited for.
    #[must_use]
    pub fn for_query(&self) -> Self {
        let late = self.late.load(Ordering::Relaxed);
        self.within(if late {
            limits::LATE_QUERY_TIME
        } else {
            limits::QUERY_TIME
        })
    }

    /// How the agent broke the rules of its connection, if it did.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        self.watch.violation()
    }

    /// Waits until the agent serves, and checks its version.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `limit`, [`Error::AgentVersion`], or the end of the VM.
    pub async fn hello(&self, limit: Duration) -> Result<HelloResponse, Error> {
        let request = HelloRequest {
            version: agent::VERSION,
            ..HelloRequest::default()
        };
        let hello = self
            .call(
                "guest kernel boot and agent start",
                limit,
                self.client.hello(Context::default(), &request),
            )
            .await?;
        if hello.version != agent::VERSION {
            return Err(Error::AgentVersion {
                got: hello.version,
                want: agent::VERSION,
            });
        }
        Ok(hello)
    }

    /// Waits until the agent of a restored guest serves, and gives it what it must not share with others.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `limit`, [`Error::AgentVersion`], or the end of the VM.
    pub async fn resume(&self, request: &ResumeRequest, limit: Duration) -> Result<ResumeResponse, Error> {
        let resume = self.client.resume(Context::default(), request);
        let resumed = self.call("resume of the guest", limit, resume).await?;
        if resumed.version != agent::VERSION {
            return Err(Error::AgentVersion {
                got: resumed.version,
                want: agent::VERSION,
            });
        }
        Ok(resumed)
    }

    /// Checks that the agent answers.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `limit`, or the end of the VM.
    pub async fn ping(&self, limit: Duration) -> Result<(), Error> {
        let request = HelloRequest {
            version: agent::VERSION,
            ..HelloRequest::default()
        };
        let hello = self.client.hello(Context::default(), &request);
        self.call("ping", limit, hello).await.map(drop)
    }

    /// Names the guest and mounts the shared tree. Can be asked before the agent serves.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `limit`, the agent's refusal, or the end of the VM.
    pub async fn setup_sandbox(&self, request: &SetupSandboxRequest, limit: Duration) -> Result<(), Error> {
        let setup = self.client.setup_sandbox(Context::default(), request);
        self.call("guest kernel boot and sandbox setup", limit, setup)
            .await
            .map(drop)
    }

    /// Subscribes to exits and out-of-memory kills.
    ///
    /// # Errors
    /// The stream could not be opened.
    pub async fn events(&self) -> Result<Events, Error> {
        let request = EventsRequest::default();
        let events = self.client.events(Context::default(), &request);
        let stream = self.call("event subscription", self.limit, events).await?;
        Ok(Events {
            stream,
            watch: self.watch.clone(),
        })
    }

    /// Signals a process. An agent that does not answer a SIGKILL loses its VM: a kill kills.
    ///
    /// # Errors
    /// The agent's refusal, [`Error::Timeout`] after [`limits::SIGNAL_TIME`] at the latest, or the end of the VM.
    pub async fn signal_process(
        &self,
        request: &SignalProcessRequest,
    ) -> Result<agent::SignalProcessResponse, Error> {
        let limit = self.limit.min(limits::SIGNAL_TIME);
        let answer = self.client.signal_process(Context::default(), request);
        let error = match self.call("signal", limit, answer).await {
            Err(error @ (Error::Timeout { .. } | Error::AgentLost { .. })) => error,
            answer => return answer,
        };
        if request.signal != libc::SIGKILL.unsigned_abs() {
            return Err(error);
        }
        let reason = format!(
            "killed: the guest did not kill container {} ({error})",
            request.container_id
        );
        log::error!("{reason}");
        self.vm.kill_because(reason);
        match tokio::time::timeout(limits::KILL_TIME, self.vm.ended()).await {
            Ok(end) => Err(Error::Ended((*end).clone())),
            Err(_) => Err(error),
        }
    }

    calls! {
        /// Sets up the guest's interfaces.
        configure_network, "network setup", ConfigureNetworkRequest => agent::ConfigureNetworkResponse;
        /// Has the guest's driver look at a place of the bus again.
        plug_device, "device plug", PlugDeviceRequest => agent::PlugDeviceResponse;
        /// Connects a stream to a server of the guest.
        forward, "port forward", ForwardRequest => agent::ForwardResponse;
        /// Creates a container.
        create_container, "container creation", CreateContainerRequest => agent::CreateContainerResponse;
        /// Starts a container.
        start_container, "container start", StartContainerRequest => agent::StartContainerResponse;
        /// Starts a process in a container.
        exec_process, "process start", ExecProcessRequest => agent::ExecProcessResponse;
        /// Resizes a terminal.
        resize_terminal, "terminal resize", ResizeTerminalRequest => agent::ResizeTerminalResponse;
        /// Changes limits.
        update_container, "update of limits", UpdateContainerRequest => agent::UpdateContainerResponse;
        /// Brings processors on line and off.
        set_processors, "change of the processors", SetProcessorsRequest => agent::SetProcessorsResponse;
        /// Freezes a container.
        pause_container, "pause", PauseContainerRequest => agent::PauseContainerResponse;
        /// Thaws a container.
        resume_container, "resume", ResumeContainerRequest => agent::ResumeContainerResponse;
        /// Reads a container's counters.
        container_stats, "statistics", ContainerStatsRequest => ContainerStatsResponse;
        /// Lists a container's processes.
        list_processes, "process list", ListProcessesRequest => ListProcessesResponse;
        /// Removes a container.
        remove_container, "container removal", RemoveContainerRequest => agent::RemoveContainerResponse;
        /// Makes a volume in guest memory.
        create_volume, "volume creation", CreateVolumeRequest => agent::CreateVolumeResponse;
        /// Copies new content of a volume.
        stage_volume, "copy of a volume", StageVolumeRequest => agent::StageVolumeResponse;
        /// Shows the new content.
        commit_volume, "update of a volume", CommitVolumeRequest => agent::CommitVolumeResponse;
        /// Removes a volume.
        remove_volume, "volume removal", RemoveVolumeRequest => agent::RemoveVolumeResponse;
        /// Has the guest do once what those made from it need not.
        prepare, "preparation of a template", PrepareRequest => agent::PrepareResponse;
        /// Writes the guest's file systems back and has them stand still.
        freeze, "freezing of the file systems", FreezeRequest => agent::FreezeResponse;
        /// Lets them go on.
        thaw, "thaw of the file systems", ThawRequest => agent::ThawResponse;
        /// Joins a process of a restored guest to new streams.
        reattach_streams, "new streams", ReattachStreamsRequest => agent::ReattachStreamsResponse;
        /// Ends the guest.
        shutdown, "guest shutdown", ShutdownRequest => agent::ShutdownResponse;
    }

    async fn call<T>(
        &self,
        phase: &'static str,
        limit: Duration,
        future: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        let answer = tokio::select! {
            biased;
            answer = tokio::time::timeout(limit, future) => answer,
            end = self.vm.ended() => return Err(Error::Ended((*end).clone())),
        };
        self.late.store(answer.is_err(), Ordering::Relaxed);
        if let Some(violation) = self.violation() {
            return Err(Error::AgentLost {
                phase,
                message: format!("it sent {violation}"),
            });
        }
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(ttrpc::Error::RpcStatus(status))) => Err(Error::Agent {
                phase,
                kind: status.code().into(),
                message: limits::text(&status.message, limits::TEXT),
            }),
            Ok(Err(error)) => match tokio::time::timeout(END_WAIT, self.vm.ended()).await {
                Ok(end) => Err(Error::Ended((*end).clone())),
                Err(_) => Err(Error::AgentLost {
                    phase,
                    message: limits::text(&error.to_string(), limits::TEXT),
                }),
            },
            Err(_) => Err(Error::Timeout {
                phase,
                limit,
                console: self.vm.console_tail().await,
            }),
        }
    }
}
