//! One sandbox: a VM, its agent, and the containers in it.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci_spec::runtime::Spec;
use tokio::sync::watch;

use crate::agent::Agent;
use crate::cgroup::Cgroup;
use crate::config::Configuration;
use crate::error::Error;
use crate::fault::{self, Step};
use crate::journal::Journal;
use crate::mount::Mount;
use crate::network::GuestNetwork;
use crate::process::{Container, Exit, KILLED, Status, ToldExit};
use crate::resources::{Demand, Host, Sizing};
use crate::snapshot::Snapshot;
use crate::spec::Role;
use crate::storage::SharedTree;
use crate::streams::{ProcessStreams, StreamTable};
use crate::template::Store;
use crate::timeline::Timeline;
use crate::vm::{Vm, VmEnd};

mod boot;
mod checkpoint;
mod create;
mod event;
mod exits;
mod lifecycle;
mod network;
mod options;
mod requests;
mod resize;
mod restore;
mod template;
mod volumes;

#[cfg(test)]
mod hostile_tests;

pub use event::{EventSink, SandboxEvent};
pub use options::{ContainerRequest, ExecRequest, PidNamespace, ProcessInfo, ProcessState, SandboxOptions};

/// How long the exits of a container's other processes may follow init's.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

/// How long a process's output may take to drain after its end.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// How long a cancelled creation may take to be gone before who has cancelled it gets an answer.
const CANCEL_WAIT: Duration = Duration::from_millis(500);

/// How long the guest may take to confirm a SIGKILL before the answer goes without it.
const KILL_ANSWER: Duration = Duration::from_millis(500);

/// How long an orderly shutdown of a guest with writable disks may take.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);

/// A VM that runs and an agent that serves.
#[derive(Clone, Debug)]
struct Guest {
    vm: Vm,
    agent: Agent,
}

#[derive(Clone, Debug)]
enum Boot {
    Pending,
    Ready(Guest),
    Failed(Arc<Error>),
}

struct Record {
    machine: Container,
    /// Its id in the guest.
    guest_id: String,
    /// What it was made from.
    made: Option<checkpoint::Made>,
    /// The way back of one that was in the snapshot.
    returns: Option<restore::Return>,
    is_sandbox: bool,
    /// Tells how it had ended when it is gone; absent: it is not being deleted.
    deleting: Option<watch::Sender<Option<Exit>>>,
    /// How often its memory may run out.
    oom: crate::limits::Throttle,
    streams: HashMap<String, ProcessStreams>,
    exits: HashMap<String, watch::Sender<Option<Exit>>>,
    execs: HashMap<String, Vec<u8>>,
    sizes: HashMap<String, (u32, u32)>,
    slots: Vec<u32>,
    /// How far its creation is.
    step: Step,
    /// The agent's part of its creation, which cannot be called back.
    making: Option<tokio::task::JoinHandle<()>>,
    /// Set when its creation is to end.
    cancelled: watch::Sender<bool>,
}

impl Record {
    fn new(id: &str, is_sandbox: bool) -> Self {
        Self {
            machine: Container::new(id),
            guest_id: id.to_owned(),
            made: None,
            returns: None,
            is_sandbox,
            deleting: None,
            oom: crate::limits::out_of_memory(),
            streams: HashMap::new(),
            exits: HashMap::from([(String::new(), watch::Sender::new(None))]),
            execs: HashMap::new(),
            sizes: HashMap::new(),
            slots: Vec::new(),
            step: Step::RootMounted,
            making: None,
            cancelled: watch::Sender::new(false),
        }
    }
}

struct State {
    containers: HashMap<String, Record>,
    sizing: Sizing,
    slots: Vec<bool>,
    vm: Option<Vm>,
    /// Whether its end is that of the sandbox.
    vm_counts: bool,
    /// Names of its devices by place.
    places: Vec<String>,
    settle: Option<network::Settle>,
    /// How far the boot is.
    boot_step: Step,
    /// The template it began from, when that has no list yet of the memory that guests write soon.
    unlisted: Option<Unlisted>,
}

/// A template without lists of the memory that guests write soon.
struct Unlisted {
    store: Store,
    /// What the guest had written when it had answered.
    first: Vec<u8>,
}

