//! What can be done to a container that exists.

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use bulkhead_protocol::agent as proto;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;

use super::create::{REMOVE_LIMIT, refusal};
use super::{Container, Containers, Status};
use crate::cgroup::Stats;
use crate::error::{Error, chain};
use crate::job::Job;
use crate::streams::{self, Copies};

impl Containers {
    /// Applies new limits.
    ///
    /// # Errors
    /// The limits make no sense, or the container has gone.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<(), Error> {
        let container = self.get(id)?;
        let resources: LinuxResources = serde_json::from_slice(resources).map_err(|source| Error::Json {
            field: "resources_json",
            source,
        })?;
        // Checked here for the right kind of error; the writes may block on reclaim.
        crate::cgroup::settings(&resources)?;
        let _turn = container.turn.lock().await;
        container.expect_one_of(
            &[Status::Created, Status::Running, Status::Paused],
            "created or running",
        )?;
        let cgroup = container.cgroup.clone();
        let mut job = Job::spawn(&self.reaper, "update of the limits", &[], move |status| {
            cgroup.apply(&resources).map_err(|error| refusal(&error, status))
        })?;
        job.finish(REMOVE_LIMIT).await?;
        Ok(())
    }

    /// Kills what is left of a container, unmounts its filesystems and forgets it. One that is being made is
    /// stopped from it.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let container = self.get(id)?;
        if let Some(creator) = container.state().creator {
            // Not collected while it is noted here.
            let _ = kill(creator, Signal::SIGKILL);
        }
        let _turn = container.turn.lock().await;
        if container.status() == Status::Creating {
            // The creation failed and has removed everything.
            return Ok(());
        }
        if container.status() == Status::Paused {
            // A frozen group can be killed, but its init process must be reaped before it is waited for.
            let _ = container.cgroup.freeze(false).await;
        }
        let _ = container.cgroup.kill();
        if tokio::time::timeout(REMOVE_LIMIT, container.wait(""))
            .await
            .is_err()
        {
            log::error!("container {id}: its init process does not exit");
        }
        self.undo(&container).await;
        Ok(())
    }
}

impl Containers {
    /// Joins a process's streams to new ports of the host, all or none.
    ///
    /// # Errors
    /// There is no such process, it was started without one of the streams, or the host does not listen.
    pub async fn reattach(&self, request: &proto::ReattachStreamsRequest) -> Result<(), Error> {
        let container = self.get(&request.container_id)?;
        let exec = request.exec_id.as_str();
        let gone = || Error::NoProcess(container.id.clone(), exec.to_owned());
        let ends = container.with_process(exec, |process| {
            process.running()?;
            Some(
                process
                    .copies
                    .as_ref()
                    .map(Copies::ends)
                    .cloned()
                    .unwrap_or_default(),
            )
        })?;
        let ends = ends.ok_or_else(gone)?;
        let wanted = [
            ("standard input", request.stdin_port, ends.stdin),
            ("standard output", request.stdout_port, ends.stdout),
            ("standard error", request.stderr_port, ends.stderr),
        ];
        let mut joined = Vec::new();
        for (stream, port, end) in wanted.into_iter().filter(|(_, port, _)| *port != 0) {
            let end = end.ok_or_else(|| Error::NoStream {
                id: container.id.clone(),
                exec: exec.to_owned(),
                stream,
            })?;
            joined.push((end, self.host.dial(port).await.map_err(Error::Streams)?));
        }
        for (end, socket) in joined {
            end.replace(socket);
        }
        Ok(())
    }
}

impl Container {
    /// Sends a signal to a process, or to all of the container.
    ///
    /// # Errors
    /// There is no such signal or process, or it has exited.
    pub fn signal(&self, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let invalid = || Error::Invalid {
            field: "signal",
            value: signal.to_string(),
        };
        let number = i32::try_from(signal).map_err(|_| invalid())?;
        if !(1..=libc::SIGRTMAX()).contains(&number) {
            return Err(invalid());
        }
        let gone = || Error::NoProcess(self.id.clone(), exec.to_owned());
        let pid = self
            .with_process(exec, |process| process.running())?
            .ok_or_else(gone)?;
        if !all {
            // Only the reaper frees the id, on this thread, and marks the process as exited when it does.
            return send(pid.as_raw(), number).map_err(|_| gone());
        }
        if number == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.processes()? {
            let _ = send(pid, number);
        }
        Ok(())
    }

