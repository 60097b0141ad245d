//! Calls of the task service that `ctr` has no verb for, straight to the shim.

use std::fs;
use std::path::Path;

use bulkhead_tests::image::PROBE_IMAGE;
use bulkhead_tests::{Fixture, config};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use serde_json::{Value, json};
use ttrpc::context::{Context, with_duration};
use ttrpc::proto::Code;

use crate::fixture;

/// What came of a call; an error as its code and message.
pub type Answer<T> = Result<T, (Code, String)>;

/// A connection to a container's shim, as containerd has one.
pub struct Shim {
    runtime: tokio::runtime::Runtime,
    client: TaskClient,
    id: String,
}

impl Shim {
    pub fn of(test: &Fixture, id: &str) -> Self {
        let address = fs::read_to_string(test.containerd.bundle(id).join("address")).unwrap();
        Self::at(&address, id)
    }

    /// Connects to `unix://PATH`.
    pub fn at(address: &str, id: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let client = runtime.block_on(Client::connect(address)).unwrap();
        Self {
            runtime,
            client: TaskClient::new(client),
            id: id.into(),
        }
    }

    pub fn call<T>(&self, call: impl AsyncFnOnce(&TaskClient, Context) -> ttrpc::Result<T>) -> Answer<T> {
        self.attempt(call).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
            other => panic!("the shim does not answer: {other}"),
        })
    }

    /// A call that the shim need not answer.
    pub fn attempt<T>(
        &self,
        call: impl AsyncFnOnce(&TaskClient, Context) -> ttrpc::Result<T>,
    ) -> ttrpc::Result<T> {
        let limit = i64::try_from(config().seconds(20).as_nanos()).unwrap();
        self.runtime.block_on(call(
            &self.client,
            with_duration(std::time::Duration::from_nanos(limit.unsigned_abs())),
        ))
    }

    /// Saves the pod in a directory.
    pub fn checkpoint(&self, directory: &Path) -> Answer<api::Empty> {
        let request = api::CheckpointTaskRequest {
            id: self.id.clone(),
            path: directory.display().to_string(),
            ..api::CheckpointTaskRequest::default()
        };
        self.call(async |client, context| client.checkpoint(context, &request).await)
    }

    pub fn update(&self, id: &str, resources: Value) -> Answer<()> {
        let request = api::UpdateTaskRequest {
            id: id.into(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
                value: resources.to_string().into_bytes(),
                ..Any::default()
            }),
            ..api::UpdateTaskRequest::default()
        };
        self.call(async |client, context| client.update(context, &request).await.map(drop))
    }
}

/// Starts a container that sees its own cgroup, and returns its id.
fn start(test: &Fixture, suffix: &str) -> String {
    let run = test.spec(suffix, &["/bin/sleep", "1000"], |spec| {
        let cgroup = ["ro", "nosuid", "noexec", "nodev"];
        let mut spec = spec.mount("cgroup", "cgroup", "/sys/fs/cgroup", &cgroup);
        let namespaces = spec.0["linux"]["namespaces"].as_array_mut().unwrap();
        if !namespaces.iter().any(|namespace| namespace["type"] == "cgroup") {
            namespaces.push(json!({ "type": "cgroup" }));
        }
        spec
    });
    run.detach()
}

#[test]
fn an_update_changes_the_limits_of_a_running_container() {
    let test = fixture("update");
    let id = start(&test, "a");
    let limits = || {
        let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight";
        test.ctr(&["tasks", "exec", "--exec-id", "look", &id, "sh", "-c", script])
            .text()
    };
    let before = limits();
    assert!(before.starts_with("max\n"), "{before}");
    let shim = Shim::of(&test, &id);
    let resources = json!({
        "memory": { "limit": 50 << 20 },
        "pids": { "limit": 33 },
        "cpu": { "quota": 20_000, "period": 100_000, "shares": 2 },
    });
    shim.update(&id, resources).unwrap();
    assert_eq!(limits(), "52428800\n33\n20000 100000\n1\n");
    // What an update does not name stays.
    shim.update(&id, json!({ "pids": { "limit": 44 } })).unwrap();
    assert_eq!(limits(), "52428800\n44\n20000 100000\n1\n");

    let (code, message) = shim.update(&id, json!({ "cpu": { "quota": 10 } })).unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    assert!(message.contains("10"), "{message}");
    let (code, message) = shim.update(&id, json!({ "memory": "much" })).unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");
    let (code, message) = shim.update("nobody", json!({})).unwrap_err();
    assert_eq!(code, Code::NOT_FOUND, "{message}");
    assert_eq!(limits(), "52428800\n44\n20000 100000\n1\n");
    drop(shim);
    test.kill_and_remove(&id);
}

#[test]
fn every_call_answers_and_says_what_it_does_not_know() {
    let test = fixture("calls");
    let id = test.run("a", PROBE_IMAGE, &["sleep", "1000"]).detach();
    let (pid, _) = test.task(&id).unwrap();
    let pid = pid.unsigned_abs();
    let shim = Shim::of(&test, &id);

    let connect = api::ConnectRequest {
        id: shim.id.clone(),
        ..api::ConnectRequest::default()
    };
    let connected = shim
        .call(async |client, context| client.connect(context, &connect).await)
        .unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (pid, pid));

    let state_of = |id: &str, exec: &str| {
        let request = api::StateRequest {
            id: id.into(),
            exec_id: exec.into(),
            ..api::StateRequest::default()
        };
        shim.call(async |client, context| client.state(context, &request).await)
    };
    let state = state_of(&id, "").unwrap();
    assert_eq!((state.pid, state.id.as_str()), (pid, id.as_str()));
    assert_eq!(state.status.enum_value(), Ok(api::Status::RUNNING));
    assert_eq!(state.bundle, test.containerd.bundle(&id).to_str().unwrap());
    for (id, exec) in [("nobody", ""), (id.as_str(), "nothing")] {
        let (code, message) = state_of(id, exec).unwrap_err();
        assert_eq!(code, Code::NOT_FOUND, "{message}");
    }

    // The pids are the guest's: they are in its pid namespace, where this container is far from 1.
    let pids = api::PidsRequest {
        id: id.clone(),
        ..api::PidsRequest::default()
    };
    let pids = shim
        .call(async |client, context| client.pids(context, &pids).await)
        .unwrap();
    assert_eq!(pids.processes.len(), 1);
    assert!(pids.processes[0].pid > 1 && pids.processes[0].pid != pid);

    let resize = api::ResizePtyRequest {
        id: id.clone(),
        width: 80,
        height: 25,
        ..api::ResizePtyRequest::default()
    };
    // No terminal, nothing to resize: as runc has it.
    shim.call(async |client, context| client.resize_pty(context, &resize).await)
        .unwrap();

    let (code, message) = shim.checkpoint(Path::new("relative")).unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT, "{message}");

    let stats = api::StatsRequest {
        id: id.clone(),
        ..api::StatsRequest::default()
    };
    let stats = shim
        .call(async |client, context| client.stats(context, &stats).await)
        .unwrap();
    assert!(
        stats.stats.type_url.contains("cgroups.v2"),
        "{}",
        stats.stats.type_url
    );

    // A server with containers does not shut down, unless it must.
    let shutdown = api::ShutdownRequest {
        id: id.clone(),
        ..api::ShutdownRequest::default()
    };
    shim.call(async |client, context| client.shutdown(context, &shutdown).await)
        .unwrap();
    assert!(state_of(&id, "").is_ok());
    drop(shim);
    test.kill_and_remove(&id);
}
