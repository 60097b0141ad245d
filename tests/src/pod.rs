//! A pod as a kubelet makes it: `RunPodSandbox`, containers, and at the end everything stopped and removed.
//!
//! ```no_run
//! # let test: bulkhead_tests::Fixture = panic!();
//! let pod = test.pod("web").with(|config| config.hostname = "web-0".into()).run();
//! let main = pod.container("main", &["sleep", "1000"]).start();
//! assert_eq!(main.sh("hostname").text(), "web-0\n");
//! ```

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bulkhead_containerd::grpc::Status;

use crate::config::config;
use crate::cri::api::*;
use crate::cri::{self, Client};
use crate::fixture::{Fixture, wait_until};
use crate::image::PROBE_IMAGE;
use crate::stream::Stream;

mod container;
mod exec;

pub use container::{Container, ContainerBuilder};
pub use exec::Exec;

/// The cgroup that the pods' own are made in, as kubelet's `kubepods`.
pub const CGROUP: &str = "/bulkhead-tests-pods";

/// A pod in the making.
#[derive(Debug)]
pub struct PodBuilder<'a> {
    test: &'a Fixture,
    handler: String,
    /// What `RunPodSandbox` is given.
    pub config: PodSandboxConfig,
}

impl<'a> PodBuilder<'a> {
    pub(crate) fn new(test: &'a Fixture, suffix: &str) -> Self {
        let name = test.id(suffix);
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                name: name.clone(),
                ..Default::default()
            })
            .into(),
            hostname: name.clone(),
            log_directory: test.work.join("logs").join(&name).display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("{CGROUP}/{name}"),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        pid: NamespaceMode::CONTAINER.into(),
                        ..Default::default()
                    })
                    .into(),
                    ..Default::default()
                })
                .into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        Self {
            test,
            handler: crate::config().handler.clone(),
            config,
        }
    }

    /// Changes what `RunPodSandbox` is given.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes the part for Linux.
    #[must_use]
    pub fn linux(self, change: impl FnOnce(&mut LinuxPodSandboxConfig)) -> Self {
        self.with(|config| change(config.linux.mut_or_insert_default()))
    }

    /// Changes the namespaces' modes; they are what kubelet asks for when a pod says nothing.
    #[must_use]
    pub fn namespaces(self, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        self.linux(|linux| {
            let security = linux.security_context.mut_or_insert_default();
            change(security.namespace_options.mut_or_insert_default());
        })
    }

    /// Another runtime handler than the one under test.
    #[must_use]
    pub fn handler(mut self, handler: &str) -> Self {
        handler.clone_into(&mut self.handler);
        self
    }

    /// Runs the pod.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn run(self) -> Pod<'a> {
        let name = self.config.hostname.clone();
        match self.try_run() {
            Ok(pod) => pod,
            Err(status) => panic!("RunPodSandbox of {name}: {status}"),
        }
    }

    /// Runs the pod, or says why it is refused.
    ///
    /// # Errors
    /// The refusal.
    ///
    /// # Panics
    /// If the pod's cgroup or log directory cannot be made.
    pub fn try_run(self) -> Result<Pod<'a>, Status> {
        let directory = PodDirectory::new(&self.config);
        let client = self.test.cri();
        let request = RunPodSandboxRequest {
            config: Some(self.config.clone()).into(),
            runtime_handler: self.handler,
            ..Default::default()
        };
        let answer = client.run_pod_sandbox(&request)?;
        Ok(Pod {
            test: self.test,
            client,
            id: answer.pod_sandbox_id,
            config: self.config,
            removed: AtomicBool::new(false),
            directory,
        })
    }
}

/// What a kubelet makes before the pod and removes after it: the cgroup and the directory of logs.
#[derive(Debug)]
struct PodDirectory {
    cgroup: Option<PathBuf>,
}

impl PodDirectory {
    fn new(config: &PodSandboxConfig) -> Self {
        fs::create_dir_all(&config.log_directory).expect("a directory");
        let parent = config.linux.cgroup_parent.trim_start_matches('/');
        let cgroup = (!parent.is_empty()).then(|| PathBuf::from("/sys/fs/cgroup").join(parent));
        if let Some(cgroup) = &cgroup {
            fs::create_dir_all(cgroup).expect("a cgroup");
            let root = PathBuf::from("/sys/fs/cgroup").join(CGROUP.trim_start_matches('/'));
            // A failure shows in the tests that look at limits.
            let _ = fs::write(
                root.join("cgroup.subtree_control"),
                "+cpu +memory +pids +cpuset +io",
            );
        }
        Self { cgroup }
    }
}

impl Drop for PodDirectory {
    fn drop(&mut self) {
        if let Some(cgroup) = &self.cgroup {
            // Processes that have just ended are in it for a moment. What stays is found by the check for leaks.
            let _ = wait_until(config().seconds(5), || fs::remove_dir(cgroup).is_ok());
        }
    }
}

/// A running pod. It is stopped and removed when it is dropped.
#[derive(Debug)]
pub struct Pod<'a> {
    test: &'a Fixture,
    client: Client,
    /// The sandbox's id.
    pub id: String,
    /// What it was made from.
    pub config: PodSandboxConfig,
    removed: AtomicBool,
    // Dropped last.
    #[allow(dead_code)]
    directory: PodDirectory,
}

