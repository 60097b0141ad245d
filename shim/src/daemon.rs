//! The server process of one sandbox.

use std::fs;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_sandbox::cgroup::Cgroup;
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::error::chain;
use bulkhead_sandbox::journal::{Entry, Journal, Role};
use bulkhead_sandbox::network::{self, GuestNetwork};
use bulkhead_sandbox::spec::{self, NetworkNamespace};
use bulkhead_sandbox::timeline::Timeline;
use bulkhead_sandbox::{Error, Sandbox, SandboxOptions, mount, spawn};
use containerd_shim_protos::shim_async::create_task;
use nix::sys::signal::{SigHandler, Signal, signal};
use oci_spec::runtime::Spec;
use tokio::sync::Notify;
use ttrpc::asynchronous::Server;

use crate::args::Args;
use crate::events::{Publisher, Tasks};
use crate::group::Group;
use crate::logging;
use crate::service::Service;
use crate::start;

/// Service names under which containerd calls tasks: version 2 for the plain address that `start` prints,
/// version 3 for clients that try it first. The messages are the same.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How long the last events may take to reach containerd.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// What `start` hands over.
pub struct Daemon {
    /// Command line of `start`.
    pub args: Args,
    /// Configuration, annotations applied.
    pub config: Configuration,
    /// Specification of the first container.
    pub spec: Spec,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its place.
    pub group: Group,
    /// Listens on the sandbox's address.
    pub listener: UnixListener,
    /// The sandbox's journal.
    pub journal: Journal,
    /// The pod's cgroup, which this process is in.
    pub cgroup: Option<Cgroup>,
    /// Where it was before.
    pub home_cgroup: Option<PathBuf>,
    /// The pod's network namespace.
    pub network: NetworkNamespace,
    /// containerd's ttrpc socket.
    pub ttrpc_address: Option<String>,
    /// When `start` began (`CLOCK_MONOTONIC`, microseconds).
    pub started_us: u64,
}

/// containerd's ttrpc socket as it tells it before 2.3.
#[must_use]
pub fn ttrpc_address_from_environment() -> Option<String> {
    std::env::var("TTRPC_ADDRESS")
        .ok()
        .filter(|address| !address.is_empty())
}

/// Serves until containerd shuts the sandbox down; then the process ends.
pub fn run(daemon: Daemon) -> ! {
    // Without this containerd waits for the server's end of its pipes.
    if start::detach_standard_streams().is_err() {
        std::process::exit(1);
    }
    logging::to_bundle(
        &daemon.bundle,
        &daemon.args.id,
        daemon.args.debug || daemon.config.debug,
    );
    let _ = nix::unistd::setsid();
    // Left by the working directory, the bundle could not be removed by everyone.
    let _ = nix::unistd::chdir("/");
    ignore_signals();
    set_oom_score_adj();
    let entered = enter_namespaces(&daemon);
    let code = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(serve(daemon, entered)),
        Err(error) => {
            log::error!("cannot make the runtime: {error}");
            1
        }
    };
    std::process::exit(code);
}

/// A host that shuts down sends these to every process; pods are ended by containerd.
fn ignore_signals() {
    for number in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        // SAFETY: ignoring a signal installs no handler.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
}

/// One more than containerd's, so that the kernel prefers neither the one nor a pod's VM over this small
/// process.
fn set_oom_score_adj() {
    let path = "/proc/self/oom_score_adj";
    let inherited: Option<i32> = fs::read_to_string(path)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    if let Some(score) = inherited {
        let _ = fs::write(path, (score + 1).min(1000).to_string());
    }
}

/// The pod's network namespace, and a mount namespace whose mounts end with this process and its VMM.
fn enter_namespaces(daemon: &Daemon) -> Result<GuestNetwork, Error> {
    use nix::mount::MsFlags;
    network::enter(&daemon.network)?;
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .and_then(|()| nix::mount::mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none))
        .map_err(|errno| mount::MountError::Open("/".into(), errno))?;
    match &daemon.network {
        // A new namespace has nothing but loopback, and the guest has its own.
        NetworkNamespace::Fresh => Ok(GuestNetwork::default()),
        NetworkNamespace::Path(path) => Ok(network::attach(path, &daemon.journal)?),
    }
}

async fn serve(daemon: Daemon, entered: Result<GuestNetwork, Error>) -> i32 {
    let Daemon {
        args,
        config,
        spec,
        bundle,
        group,
        listener,
        journal,
        cgroup,
        home_cgroup,
        ..
    } = daemon;
    let pid = std::process::id();
    let recorded = i32::try_from(pid).ok().and_then(|pid| {
        let start_time = spawn::start_time(pid)?;
        Some(Entry::Process {
            pid,
            start_time,
            role: Role::Shim,
        })
    });
    if let Some(entry) = recorded
        && let Err(error) = journal.record(&entry)
    {
        log::error!("{}", chain(&error));
        return 1;
    }
    let timeline = Timeline::new(
        config
            .timeline_dir
            .as_ref()
            .map(|dir| dir.join(format!("{}.json", args.id))),
    );
    timeline.mark_at("shim_start", daemon.started_us);
    timeline.mark("shim_ready");

    let (network, refusal) = match entered {
        Ok(network) => (network, None),
        Err(error) => (GuestNetwork::default(), Some(error)),
    };
    let tasks = Tasks::default();
    let publisher = Publisher::start(daemon.ttrpc_address, args.namespace.clone(), Arc::clone(&tasks));
    let process = spec.process().as_ref();
    let is_pod = group == Group::Sandbox;
    let sysctls = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.sysctl().clone())
        .filter(|_| is_pod);
    let options = SandboxOptions {
        id: args.id.clone(),
        hostname: spec.hostname().clone().unwrap_or_default(),
        sysctls: sysctls.unwrap_or_default(),
        shm_size: spec::shm_size(&spec),
        oom_score_adj: process.and_then(|process| process.oom_score_adj()).unwrap_or(0),
        cgroup,
        home_cgroup,
        journal,
        network,
        timeline,
        config,
    };
    let sandbox = Sandbox::start(options, publisher.clone(), refusal);
    let shutdown = Arc::new(Notify::new());
    let service = Service::new(
        sandbox.clone(),
        args.namespace,
        tasks,
        is_pod.then(|| args.id.clone()),
        (bundle, spec),
        Arc::clone(&shutdown),
    );
    let mut server = match server(listener, Arc::new(service)) {
        Ok(server) => server,
        Err(error) => {
            log::error!("cannot serve: {error}");
            return 1;
        }
    };
    if let Err(error) = server.start().await {
        log::error!("cannot serve: {error}");
        return 1;
    }
    shutdown.notified().await;
    log::debug!("shutting down");
    let stopped = sandbox.stop().await;
    if let Err(error) = &stopped {
        log::error!("sandbox {}: {}", args.id, chain(error));
    }
    publisher.flush(FLUSH_LIMIT).await;
    i32::from(stopped.is_err())
}

/// The task service on `listener`. The socket is only for its owner, and so is its directory: no other
/// user can connect.
fn server(listener: UnixListener, service: Arc<Service>) -> Result<Server, ttrpc::Error> {
    listener
        .set_nonblocking(true)
        .map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    // SAFETY: the descriptor is a listening Unix socket and its ownership goes to the server.
    let mut server = unsafe { Server::new().add_unix_listener(listener.into_raw_fd())? };
    for name in SERVICES {
        let generated = create_task(service.clone());
        let services = generated
            .into_values()
            .map(|methods| (name.to_owned(), methods))
            .collect();
        server = server.register_service(services);
    }
    Ok(server)
}