struct Inner {
    id: String,
    config: Configuration,
    hostname: String,
    sysctls: HashMap<String, String>,
    shm_size: u64,
    files: HashMap<String, Vec<u8>>,
    oom_score_adj: i32,
    cgroup: Option<Cgroup>,
    home_cgroup: Option<PathBuf>,
    journal: Mutex<Option<Journal>>,
    network: Mutex<GuestNetwork>,
    timeline: Timeline,
    namespace: String,
    restore: Option<restore::Restore>,
    sink: Arc<dyn EventSink>,
    state: Mutex<State>,
    /// Held while the VM's size changes.
    applied: tokio::sync::Mutex<resize::Applied>,
    streams: StreamTable,
    /// Absent when the sandbox was refused.
    tree: Option<SharedTree>,
    /// Follows volumes that the host brings up to date; absent until there is one.
    watch: Mutex<Option<Arc<volumes::Watch>>>,
    boot: watch::Sender<Boot>,
    /// Set when the VM has ended or will never be.
    end: watch::Sender<Option<Exit>>,
    stopping: watch::Sender<bool>,
}

/// Handle of a sandbox. Its methods answer at once unless they say that they wait.
#[derive(Clone)]
pub struct Sandbox(Arc<Inner>);

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.0.id)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Makes a sandbox and begins to boot its VM. With `refusal` nothing is booted and every container
    /// is refused with that error.
    ///
    /// Call it on the main thread, inside a current-thread runtime: the VMM dies with the thread that
    /// starts it.
    #[must_use]
    pub fn start(mut options: SandboxOptions, sink: Arc<dyn EventSink>, refusal: Option<Error>) -> Self {
        let machine = options
            .snapshot
            .as_ref()
            .map(|snapshot| snapshot.manifest.machine.clone());
        if let Some(machine) = &machine {
            machine.apply(&mut options.config);
        }
        let slots = usize::try_from(options.config.disk_slots).unwrap_or_default();
        let root = options.journal.directory().join("shared");
        let (tree, refusal) = match refusal {
            Some(error) => (None, Some(error)),
            None => match fault::point(Step::TreeMounted)
                .map_err(|error| Error::Step(Step::TreeMounted, error))
                .and_then(|()| Ok(SharedTree::create(&root)?))
            {
                Ok(tree) => (Some(tree), None),
                Err(error) => (None, Some(error)),
            },
        };
        let sandbox = Self(Arc::new(Inner {
            id: options.id,
            hostname: options.hostname,
            sysctls: options.sysctls,
            shm_size: options.shm_size,
            files: options.files,
            oom_score_adj: options.oom_score_adj,
            cgroup: options.cgroup,
            home_cgroup: options.home_cgroup,
            journal: Mutex::new(Some(options.journal)),
            network: Mutex::new(options.network),
            timeline: options.timeline,
            namespace: options.namespace,
            restore: options.snapshot.map(restore::Restore::new),
            sink,
            state: Mutex::new(State {
                containers: HashMap::new(),
                sizing: machine.iter().fold(
                    Sizing::new(&options.config, Host::this(), options.demand),
                    Sizing::continued,
                ),
                slots: vec![false; slots],
                vm: None,
                vm_counts: false,
                places: Vec::new(),
                settle: None,
                boot_step: Step::VmmStarted,
                unlisted: None,
            }),
            applied: tokio::sync::Mutex::new(machine.as_ref().map(resize::Applied::of).unwrap_or_default()),
            streams: StreamTable::default(),
            tree,
            watch: Mutex::default(),
            boot: watch::Sender::new(Boot::Pending),
            end: watch::Sender::new(None),
            stopping: watch::Sender::new(false),
            config: options.config,
        }));
        match refusal {
            Some(error) => {
                sandbox.0.boot.send_replace(Boot::Failed(Arc::new(error)));
                sandbox.0.end.send_replace(Some(killed_now()));
            }
            None => {
                let booting = sandbox.clone();
                tokio::spawn(async move { booting.run_boot().await });
            }
        }
        sandbox
    }

    /// The sandbox's id.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// The marks of its start.
    #[must_use]
    pub fn timeline(&self) -> &Timeline {
        &self.0.timeline
    }

    /// Whether no container is left, but for those whose creation has been cancelled.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lock()
            .containers
            .values()
            .all(|record| record.machine.is_creating() && *record.cancelled.borrow())
    }

    fn is_stopping(&self) -> bool {
        *self.0.stopping.borrow()
    }

    /// The end that follows is no news.
    fn begin_stop(&self) {
        self.0.stopping.send_replace(true);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `action` on a container's record.
    fn with<T>(&self, id: &str, action: impl FnOnce(&mut Record) -> Result<T, Error>) -> Result<T, Error> {
        let mut state = self.lock();
        let record = state
            .containers
            .get_mut(id)
            .ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        action(record)
    }

    /// A container's id in the guest.
    fn guest_id(&self, id: &str) -> String {
        let known = self.with(id, |record| Ok(record.guest_id.clone()));
        known.unwrap_or_else(|_| id.to_owned())
    }

    /// The id of the container that the guest knows by this one.
    fn id_of(&self, guest_id: &str) -> Option<String> {
        let state = self.lock();
        let mut records = state.containers.iter();
        records.find_map(|(id, record)| (record.guest_id == guest_id).then(|| id.clone()))
    }

    /// Waits until the agent serves.
    async fn guest(&self) -> Result<Guest, Error> {
        let mut boot = self.0.boot.subscribe();
        let state = boot.wait_for(|state| !matches!(state, Boot::Pending)).await;
        match state.map(|state| state.clone()) {
            Ok(Boot::Ready(guest)) => match guest.vm.end() {
                Some(end) => Err(Error::Ended((*end).clone())),
                None => Ok(guest),
            },
            Ok(Boot::Failed(error)) => Err(Error::Boot(error)),
            Ok(Boot::Pending) | Err(_) => Err(Error::NoContainer(self.0.id.clone())),
        }
    }

    /// The agent, if it serves now.
    fn agent_now(&self) -> Result<Agent, Error> {
        match &*self.0.boot.borrow() {
            Boot::Ready(guest) => match guest.vm.end() {
                Some(end) => Err(Error::Ended((*end).clone())),
                None => Ok(guest.agent.clone()),
            },
            Boot::Failed(error) => Err(Error::Boot(Arc::clone(error))),
            Boot::Pending => Err(Error::State {
                what: format!("Sandbox {}", self.0.id),
                state: "starting",
                operation: "ask its agent",
            }),
        }
    }

    fn vm_now(&self) -> Option<Vm> {
        self.lock().vm.clone()
    }

    /// Ends the VM, and with it every container; what the sandbox has acquired on the host stays. An orderly end,
    /// which a guest with writable disks gets, may take `limit`.
    pub async fn halt(&self, limit: Duration) {
        // A boot under way ends with it.
        self.begin_stop();
        if let Some(vm) = self.vm_now() {
            let has_disks = self.lock().slots.iter().any(|used| *used);
            if has_disks && let Ok(agent) = self.agent_now() {
                let ended = async {
                    agent
                        .shutdown(&bulkhead_protocol::agent::ShutdownRequest::default())
                        .await?;
                    Ok::<_, Error>(vm.ended().await)
                };
                let _ = tokio::time::timeout(limit, ended).await;
            }
            vm.kill();
            let _ = tokio::time::timeout(SHUTDOWN_LIMIT, vm.ended()).await;
        }
    }

    /// Ends the VM and gives back everything the sandbox has acquired. Waits until it is done. What fails is tried
    /// once more after the rest.
    ///
    /// # Errors
    /// What could not be given back; the journal stays then.
    pub async fn stop(&self) -> Result<(), Error> {
        let halted = fault::reach(Step::VmHalted).await;
        self.halt(SHUTDOWN_LIMIT).await;
        self.lock().containers.clear();
        self.0.timeline.save(&self.0.id);
        let first = halted
            .map_err(|error| Error::Step(Step::VmHalted, error))
            .and(self.give_back());
        let journal = self
            .0
            .journal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Err(error) = first.and_then(|()| Ok(journal.as_ref().map_or(Ok(()), Journal::undo)?)) {
            log::warn!(
                "sandbox {}: once more: {}",
                self.0.id,
                crate::error::chain(&error)
            );
            self.give_back()?;
        }
        journal.map_or(Ok(()), Journal::finish)?;
        Ok(())
    }

    /// What the journal does not know of, or needs for its replay.
    fn give_back(&self) -> Result<(), Error> {
        let step = |step| fault::point(step).map_err(|error| Error::Step(step, error));
        if let Some(tree) = &self.0.tree {
            step(Step::TreeUnmounted)?;
            // What is left of the containers goes with it.
            tree.unmount()?;
        }
        // A process in the cgroup would keep it: this one goes back to where it came from.
        if let (Some(_), Some(home)) = (&self.0.cgroup, &self.0.home_cgroup) {
            step(Step::CgroupLeft)?;
            Cgroup::new(home.clone()).add(std::process::id())?;
        }
        Ok(())
    }
}

/// Does what the host's kernel may hold up on a thread of its own, while other calls are answered. A thread that hangs in
/// the kernel is left behind.
async fn on_thread<T: Send + 'static>(
    phase: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let limit = crate::limits::HOST_TIME;
    let done = tokio::time::timeout(limit, tokio::task::spawn_blocking(work)).await;
    done.map_err(|_| Error::Timeout {
        phase,
        limit,
        console: String::new(),
    })?
    .map_err(Error::Task)
}

/// The exit of what ends with the VM.
fn killed_now() -> Exit {
    Exit {
        status: KILLED,
        at_ns: now_ns(),
    }
}

/// Nanoseconds since the Unix epoch; never zero.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX).max(1)
}

/// A copy of a descriptor for a message.
fn duplicate(fd: &impl AsFd) -> std::io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}
