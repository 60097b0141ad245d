//! `start`: names the sandbox's server, after making it for the first container.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use bulkhead_sandbox::cgroup::{self, Cgroup, CgroupError};
use bulkhead_sandbox::config::{ConfigError, Configuration};
use bulkhead_sandbox::fault::{self, Step};
use bulkhead_sandbox::journal::{self, Entry, Journal, JournalError};
use bulkhead_sandbox::snapshot::ORIGIN;
use bulkhead_sandbox::spec::{self, NetworkNamespace, SpecError};
use bulkhead_sandbox::{Role, spawn, timeline};
use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};
use oci_spec::runtime::Spec;

use crate::args::Args;
use crate::bootstrap;
use crate::daemon::{self, Daemon, First};
use crate::group::{Group, GroupError, Place};
use crate::pod::{Kind, make_cgroup};

/// File in the bundle that names the sandbox's state directory, for `delete`.
pub const STATE_FILE: &str = "bulkhead-state";

/// Part of the path of every bundle that containerd makes for the Sandbox API.
const SANDBOX_BUNDLES: &str = "io.containerd.sandbox.controller.v1.shim";

/// Why a sandbox's server was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Standard input or the working directory could not be read.
    #[error("Cannot read what containerd passes")]
    Input(#[source] std::io::Error),
    /// The bundle's specification is not usable.
    #[error("OCI specification is not valid")]
    Spec(#[from] SpecError),
    /// The configuration is not usable.
    #[error("Configuration is not valid")]
    Config(#[from] ConfigError),
    /// The task's place is not clear.
    #[error("Cannot tell the task's sandbox")]
    Group(#[from] GroupError),
    /// A container of a pod whose sandbox has no server.
    #[error("Sandbox {id} is not running ({})", .socket.display())]
    NoSandbox {
        /// Sandbox id.
        id: String,
        /// Where its server would listen.
        socket: PathBuf,
        /// Reason.
        #[source]
        error: std::io::Error,
    },
    /// What a crashed sandbox of the same id left could not be removed.
    #[error("Cannot clean up after a crashed sandbox")]
    Replay(#[source] JournalError),
    /// The journal could not be made.
    #[error("Cannot keep the journal")]
    Journal(#[from] JournalError),
    /// The cgroup could not be made.
    #[error("Cannot use the pod's cgroup")]
    Cgroup(#[from] CgroupError),
    /// The sandbox's cgroup could not be made.
    #[error(transparent)]
    Sandbox(#[from] bulkhead_sandbox::Error),
    /// The socket could not be made.
    #[error("Cannot listen on {}", .0.display())]
    Listen(PathBuf, #[source] std::io::Error),
    /// A file in the bundle could not be written.
    #[error("Cannot write {}", .0.display())]
    Write(PathBuf, #[source] std::io::Error),
    /// The server process could not be made.
    #[error("Cannot start the server process")]
    Fork(#[source] Errno),
}

/// Runs `start` and returns the server's address. The server's process never returns from here.
///
/// # Errors
/// [`StartError`]; nothing is left.
pub fn run(args: &Args) -> Result<String, StartError> {
    let started_us = timeline::monotonic_us();
    umask(Mode::from_bits_truncate(0o077));
    let mut input = Vec::new();
    std::io::stdin()
        .read_to_end(&mut input)
        .map_err(StartError::Input)?;
    let bundle = std::env::current_dir().map_err(StartError::Input)?;
    let bootstrap = bootstrap::parse(&input, &args.id, &args.namespace);
    let spec = load_spec(&bundle)?;
    let annotations = spec.as_ref().map(spec::annotations).unwrap_or_default();
    let group = Group::of(&annotations)?;
    let place = Place::new(
        bootstrap.socket_dir.as_deref(),
        &args.address,
        &args.namespace,
        group.sandbox_id(&args.id),
    )?;

    if let Group::Container(id) = &group {
        UnixStream::connect(&place.socket).map_err(|error| StartError::NoSandbox {
            id: id.clone(),
            socket: place.socket.clone(),
            error,
        })?;
        return answer(&bundle, &place);
    }

    let config = Configuration::load(bootstrap.config_path.as_deref())?;
    let task = spec
        .map(|spec| Task::new(spec, &group, &config, &annotations))
        .transpose()?;
    let state_dir = config.state_dir.join(&place.state_name);
    if UnixStream::connect(&place.socket).is_ok() {
        // The server is there already: containerd asks a second time.
        return answer(&bundle, &place);
    }
    // A server on its way out, or one that was killed, has no socket but may still have a journal.
    journal::take_over(&state_dir).map_err(StartError::Replay)?;
    journal::sweep(&config.state_dir);

    // Written first: whatever happens from here on, `delete` finds the journal.
    step(Step::StateFile, |error| {
        StartError::Write(bundle.join(STATE_FILE), error)
    })?;
    write(&bundle.join(STATE_FILE), state_dir.as_os_str().as_encoded_bytes())?;
    let journal = Journal::create(&state_dir)?;
    let made = make_server(task.as_ref(), &args.id, &place, &journal).and_then(|made| {
        // For the command line.
        write(&state_dir.join("address"), place.address().as_bytes())?;
        let file = state_dir.join(ORIGIN);
        let origin = serde_json::to_vec(&args.origin())
            .map_err(|error| StartError::Write(file.clone(), error.into()))?;
        write(&file, &origin)?;
        step(Step::ServerForked, StartError::Input)?;
        Ok(made)
    });
    let (listener, cgroup, directory) = match made {
        Ok(made) => made,
        Err(error) => {
            if let Err(error) = journal.finish() {
                log::warn!("{error}");
            }
            return Err(error);
        }
    };
    let home_cgroup = cgroup::current();
    // SAFETY: this process has made no thread.
    match unsafe { spawn::fork_into(directory.as_ref().map(AsFd::as_fd)) } {
        Ok(Some(_)) => {
            // The server owns the socket, the cgroup and the journal now.
            let result = answer(&bundle, &place);
            std::mem::forget(journal);
            result
        }
        Ok(None) => {
            let ttrpc_address = bootstrap
                .ttrpc_address
                .or_else(daemon::ttrpc_address_from_environment);
            daemon::run(Daemon {
                args: args.clone(),
                config,
                bundle,
                first: task.map(|task| First {
                    spec: task.spec,
                    kind: task.kind,
                    config: task.config,
                    network: task.network,
                    cgroup,
                }),
                listener,
                journal,
                home_cgroup,
                ttrpc_address,
                started_us,
            })
        }
        Err(errno) => {
            drop(listener);
            if let Err(error) = journal.finish() {
                log::warn!("{error}");
            }
            Err(StartError::Fork(errno))
        }
    }
}

/// The specification of a task; none in the bundle of a sandbox, which the Sandbox API describes later.
fn load_spec(bundle: &Path) -> Result<Option<Spec>, StartError> {
    let of_sandbox = bundle.iter().any(|part| part == SANDBOX_BUNDLES);
    match spec::load(bundle) {
        _ if of_sandbox => Ok(None),
        Err(SpecError::Read(_, error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        result => Ok(result.map(Some)?),
    }
}

/// The first container, and what the sandbox is to be for it.
struct Task {
    spec: Spec,
    kind: Kind,
    config: Configuration,
    network: NetworkNamespace,
}

impl Task {
    fn new(
        spec: Spec,
        group: &Group,
        config: &Configuration,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, StartError> {
        let (kind, role) = match group {
            Group::Sandbox => (Kind::Task, Role::Sandbox),
            Group::Single | Group::Container(_) => (Kind::Single, Role::Single),
        };
        spec::check(&spec, role)?;
        let mut config = config.clone();
        config.apply_annotations(annotations)?;
        Ok(Self {
            network: spec::network_namespace(&spec)?,
            spec,
            kind,
            config,
        })
    }
}

type Server = (UnixListener, Option<Cgroup>, Option<OwnedFd>);

/// The listener and, for a task, the cgroup, each in the journal before it is made.
fn make_server(
    task: Option<&Task>,
    sandbox_id: &str,
    place: &Place,
    journal: &Journal,
) -> Result<Server, StartError> {
    journal.record(&Entry::Socket {
        path: place.socket.clone(),
    })?;
    step(Step::SocketBound, |error| {
        StartError::Listen(place.socket.clone(), error)
    })?;
    let listener = listen(&place.socket)?;
    let cgroup = task
        .map(|task| make_cgroup(&task.spec, sandbox_id, journal))
        .transpose()?
        .flatten();
    let Some(cgroup) = cgroup else {
        return Ok((listener, None, None));
    };
    let directory = fs::File::open(cgroup.path())
        .map_err(|error| StartError::Cgroup(CgroupError::Create(cgroup.path(), error)))?;
    Ok((listener, Some(cgroup), Some(directory.into())))
}

fn listen(socket: &Path) -> Result<UnixListener, StartError> {
    let fail = |error| StartError::Listen(socket.into(), error);
    if let Some(directory) = socket.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(fail)?;
    }
    // Nobody answers on it, as the caller has seen: left by a crash.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(fail)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

/// A step, which is numbered for tests that make it fail.
fn step(step: Step, fail: impl FnOnce(std::io::Error) -> StartError) -> Result<(), StartError> {
    fault::point(step).map_err(fail)
}

fn write(path: &Path, content: &[u8]) -> Result<(), StartError> {
    fs::write(path, content).map_err(|error| StartError::Write(path.into(), error))
}

/// containerd before 2.0 reads the file `address` when it restarts.
fn answer(bundle: &Path, place: &Place) -> Result<String, StartError> {
    let address = place.address();
    write(&bundle.join("address"), address.as_bytes())?;
    Ok(address)
}

/// Points standard input, output and error to /dev/null: containerd waits for their ends.
///
/// # Errors
/// `/dev/null` cannot be used.
pub fn detach_standard_streams() -> std::io::Result<()> {
    let null = fs::File::options().read(true).write(true).open("/dev/null")?;
    for number in 0..=2 {
        nix::unistd::dup2(null.as_raw_fd(), number)?;
    }
    Ok(())
}
