//! The ttrpc service: a thin layer over [`Containers`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_protocol::agent::{self as proto, Agent, VERSION};
use nix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::checkpoint::Checkpoint;
use crate::container::{Containers, control};
use crate::error::{Error, chain};
use crate::gate::Gate;
use crate::resume::Resume;
use crate::storage::volumes::{Create, Remove, Version};
use crate::{cgroup, network, power, processors, sandbox};

mod work;

use work::{checked_source, joined, limit};

/// Moments of the boot, in microseconds of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug)]
pub struct BootTimes {
    /// `main` entered.
    pub main: u64,
    /// Ready to serve.
    pub ready: u64,
}

/// The guest's uptime in microseconds.
pub fn uptime_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// The agent as the host sees it.
#[derive(Debug)]
pub struct Service {
    containers: Arc<Containers>,
    boot: BootTimes,
    /// Set up once; what of it waits for the network.
    sandbox: Mutex<Option<sandbox::Pending>>,
    gate: Arc<Gate>,
    checkpoint: Arc<Checkpoint>,
    shutdown: Arc<Notify>,
}

impl Service {
    /// A service behind `gate`; `shutdown` is notified when the guest is to be switched off.
    pub fn new(containers: Arc<Containers>, boot: BootTimes, gate: Arc<Gate>, shutdown: Arc<Notify>) -> Self {
        Self {
            checkpoint: Checkpoint::new(containers.reaper.clone(), Arc::clone(&gate)),
            containers,
            boot,
            sandbox: Mutex::new(None),
            gate,
            shutdown,
        }
    }
}

fn check_version(version: u32) -> Result<(), Error> {
    if version == VERSION {
        return Ok(());
    }
    Err(Error::Version(version, VERSION))
}

fn kernel_release() -> Result<String, Error> {
    let system = nix::sys::utsname::uname().map_err(|e| Error::io("cannot read the kernel's release")(e))?;
    Ok(system.release().to_string_lossy().into_owned())
}

