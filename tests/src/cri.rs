//! Client of the Kubernetes Container Runtime Interface, with the calls that a kubelet makes.

use std::path::PathBuf;
use std::time::Duration;

use bulkhead_containerd::grpc::{self, Status};

use crate::config::config;

/// The interface's messages, version v1. See `proto/cri.proto`.
#[allow(
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used
)]
#[allow(nonstandard_style, unused)]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

use api::*;

/// A runtime that is reached by its socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// Seconds on hardware that a call may take: what a kubelet gives most of them.
const LIMIT: u32 = 120;

macro_rules! calls {
    ($($(#[$meta:meta])* $name:ident, $method:literal, $request:ident, $answer:ident;)*) => {
        impl Client {
            $(
                $(#[$meta])*
                ///
                /// # Errors
                /// The runtime's refusal.
                pub fn $name(&self, request: &$request) -> Result<$answer, Status> {
                    grpc::call(&self.socket, concat!("runtime.v1.", $method), None, request, config().seconds(LIMIT))
                }
            )*
        }
    };
}

calls! {
    /// Version of the runtime.
    version, "RuntimeService/Version", VersionRequest, VersionResponse;
    /// Conditions of the runtime and its handlers.
    status, "RuntimeService/Status", StatusRequest, StatusResponse;
    /// Makes and starts a pod.
    run_pod_sandbox, "RuntimeService/RunPodSandbox", RunPodSandboxRequest, RunPodSandboxResponse;
    /// Ends a pod with its containers.
    stop_pod_sandbox, "RuntimeService/StopPodSandbox", StopPodSandboxRequest, StopPodSandboxResponse;
    /// Removes a pod with its containers.
    remove_pod_sandbox, "RuntimeService/RemovePodSandbox", RemovePodSandboxRequest, RemovePodSandboxResponse;
    /// State of a pod.
    pod_sandbox_status, "RuntimeService/PodSandboxStatus", PodSandboxStatusRequest, PodSandboxStatusResponse;
    /// All pods.
    list_pod_sandbox, "RuntimeService/ListPodSandbox", ListPodSandboxRequest, ListPodSandboxResponse;
    /// Makes a container in a pod.
    create_container, "RuntimeService/CreateContainer", CreateContainerRequest, CreateContainerResponse;
    /// Starts a container.
    start_container, "RuntimeService/StartContainer", StartContainerRequest, StartContainerResponse;
    /// Ends a container, first with its stop signal.
    stop_container, "RuntimeService/StopContainer", StopContainerRequest, StopContainerResponse;
    /// Removes a container; one that runs is killed.
    remove_container, "RuntimeService/RemoveContainer", RemoveContainerRequest, RemoveContainerResponse;
    /// Containers, of one pod if asked.
    list_containers, "RuntimeService/ListContainers", ListContainersRequest, ListContainersResponse;
    /// State of a container.
    container_status, "RuntimeService/ContainerStatus", ContainerStatusRequest, ContainerStatusResponse;
    /// Changes the limits of a container.
    update_container_resources, "RuntimeService/UpdateContainerResources",
        UpdateContainerResourcesRequest, UpdateContainerResourcesResponse;
    /// Begins a new log file, after the old one was renamed.
    reopen_container_log, "RuntimeService/ReopenContainerLog",
        ReopenContainerLogRequest, ReopenContainerLogResponse;
    /// Runs a command in a container to its end.
    exec_sync, "RuntimeService/ExecSync", ExecSyncRequest, ExecSyncResponse;
    /// Prepares a command whose streams are served at an address.
    exec, "RuntimeService/Exec", ExecRequest, ExecResponse;
    /// Prepares streams to a container.
    attach, "RuntimeService/Attach", AttachRequest, AttachResponse;
    /// Prepares streams to ports of a pod.
    port_forward, "RuntimeService/PortForward", PortForwardRequest, PortForwardResponse;
    /// Figures of a container.
    container_stats, "RuntimeService/ContainerStats", ContainerStatsRequest, ContainerStatsResponse;
    /// Figures of several containers.
    list_container_stats, "RuntimeService/ListContainerStats",
        ListContainerStatsRequest, ListContainerStatsResponse;
    /// Figures of a pod.
    pod_sandbox_stats, "RuntimeService/PodSandboxStats", PodSandboxStatsRequest, PodSandboxStatsResponse;
    /// An image, if there is one of that name.
    image_status, "ImageService/ImageStatus", ImageStatusRequest, ImageStatusResponse;
    /// All images.
    list_images, "ImageService/ListImages", ListImagesRequest, ListImagesResponse;
    /// Removes an image.
    remove_image, "ImageService/RemoveImage", RemoveImageRequest, RemoveImageResponse;
}

impl Client {
    /// For the runtime that listens at `socket`.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// As [`Self::exec_sync`], for a call that may take longer than others.
    ///
    /// # Errors
    /// The runtime's refusal.
    pub fn exec_sync_within(
        &self,
        request: &ExecSyncRequest,
        limit: Duration,
    ) -> Result<ExecSyncResponse, Status> {
        grpc::call(
            &self.socket,
            "runtime.v1.RuntimeService/ExecSync",
            None,
            request,
            limit,
        )
    }

    /// Whether CRI knows an image of this name.
    ///
    /// # Panics
    /// If the call fails.
    #[must_use]
    pub fn has_image(&self, name: &str) -> bool {
        let request = ImageStatusRequest {
            image: Some(image(name)).into(),
            ..Default::default()
        };
        let answer = self.image_status(&request).expect("ImageStatus answers");
        answer.image.is_some()
    }
}

/// An image by its name.
#[must_use]
pub fn image(name: &str) -> ImageSpec {
    ImageSpec {
        image: name.to_owned(),
        ..Default::default()
    }
}

/// CRI's optional number.
#[must_use]
pub fn number(value: i64) -> Int64Value {
    Int64Value {
        value,
        ..Default::default()
    }
}

/// A bind mount.
#[must_use]
pub fn mount(host: &std::path::Path, container: &str, readonly: bool) -> Mount {
    Mount {
        host_path: host.display().to_string(),
        container_path: container.to_owned(),
        readonly,
        ..Default::default()
    }
}
