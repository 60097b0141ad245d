//! Containers of a pod: in the making, and as they run.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::{Exec, Pod, open};
use crate::config::config;
use crate::cri::api::*;
use crate::fixture::wait_until;
use crate::log;
use crate::stream::Stream;
use bulkhead_containerd::grpc::Status;

/// A container in the making.
#[derive(Debug)]
pub struct ContainerBuilder<'a> {
    pod: &'a Pod<'a>,
    /// What `CreateContainer` is given.
    pub config: ContainerConfig,
}

impl<'a> ContainerBuilder<'a> {
    pub(super) fn new(pod: &'a Pod<'a>, config: ContainerConfig) -> Self {
        Self { pod, config }
    }

    /// Changes what `CreateContainer` is given.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the security context.
    #[must_use]
    pub fn security(self, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> Self {
        self.with(|config| {
            let linux = config.linux.mut_or_insert_default();
            change(linux.security_context.mut_or_insert_default());
        })
    }

    /// Changes limits.
    #[must_use]
    pub fn resources(self, change: impl FnOnce(&mut LinuxContainerResources)) -> Self {
        self.with(|config| {
            let linux = config.linux.mut_or_insert_default();
            change(linux.resources.mut_or_insert_default());
        })
    }

    /// Adds a mount.
    #[must_use]
    pub fn mount(self, mount: Mount) -> Self {
        self.with(|config| config.mounts.push(mount))
    }

    /// The number of the attempt: a container that is started anew has the same name and a higher one.
    #[must_use]
    pub fn attempt(self, attempt: u32) -> Self {
        self.with(|config| {
            config.metadata.mut_or_insert_default().attempt = attempt;
            config.log_path = format!("{}.{attempt}.log", config.metadata.name);
        })
    }

    /// Creates the container, or says why it is refused.
    ///
    /// # Errors
    /// The refusal.
    pub fn try_create(self) -> Result<Container<'a>, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config.clone()).into(),
            sandbox_config: Some(self.pod.config.clone()).into(),
            ..Default::default()
        };
        let answer = self.pod.client.create_container(&request)?;
        Ok(Container {
            pod: self.pod,
            id: answer.container_id,
            config: self.config,
        })
    }

    /// Creates the container.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn create(self) -> Container<'a> {
        let name = self.config.metadata.name.clone();
        self.try_create()
            .unwrap_or_else(|status| panic!("CreateContainer of {name}: {status}"))
    }

    /// Creates and starts the container.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn start(self) -> Container<'a> {
        let container = self.create();
        container.start();
        container
    }

    /// Creates and starts the container, or says why it is refused. After a refusal nothing of it is left.
    ///
    /// # Errors
    /// The refusal.
    pub fn try_start(self) -> Result<Container<'a>, Status> {
        let container = self.try_create()?;
        match container.try_start() {
            Ok(()) => Ok(container),
            Err(status) => {
                container.remove();
                Err(status)
            }
        }
    }

    /// Runs the container to its end and removes it; its exit code and what it wrote.
    #[track_caller]
    #[must_use]
    pub fn finish(self) -> Exec {
        let container = self.start();
        let status = container.wait();
        let lines = container.log();
        let of = |stream: &str| {
            let lines = lines.iter().filter(|line| line.stream == stream);
            lines
                .map(|line| format!("{}{}", line.text, if line.full { "\n" } else { "" }))
                .collect()
        };
        let exec = Exec {
            label: format!("{:?}", container.config.command),
            stdout: of("stdout"),
            stderr: of("stderr"),
            code: status.exit_code,
        };
        container.remove();
        exec
    }
}

/// A container of a pod. It goes with its pod.
#[derive(Debug)]
pub struct Container<'a> {
    pod: &'a Pod<'a>,
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub config: ContainerConfig,
}

