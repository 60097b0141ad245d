//! The pod, or stand-alone container, of this server: nothing at first, then one sandbox.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bulkhead_sandbox::cgroup::{self, Cgroup};
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::fault::{self, Step};
use bulkhead_sandbox::journal::{Entry, Journal};
use bulkhead_sandbox::network::GuestNetwork;
use bulkhead_sandbox::resources::{Demand, Host, Sizing};
use bulkhead_sandbox::snapshot::{ANNOTATION, Origin, Snapshot, SnapshotError};
use bulkhead_sandbox::spec;
use bulkhead_sandbox::timeline::Timeline;
use bulkhead_sandbox::{Error, Role, Sandbox, SandboxOptions};
use oci_spec::runtime::Spec;
use tokio::sync::Notify;
use ttrpc::proto::Code;

use crate::events::{Publisher, Tasks};
use crate::status::status;

/// How containerd asked for the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A container of the task API that is a sandbox of its own.
    Single,
    /// A container of the task API that stands for a pod's sandbox.
    Task,
    /// The Sandbox API.
    Api,
}

/// What a sandbox is made from whoever asks for it.
#[derive(Debug)]
pub struct Parts {
    /// Configuration, annotations not applied.
    pub config: Configuration,
    /// The sandbox's journal.
    pub journal: Journal,
    /// Marks of the start.
    pub timeline: Timeline,
    /// Where this process was before it went into the pod's cgroup.
    pub home_cgroup: Option<PathBuf>,
}

/// What the pod's description says.
pub struct Wanted {
    /// Who asks.
    pub kind: Kind,
    /// Configuration, annotations applied.
    pub config: Configuration,
    /// The pod's cgroup; this process is in it.
    pub cgroup: Option<Cgroup>,
    /// The pod's interfaces; this process is in their network namespace.
    pub network: GuestNetwork,
    /// Files for the containers.
    pub files: HashMap<String, Vec<u8>>,
}

struct Made {
    sandbox: Sandbox,
    kind: Kind,
}

/// What the services of this server share.
pub struct Pod {
    /// Id of the sandbox.
    pub id: String,
    /// containerd namespace.
    pub namespace: String,
    /// Who has made it.
    pub origin: Origin,
    /// Tasks by container id.
    pub tasks: Tasks,
    /// Sends events.
    pub publisher: Arc<Publisher>,
    /// Told when containerd wants the server to end.
    pub shutdown: Notify,
    parts: Mutex<Option<Parts>>,
    made: OnceLock<Made>,
}

impl Pod {
    /// A pod without a sandbox.
    #[must_use]
    pub fn new(origin: Origin, tasks: Tasks, publisher: Arc<Publisher>, parts: Parts) -> Self {
        Self {
            id: origin.pod.clone(),
            namespace: origin.namespace.clone(),
            origin,
            tasks,
            publisher,
            shutdown: Notify::new(),
            parts: Mutex::new(Some(parts)),
            made: OnceLock::new(),
        }
    }

    /// Looks at the parts while there is no sandbox.
    ///
    /// # Errors
    /// There is one.
    pub fn with_parts<T>(&self, action: impl FnOnce(&Parts) -> T) -> ttrpc::Result<T> {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.as_ref().map(action).ok_or_else(|| {
            status(
                Code::ALREADY_EXISTS,
                format!("sandbox {} already exists", self.id),
            )
        })
    }

