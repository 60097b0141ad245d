#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::journal::Journal;
use bulkhead_sandbox::snapshot::Origin;
use bulkhead_sandbox::spec::SpecError;
use bulkhead_sandbox::timeline::Timeline;
use protobuf::well_known_types::any::Any;

use super::*;
use crate::cri::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption};
use crate::events::{Publisher, Tasks};
use crate::pod::Parts;

/// A pod whose state is below a directory of its own.
struct Fixture {
    service: Service,
    directory: PathBuf,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("bulkhead-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        let parts = Parts {
            config: Configuration::default(),
            journal: Journal::create(&directory.join("state")).unwrap(),
            timeline: Timeline::new(None),
            home_cgroup: None,
        };
        let tasks = Tasks::default();
        let publisher = Publisher::start(None, "ns".into(), Arc::clone(&tasks));
        let origin = Origin {
            manager: "/run/containerd.sock".into(),
            namespace: "ns".into(),
            pod: "pod".into(),
        };
        let pod = Pod::new(origin, tasks, publisher, parts);
        Self {
            service: Service::new(Arc::new(pod), directory.clone()),
            directory,
        }
    }

    /// Makes a sandbox that was refused.
    fn refuse(&self) {
        let wanted = Wanted {
            kind: Kind::Api,
            config: Configuration::default(),
            cgroup: None,
            network: bulkhead_sandbox::network::GuestNetwork::default(),
            files: HashMap::new(),
        };
        let refusal = Error::Spec(SpecError::HostNetwork);
        self.service.pod.make(&Spec::default(), wanted, Some(refusal));
    }

    async fn status(&self) -> api::SandboxStatusResponse {
        let request = api::SandboxStatusRequest {
            sandbox_id: "pod".into(),
            verbose: true,
            ..Default::default()
        };
        self.service.sandbox_status(&context(), request).await.unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn context() -> TtrpcContext {
    TtrpcContext {
        mh: ttrpc::MessageHeader::default(),
        metadata: HashMap::new(),
        timeout_nano: 0,
        connection_data: Default::default(),
    }
}

fn refusal<T: std::fmt::Debug>(result: Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

fn create(modes: NamespaceOption) -> api::CreateSandboxRequest {
    let config = PodSandboxConfig {
        linux: Some(LinuxPodSandboxConfig {
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(modes).into(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    api::CreateSandboxRequest {
        sandbox_id: "pod".into(),
        options: Some(Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value: config.write_to_bytes().unwrap(),
            ..Any::default()
        })
        .into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn other_sandboxes_are_not_found() {
    let fixture = Fixture::new("other");
    let request = api::PlatformRequest {
        sandbox_id: "other".into(),
        ..Default::default()
    };
    let (code, text) = refusal(fixture.service.platform(&context(), request).await);
    assert_eq!(code, Code::NOT_FOUND);
    assert!(text.contains("other"), "{text}");
}

#[tokio::test]
async fn before_it_is_created_a_sandbox_can_be_asked_and_shut_down() {
    let fixture = Fixture::new("before");
    let status = fixture.status().await;
    assert_eq!(
        (status.sandbox_id.as_str(), status.state.as_str()),
        ("pod", "SANDBOX_NOTREADY")
    );
    let ping = api::PingRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let (code, _) = refusal(fixture.service.ping_sandbox(&context(), ping).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    let shutdown = api::ShutdownSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    fixture
        .service
        .shutdown_sandbox(&context(), shutdown)
        .await
        .unwrap();
    fixture.service.pod.shutdown.notified().await;
    fixture.service.pod.stop().await.unwrap();
    assert!(!fixture.directory.join("state").exists());
}

#[tokio::test]
async fn what_a_virtual_machine_cannot_give_is_refused_before_anything_is_made() {
    let fixture = Fixture::new("refused");
    let node = NamespaceMode::NODE.into();
    for (modes, field) in [
        (
            NamespaceOption {
                network: node,
                ..Default::default()
            },
            "host's network",
        ),
        (
            NamespaceOption {
                pid: node,
                ..Default::default()
            },
            "hostPID",
        ),
        (
            NamespaceOption {
                ipc: node,
                ..Default::default()
            },
            "hostIPC",
        ),
    ] {
        let (code, text) = refusal(fixture.service.create_sandbox(&context(), create(modes)).await);
        assert_eq!(code, Code::UNIMPLEMENTED, "{text}");
        assert!(text.contains(field), "{text}");
    }
    let mut broken = create(NamespaceOption::default());
    broken.options.as_mut().unwrap().value = vec![0xff];
    let (code, _) = refusal(fixture.service.create_sandbox(&context(), broken).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    let mut annotated = create(NamespaceOption::default());
    annotated.annotations = [("io.katacontainers.config.runtime.x".to_owned(), String::new())].into();
    let (code, text) = refusal(fixture.service.create_sandbox(&context(), annotated).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("io.katacontainers.config.runtime.x"), "{text}");
    assert!(fixture.service.pod.sandbox().is_err());
}

#[tokio::test]
async fn a_sandbox_that_did_not_start_tells_why_and_has_ended() {
    let fixture = Fixture::new("failed");
    fixture.refuse();
    let start = api::StartSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let (code, text) = refusal(fixture.service.start_sandbox(&context(), start).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.contains("host's network"), "{text}");
    let (code, _) = refusal(
        fixture
            .service
            .create_sandbox(&context(), create(NamespaceOption::default()))
            .await,
    );
    assert_eq!(code, Code::ALREADY_EXISTS);

    let status = fixture.status().await;
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(status.exited_at.seconds > 0);
    assert!(status.info["info"].contains("memoryMiB"));
    let wait = api::WaitSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    let exit = fixture.service.wait_sandbox(&context(), wait).await.unwrap();
    assert_eq!(exit.exited_at, status.exited_at);
    let stop = api::StopSandboxRequest {
        sandbox_id: "pod".into(),
        ..Default::default()
    };
    fixture.service.stop_sandbox(&context(), stop).await.unwrap();
    fixture.service.pod.stop().await.unwrap();
}