    /// Sets the size of a process's terminal in characters.
    ///
    /// # Errors
    /// There is no such process, or it has no terminal.
    pub fn resize(&self, exec: &str, size: (u32, u32)) -> Result<(), Error> {
        let gone = || Error::NoProcess(self.id.clone(), exec.to_owned());
        let running = self.with_process(exec, |process| {
            process.running().map(|_| process.terminal.clone())
        })?;
        let terminal = running.ok_or_else(gone)?;
        let terminal = terminal.ok_or_else(|| Error::NoTerminal(self.id.clone(), exec.to_owned()))?;
        streams::resize(&terminal, size).map_err(Error::io("cannot resize the terminal"))
    }

    /// Stops all processes of the container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.expect_status(Status::Running)?;
        // Set first: an exec must not join a group that is about to freeze.
        self.state().status = Status::Paused;
        if let Err(error) = self.cgroup.freeze(true).await {
            let _ = self.cgroup.freeze(false).await;
            self.unpause();
            return Err(error.into());
        }
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// It is not paused.
    pub async fn resume(&self) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.expect_status(Status::Paused)?;
        self.cgroup.freeze(false).await?;
        self.unpause();
        Ok(())
    }

    /// Unless it was killed meanwhile.
    fn unpause(&self) {
        let mut state = self.state();
        if state.status == Status::Paused {
            state.status = Status::Running;
        }
    }

    /// Counters of the container.
    ///
    /// # Errors
    /// It is being made or removed.
    pub fn stats(&self) -> Result<proto::ContainerStatsResponse, Error> {
        Ok(Stats::read(&self.cgroup)?)
    }

    /// Processes of the container: those that live, without the agent's helpers that make another one.
    ///
    /// # Errors
    /// It is being made or removed.
    pub fn processes(&self) -> Result<Vec<proto::ContainerProcess>, Error> {
        let pids = self.cgroup.processes()?;
        let agent = Program::of("self");
        let state = self.state();
        let init = state.init.pid.map(Pid::as_raw);
        let belongs = |pid: &i32| match Program::of(pid) {
            // Dead and not reaped yet, or gone since the group was read.
            None => false,
            // Between its fork and its program a process is the agent's, except that of a created container.
            program => init == Some(*pid) || program != agent,
        };
        let exec_of = |pid: i32| {
            let own = state
                .execs
                .iter()
                .find(|(_, process)| process.pid.is_some_and(|own| own.as_raw() == pid));
            own.map(|(exec, _)| exec.clone()).unwrap_or_default()
        };
        let process = |pid: i32| proto::ContainerProcess {
            pid: pid.unsigned_abs(),
            exec_id: exec_of(pid),
            ..Default::default()
        };
        Ok(pids.into_iter().filter(belongs).map(process).collect())
    }
}

/// Identity of the file that a process executes.
#[derive(PartialEq, Eq)]
struct Program {
    device: u64,
    inode: u64,
}

impl Program {
    /// The program of a living process, named as in `/proc`.
    fn of(process: impl Display) -> Option<Self> {
        let file = fs::metadata(format!("/proc/{process}/exe")).ok()?;
        Some(Self {
            device: file.dev(),
            inode: file.ino(),
        })
    }
}

/// kill(2) for every number, also of real-time signals.
fn send(pid: i32, signal: i32) -> nix::Result<()> {
    // SAFETY: kill has no memory effects.
    nix::errno::Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Stops every container before the guest goes down.
pub async fn remove_all(containers: &Arc<Containers>) {
    for id in containers.ids() {
        if let Err(error) = containers.remove(&id).await {
            log::error!("{}", chain(&error));
        }
    }
}