    /// Makes the sandbox, whose VM begins to boot; with `refusal` it refuses every container for that reason.
    /// To be called on the main thread, inside the runtime. A second sandbox is not made.
    pub fn make(&self, spec: &Spec, wanted: Wanted, refusal: Option<Error>) {
        let Some(parts) = self.parts.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        let namespace = kubernetes_namespace(spec, &self.namespace);
        let (snapshot, refusal) = match (refusal, snapshot(spec, &wanted.config, &namespace)) {
            (Some(refusal), _) => (None, Some(refusal)),
            (None, Ok(snapshot)) => (snapshot, None),
            (None, Err(error)) => (None, Some(error.into())),
        };
        let process = spec.process().as_ref();
        let sysctls = spec.linux().as_ref().and_then(|linux| linux.sysctl().clone());
        let options = SandboxOptions {
            id: self.id.clone(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            // A stand-alone container's are set with the container.
            sysctls: sysctls
                .filter(|_| wanted.kind != Kind::Single)
                .unwrap_or_default(),
            shm_size: spec::shm_size(spec),
            files: wanted.files,
            demand: demand(wanted.kind, spec),
            oom_score_adj: process.and_then(|process| process.oom_score_adj()).unwrap_or(0),
            cgroup: wanted.cgroup,
            home_cgroup: parts.home_cgroup,
            journal: parts.journal,
            network: wanted.network,
            timeline: parts.timeline,
            namespace,
            snapshot,
            config: wanted.config,
        };
        let sandbox = Sandbox::start(options, self.publisher.clone(), refusal);
        let _ = self.made.set(Made {
            sandbox,
            kind: wanted.kind,
        });
    }

    fn made(&self) -> ttrpc::Result<&Made> {
        self.made.get().ok_or_else(|| {
            status(
                Code::FAILED_PRECONDITION,
                format!("sandbox {} is not created", self.id),
            )
        })
    }

    /// The sandbox.
    ///
    /// # Errors
    /// There is none yet.
    pub fn sandbox(&self) -> ttrpc::Result<&Sandbox> {
        Ok(&self.made()?.sandbox)
    }

    /// How containerd asked for the sandbox.
    ///
    /// # Errors
    /// There is none yet.
    pub fn kind(&self) -> ttrpc::Result<Kind> {
        Ok(self.made()?.kind)
    }

    /// What the container `id` is to the pod.
    ///
    /// # Errors
    /// There is no sandbox yet.
    pub fn role(&self, id: &str) -> ttrpc::Result<Role> {
        Ok(match self.kind()? {
            Kind::Single => Role::Single,
            Kind::Task if self.id == id => Role::Sandbox,
            Kind::Task | Kind::Api => Role::Container,
        })
    }

    /// Ends the sandbox and gives everything back.
    ///
    /// # Errors
    /// What could not be given back.
    pub async fn stop(&self) -> Result<(), Error> {
        if let Some(made) = self.made.get() {
            return made.sandbox.stop().await;
        }
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(parts) = parts {
            // Out of a cgroup that the journal may hold.
            if let Some(home) = parts.home_cgroup {
                Cgroup::new(home).add(std::process::id())?;
            }
            parts.journal.finish()?;
        }
        Ok(())
    }
}

/// The pod's namespace in Kubernetes as containerd and CRI-O tell it, or else containerd's.
fn kubernetes_namespace(spec: &Spec, namespace: &str) -> String {
    let annotations = spec.annotations().as_ref();
    [
        "io.kubernetes.cri.sandbox-namespace",
        "io.kubernetes.pod.namespace",
    ]
    .iter()
    .find_map(|key| annotations?.get(*key).cloned())
    .unwrap_or_else(|| namespace.to_owned())
}

/// What the pod asks for, as far as its first specification says.
fn demand(kind: Kind, spec: &Spec) -> Option<Demand> {
    match kind {
        Kind::Single => Some(Demand::of_container(spec)),
        Kind::Task | Kind::Api => Demand::of_sandbox(spec),
    }
}

/// The most vCPUs that the VM of a pod can have. Its interfaces are made before it, and have queues for them. `namespace` is
/// containerd's.
#[must_use]
pub fn max_vcpus(kind: Kind, spec: &Spec, config: &Configuration, namespace: &str) -> u8 {
    match snapshot(spec, config, &kubernetes_namespace(spec, namespace)) {
        Ok(Some(snapshot)) => snapshot.manifest.machine.max_vcpus,
        // What is wrong with a snapshot is said when the pod is made.
        Ok(None) | Err(_) => Sizing::new(config, Host::this(), demand(kind, spec)).max_vcpus(),
    }
}

/// What the pod is to begin from, if it is a snapshot.
fn snapshot(spec: &Spec, config: &Configuration, namespace: &str) -> Result<Option<Snapshot>, SnapshotError> {
    let annotations = spec.annotations().as_ref();
    let name = annotations.and_then(|annotations| annotations.get(ANNOTATION));
    name.map(|name| Snapshot::open(&config.snapshot_dir, name, namespace, &config.image))
        .transpose()
}

/// Makes the cgroup of sandbox `id`, in the journal before it is; none on a host without cgroup v2.
///
/// # Errors
/// The path is not usable, or the cgroup cannot be made.
pub fn make_cgroup(spec: &Spec, id: &str, journal: &Journal) -> Result<Option<Cgroup>, Error> {
    if !cgroup::is_unified() {
        return Ok(None);
    }
    let linux = spec.linux().as_ref();
    let path = linux
        .and_then(|linux| linux.cgroups_path().as_ref())
        .and_then(|path| path.to_str());
    let relative = cgroup::translate(path, id)?;
    journal.record(&Entry::Cgroup {
        path: relative.clone(),
    })?;
    fault::point(Step::CgroupMade).map_err(|error| Error::Step(Step::CgroupMade, error))?;
    let cgroup = Cgroup::new(relative);
    cgroup.create()?;
    Ok(Some(cgroup))
}
