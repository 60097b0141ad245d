//! State machines of processes and containers: pure, without input or output.

use std::collections::BTreeMap;

use crate::error::Error;

#[cfg(test)]
mod tests;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 + signal when killed.
    pub status: u32,
    /// Nanoseconds since the Unix epoch, host's clock.
    pub at_ns: u64,
}

/// State of a process as its user sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Made, not started.
    Created,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// About to be frozen.
    Pausing,
    /// Ended.
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest is making it.
    Creating,
    Created,
    /// The guest is starting it.
    Starting,
    Running,
    Stopped(Exit),
}

/// One process: a container's init, or a process started later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    phase: Phase,
    /// An exit that arrived before the answer to the start; told after it.
    early: Option<Exit>,
}

impl Process {
    fn new(phase: Phase) -> Self {
        Self { phase, early: None }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exit(&self) -> Option<Exit> {
        match self.phase {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::Creating => "being created",
            Phase::Created => "created",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Stopped(_) => "stopped",
        }
    }

    fn status(&self) -> Status {
        match self.phase {
            Phase::Creating | Phase::Created | Phase::Starting => Status::Created,
            Phase::Running => Status::Running,
            Phase::Stopped(_) => Status::Stopped,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freeze {
    No,
    Freezing,
    Frozen,
    Thawing,
}

/// An exit to tell, in the order of the list it is in. The init process has an empty exec id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToldExit {
    /// Exec id.
    pub exec: String,
    /// How it ended.
    pub exit: Exit,
}

/// A container: its init process and the processes started in it later.
#[derive(Clone, Debug)]
pub struct Container {
    id: String,
    init: Process,
    execs: BTreeMap<String, Process>,
    freeze: Freeze,
    /// The init process's exit, held until the other processes' exits are told.
    held: Option<Exit>,
}

impl Container {
    /// A container the guest is making.
    #[must_use]
    pub fn new(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            init: Process::new(Phase::Creating),
            execs: BTreeMap::new(),
            freeze: Freeze::No,
            held: None,
        }
    }

    /// A process by exec id; empty: init.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn process(&self, exec: &str) -> Result<&Process, Error> {
        if exec.is_empty() {
            Ok(&self.init)
        } else {
            self.execs.get(exec).ok_or_else(|| self.no_process(exec))
        }
    }

    fn process_mut(&mut self, exec: &str) -> Option<&mut Process> {
        if exec.is_empty() {
            Some(&mut self.init)
        } else {
            self.execs.get_mut(exec)
        }
    }

    fn no_process(&self, exec: &str) -> Error {
        Error::NoProcess {
            container: self.id.clone(),
            exec: exec.into(),
        }
    }

    fn what(&self, exec: &str) -> String {
        if exec.is_empty() {
            format!("Container {}", self.id)
        } else {
            format!("Process {exec} of container {}", self.id)
        }
    }

    fn refuse(&self, exec: &str, state: &'static str, operation: &'static str) -> Error {
        Error::State {
            what: self.what(exec),
            state,
            operation,
        }
    }

    /// State of a process as its user sees it.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn status(&self, exec: &str) -> Result<Status, Error> {
        let process = self.process(exec)?;
        Ok(match (process.status(), self.freeze) {
            (Status::Running, Freeze::Freezing) => Status::Pausing,
            (Status::Running, Freeze::Frozen | Freeze::Thawing) => Status::Paused,
            (status, _) => status,
        })
    }

    /// The guest has made the container.
    pub fn created(&mut self) {
        if self.init.phase == Phase::Creating {
            self.init.phase = Phase::Created;
        }
    }

    /// Adds a process that is not started yet.
    ///
    /// # Errors
    /// [`Error::Exists`], or [`Error::State`] unless the container runs.
    pub fn add_exec(&mut self, exec: &str) -> Result<(), Error> {
        if exec.is_empty() || exec == self.id || self.execs.contains_key(exec) {
            return Err(Error::Exists(format!("process {exec} of container {}", self.id)));
        }
        self.check_running("", "add a process")?;
        self.execs.insert(exec.to_owned(), Process::new(Phase::Created));
        Ok(())
    }