impl Container<'_> {
    /// Starts it.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    pub fn start(&self) {
        self.try_start()
            .unwrap_or_else(|status| panic!("StartContainer of {}: {status}", self.config.metadata.name));
    }

    /// Starts it, or says why it is refused.
    ///
    /// # Errors
    /// The refusal.
    pub fn try_start(&self) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        self.pod.client.start_container(&request).map(drop)
    }

    /// Its state.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn status(&self) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.pod.client.container_status(&request);
        answer
            .unwrap_or_else(|status| panic!("ContainerStatus: {status}"))
            .status
            .unwrap_or_default()
    }

    /// Whether it runs.
    #[track_caller]
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.status().state == ContainerState::CONTAINER_RUNNING.into()
    }

    /// Waits until it has ended; its state then.
    ///
    /// # Panics
    /// If it does not end within a minute.
    #[track_caller]
    #[must_use]
    pub fn wait(&self) -> ContainerStatus {
        let mut status = ContainerStatus::default();
        let ended = wait_until(config().seconds(60), || {
            status = self.status();
            status.state == ContainerState::CONTAINER_EXITED.into()
        });
        assert!(ended, "the container does not end: {status:?}");
        status
    }

    /// Runs a command in it to its end.
    ///
    /// # Panics
    /// If it cannot be run.
    #[track_caller]
    #[must_use]
    pub fn exec(&self, command: &[&str]) -> Exec {
        self.try_exec(command, Duration::ZERO)
            .unwrap_or_else(|status| panic!("ExecSync {command:?}: {status}"))
    }

    /// Runs a script in it to its end.
    #[track_caller]
    #[must_use]
    pub fn sh(&self, script: &str) -> Exec {
        self.exec(&["/bin/sh", "-c", script])
    }

    /// Runs a command, killed after `timeout` unless that is zero.
    ///
    /// # Errors
    /// The runtime's refusal.
    pub fn try_exec(&self, command: &[&str], timeout: Duration) -> Result<Exec, Status> {
        let request = ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            timeout: i64::try_from(timeout.as_secs()).expect("a short time"),
            ..Default::default()
        };
        let limit = config().seconds(60) + timeout;
        let answer = self.pod.client.exec_sync_within(&request, limit)?;
        Ok(Exec {
            label: format!("{command:?}"),
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
            code: answer.exit_code,
        })
    }

    /// Runs a command with streams, on a terminal or not.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn exec_stream(&self, command: &[&str], tty: bool) -> Stream {
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty,
            stdin: tty,
            stdout: true,
            // On a terminal there is one stream.
            stderr: !tty,
            ..Default::default()
        };
        let answer = self.pod.client.exec(&request);
        open(
            &answer
                .unwrap_or_else(|status| panic!("Exec {command:?}: {status}"))
                .url,
        )
    }

    /// Streams to the container's own process.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn attach(&self) -> Stream {
        let request = AttachRequest {
            container_id: self.id.clone(),
            stdin: self.config.stdin,
            tty: self.config.tty,
            stdout: true,
            stderr: !self.config.tty,
            ..Default::default()
        };
        let answer = self.pod.client.attach(&request);
        open(&answer.unwrap_or_else(|status| panic!("Attach: {status}")).url)
    }

    /// What the probe reports from inside, as JSON; the image must be the probe's.
    #[track_caller]
    #[must_use]
    pub fn report(&self) -> serde_json::Value {
        self.exec(&["/probe", "report"]).json()
    }

    /// Figures of the container.
    ///
    /// # Panics
    /// If there are none.
    #[track_caller]
    #[must_use]
    pub fn stats(&self) -> ContainerStats {
        let request = ContainerStatsRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.pod.client.container_stats(&request);
        answer
            .unwrap_or_else(|status| panic!("ContainerStats: {status}"))
            .stats
            .unwrap_or_default()
    }

    /// Changes its limits.
    ///
    /// # Errors
    /// The runtime's refusal.
    pub fn update(&self, resources: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: Some(resources).into(),
            ..Default::default()
        };
        self.pod.client.update_container_resources(&request).map(drop)
    }

    /// Path of its log on the host.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        PathBuf::from(&self.pod.config.log_directory).join(&self.config.log_path)
    }

    /// Lines of its log.
    ///
    /// # Panics
    /// If a line is not of CRI's form.
    #[track_caller]
    #[must_use]
    pub fn log(&self) -> Vec<log::Line> {
        log::parse(&fs::read_to_string(self.log_file()).unwrap_or_default())
    }

    /// Waits until a line of the log contains `text`.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) {
        let seen = wait_until(config().seconds(20), || {
            fs::read_to_string(self.log_file()).is_ok_and(|log| log.contains(text))
        });
        assert!(
            seen,
            "{text:?} is not in {:?}",
            fs::read_to_string(self.log_file())
        );
    }

    /// Begins a new log file.
    ///
    /// # Errors
    /// The runtime's refusal.
    pub fn reopen_log(&self) -> Result<(), Status> {
        let request = ReopenContainerLogRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        self.pod.client.reopen_container_log(&request).map(drop)
    }

    /// Sends the stop signal and, `seconds` later, SIGKILL; returns when it has ended.
    ///
    /// # Panics
    /// If the call fails.
    #[track_caller]
    pub fn stop(&self, seconds: i64) {
        let request = StopContainerRequest {
            container_id: self.id.clone(),
            timeout: seconds,
            ..Default::default()
        };
        let answer = self.pod.client.stop_container(&request);
        answer.unwrap_or_else(|status| panic!("StopContainer: {status}"));
    }

    /// Removes it; one that runs is killed.
    ///
    /// # Panics
    /// If the call fails.
    #[track_caller]
    pub fn remove(&self) {
        let request = RemoveContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.pod.client.remove_container(&request);
        answer.unwrap_or_else(|status| panic!("RemoveContainer: {status}"));
    }
}