#[async_trait]
impl Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: proto::HelloRequest,
    ) -> ttrpc::Result<proto::HelloResponse> {
        check_version(request.version)?;
        self.gate.hello()?;
        Ok(proto::HelloResponse {
            version: VERSION,
            kernel_release: kernel_release()?,
            main_uptime_us: self.boot.main,
            ready_uptime_us: self.boot.ready,
            ..Default::default()
        })
    }

    // Without a pause in it: whatever was sent after it is carried out after it.
    async fn resume(
        &self,
        _: &TtrpcContext,
        request: proto::ResumeRequest,
    ) -> ttrpc::Result<proto::ResumeResponse> {
        check_version(request.version)?;
        let resume = Resume::new(&request).map_err(Error::Resume)?;
        let session = resume.run().map_err(Error::Resume)?;
        let change = self.gate.resumed();
        Ok(proto::ResumeResponse {
            version: VERSION,
            kernel_release: kernel_release()?,
            lost_uptime_us: change.lost,
            ready_uptime_us: change.ready,
            resumed_uptime_us: uptime_us(),
            session_id: session.id,
            frozen: self.checkpoint.is_frozen(),
            ..Default::default()
        })
    }

    async fn prepare(
        &self,
        _: &TtrpcContext,
        _: proto::PrepareRequest,
    ) -> ttrpc::Result<proto::PrepareResponse> {
        cgroup::keep_filter().map_err(Error::Cgroup)?;
        Ok(proto::PrepareResponse::new())
    }

    async fn setup_sandbox(
        &self,
        _: &TtrpcContext,
        request: proto::SetupSandboxRequest,
    ) -> ttrpc::Result<proto::SetupSandboxResponse> {
        let mut sandbox = self.sandbox.lock().unwrap_or_else(PoisonError::into_inner);
        if sandbox.is_some() {
            return Err(Error::SandboxExists.into());
        }
        let pending = sandbox.insert(sandbox::Pending::default());
        *pending = sandbox::setup(&request).map_err(Error::Sandbox)?;
        Ok(proto::SetupSandboxResponse::new())
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: proto::ConfigureNetworkRequest,
    ) -> ttrpc::Result<proto::ConfigureNetworkResponse> {
        network::configure(&request).map_err(Error::Network)?;
        if let Some(pending) = &mut *self.sandbox.lock().unwrap_or_else(PoisonError::into_inner) {
            pending.apply().map_err(Error::Sandbox)?;
        }
        Ok(proto::ConfigureNetworkResponse::new())
    }

    async fn plug_device(
        &self,
        _: &TtrpcContext,
        request: proto::PlugDeviceRequest,
    ) -> ttrpc::Result<proto::PlugDeviceResponse> {
        network::plug::plug(request.place, request.present).map_err(Error::Plug)?;
        if request.present {
            // A processor may have come while the driver counted them.
            network::channels::fit();
        }
        Ok(proto::PlugDeviceResponse::new())
    }

    async fn forward(
        &self,
        _: &TtrpcContext,
        request: proto::ForwardRequest,
    ) -> ttrpc::Result<proto::ForwardResponse> {
        network::forward::forward(&self.containers.host, &request)
            .await
            .map_err(Error::Forward)?;
        Ok(proto::ForwardResponse::new())
    }

    async fn create_container(
        &self,
        context: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> ttrpc::Result<proto::CreateContainerResponse> {
        if let Some(pending) = &*self.sandbox.lock().unwrap_or_else(PoisonError::into_inner) {
            pending.check().map_err(Error::Sandbox)?;
        }
        let limit = limit(context);
        let containers = Arc::clone(&self.containers);
        let pid = self
            .detached(async move { containers.create(request, limit).await })
            .await?;
        Ok(proto::CreateContainerResponse {
            pid: pid.as_raw().unsigned_abs(),
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        context: &TtrpcContext,
        request: proto::StartContainerRequest,
    ) -> ttrpc::Result<proto::StartContainerResponse> {
        let limit = limit(context);
        let containers = Arc::clone(&self.containers);
        self.detached(async move { containers.start(&request.container_id, limit).await })
            .await?;
        Ok(proto::StartContainerResponse::new())
    }

    async fn exec_process(
        &self,
        context: &TtrpcContext,
        request: proto::ExecProcessRequest,
    ) -> ttrpc::Result<proto::ExecProcessResponse> {
        let limit = limit(context);
        let containers = Arc::clone(&self.containers);
        let pid = self
            .detached(async move { containers.exec(request, limit).await })
            .await?;
        Ok(proto::ExecProcessResponse {
            pid: pid.as_raw().unsigned_abs(),
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: proto::SignalProcessRequest,
    ) -> ttrpc::Result<proto::SignalProcessResponse> {
        self.containers
            .get(&request.container_id)?
            .signal(&request.exec_id, request.signal, request.all)?;
        Ok(proto::SignalProcessResponse::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: proto::WaitProcessRequest,
    ) -> ttrpc::Result<proto::WaitProcessResponse> {
        let exit = self
            .containers
            .get(&request.container_id)?
            .wait(&request.exec_id)
            .await?;
        Ok(proto::WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: u64::try_from(exit.at.as_nanos()).unwrap_or(u64::MAX),
            ..Default::default()
        })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: proto::ResizeTerminalRequest,
    ) -> ttrpc::Result<proto::ResizeTerminalResponse> {
        let size = (request.width, request.height);
        self.containers
            .get(&request.container_id)?
            .resize(&request.exec_id, size)?;
        Ok(proto::ResizeTerminalResponse::new())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: proto::UpdateContainerRequest,
    ) -> ttrpc::Result<proto::UpdateContainerResponse> {
        let containers = Arc::clone(&self.containers);
        self.detached(async move {
            containers
                .update(&request.container_id, &request.resources_json)
                .await
        })
        .await?;
        Ok(proto::UpdateContainerResponse::new())
    }

    async fn set_processors(
        &self,
        _: &TtrpcContext,
        request: proto::SetProcessorsRequest,
    ) -> ttrpc::Result<proto::SetProcessorsResponse> {
        // A processor takes a moment to start or stop, for which the kernel keeps the writer waiting.
        let _working = self.gate.work();
        let set = tokio::task::spawn_blocking(move || {
            let set = processors::set_online(request.online);
            network::channels::fit();
            set
        });
        let online = joined(set.await)?.map_err(Error::Processors)?;
        Ok(proto::SetProcessorsResponse {
            online,
            ..Default::default()
        })
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: proto::PauseContainerRequest,
    ) -> ttrpc::Result<proto::PauseContainerResponse> {
        let container = self.containers.get(&request.container_id)?;
        self.detached(async move { container.pause().await }).await?;
        Ok(proto::PauseContainerResponse::new())
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: proto::ResumeContainerRequest,
    ) -> ttrpc::Result<proto::ResumeContainerResponse> {
        let container = self.containers.get(&request.container_id)?;
        self.detached(async move { container.resume().await }).await?;
        Ok(proto::ResumeContainerResponse::new())
    }

    async fn container_stats(
        &self,
        _: &TtrpcContext,
        request: proto::ContainerStatsRequest,
    ) -> ttrpc::Result<proto::ContainerStatsResponse> {
        Ok(self.containers.get(&request.container_id)?.stats()?)
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: proto::ListProcessesRequest,
    ) -> ttrpc::Result<proto::ListProcessesResponse> {
        let processes = self.containers.get(&request.container_id)?.processes()?;
        Ok(proto::ListProcessesResponse {
            processes,
            ..Default::default()
        })
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: proto::RemoveContainerRequest,
    ) -> ttrpc::Result<proto::RemoveContainerResponse> {
        let containers = Arc::clone(&self.containers);
        self.detached(async move { containers.remove(&request.container_id).await })
            .await?;
        Ok(proto::RemoveContainerResponse::new())
    }

    async fn create_volume(
        &self,
        context: &TtrpcContext,
        request: proto::CreateVolumeRequest,
    ) -> ttrpc::Result<proto::CreateVolumeResponse> {
        let create = Create::new(&request)?;
        let work = move || create.run().map_err(|error| chain(&error));
        self.volume_job(context, "creation of a volume", work).await?;
        Ok(proto::CreateVolumeResponse::new())
    }

    async fn stage_volume(
        &self,
        context: &TtrpcContext,
        request: proto::StageVolumeRequest,
    ) -> ttrpc::Result<proto::StageVolumeResponse> {
        let version = Version::new(&request.name, &request.version)?;
        let source = checked_source(&request.source)?;
        let work = move || version.stage(&source).map_err(|error| chain(&error));
        self.volume_job(context, "copy of a volume", work).await?;
        Ok(proto::StageVolumeResponse::new())
    }

    async fn commit_volume(
        &self,
        context: &TtrpcContext,
        request: proto::CommitVolumeRequest,
    ) -> ttrpc::Result<proto::CommitVolumeResponse> {
        let version = Version::new(&request.name, &request.version)?;
        let work = move || version.commit().map_err(|error| chain(&error));
        self.volume_job(context, "update of a volume", work).await?;
        Ok(proto::CommitVolumeResponse::new())
    }

    async fn remove_volume(
        &self,
        context: &TtrpcContext,
        request: proto::RemoveVolumeRequest,
    ) -> ttrpc::Result<proto::RemoveVolumeResponse> {
        let remove = Remove::new(&request.name)?;
        let work = move || remove.run().map_err(|error| chain(&error));
        self.volume_job(context, "removal of a volume", work).await?;
        Ok(proto::RemoveVolumeResponse::new())
    }

    async fn freeze(
        &self,
        context: &TtrpcContext,
        request: proto::FreezeRequest,
    ) -> ttrpc::Result<proto::FreezeResponse> {
        let (duration, limit) = (Duration::from_millis(request.limit_ms.into()), limit(context));
        let checkpoint = Arc::clone(&self.checkpoint);
        let freeze = tokio::spawn(async move { checkpoint.freeze(duration, limit).await });
        let frozen = joined(freeze.await)??;
        Ok(proto::FreezeResponse {
            frozen,
            ..Default::default()
        })
    }

    async fn thaw(&self, _: &TtrpcContext, _: proto::ThawRequest) -> ttrpc::Result<proto::ThawResponse> {
        let checkpoint = Arc::clone(&self.checkpoint);
        let thaw = tokio::spawn(async move { checkpoint.thaw().await });
        let expired = joined(thaw.await)?;
        Ok(proto::ThawResponse {
            expired,
            ..Default::default()
        })
    }

    async fn reattach_streams(
        &self,
        _: &TtrpcContext,
        request: proto::ReattachStreamsRequest,
    ) -> ttrpc::Result<proto::ReattachStreamsResponse> {
        self.containers.reattach(&request).await?;
        Ok(proto::ReattachStreamsResponse::new())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: proto::EventsRequest,
        stream: ServerStreamSender<proto::Event>,
    ) -> ttrpc::Result<()> {
        self.gate.admit("Events")?;
        let subscription = self.containers.events.subscribe();
        while let Some(event) = subscription.next().await {
            stream.send(&event.into()).await?;
            subscription.sent();
        }
        Ok(())
    }

    async fn shutdown(
        &self,
        _: &TtrpcContext,
        _: proto::ShutdownRequest,
    ) -> ttrpc::Result<proto::ShutdownResponse> {
        let containers = Arc::clone(&self.containers);
        let checkpoint = Arc::clone(&self.checkpoint);
        self.detached(async move {
            // Nothing could be unmounted.
            checkpoint.thaw().await;
            control::remove_all(&containers).await;
            power::flush();
            Ok(())
        })
        .await?;
        self.shutdown.notify_one();
        Ok(proto::ShutdownResponse::new())
    }
}
