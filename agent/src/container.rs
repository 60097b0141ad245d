//! Containers of the guest and the processes in them.

pub mod control;
pub mod create;
pub mod executor;
pub mod pause;
pub mod spec;
pub mod start;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use nix::unistd::Pid;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::events::{Event, Events};
use crate::fd::AsyncFile;
use crate::reaper::{Exit, Reaper};
use crate::storage::{Partitions, Plan, RUN};
use crate::streams::{Copies, Host};

/// Exited processes that a container remembers, besides its init process.
const MAX_EXITED: usize = 128;

/// All containers, and what they share.
#[derive(Debug)]
pub struct Containers {
    /// Collects exits.
    pub reaper: Reaper,
    /// Tells the host of them.
    pub events: Events,
    /// Where streams are dialled.
    pub host: Host,
    map: Mutex<HashMap<String, Arc<Container>>>,
    partitions: Mutex<Partitions>,
    sockets: Mutex<u64>,
    shared: pause::Shared,
    /// Turns of processes that are added to containers.
    additions: Semaphore,
}

/// Processes that are being added to containers at once: each has a helper or two until its program runs, and so many
/// more would take the memory of a small guest for no gain.
const ADDITIONS: usize = 16;

impl Containers {
    /// No containers.
    pub fn new(reaper: Reaper, host: Host) -> Arc<Self> {
        Arc::new(Self {
            reaper,
            events: Events::default(),
            host,
            map: Mutex::default(),
            partitions: Mutex::default(),
            sockets: Mutex::default(),
            shared: pause::Shared::default(),
            additions: Semaphore::new(ADDITIONS),
        })
    }

    fn map(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn partitions(&self) -> MutexGuard<'_, Partitions> {
        self.partitions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container by its id.
    ///
    /// # Errors
    /// There is none of that id.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.map()
            .get(id)
            .cloned()
            .ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    /// Ids of all containers.
    pub fn ids(&self) -> Vec<String> {
        self.map().keys().cloned().collect()
    }

    /// A path for a socket, short enough for every address.
    fn socket_path(&self) -> PathBuf {
        let mut next = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        *next += 1;
        Path::new(RUN).join(format!("s{next}"))
    }
}

/// What a container is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Being made.
    Creating,
    /// Its init process waits to be started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Its init process has exited.
    Stopped,
}

impl Status {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "being created",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A container.
#[derive(Debug)]
pub struct Container {
    id: String,
    directory: PathBuf,
    cgroup: Cgroup,
    plan: Plan,
    events: Events,
    state: Mutex<State>,
    /// Held by whatever changes the container as a whole.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    status: Status,
    init: Process,
    execs: BTreeMap<String, Process>,
    /// Exec ids in the order of their exits, to forget the oldest.
    exited: VecDeque<String>,
    /// Additional processes that run or are being made.
    live: usize,
    /// The init process's exit, held back until the other processes' exits are reported.
    init_exit: Option<Exit>,
    /// Kills for lack of memory reported so far.
    oom_kills: u64,
    /// The helper that makes the container, and the status pipe of its init process until it is started.
    creator: Option<Pid>,
    status_pipe: Option<AsyncFile>,
    /// Watches for kills for lack of memory.
    memory_watch: Option<AbortHandle>,
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(watch) = &self.memory_watch {
            watch.abort();
        }
    }
}

/// A process of a container.
#[derive(Debug)]
struct Process {
    pid: Option<Pid>,
    terminal: Option<AsyncFile>,
    copies: Option<Copies>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    fn new() -> Self {
        Self {
            pid: None,
            terminal: None,
            copies: None,
            exit: watch::Sender::new(None),
        }
    }

    /// Its id, if it is running.
    fn running(&self) -> Option<Pid> {
        if self.exit.borrow().is_some() {
            None
        } else {
            self.pid
        }
    }
}

