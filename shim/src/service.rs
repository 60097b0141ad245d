//! containerd's task service over one sandbox.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bulkhead_sandbox::snapshot::ANNOTATION;
use bulkhead_sandbox::{Error, ExecRequest, Exit, Role, Sandbox, Status, Stdio};
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::{CheckpointOptions, ProcessDetails};
use containerd_shim_protos::shim_async::Task as TaskService;
use oci_spec::runtime::Spec;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use ttrpc::asynchronous::TtrpcContext;
use ttrpc::proto::Code;

use crate::anchor::Anchor;
use crate::events::{self, Task, any};
use crate::io::{self, Owner, Paths};
use crate::pod::{Kind, Pod};
use crate::stats;
use crate::status::{from_sandbox, status};

mod create;

use create::NewTask;

type Result<T> = ttrpc::Result<T>;
type Empty = api::Empty;

/// The service. One server serves every container of a pod.
pub struct Service {
    pod: Arc<Pod>,
    /// The first bundle and its specification, read before the server was there.
    first: Mutex<Option<(PathBuf, Spec)>>,
}

impl Service {
    /// Serves `pod`.
    #[must_use]
    pub fn new(pod: Arc<Pod>, first: Option<(PathBuf, Spec)>) -> Self {
        Self {
            pod,
            first: Mutex::new(first),
        }
    }

    fn sandbox(&self) -> Result<&Sandbox> {
        self.pod.sandbox()
    }

    /// Process id of a container on the host.
    fn pid(&self, id: &str) -> u32 {
        self.tasks().get(id).map_or_else(std::process::id, Task::pid)
    }

    fn tasks(&self) -> MutexGuard<'_, std::collections::HashMap<String, Task>> {
        self.pod.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn open_streams(&self, container: &str, paths: &Paths) -> Result<Stdio> {
        let owner = Owner {
            container,
            namespace: &self.pod.namespace,
        };
        io::open(paths, owner)
            .await
            .map_err(|error| status(Code::INVALID_ARGUMENT, bulkhead_sandbox::error::chain(&error)))
    }
}

fn exited_at(exit: Exit) -> MessageField<Timestamp> {
    Some(events::timestamp(exit.at_ns)).into()
}

