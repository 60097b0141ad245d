//! containerd's Sandbox API over the pod of this server.
//!
//! With `sandboxer = "shim"` containerd 2 asks for the pod here, and for its containers through the task service
//! of the same server. Each call is described in containerd's `api/runtime/sandbox/v1/sandbox.proto`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use bulkhead_sandbox::journal::Entry;
use bulkhead_sandbox::network;
use bulkhead_sandbox::spec;
use bulkhead_sandbox::{Error, Exit, Role};
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox as SandboxService;
use containerd_shim_protos::types::platform::Platform;
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::proto::Code;

use crate::cri::PodSandboxConfig;
use crate::events::{any, timestamp};
use crate::pod::{self, Kind, Pod, Wanted, make_cgroup};
use crate::pod_config;
use crate::stats;
use crate::status::{from_sandbox, status};

type Result<T> = ttrpc::Result<T>;

/// How long the guest may take to answer a ping.
const PING_LIMIT: Duration = Duration::from_secs(5);

/// How long an orderly end may take unless the caller says.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Longest time for an orderly end.
const MAX_STOP_LIMIT: Duration = Duration::from_secs(60);

/// The service.
pub struct Service {
    pod: Arc<Pod>,
    bundle: PathBuf,
    /// When containerd was told that the sandbox runs, in nanoseconds since the epoch.
    started_ns: Mutex<Option<u64>>,
}

/// A sandbox as its creator describes it.
struct Description {
    spec: Spec,
    files: std::collections::HashMap<String, Vec<u8>>,
}

impl Service {
    /// Serves `pod`, whose bundle is `bundle`.
    #[must_use]
    pub fn new(pod: Arc<Pod>, bundle: PathBuf) -> Self {
        Self {
            pod,
            bundle,
            started_ns: Mutex::new(None),
        }
    }

    fn check_id(&self, id: &str) -> Result<()> {
        if id == self.pod.id {
            return Ok(());
        }
        Err(status(
            Code::NOT_FOUND,
            format!("sandbox {id} is not here: this is {}", self.pod.id),
        ))
    }