impl Container {
    fn new(id: &str, directory: PathBuf, plan: Plan, events: Events) -> Self {
        Self {
            id: id.to_owned(),
            directory,
            cgroup: Cgroup::of(id),
            plan,
            events,
            state: Mutex::new(State {
                status: Status::Creating,
                init: Process::new(),
                execs: BTreeMap::new(),
                exited: VecDeque::new(),
                live: 0,
                init_exit: None,
                oom_kills: 0,
                creator: None,
                status_pipe: None,
                memory_watch: None,
            }),
            turn: tokio::sync::Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        self.state().status
    }

    fn expect_status(&self, wanted: Status) -> Result<(), Error> {
        self.expect_one_of(&[wanted], wanted.name())
    }

    fn expect_one_of(&self, allowed: &[Status], wanted: &'static str) -> Result<(), Error> {
        let status = self.status();
        if allowed.contains(&status) {
            return Ok(());
        }
        Err(Error::State {
            id: self.id.clone(),
            state: status.name(),
            wanted,
        })
    }

    /// Runs `f` on a process; an empty exec id means the init process.
    fn with_process<T>(&self, exec: &str, f: impl FnOnce(&Process) -> T) -> Result<T, Error> {
        let state = self.state();
        let process = if exec.is_empty() {
            Some(&state.init)
        } else {
            state.execs.get(exec)
        };
        process
            .map(f)
            .ok_or_else(|| Error::NoProcess(self.id.clone(), exec.to_owned()))
    }

    /// Waits for a process to exit; its exit is reported at the same time as an event.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn wait(&self, exec: &str) -> Result<Exit, Error> {
        let mut exit = self.with_process(exec, |process| process.exit.subscribe())?;
        let gone = || Error::NoProcess(self.id.clone(), exec.to_owned());
        let exit = exit.wait_for(Option::is_some).await.map_err(|_| gone())?;
        exit.ok_or_else(gone)
    }

    /// Tells the host of kills for lack of memory that it does not know of.
    fn report_oom(&self, state: &mut State) {
        let kills = self.cgroup.oom_kills();
        if kills > state.oom_kills {
            state.oom_kills = kills;
            self.events.push(Event::OutOfMemory {
                container: self.id.clone(),
            });
        }
    }

    /// Notes that the init process runs and lets the reaper tell of its end.
    fn adopt_init(self: &Arc<Self>, reaper: &Reaper, pid: Pid) {
        self.state().init.pid = Some(pid);
        let container = Arc::downgrade(self);
        reaper.expect(pid, move |exit| {
            upgrade(&container, |container| container.init_exited(exit))
        });
    }

    fn adopt_exec(self: &Arc<Self>, reaper: &Reaper, exec: &str, pid: Pid) {
        if let Some(process) = self.state().execs.get_mut(exec) {
            process.pid = Some(pid);
        }
        let container = Arc::downgrade(self);
        let exec = exec.to_owned();
        reaper.expect(pid, move |exit| {
            upgrade(&container, |container| container.exec_exited(&exec, exit))
        });
    }

    fn init_exited(&self, exit: Exit) {
        // With a pid namespace nothing is left; without one the rest must not outlive the container.
        let _ = self.cgroup.kill();
        let mut state = self.state();
        state.init_exit = Some(exit);
        self.report_init_exit(&mut state);
    }

    fn exec_exited(&self, exec: &str, exit: Exit) {
        let mut state = self.state();
        self.report_oom(&mut state);
        state.live = state.live.saturating_sub(1);
        if let Some(process) = state.execs.get_mut(exec) {
            let pid = process.pid.map_or(0, |pid| pid.as_raw().unsigned_abs());
            self.events.push(Event::Exited {
                container: self.id.clone(),
                exec: exec.to_owned(),
                pid,
                exit,
            });
            finish(process, exit);
            state.exited.push_back(exec.to_owned());
        }
        while state.exited.len() > MAX_EXITED {
            if let Some(oldest) = state.exited.pop_front()
                && state
                    .execs
                    .get(&oldest)
                    .is_some_and(|process| process.running().is_none())
            {
                state.execs.remove(&oldest);
            }
        }
        self.report_init_exit(&mut state);
    }

    /// Reports the init process's exit when all others have been: it is the container's last event.
    fn report_init_exit(&self, state: &mut State) {
        if state.live > 0 {
            return;
        }
        let Some(exit) = state.init_exit.take() else {
            return;
        };
        self.report_oom(state);
        let pid = state.init.pid.map_or(0, |pid| pid.as_raw().unsigned_abs());
        self.events.push(Event::Exited {
            container: self.id.clone(),
            exec: String::new(),
            pid,
            exit,
        });
        state.status = Status::Stopped;
        if let Some(watch) = state.memory_watch.take() {
            watch.abort();
        }
        finish(&mut state.init, exit);
    }
}

/// Marks a process as exited and lets its streams run dry.
fn finish(process: &mut Process, exit: Exit) {
    process.terminal = None;
    if let Some(copies) = process.copies.take() {
        copies.finish();
    }
    process.exit.send_replace(Some(exit));
}

fn upgrade(container: &Weak<Container>, f: impl FnOnce(&Arc<Container>)) {
    if let Some(container) = container.upgrade() {
        f(&container);
    }
}

#[cfg(test)]
#[path = "container_tests.rs"]
mod tests;