#[async_trait]
impl TaskService for Service {
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Result<api::StateResponse> {
        let state = self
            .sandbox()?
            .state(&request.id, &request.exec_id)
            .map_err(from_sandbox)?;
        let task = self.tasks().get(&request.id).cloned().unwrap_or_default();
        let pid = task.pid();
        let paths = match request.exec_id.as_str() {
            "" => task.paths,
            exec => task.execs.get(exec).cloned().unwrap_or_default(),
        };
        let status = match state.status {
            Status::Created => api::Status::CREATED,
            Status::Running => api::Status::RUNNING,
            Status::Paused => api::Status::PAUSED,
            Status::Pausing => api::Status::PAUSING,
            Status::Stopped => api::Status::STOPPED,
        };
        Ok(api::StateResponse {
            id: if request.exec_id.is_empty() {
                request.id
            } else {
                request.exec_id.clone()
            },
            bundle: task.bundle,
            pid,
            status: status.into(),
            stdin: paths.stdin,
            stdout: paths.stdout,
            stderr: paths.stderr,
            terminal: paths.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: state.exit.map_or_else(MessageField::none, exited_at),
            exec_id: request.exec_id,
            ..api::StateResponse::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        self.sandbox()?.timeline().mark("create_called");
        if !request.checkpoint.is_empty() {
            return Err(status(
                Code::UNIMPLEMENTED,
                format!(
                    "checkpoint {}: the VM boots before this call; name a snapshot by the annotation {ANNOTATION}",
                    request.checkpoint
                ),
            ));
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        {
            let mut tasks = self.tasks();
            if tasks.contains_key(&request.id) {
                return Err(status(
                    Code::ALREADY_EXISTS,
                    format!("container {} already exists", request.id),
                ));
            }
            let anchor = match self.pod.role(&request.id)? {
                Role::Container => Some(Anchor::new().map_err(|error| {
                    status(
                        Code::INTERNAL,
                        format!("cannot make a thread for the container: {error}"),
                    )
                })?),
                Role::Single | Role::Sandbox => None,
            };
            let task = Task {
                anchor: anchor.map(Arc::new),
                bundle: request.bundle.clone(),
                rootfs: request.rootfs.clone(),
                paths: paths.clone(),
                ..Task::default()
            };
            tasks.insert(request.id.clone(), task);
        }
        // Also when containerd's client has given up, and this call with it.
        let mut entry = NewTask {
            service: self,
            id: &request.id,
            keep: false,
        };
        self.create_container(&request, &paths).await?;
        entry.keep = true;
        drop(entry);
        Ok(api::CreateTaskResponse {
            pid: self.pid(&request.id),
            ..api::CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> Result<api::StartResponse> {
        let stdio = if request.exec_id.is_empty() {
            Stdio::default()
        } else {
            // Checked before streams are opened: a logging program is not started for nothing.
            self.sandbox()?
                .state(&request.id, &request.exec_id)
                .map_err(from_sandbox)?;
            let paths = self
                .tasks()
                .get(&request.id)
                .and_then(|task| task.execs.get(&request.exec_id).cloned());
            self.open_streams(&request.id, &paths.unwrap_or_default()).await?
        };
        self.sandbox()?
            .start_process(&request.id, &request.exec_id, stdio)
            .await
            .map_err(from_sandbox)?;
        Ok(api::StartResponse {
            pid: self.pid(&request.id),
            ..api::StartResponse::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> Result<api::DeleteResponse> {
        let pid = self.pid(&request.id);
        let deleted = self.sandbox()?.delete(&request.id, &request.exec_id).await;
        // Also when a caller before has not waited for its end.
        if matches!(deleted, Ok(_) | Err(Error::NoContainer(_))) {
            let mut tasks = self.tasks();
            if request.exec_id.is_empty() {
                tasks.remove(&request.id);
            } else if let Some(task) = tasks.get_mut(&request.id) {
                task.execs.remove(&request.exec_id);
            }
        }
        let exit = deleted.map_err(from_sandbox)?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: exited_at(exit),
            ..api::DeleteResponse::default()
        })
    }

    /// The processes' ids in the guest: they mean nothing on the host. A container without processes (the
    /// sandbox's, or one that has ended) answers with its id on the host: containerd, when it restarts, takes a task
    /// without processes for lost, and its exit status would be. So does one whose guest does not answer.
    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Result<api::PidsResponse> {
        let sandbox = self.sandbox()?;
        let state = sandbox.state(&request.id, "").map_err(from_sandbox)?;
        let listed = match state.status {
            Status::Stopped => Vec::new(),
            _ => match sandbox.processes(&request.id).await {
                Err(Error::Timeout { .. }) => Vec::new(),
                listed => listed.map_err(from_sandbox)?,
            },
        };
        let mut processes: Vec<api::ProcessInfo> = listed
            .into_iter()
            .map(|process| {
                let details = (!process.exec.is_empty()).then(|| {
                    any(&ProcessDetails {
                        exec_id: process.exec,
                        ..ProcessDetails::default()
                    })
                });
                api::ProcessInfo {
                    pid: process.pid,
                    info: details.into(),
                    ..api::ProcessInfo::default()
                }
            })
            .collect();
        if processes.is_empty() {
            processes.push(api::ProcessInfo {
                pid: self.pid(&request.id),
                ..api::ProcessInfo::default()
            });
        }
        Ok(api::PidsResponse {
            processes,
            ..api::PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Result<Empty> {
        self.sandbox()?.pause(&request.id).await.map_err(from_sandbox)?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Result<Empty> {
        self.sandbox()?.resume(&request.id).await.map_err(from_sandbox)?;
        Ok(Empty::default())
    }

    /// Saves the whole pod that the container is in: they share their VM.
    async fn checkpoint(&self, _: &TtrpcContext, request: api::CheckpointTaskRequest) -> Result<Empty> {
        let options = CheckpointOptions::parse_from_bytes(&request.options.value).map_err(|error| {
            let kind = &request.options.type_url;
            status(
                Code::INVALID_ARGUMENT,
                format!("options ({kind}) of the checkpoint: {error}"),
            )
        })?;
        let path = PathBuf::from(&request.path);
        if !path.is_absolute() {
            return Err(status(
                Code::INVALID_ARGUMENT,
                format!("path {:?} of the checkpoint is not absolute", request.path),
            ));
        }
        let sandbox = self.sandbox()?;
        // With the Sandbox API no container stands for the pod.
        if request.id != self.pod.id {
            sandbox.state(&request.id, "").map_err(from_sandbox)?;
        }
        sandbox
            .checkpoint(&path, self.pod.origin.clone())
            .await
            .map_err(from_sandbox)?;
        if options.exit {
            let kill = libc::SIGKILL.unsigned_abs();
            sandbox
                .signal(&request.id, "", kill, true)
                .await
                .map_err(from_sandbox)?;
        }
        Ok(Empty::default())
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Result<Empty> {
        self.sandbox()?
            .signal(&request.id, &request.exec_id, request.signal, request.all)
            .await
            .map_err(from_sandbox)?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Result<Empty> {
        let process_json = request
            .spec
            .into_option()
            .map(|any| any.value)
            .unwrap_or_default();
        let exec = ExecRequest {
            container: request.id.clone(),
            exec: request.exec_id.clone(),
            process_json,
        };
        self.sandbox()?.exec(exec).map_err(from_sandbox)?;
        if let Some(task) = self.tasks().get_mut(&request.id) {
            let paths = Paths {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
            };
            task.execs.insert(request.exec_id, paths);
        }
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> Result<Empty> {
        let terminal = self
            .tasks()
            .get(&request.id)
            .is_some_and(|task| match request.exec_id.as_str() {
                "" => task.paths.terminal,
                exec => task.execs.get(exec).is_some_and(|paths| paths.terminal),
            });
        self.sandbox()?
            .resize(
                &request.id,
                &request.exec_id,
                terminal,
                request.width,
                request.height,
            )
            .await
            .map_err(from_sandbox)?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Result<Empty> {
        if request.stdin {
            self.sandbox()?
                .close_stdin(&request.id, &request.exec_id)
                .map_err(from_sandbox)?;
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Result<Empty> {
        let resources = request
            .resources
            .into_option()
            .map(|any| any.value)
            .unwrap_or_default();
        self.sandbox()?
            .update(&request.id, &resources)
            .await
            .map_err(from_sandbox)?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Result<api::WaitResponse> {
        let exit = self
            .sandbox()?
            .wait(&request.id, &request.exec_id)
            .await
            .map_err(from_sandbox)?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: exited_at(exit),
            ..api::WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> Result<api::StatsResponse> {
        let sandbox = self.sandbox()?;
        let counters = sandbox.stats(&request.id).await.map_err(from_sandbox)?;
        let stats = any(&stats::metrics(&counters, &sandbox.network_stats()));
        Ok(api::StatsResponse {
            stats: Some(stats).into(),
            ..api::StatsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> Result<api::ConnectResponse> {
        let task_pid = self.tasks().get(&request.id).map_or(0, Task::pid);
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..api::ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Result<Empty> {
        // Also asked after every container of a pod: only the last one's counts. The Sandbox API has a call of its own.
        match self.pod.kind() {
            Ok(Kind::Api) => {}
            Ok(Kind::Single | Kind::Task) if !self.sandbox()?.is_empty() => {}
            _ => self.pod.shutdown.notify_one(),
        }
        Ok(Empty::default())
    }
}