impl Pod<'_> {
    /// A container of the busybox image.
    #[must_use]
    pub fn container(&self, name: &str, command: &[&str]) -> ContainerBuilder<'_> {
        self.container_of(&self.test.containerd.busybox, name, command)
    }

    /// A container of the probe image, with the probe's arguments.
    #[must_use]
    pub fn probe(&self, name: &str, arguments: &[&str]) -> ContainerBuilder<'_> {
        self.container_of(PROBE_IMAGE, name, &[&["/probe"], arguments].concat())
    }

    /// A container of an image. Without a command it runs the image's.
    #[must_use]
    pub fn container_of(&self, image: &str, name: &str, command: &[&str]) -> ContainerBuilder<'_> {
        let security = LinuxContainerSecurityContext {
            namespace_options: self.config.linux.security_context.namespace_options.clone(),
            ..Default::default()
        };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                ..Default::default()
            })
            .into(),
            image: Some(cri::image(image)).into(),
            command: command.iter().map(ToString::to_string).collect(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()).into(),
                security_context: Some(security).into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        ContainerBuilder::new(self, config)
    }

    /// Whether CRI knows an image of this name.
    #[must_use]
    pub fn has_image(&self, name: &str) -> bool {
        self.client.has_image(name)
    }

    /// State of the pod.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn status(&self) -> PodSandboxStatus {
        let answer = self.verbose_status();
        answer.status.unwrap_or_default()
    }

    /// State of the pod with what the runtime adds.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn verbose_status(&self) -> PodSandboxStatusResponse {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
            ..Default::default()
        };
        self.client
            .pod_sandbox_status(&request)
            .unwrap_or_else(|status| panic!("PodSandboxStatus: {status}"))
    }

    /// Whether the pod is ready.
    #[track_caller]
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status().state == PodSandboxState::SANDBOX_READY.into()
    }

    /// The pod's address.
    #[track_caller]
    #[must_use]
    pub fn ip(&self) -> String {
        self.status().network.ip.clone()
    }

    /// Process id of the pod's shim.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn shim(&self) -> i32 {
        let all = crate::host::processes();
        let shim = all.iter().find(|process| {
            process.command.contains("containerd-shim-kata-v2") && process.command.contains(&self.id)
        });
        shim.unwrap_or_else(|| panic!("no shim of {} in {all:?}", self.id))
            .pid
    }

    /// Figures of the pod.
    ///
    /// # Panics
    /// If there are none.
    #[track_caller]
    #[must_use]
    pub fn stats(&self) -> LinuxPodSandboxStats {
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer = self
            .client
            .pod_sandbox_stats(&request)
            .unwrap_or_else(|status| panic!("PodSandboxStats: {status}"));
        answer.stats.linux.clone().unwrap_or_default()
    }

    /// The pod's containers as CRI lists them.
    ///
    /// # Panics
    /// If the call fails.
    #[track_caller]
    #[must_use]
    pub fn containers(&self) -> Vec<api_container::Container> {
        let request = ListContainersRequest {
            filter: Some(ContainerFilter {
                pod_sandbox_id: self.id.clone(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let answer = self.client.list_containers(&request);
        answer
            .unwrap_or_else(|status| panic!("ListContainers: {status}"))
            .containers
    }

    /// A stream to a port of the pod, on channel 0, as `kubectl port-forward` has it.
    ///
    /// # Panics
    /// If it is refused.
    #[track_caller]
    #[must_use]
    pub fn port_forward(&self, port: u16) -> Stream {
        let request = PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: vec![i32::from(port)],
            ..Default::default()
        };
        let answer = self.client.port_forward(&request);
        let answer = answer.unwrap_or_else(|status| panic!("PortForward: {status}"));
        open(&format!("{}?port={port}", answer.url))
    }

    /// Ends the pod with all its containers; it can be called again.
    ///
    /// # Errors
    /// The runtime's refusal.
    pub fn stop(&self) -> Result<(), Status> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.client.stop_pod_sandbox(&request).map(drop)
    }

    /// Removes the pod with all its containers.
    ///
    /// # Errors
    /// The runtime's refusal.
    pub fn remove(&self) -> Result<(), Status> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.client.remove_pod_sandbox(&request)?;
        self.removed.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if self.removed.load(Ordering::Relaxed) {
            return;
        }
        let done = self.stop().and_then(|()| self.remove());
        match done {
            Err(status) if !thread::panicking() => panic!("the pod cannot be removed: {status}"),
            Err(status) => eprintln!("the pod cannot be removed: {status}"),
            Ok(()) => {}
        }
    }
}

fn open(url: &str) -> Stream {
    Stream::open(url, config().seconds(30)).unwrap_or_else(|error| panic!("{url}: {error}"))
}

/// Removes every pod that is still there, as after a failed test; their names.
pub(crate) fn left(client: &Client) -> Vec<String> {
    let Ok(pods) = client.list_pod_sandbox(&ListPodSandboxRequest::default()) else {
        return Vec::new();
    };
    for pod in &pods.items {
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        let remove = RemovePodSandboxRequest {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        };
        // What stays is said by the check for leaks of the next test.
        let _ = client.stop_pod_sandbox(&stop);
        let _ = client.remove_pod_sandbox(&remove);
    }
    pods.items.iter().map(|pod| pod.metadata.name.clone()).collect()
}

/// `Container` of the interface, apart from the [`Container`] of the tests.
mod api_container {
    pub use crate::cri::api::Container;
}