    fn check_running(&self, exec: &str, operation: &'static str) -> Result<(), Error> {
        let process = self.process(exec)?;
        match (process.phase, self.freeze) {
            (Phase::Running, Freeze::No) => Ok(()),
            (Phase::Running, _) => Err(self.refuse(exec, "paused", operation)),
            _ => Err(self.refuse(exec, process.state_name(), operation)),
        }
    }

    /// A start is about to be asked for.
    ///
    /// # Errors
    /// [`Error::State`] unless the process is created, and, for a later process, the container runs.
    pub fn begin_start(&mut self, exec: &str) -> Result<(), Error> {
        let process = self.process(exec)?;
        if process.phase != Phase::Created {
            return Err(self.refuse(exec, process.state_name(), "start it"));
        }
        if !exec.is_empty() {
            self.check_running("", "start a process")?;
        }
        if let Some(process) = self.process_mut(exec) {
            process.phase = Phase::Starting;
        }
        Ok(())
    }

    /// The guest has started the process. The exits to tell now, if it has ended already.
    pub fn started(&mut self, exec: &str) -> Vec<ToldExit> {
        let Some(process) = self.process_mut(exec) else {
            return Vec::new();
        };
        if process.phase != Phase::Starting {
            return Vec::new();
        }
        process.phase = Phase::Running;
        match process.early.take() {
            Some(exit) => self.exited(exec, exit),
            None => Vec::new(),
        }
    }

    /// The guest could not start the process: it is as before. The exits to tell now.
    pub fn start_failed(&mut self, exec: &str) -> Vec<ToldExit> {
        let Some(process) = self.process_mut(exec) else {
            return Vec::new();
        };
        if process.phase != Phase::Starting {
            return Vec::new();
        }
        process.phase = Phase::Created;
        match process.early.take() {
            Some(exit) if exec.is_empty() => self.exited(exec, exit),
            // Init's exit may have been held for this process.
            _ => self.release().into_iter().collect(),
        }
    }

    /// A process has ended. The exits to tell now, in order: init's comes last of all.
    pub fn exited(&mut self, exec: &str, exit: Exit) -> Vec<ToldExit> {
        let Some(process) = self.process_mut(exec) else {
            return Vec::new();
        };
        match process.phase {
            Phase::Starting => {
                process.early = Some(exit);
                return Vec::new();
            }
            Phase::Stopped(_) => return Vec::new(),
            // A later process that never ran has no exit; a created container can be killed.
            Phase::Created if !exec.is_empty() => return Vec::new(),
            Phase::Creating | Phase::Created | Phase::Running => {}
        }
        let mut told = Vec::new();
        if exec.is_empty() {
            if self.held.is_none() {
                self.held = Some(exit);
            }
        } else {
            process.phase = Phase::Stopped(exit);
            told.push(ToldExit {
                exec: exec.to_owned(),
                exit,
            });
        }
        told.extend(self.release());
        told
    }

    /// Whether init's exit waits for the exits of other processes.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Init has ended and other processes' exits have not arrived in time: they are taken to have been
    /// killed with it. The exits to tell now.
    pub fn force_release(&mut self) -> Vec<ToldExit> {
        let Some(exit) = self.held else { return Vec::new() };
        let killed = Exit {
            status: KILLED,
            ..exit
        };
        self.end_live_execs(killed)
            .into_iter()
            .chain(self.release())
            .collect()
    }

    /// The virtual machine has ended: so has everything in it. The exits to tell now.
    pub fn lost(&mut self, exit: Exit) -> Vec<ToldExit> {
        let mut told = self.end_live_execs(exit);
        self.freeze = Freeze::No;
        if self.init.exit().is_none() {
            self.init.phase = Phase::Running;
            self.held.get_or_insert(exit);
            told.extend(self.release());
        }
        told
    }

    fn end_live_execs(&mut self, exit: Exit) -> Vec<ToldExit> {
        let mut told = Vec::new();
        for (exec, process) in &mut self.execs {
            // One that was never started has no exit to tell, but it can be deleted.
            let live = matches!(process.phase, Phase::Running | Phase::Starting);
            if process.exit().is_none() {
                let exit = process.early.take().unwrap_or(exit);
                process.phase = Phase::Stopped(exit);
                if live {
                    told.push(ToldExit {
                        exec: exec.clone(),
                        exit,
                    });
                }
            }
        }
        told
    }