    fn started_ns(&self) -> Option<u64> {
        *self.started_ns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to make: from CRI's description, or else from a specification in the bundle.
    fn describe(&self, request: &api::CreateSandboxRequest) -> Result<Description> {
        let invalid = |error: &dyn std::error::Error| status(Code::INVALID_ARGUMENT, error.to_string());
        let mut description = match request.options.as_ref() {
            Some(options) if pod_config::is_pod(&options.type_url) => {
                let mut config =
                    PodSandboxConfig::parse_from_bytes(&options.value).map_err(|error| invalid(&error))?;
                if config.hostname.is_empty() {
                    // As containerd, which also tells containers this name in their environment.
                    let name = nix::unistd::gethostname().unwrap_or_default();
                    config.hostname = name.to_string_lossy().into_owned();
                }
                let spec = pod_config::specification(&self.pod.id, &config, &request.netns_path)
                    .map_err(|error| invalid(&error))?;
                let read = |path: &str| std::fs::read(path).unwrap_or_default();
                Description {
                    spec,
                    files: pod_config::files(&config, read),
                }
            }
            _ => {
                let mut spec = spec::load(&self.bundle).map_err(|error| from_sandbox(error.into()))?;
                if !request.netns_path.is_empty() {
                    set_network_namespace(&mut spec, &request.netns_path).map_err(|error| invalid(&error))?;
                }
                Description {
                    spec,
                    files: std::collections::HashMap::new(),
                }
            }
        };
        let mut annotations = spec::annotations(&description.spec);
        annotations.extend(request.annotations.clone());
        description.spec.set_annotations(Some(annotations));
        Ok(description)
    }

    fn create(&self, description: Description) -> Result<()> {
        let Description { spec, files } = description;
        let wanted = self.pod.with_parts(|parts| {
            spec::check(&spec, Role::Sandbox)?;
            let namespace = spec::network_namespace(&spec)?;
            let mut config = parts.config.clone();
            config.apply_annotations(&spec::annotations(&spec))?;
            let cgroup = make_cgroup(&spec, &self.pod.id, &parts.journal)?;
            if let Some(cgroup) = &cgroup {
                cgroup.add(std::process::id())?;
            }
            let claim = network::enter(&namespace)?;
            let max_vcpus = pod::max_vcpus(Kind::Api, &spec, &config, &self.pod.namespace);
            let mut record = |entry: &Entry| parts.journal.record(entry);
            let network = network::attach(&namespace, claim, max_vcpus, &mut record)?;
            Ok::<_, Error>(Wanted {
                kind: Kind::Api,
                config,
                cgroup,
                network,
                files,
            })
        })?;
        let wanted = wanted.map_err(from_sandbox)?;
        self.pod.make(&spec, wanted, None);
        Ok(())
    }
}

fn set_network_namespace(spec: &mut Spec, path: &str) -> std::result::Result<(), oci_spec::OciSpecError> {
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    let network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    namespaces.push(network.path(Path::new(path)).build()?);
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(())
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn time(ns: u64) -> MessageField<Timestamp> {
    Some(timestamp(ns)).into()
}

#[async_trait]
impl SandboxService for Service {
    /// Joins the pod's cgroup and network, and begins to boot its VM.
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> Result<api::CreateSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let description = self.describe(&request)?;
        self.create(description)?;
        Ok(api::CreateSandboxResponse::default())
    }

    /// Answers when containers can be created.
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> Result<api::StartSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let sandbox = self.pod.sandbox()?;
        sandbox.ready().await.map_err(from_sandbox)?;
        sandbox.timeline().save(&self.pod.id);
        let mut started = self.started_ns.lock().unwrap_or_else(PoisonError::into_inner);
        let created_at = *started.get_or_insert_with(now_ns);
        Ok(api::StartSandboxResponse {
            pid: std::process::id(),
            created_at: time(created_at),
            ..api::StartSandboxResponse::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: api::PlatformRequest,
    ) -> Result<api::PlatformResponse> {
        self.check_id(&request.sandbox_id)?;
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Platform::default()
        };
        Ok(api::PlatformResponse {
            platform: Some(platform).into(),
            ..api::PlatformResponse::default()
        })
    }

    /// Ends the VM and every container in it. The server stays, to tell how they ended.
    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> Result<api::StopSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let limit = match request.timeout_secs {
            0 => STOP_LIMIT,
            seconds => Duration::from_secs(seconds.into()).min(MAX_STOP_LIMIT),
        };
        if let Ok(sandbox) = self.pod.sandbox() {
            sandbox.halt(limit).await;
        }
        Ok(api::StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> Result<api::WaitSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        let Exit {
            status: exit_status,
            at_ns,
        } = self.pod.sandbox()?.ended().await;
        Ok(api::WaitSandboxResponse {
            exit_status,
            exited_at: time(at_ns),
            ..api::WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> Result<api::SandboxStatusResponse> {
        self.check_id(&request.sandbox_id)?;
        let sandbox = self.pod.sandbox().ok();
        let started = self.started_ns();
        let ready = started.is_some() && sandbox.is_some_and(bulkhead_sandbox::Sandbox::is_ready);
        let mut response = api::SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: std::process::id(),
            state: if ready {
                "SANDBOX_READY"
            } else {
                "SANDBOX_NOTREADY"
            }
            .into(),
            created_at: started.map(timestamp).into(),
            exited_at: sandbox
                .and_then(bulkhead_sandbox::Sandbox::end)
                .map(|exit| timestamp(exit.at_ns))
                .into(),
            ..api::SandboxStatusResponse::default()
        };
        if let Some(sandbox) = sandbox.filter(|_| request.verbose) {
            let config = sandbox.configuration();
            let info = serde_json::json!({
                "pid": response.pid,
                "runtimeType": "io.containerd.kata.v2",
                "vmm": {
                    "pid": sandbox.vmm_pid(),
                    "vcpus": config.vcpus,
                    "memoryMiB": config.memory_mib,
                    "kernel": config.kernel,
                    "image": config.image,
                },
            });
            response.info.insert("info".into(), info.to_string());
        }
        Ok(response)
    }

    /// Asks the guest's agent.
    async fn ping_sandbox(&self, _: &TtrpcContext, request: api::PingRequest) -> Result<api::PingResponse> {
        self.check_id(&request.sandbox_id)?;
        self.pod.sandbox()?.ping(PING_LIMIT).await.map_err(from_sandbox)?;
        Ok(api::PingResponse::default())
    }

    /// Ends the VM, then the server, which gives everything back.
    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> Result<api::ShutdownSandboxResponse> {
        self.check_id(&request.sandbox_id)?;
        if let Ok(sandbox) = self.pod.sandbox() {
            sandbox.halt(STOP_LIMIT).await;
        }
        self.pod.shutdown.notify_one();
        Ok(api::ShutdownSandboxResponse::default())
    }

    /// Counters of the pod's cgroup on the host.
    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> Result<api::SandboxMetricsResponse> {
        self.check_id(&request.sandbox_id)?;
        let sandbox = self.pod.sandbox()?;
        let (counters, network) = (sandbox.pod_stats(), sandbox.network_stats());
        let mut response = api::SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = request.sandbox_id;
        metrics.timestamp = time(now_ns());
        metrics.data = Some(any(&stats::metrics(&counters, &network))).into();
        Ok(response)
    }
}

#[cfg(test)]
#[path = "sandbox_service_tests.rs"]
mod tests;
