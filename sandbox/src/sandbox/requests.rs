//! Questions and small requests about containers.

use bulkhead_protocol::agent::{
    ContainerStatsRequest, ContainerStatsResponse, ListProcessesRequest, PauseContainerRequest,
    ResizeTerminalRequest, ResumeContainerRequest, SignalProcessRequest,
};

use super::*;
use crate::error::Kind;
use crate::limits;
use crate::network::Counters;

impl Sandbox {
    /// Waits until containers can be created. Those of a snapshot can be before there is a guest.
    ///
    /// # Errors
    /// Why the sandbox did not start, or that it has ended.
    pub async fn ready(&self) -> Result<(), Error> {
        if self.awaits().is_some() {
            return Ok(());
        }
        self.guest().await.map(drop)
    }

    /// Whether containers can be created now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        (self.agent_now().is_ok() || self.awaits().is_some()) && !self.is_stopping()
    }

    /// Asks the guest's agent for a sign of life. There is nobody to ask yet where a snapshot waits for its containers.
    ///
    /// # Errors
    /// The agent does not serve, has not answered within `limit`, or the VM has ended.
    pub async fn ping(&self, limit: Duration) -> Result<(), Error> {
        if self.awaits().is_some() {
            return Ok(());
        }
        self.agent_now()?.ping(limit).await
    }

    /// Waits for the end of the VM; at once if it could not be started. The status is 0 after an end that was
    /// asked for.
    pub async fn ended(&self) -> Exit {
        let mut end = self.0.end.subscribe();
        let exit = end.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        exit.unwrap_or_else(killed_now)
    }

    /// How the VM ended, if it has.
    #[must_use]
    pub fn end(&self) -> Option<Exit> {
        *self.0.end.borrow()
    }

    /// Process id of the VMM, once there is one.
    #[must_use]
    pub fn vmm_pid(&self) -> Option<i32> {
        self.vm_now().map(|vm| vm.process().pid)
    }

    /// Configuration the VM was started with.
    #[must_use]
    pub fn configuration(&self) -> &Configuration {
        &self.0.config
    }

    /// Counters of the pod's cgroup on the host, in which the VM is.
    #[must_use]
    pub fn pod_stats(&self) -> ContainerStatsResponse {
        self.0.cgroup.as_ref().map(Cgroup::stats).unwrap_or_default()
    }

    /// Counters of the pod's network interfaces.
    #[must_use]
    pub fn network_stats(&self) -> Vec<Counters> {
        crate::network::counters()
    }

    /// A process's state.
    ///
    /// # Errors
    /// [`Error::NoContainer`], [`Error::NoProcess`].
    pub fn state(&self, id: &str, exec: &str) -> Result<ProcessState, Error> {
        self.with(id, |record| {
            Ok(ProcessState {
                status: record.machine.status(exec)?,
                exit: record.machine.process(exec)?.exit(),
            })
        })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// [`Error::NoContainer`], [`Error::NoProcess`], also when it is deleted before it has run.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit, Error> {
        let mut receiver = self.with(id, |record| {
            record.machine.process(exec)?;
            let sender = record.exits.get(exec).ok_or_else(|| Error::NoProcess {
                container: id.into(),
                exec: exec.into(),
            })?;
            Ok(sender.subscribe())
        })?;
        let exit = receiver
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit);
        exit.ok_or_else(|| Error::NoContainer(id.into()))
    }

    /// Sends a signal to a process, or to every process of the container.
    ///
    /// # Errors
    /// [`Error::Finished`], [`Error::State`], or the agent's reason.
    pub async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Error> {
        let kill = signal == libc::SIGKILL.unsigned_abs();
        if kill && exec.is_empty() && self.with(id, |record| Ok(record.machine.is_creating()))? {
            self.cancel(id).await;
            return Ok(());
        }
        let is_sandbox = self.with(id, |record| {
            record.machine.check_signal(exec)?;
            Ok(record.is_sandbox)
        })?;
        if is_sandbox {
            self.signal_sandbox(id, signal);
            return Ok(());
        }
        if let Some(restore) = self.awaits() {
            // Its process stands still, and there is no guest yet that could be asked.
            self.signal_sandbox(id, signal);
            if self.state(id, "")?.exit.is_some() {
                restore.leave(id);
            }
            return Ok(());
        }
        let request = SignalProcessRequest {
            container_id: self.guest_id(id),
            exec_id: exec.into(),
            signal,
            all,
            ..SignalProcessRequest::default()
        };
        let agent = self.agent_now()?;
        if kill {
            return self.kill(agent, request).await;
        }
        match agent.signal_process(&request).await {
            Err(Error::Agent {
                kind: Kind::NotFound, ..
            }) => Err(Error::Finished),
            result => result.map(drop),
        }
    }

    /// Sends SIGKILL. The answer does not wait for a guest that is slow to confirm it, nor for the end of the VM of one
    /// that never does.
    async fn kill(&self, agent: Agent, request: SignalProcessRequest) -> Result<(), Error> {
        let killing = tokio::spawn(async move { agent.signal_process(&request).await });
        let Ok(joined) = tokio::time::timeout(KILL_ANSWER, killing).await else {
            return Ok(());
        };
        match joined.map_err(Error::Task)? {
            Err(Error::Agent {
                kind: Kind::NotFound, ..
            }) => Err(Error::Finished),
            // The machine's end kills better than any signal.
            Err(Error::Ended(_)) => Ok(()),
            result => result.map(drop),
        }
    }

    /// The sandbox container has no process: the signals that would end its pause process end it.
    fn signal_sandbox(&self, id: &str, signal: u32) {
        let deadly = [
            libc::SIGKILL,
            libc::SIGTERM,
            libc::SIGINT,
            libc::SIGQUIT,
            libc::SIGHUP,
        ];
        if !deadly.iter().any(|deadly| deadly.unsigned_abs() == signal) {
            return;
        }
        let exit = Exit {
            status: 128 + signal,
            at_ns: now_ns(),
        };
        let _ = self.with(id, |record| {
            let told = record.machine.exited("", exit);
            self.tell(id, record, told);
            Ok(())
        });
    }

    /// Closes a process's stdin: it sees the end once it has read what is there.
    ///
    /// # Errors
    /// [`Error::NoContainer`], [`Error::NoProcess`].
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Error> {
        self.with(id, |record| {
            record.machine.process(exec)?;
            if let Some(streams) = record.streams.get(exec) {
                self.0.streams.close_stdin(streams);
            }
            Ok(())
        })
    }

    /// Sets the size of a process's terminal; without a terminal nothing happens.
    ///
    /// # Errors
    /// [`Error::NoContainer`], [`Error::NoProcess`], or the agent's reason.
    pub async fn resize(
        &self,
        id: &str,
        exec: &str,
        terminal: bool,
        width: u32,
        height: u32,
    ) -> Result<(), Error> {
        let live = self.with(id, |record| {
            record.machine.process(exec)?;
            record.sizes.insert(exec.into(), (width, height));
            // Before its streams are open the size waits for the start.
            Ok(record.streams.contains_key(exec) && !record.is_sandbox)
        })?;
        if !live || !terminal {
            return Ok(());
        }
        let request = ResizeTerminalRequest {
            container_id: self.guest_id(id),
            exec_id: exec.into(),
            width,
            height,
            ..ResizeTerminalRequest::default()
        };
        self.agent_now()?.resize_terminal(&request).await.map(drop)
    }

    /// Freezes a container, also when the caller stops waiting.
    ///
    /// # Errors
    /// [`Error::State`] unless it runs, or the agent's reason.
    pub async fn pause(&self, id: &str) -> Result<(), Error> {
        let id = id.to_owned();
        self.to_the_end(|sandbox: Self| async move { sandbox.pause_to_the_end(&id).await })
            .await
    }

    async fn pause_to_the_end(&self, id: &str) -> Result<(), Error> {
        self.refuse_for_sandbox(id, "pausing the sandbox container")?;
        let agent = self.agent_now()?;
        self.with(id, |record| record.machine.begin_pause())?;
        let request = PauseContainerRequest {
            container_id: self.guest_id(id),
            ..Default::default()
        };
        let result = agent.pause_container(&request).await;
        self.with(id, |record| {
            if record.machine.pause_done(result.is_ok()) {
                self.0.sink.event(SandboxEvent::Paused { container: id.into() });
            }
            Ok(())
        })?;
        result.map(drop)
    }

    /// Thaws a container, also when the caller stops waiting.
    ///
    /// # Errors
    /// [`Error::State`] unless it is frozen, or the agent's reason.
    pub async fn resume(&self, id: &str) -> Result<(), Error> {
        let id = id.to_owned();
        self.to_the_end(|sandbox: Self| async move { sandbox.resume_to_the_end(&id).await })
            .await
    }

    async fn resume_to_the_end(&self, id: &str) -> Result<(), Error> {
        self.refuse_for_sandbox(id, "resuming the sandbox container")?;
        let agent = self.agent_now()?;
        self.with(id, |record| record.machine.begin_resume())?;
        let request = ResumeContainerRequest {
            container_id: self.guest_id(id),
            ..Default::default()
        };
        let result = agent.resume_container(&request).await;
        self.with(id, |record| {
            if record.machine.resume_done(result.is_ok()) {
                self.0.sink.event(SandboxEvent::Resumed { container: id.into() });
            }
            Ok(())
        })?;
        result.map(drop)
    }

    fn refuse_for_sandbox(&self, id: &str, what: &'static str) -> Result<(), Error> {
        self.with(id, |record| {
            if record.is_sandbox {
                Err(Error::Unsupported(what))
            } else {
                Ok(())
            }
        })
    }

    /// A container's counters. The sandbox container's are those of the pod's cgroup on the host.
    ///
    /// # Errors
    /// [`Error::NoContainer`], or the agent's reason.
    pub async fn stats(&self, id: &str) -> Result<ContainerStatsResponse, Error> {
        let (is_sandbox, is_creating) =
            self.with(id, |record| Ok((record.is_sandbox, record.machine.is_creating())))?;
        // The guest has no counters of a container that it is making, and may not answer.
        if is_sandbox || is_creating {
            return Ok(self.pod_stats());
        }
        let request = ContainerStatsRequest {
            container_id: self.guest_id(id),
            ..Default::default()
        };
        let mut stats = self.agent_now()?.for_query().container_stats(&request).await?;
        limits::trim_counters(&mut stats);
        Ok(stats)
    }

    /// A container's processes; none for the sandbox container.
    ///
    /// # Errors
    /// [`Error::NoContainer`], or the agent's reason.
    pub async fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        if self.with(id, |record| Ok(record.is_sandbox))? {
            return Ok(Vec::new());
        }
        let request = ListProcessesRequest {
            container_id: self.guest_id(id),
            ..Default::default()
        };
        let mut list = self.agent_now()?.for_query().list_processes(&request).await?;
        self.with(id, |record| {
            limits::trim_processes(&mut list, |exec| record.execs.contains_key(exec));
            Ok(())
        })?;
        Ok(list
            .processes
            .into_iter()
            .map(|process| ProcessInfo {
                pid: process.pid,
                exec: process.exec_id,
            })
            .collect())
    }
}