    fn release(&mut self) -> Option<ToldExit> {
        let exit = self.held?;
        let others = self
            .execs
            .values()
            .any(|exec| matches!(exec.phase, Phase::Running | Phase::Starting));
        if others {
            return None;
        }
        self.held = None;
        self.freeze = Freeze::No;
        self.init.phase = Phase::Stopped(exit);
        Some(ToldExit {
            exec: String::new(),
            exit,
        })
    }

    /// Checks that a process can be signalled.
    ///
    /// # Errors
    /// [`Error::Finished`], or [`Error::State`] for a later process that is not started.
    pub fn check_signal(&self, exec: &str) -> Result<(), Error> {
        let process = self.process(exec)?;
        match process.phase {
            Phase::Stopped(_) => Err(Error::Finished),
            _ if exec.is_empty() && self.held.is_some() => Err(Error::Finished),
            Phase::Creating => Err(self.refuse(exec, process.state_name(), "signal it")),
            Phase::Created if !exec.is_empty() => Err(self.refuse(exec, process.state_name(), "signal it")),
            _ => Ok(()),
        }
    }

    /// Checks that a process can be deleted.
    ///
    /// # Errors
    /// [`Error::State`] while it is starting or running.
    pub fn check_delete(&self, exec: &str) -> Result<(), Error> {
        let process = self.process(exec)?;
        match process.phase {
            Phase::Created | Phase::Stopped(_) => Ok(()),
            _ => Err(self.refuse(exec, process.state_name(), "delete it")),
        }
    }

    /// Forgets a process started later.
    pub fn forget_exec(&mut self, exec: &str) {
        self.execs.remove(exec);
    }

    /// Checks that the container runs and marks it as about to be frozen.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn begin_pause(&mut self) -> Result<(), Error> {
        self.check_running("", "pause it")?;
        self.freeze = Freeze::Freezing;
        Ok(())
    }

    /// The answer to a pause; whether the container is frozen now.
    pub fn pause_done(&mut self, frozen: bool) -> bool {
        if self.freeze != Freeze::Freezing {
            return false;
        }
        self.freeze = if frozen { Freeze::Frozen } else { Freeze::No };
        frozen
    }

    /// Checks that the container is frozen and marks it as about to be thawed.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn begin_resume(&mut self) -> Result<(), Error> {
        match (self.init.phase, self.freeze) {
            (Phase::Running, Freeze::Frozen) => {
                self.freeze = Freeze::Thawing;
                Ok(())
            }
            (Phase::Running, Freeze::No) => Err(self.refuse("", "not paused", "resume it")),
            (Phase::Running, _) => Err(self.refuse("", "changing", "resume it")),
            _ => Err(self.refuse("", self.init.state_name(), "resume it")),
        }
    }

    /// The answer to a resume; whether the container is thawed now.
    pub fn resume_done(&mut self, thawed: bool) -> bool {
        if self.freeze != Freeze::Thawing {
            return false;
        }
        self.freeze = if thawed { Freeze::No } else { Freeze::Frozen };
        thawed
    }

    /// Checks that limits can be changed.
    ///
    /// # Errors
    /// [`Error::State`] unless created, running or paused.
    pub fn check_update(&self) -> Result<(), Error> {
        match self.init.phase {
            Phase::Created | Phase::Starting | Phase::Running => Ok(()),
            _ => Err(self.refuse("", self.init.state_name(), "update it")),
        }
    }

    /// Whether the guest is still making the container.
    #[must_use]
    pub fn is_creating(&self) -> bool {
        self.init.phase == Phase::Creating
    }

    /// Whether the container has a process that runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        matches!(self.init.phase, Phase::Starting | Phase::Running)
    }

    /// Exec ids of all later processes.
    pub fn execs(&self) -> impl Iterator<Item = &str> {
        self.execs.keys().map(String::as_str)
    }
}

/// Status of a process killed by SIGKILL.
pub const KILLED: u32 = 128 + 9;
