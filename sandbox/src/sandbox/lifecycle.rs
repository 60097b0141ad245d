//! Starting and deleting containers and processes.

use bulkhead_protocol::agent::{self, ExecProcessRequest, RemoveContainerRequest, StartContainerRequest};
use bulkhead_protocol::control::Request;

use super::*;
use crate::streams::Stdio;

impl Sandbox {
    /// Does `work` to its end, also when the caller stops waiting: ttrpc drops a call at its deadline, and what stops in
    /// the middle leaves a container in a state that it cannot leave.
    pub(super) async fn to_the_end<T, F>(&self, work: impl FnOnce(Self) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>> + Send + 'static,
        T: Send + 'static,
    {
        tokio::spawn(work(self.clone())).await.map_err(Error::Task)?
    }

    /// Starts the init process or an added one, also when the caller stops waiting. `stdio` is for an added process.
    ///
    /// # Errors
    /// [`Error::State`], or the agent's reason; the process can then be deleted.
    pub async fn start_process(&self, id: &str, exec: &str, stdio: Stdio) -> Result<(), Error> {
        let (id, exec) = (id.to_owned(), exec.to_owned());
        let start = |sandbox: Self| async move { sandbox.start_to_the_end(&id, &exec, stdio).await };
        self.to_the_end(start).await
    }

    async fn start_to_the_end(&self, id: &str, exec: &str, stdio: Stdio) -> Result<(), Error> {
        let is_sandbox = self.with(id, |record| {
            record.machine.begin_start(exec)?;
            Ok(record.is_sandbox)
        })?;
        let result = match (is_sandbox, exec.is_empty()) {
            (true, _) => Ok(()),
            (false, true) if let Some(result) = self.start_saved(id).await => result,
            (false, true) => {
                // A network attached between creation and start is there when the program runs.
                let settled = fault::reach(Step::NetworkSettled).await;
                self.settle_network().await;
                let request = StartContainerRequest {
                    container_id: self.guest_id(id),
                    ..Default::default()
                };
                let started = async {
                    settled.map_err(|error| Error::Step(Step::NetworkSettled, error))?;
                    let agent = self.agent_now()?;
                    step(Step::GuestStarted).await?;
                    agent.start_container(&request).await?;
                    // Its exit, should it come, waits for the answer: see `Container::started`.
                    step(Step::StartTold).await
                };
                started.await
            }
            (false, false) => self.start_exec(id, exec, stdio).await,
        };
        self.with(id, |record| {
            let told = match &result {
                Ok(()) => {
                    let exit_known = record.machine.process(exec)?.exit().is_some();
                    if !exit_known {
                        self.0.sink.event(SandboxEvent::Started {
                            container: id.into(),
                            exec: exec.into(),
                        });
                    }
                    record.machine.started(exec)
                }
                Err(_) => record.machine.start_failed(exec),
            };
            self.tell(id, record, told);
            Ok(())
        })?;
        if result.is_ok() && exec.is_empty() {
            self.0.timeline.mark("container_started");
            self.0.timeline.save(&self.0.id);
        }
        result
    }

    async fn start_exec(&self, id: &str, exec: &str, stdio: Stdio) -> Result<(), Error> {
        let guest = self.guest().await?;
        let (process_json, size) = self.with(id, |record| {
            let json = record.execs.get(exec).cloned().unwrap_or_default();
            Ok((json, record.sizes.get(exec).copied()))
        })?;
        step(Step::ExecStreams).await?;
        let (streams, open) = self.0.streams.open(&guest.vm, stdio, size).await?;
        self.with(id, |record| {
            record.streams.insert(exec.into(), open);
            Ok(())
        })?;
        let request = ExecProcessRequest {
            container_id: self.guest_id(id),
            exec_id: exec.into(),
            process_json,
            streams: Some(streams).into(),
            ..ExecProcessRequest::default()
        };
        let result = async {
            step(Step::GuestExec).await?;
            guest.agent.exec_process(&request).await.map(drop)
        }
        .await;
        if result.is_err() {
            let open = self.with(id, |record| Ok(record.streams.remove(exec)))?;
            if let Some(open) = open {
                self.unlisten(Some(&guest.vm), &open).await;
            }
        }
        result
    }

    async fn unlisten(&self, vm: Option<&crate::vm::Vm>, streams: &ProcessStreams) {
        // Nothing is drained: the guest has not connected, or has been told to forget the process.
        self.0.streams.drain(vm, streams, Duration::ZERO).await;
    }

    /// Adds a process to a running container.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::State`].
    pub fn exec(&self, request: ExecRequest) -> Result<(), Error> {
        let ExecRequest {
            container,
            exec,
            process_json,
        } = request;
        self.with(&container, |record| {
            if record.is_sandbox {
                return Err(Error::Unsupported(
                    "a process in the sandbox container, which is the VM itself,",
                ));
            }
            record.machine.add_exec(&exec)?;
            record.execs.insert(exec.clone(), process_json);
            record.exits.insert(exec.clone(), watch::Sender::new(None));
            self.0.sink.event(SandboxEvent::ExecAdded {
                container: container.clone(),
                exec,
            });
            Ok(())
        })
    }

    /// Deletes a container, or a process by exec id, that does not run; waits for its output to drain. A caller that stops
    /// waiting, as containerd does after ten seconds, does not stop the deletion: who asks again waits for its end.
    ///
    /// # Errors
    /// [`Error::State`] while it runs.
    pub async fn delete(&self, id: &str, exec: &str) -> Result<Exit, Error> {
        let (id, exec) = (id.to_owned(), exec.to_owned());
        let delete = |sandbox: Self| async move { sandbox.delete_to_the_end(&id, &exec).await };
        self.to_the_end(delete).await
    }

    async fn delete_to_the_end(&self, id: &str, exec: &str) -> Result<Exit, Error> {
        let never = Exit {
            status: KILLED,
            at_ns: now_ns(),
        };
        if exec.is_empty() && self.with(id, |record| Ok(record.machine.is_creating()))? {
            self.cancel(id).await;
            return Ok(never);
        }
        let (exit, other) = self.with(id, |record| {
            record.machine.check_delete(exec)?;
            let exit = record.machine.process(exec)?.exit().unwrap_or(never);
            if !exec.is_empty() {
                return Ok((exit, None));
            }
            let other = record.deleting.as_ref().map(watch::Sender::subscribe);
            record.deleting.get_or_insert_default();
            Ok((exit, other))
        })?;
        if let Some(mut other) = other {
            // The other one tells before the record goes.
            let told = other.wait_for(Option::is_some).await;
            return told
                .ok()
                .and_then(|exit| *exit)
                .ok_or_else(|| Error::NoContainer(id.to_owned()));
        }
        let streams = self.with(id, |record| Ok(record.streams.remove(exec)))?;
        go_on(Step::OutputDrained).await;
        if let Some(streams) = streams {
            self.0
                .streams
                .drain(self.vm_now().as_ref(), &streams, DRAIN_LIMIT)
                .await;
        }
        if !exec.is_empty() {
            self.with(id, |record| {
                record.machine.forget_exec(exec);
                record.execs.remove(exec);
                record.exits.remove(exec);
                record.sizes.remove(exec);
                Ok(())
            })?;
            return Ok(exit);
        }
        self.release_resources(id).await;
        let mut state = self.lock();
        if let Some(record) = state.containers.remove(id)
            && let Some(deleting) = record.deleting
        {
            deleting.send_replace(Some(exit));
        }
        self.0.sink.event(SandboxEvent::Deleted {
            container: id.into(),
            exit,
        });
        Ok(exit)
    }

    /// Gives back what a container holds in the guest and on the host.
    pub(super) async fn release_resources(&self, id: &str) {
        let taken = self.with(id, |record| {
            let streams: Vec<ProcessStreams> = record.streams.drain().map(|(_, streams)| streams).collect();
            Ok((streams, std::mem::take(&mut record.slots), record.is_sandbox))
        });
        let Ok((streams, slots, is_sandbox)) = taken else {
            return;
        };
        let guest_id = self.guest_id(id);
        if let Some(restore) = &self.0.restore {
            restore.leave(id);
        }
        let vm = self.vm_now();
        let agent = if is_sandbox { None } else { self.agent_now().ok() };
        go_on(Step::GuestRemoved).await;
        if let Some(agent) = agent {
            let request = RemoveContainerRequest {
                container_id: guest_id.clone(),
                ..Default::default()
            };
            match agent.remove_container(&request).await {
                Ok(agent::RemoveContainerResponse { .. }) => {}
                // The guest never had it, or is gone with it.
                Err(
                    Error::Agent {
                        kind: crate::Kind::NotFound,
                        ..
                    }
                    | Error::Ended(_),
                ) => {}
                Err(error) => log::warn!("{}", crate::error::chain(&error)),
            }
        }
        self.shrink(id).await;
        for streams in streams {
            self.unlisten(vm.as_ref(), &streams).await;
        }
        go_on(Step::DisksDetached).await;
        for slot in slots {
            if let Some(vm) = &vm
                && let Err(error) = vm.ask(Request::DetachDisk { slot }, Vec::new()).await
            {
                log::debug!("{}", crate::error::chain(&error));
            }
            let index = usize::try_from(slot).unwrap_or(usize::MAX);
            if let Some(used) = self.lock().slots.get_mut(index) {
                *used = false;
            }
        }
        go_on(Step::VolumesReleased).await;
        self.release_volumes(id).await;
        go_on(Step::RootUnmounted).await;
        let tree = self.0.tree.clone();
        if let (Some(tree), false) = (tree, is_sandbox) {
            let phase = Step::RootUnmounted.words();
            if let Err(error) = on_thread(phase, move || tree.remove(&guest_id)).await {
                log::warn!("{}", crate::error::chain(&error));
            }
        }
    }
}

async fn step(step: Step) -> Result<(), Error> {
    fault::reach(step).await.map_err(|error| Error::Step(step, error))
}

/// A step of an end, which goes on whatever fails.
async fn go_on(step: Step) {
    if let Err(error) = fault::reach(step).await {
        log::warn!("{}", crate::error::chain(&Error::Step(step, error)));
    }
}
