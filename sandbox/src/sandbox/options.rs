//! What sandboxes and containers are made from, and what is told of them.

use super::*;

/// What a sandbox is made from.
pub struct SandboxOptions {
    /// Id of the sandbox.
    pub id: String,
    /// Configuration, annotations applied.
    pub config: Configuration,
    /// Host name of the guest; empty: the id.
    pub hostname: String,
    /// Kernel parameters of the guest (`linux.sysctl`).
    pub sysctls: HashMap<String, String>,
    /// Size of the pod's `/dev/shm` in bytes.
    pub shm_size: u64,
    /// Files that containers get on `/etc/<name>` unless they have a mount there.
    pub files: HashMap<String, Vec<u8>>,
    /// What the pod asks for, if that is known: it decides the size the VM starts with.
    pub demand: Option<Demand>,
    /// `oom_score_adj` of the VMM.
    pub oom_score_adj: i32,
    /// The pod's cgroup; the calling process is in it already.
    pub cgroup: Option<Cgroup>,
    /// Where the calling process goes when the pod's cgroup is removed, relative to the hierarchy's root.
    pub home_cgroup: Option<PathBuf>,
    /// The sandbox's journal.
    pub journal: Journal,
    /// Interfaces of the pod for the guest.
    pub network: GuestNetwork,
    /// Marks of the start.
    pub timeline: Timeline,
    /// Kubernetes namespace of the pod, or else containerd's.
    pub namespace: String,
    /// What the pod begins from, if not from nothing.
    pub snapshot: Option<Snapshot>,
}

impl std::fmt::Debug for SandboxOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SandboxOptions")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A container to create.
#[derive(Debug)]
pub struct ContainerRequest {
    /// Container id.
    pub id: String,
    /// OCI specification as the host sees it.
    pub spec: Spec,
    /// The bundle's directory, absolute.
    pub bundle: PathBuf,
    /// Mounts that make the root file system; none: `root.path`.
    pub root: Vec<Mount>,
    /// Host ends of the init process's streams.
    pub stdio: crate::streams::Stdio,
    /// What it is. No process runs in the guest for the container that stands for the sandbox.
    pub role: Role,
    /// Which processes it sees.
    pub pid_namespace: PidNamespace,
}

/// A container's pid namespace in the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PidNamespace {
    /// Its own.
    #[default]
    Own,
    /// The one that containers of the pod share.
    Pod,
    /// That of a running container, by id.
    Container(String),
}

/// A process to add to a container.
#[derive(Debug)]
pub struct ExecRequest {
    /// Container id.
    pub container: String,
    /// Id of the process.
    pub exec: String,
    /// OCI `Process` object as JSON.
    pub process_json: Vec<u8>,
}

/// A process's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessState {
    /// The state.
    pub status: Status,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

/// A process of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Process id in the guest's initial pid namespace.
    pub pid: u32,
    /// Exec id; empty: init or a descendant.
    pub exec: String,
}
