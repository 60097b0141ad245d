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
use bulkhead_sandbox::fault::{self, Step};
use bulkhead_sandbox::journal::{Entry, Journal, Role};
use bulkhead_sandbox::network::{self, GuestNetwork};
use bulkhead_sandbox::spec::NetworkNamespace;
use bulkhead_sandbox::timeline::Timeline;
use bulkhead_sandbox::{Error, mount, spawn};
use containerd_shim_protos::sandbox_async::create_sandbox;
use containerd_shim_protos::shim_async::create_task;
use nix::sys::signal::{SigHandler, Signal, signal};
use oci_spec::runtime::Spec;
use ttrpc::asynchronous::Server;

use crate::args::Args;
use crate::events::{Publisher, Tasks};
use crate::pod::{self, Kind, Parts, Pod, Wanted};
use crate::{logging, sandbox_service, service, start};

/// Service names under which containerd calls tasks: version 2 for the plain address that `start` prints,
/// version 3 for clients that try it first. The messages are the same.
const SERVICES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How long the last events may take to reach containerd.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);
/// How long answers may take to be written when the server ends.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);

/// The first container of the task API, for which the sandbox is made at once.
pub struct First {
    /// Its specification.
    pub spec: Spec,
    /// What it is.
    pub kind: Kind,
    /// Configuration, annotations applied.
    pub config: Configuration,
    /// The pod's network namespace.
    pub network: NetworkNamespace,
    /// The pod's cgroup, which this process is in.
    pub cgroup: Option<Cgroup>,
}

/// What `start` hands over.
pub struct Daemon {
    /// Command line of `start`.
    pub args: Args,
    /// Configuration, annotations not applied.
    pub config: Configuration,
    /// Bundle of the first container, or of the sandbox.
    pub bundle: PathBuf,
    /// Absent: the Sandbox API will tell what to make.
    pub first: Option<First>,
    /// Listens on the sandbox's address.
    pub listener: UnixListener,
    /// The sandbox's journal.
    pub journal: Journal,
    /// Where this process was before it came into the pod's cgroup.
    pub home_cgroup: Option<PathBuf>,
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
    let entered = enter_namespaces(daemon.first.as_ref(), &daemon.args.namespace, &daemon.journal);
    let code = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => {
            let code = runtime.block_on(serve(daemon, entered));
            // A mount that hangs keeps its thread; nobody waits for that.
            runtime.shutdown_background();
            code
        }
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

/// Never killed for lack of memory: in a cgroup whose VM has been, the kernel takes this process next when the memory is not
/// back at once.
const OOM_SCORE_ADJ: i32 = -1000;

/// The kernel is to kill the pod's VM and not this small process, which says why the VM has ended. Without the power for
/// that, it is one more than containerd's.
fn set_oom_score_adj() {
    let path = "/proc/self/oom_score_adj";
    if fs::write(path, OOM_SCORE_ADJ.to_string()).is_ok() {
        return;
    }
    let inherited = fs::read_to_string(path).ok();
    if let Some(score) = inherited.and_then(|text| text.trim().parse::<i32>().ok()) {
        let _ = fs::write(path, (score + 1).min(1000).to_string());
    }
}

/// A mount namespace whose mounts end with this process and its VMM, and the pod's network namespace, if it is
/// known yet. `namespace` is containerd's.
fn enter_namespaces(
    first: Option<&First>,
    namespace: &str,
    journal: &Journal,
) -> Result<GuestNetwork, Error> {
    use nix::mount::MsFlags;
    let claim = first.map(|first| network::enter(&first.network)).transpose()?;
    let none: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .and_then(|()| nix::mount::mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none))
        .map_err(|errno| mount::MountError::Open("/".into(), errno))?;
    match first.zip(claim) {
        Some((first, claim)) => {
            let max_vcpus = pod::max_vcpus(first.kind, &first.spec, &first.config, namespace);
            let mut record = |entry: &Entry| journal.record(entry);
            Ok(network::attach(&first.network, claim, max_vcpus, &mut record)?)
        }
        None => Ok(GuestNetwork::default()),
    }
}

async fn serve(daemon: Daemon, entered: Result<GuestNetwork, Error>) -> i32 {
    let Daemon {
        args,
        config,
        bundle,
        first,
        listener,
        journal,
        home_cgroup,
        ttrpc_address,
        started_us,
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
    let step = Step::ServerRecorded;
    let recorded = fault::point(step)
        .map_err(|error| Error::Step(step, error))
        .and_then(|()| recorded.map_or(Ok(()), |entry| Ok(journal.record(&entry)?)));
    // Whoever asks gets the reason.
    let entered = recorded.and(entered);
    let timeline = Timeline::new(
        config
            .timeline_dir
            .as_ref()
            .map(|dir| dir.join(format!("{}.json", args.id))),
    );
    timeline.keep_in(journal.directory());
    timeline.mark_at("shim_start", started_us);
    timeline.mark("shim_ready");

    let tasks = Tasks::default();
    let publisher = Publisher::start(ttrpc_address, args.namespace.clone(), Arc::clone(&tasks));
    let parts = Parts {
        config,
        journal,
        timeline,
        home_cgroup,
    };
    let pod = Arc::new(Pod::new(args.origin(), tasks, publisher, parts));
    let first = match (first, entered) {
        (Some(first), entered) => {
            let (network, refusal) = match entered {
                Ok(network) => (network, None),
                Err(error) => (GuestNetwork::default(), Some(error)),
            };
            let wanted = Wanted {
                kind: first.kind,
                config: first.config,
                cgroup: first.cgroup,
                network,
                files: std::collections::HashMap::new(),
            };
            pod.make(&first.spec, wanted, refusal);
            Some((bundle.clone(), first.spec))
        }
        (None, Ok(_)) => None,
        (None, Err(error)) => {
            log::error!("{}", chain(&error));
            return 1;
        }
    };
    let task = Arc::new(service::Service::new(Arc::clone(&pod), first));
    let sandbox = Arc::new(sandbox_service::Service::new(Arc::clone(&pod), bundle));
    let mut server = match server(listener, task, sandbox) {
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
    pod.shutdown.notified().await;
    log::debug!("shutting down");
    let stopped = pod.stop().await;
    if let Err(error) = &stopped {
        log::error!("sandbox {}: {}", args.id, chain(error));
    }
    // The answer to the call that ends this process is still to be written, and so may be others.
    if tokio::time::timeout(ANSWER_LIMIT, server.shutdown())
        .await
        .is_err()
    {
        log::debug!("calls are left without an answer");
    }
    pod.publisher.flush(FLUSH_LIMIT).await;
    i32::from(stopped.is_err())
}

/// The task and sandbox services on `listener`. The socket is only for its owner, and so is its directory: no other
/// user can connect.
fn server(
    listener: UnixListener,
    task: Arc<service::Service>,
    sandbox: Arc<sandbox_service::Service>,
) -> Result<Server, ttrpc::Error> {
    listener
        .set_nonblocking(true)
        .map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    // SAFETY: the descriptor is a listening Unix socket and its ownership goes to the server.
    let mut server = unsafe { Server::new().add_unix_listener(listener.into_raw_fd())? };
    for name in SERVICES {
        let generated = create_task(task.clone());
        let services = generated
            .into_values()
            .map(|methods| (name.to_owned(), methods))
            .collect();
        server = server.register_service(services);
    }
    Ok(server.register_service(create_sandbox(sandbox)))
}
