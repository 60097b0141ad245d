//! The shim's Sandbox API, called as containerd 2 does with `sandboxer = "shim"`, without containerd in between:
//! every call, also those that CRI has no use for, with any version of containerd installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use bulkhead_tests::fixture::wait_until;
use bulkhead_tests::spec::Spec;
use bulkhead_tests::{Fixture, Session, config, host};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::context::with_timeout;
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::{Client, TaskClient, api as task};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::fixture;

fn context() -> ttrpc::context::Context {
    let limit = config().seconds(60);
    with_timeout(i64::try_from(limit.as_nanos()).unwrap())
}

/// The code and text of a refusal.
fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

/// A length-delimited field of a protobuf message.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
    bytes.extend(content);
    bytes
}

/// CRI's `PodSandboxConfig` of a pod with host name, DNS and a parameter of the kernel.
fn description(network_of_node: bool) -> Any {
    let dns = [field(1, b"192.0.2.53"), field(2, b"cluster.example")].concat();
    let sysctl = [field(1, b"kernel.shm_rmid_forced"), field(2, b"1")].concat();
    let modes: &[u8] = if network_of_node { &[0x08, 2] } else { &[] };
    let linux = [field(2, &field(1, modes)), field(3, &sysctl)].concat();
    Any {
        type_url: "runtime.v1.PodSandboxConfig".into(),
        value: [field(2, b"web-0"), field(4, &dns), field(8, &linux)].concat(),
        ..Any::default()
    }
}

/// A sandbox and the directories that containerd would have made for it.
struct Sandbox<'a> {
    test: &'a Fixture,
    id: String,
    bundle: PathBuf,
    address: String,
    client: SandboxClient,
    tasks: TaskClient,
}

impl<'a> Sandbox<'a> {
    fn new(test: &'a Fixture) -> Self {
        let id = test.id("pod");
        let parent = test.work.join("io.containerd.sandbox.controller.v1.shim");
        let bundle = parent.join(&id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let address = start(test, &id, &bundle);
        let connection = Client::connect(&address).unwrap();
        Self {
            test,
            client: SandboxClient::new(connection.clone()),
            tasks: TaskClient::new(connection),
            id,
            bundle,
            address,
        }
    }

    fn create(&self, options: Any) -> ttrpc::Result<api::CreateSandboxResponse> {
        let request = api::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.display().to_string(),
            options: Some(options).into(),
            ..Default::default()
        };
        self.client.create_sandbox(context(), &request)
    }

    fn start(&self) -> ttrpc::Result<api::StartSandboxResponse> {
        let request = api::StartSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.client.start_sandbox(context(), &request)
    }

    fn status(&self) -> api::SandboxStatusResponse {
        let request = api::SandboxStatusRequest {
            sandbox_id: self.id.clone(),
            verbose: true,
            ..Default::default()
        };
        self.client.sandbox_status(context(), &request).unwrap()
    }

    fn ping(&self) -> ttrpc::Result<api::PingResponse> {
        let request = api::PingRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.client.ping_sandbox(context(), &request)
    }

    /// Waits on a thread of its own.
    fn wait(&self) -> thread::JoinHandle<api::WaitSandboxResponse> {
        let request = api::WaitSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let client = self.client.clone();
        thread::spawn(move || client.wait_sandbox(context(), &request).unwrap())
    }

    fn stop(&self) {
        let request = api::StopSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.client.stop_sandbox(context(), &request).unwrap();
    }

    /// Shuts down as containerd does: the call, then `delete` when the connection has ended.
    fn shut_down(self) {
        let request = api::ShutdownSandboxRequest {
            sandbox_id: self.id.clone(),
            ..Default::default()
        };
        self.client.shutdown_sandbox(context(), &request).unwrap();
        delete(self.test, &self.id, &self.bundle);
        assert!(!Path::new(self.address.strip_prefix("unix://").unwrap()).exists());
    }

    /// Runs a container of the pod to its end; what it wrote.
    fn run(&self, name: &str, script: &str) -> String {
        let id = self.test.id(name);
        let bundle = self.test.work.join("tasks").join(&id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let default: Value =
            serde_json::from_str(&self.test.ctr(&["oci", "spec"]).text()).expect("a specification");
        let spec = Spec::new(default, &self.test.rootfs(), &id, &["/bin/sh", "-c", script]).set(
            "/annotations",
            json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": self.id,
            }),
        );
        fs::write(bundle.join("config.json"), spec.0.to_string()).unwrap();
        assert_eq!(start(self.test, &id, &bundle), self.address);
        assert_eq!(
            fs::read_to_string(bundle.join("address")).unwrap(),
            self.address,
            "containerd before 2.0 reads it"
        );

        let output = self.test.work.join(format!("{id}.out"));
        let create = task::CreateTaskRequest {
            id: id.clone(),
            bundle: bundle.display().to_string(),
            stdout: format!("file://{}", output.display()),
            stderr: format!("file://{}", output.display()),
            ..Default::default()
        };
        let pid = self.tasks.create(context(), &create).unwrap().pid;
        assert!(Path::new(&format!("/proc/{pid}/ns/net")).exists());
        let start = task::StartRequest {
            id: id.clone(),
            ..Default::default()
        };
        assert_eq!(self.tasks.start(context(), &start).unwrap().pid, pid);
        let wait = task::WaitRequest {
            id: id.clone(),
            ..Default::default()
        };
        let exit = self.tasks.wait(context(), &wait).unwrap();
        let delete_task = task::DeleteRequest {
            id: id.clone(),
            ..Default::default()
        };
        let deleted = self.tasks.delete(context(), &delete_task).unwrap();
        assert_eq!((deleted.exit_status, deleted.pid), (exit.exit_status, pid));
        // What containerd does after every task of a version 2 shim: the sandbox stays.
        let shutdown = task::ShutdownRequest {
            id: id.clone(),
            ..Default::default()
        };
        self.tasks.shutdown(context(), &shutdown).unwrap();
        delete(self.test, &id, &bundle);
        let text = fs::read_to_string(output).unwrap();
        assert_eq!(exit.exit_status, 0, "{text}");
        text
    }
}

/// The shim's program with the arguments containerd gives it.
fn shim(test: &Fixture, id: &str, bundle: &Path) -> Command {
    let mut command = Command::new("containerd-shim-kata-v2");
    let address = test.containerd.directory.join("containerd.sock");
    command
        .args(["-namespace", "bulkhead-tests", "-address"])
        .arg(address);
    command.args(["-publish-binary", "/usr/bin/containerd", "-id", id]);
    command.env_remove("TTRPC_ADDRESS").current_dir(bundle);
    command.stdin(Stdio::null());
    command
}

/// Runs `start` in a bundle; the address it answers with.
fn start(test: &Fixture, id: &str, bundle: &Path) -> String {
    let mut command = shim(test, id, bundle);
    command.arg("start");
    let mut session = Session::start(command, config().seconds(20));
    session.close_input();
    session.finish().expect_code(0).text()
}

fn delete(test: &Fixture, id: &str, bundle: &Path) {
    let mut command = shim(test, id, bundle);
    command.arg("-bundle").arg(bundle).arg("delete");
    let _ = Session::start(command, config().seconds(20))
        .finish()
        .expect_code(0);
}

#[test]
fn a_sandbox_lives_through_all_its_calls() {
    let test = fixture("sandbox-api");
    let sandbox = Sandbox::new(&test);
    let before = sandbox.status();
    assert_eq!(before.state, "SANDBOX_NOTREADY");
    let (code, _) = refusal(sandbox.start());
    assert_eq!(code, Code::FAILED_PRECONDITION);

    sandbox.create(description(false)).unwrap();
    assert_eq!(
        refusal(sandbox.create(description(false))).0,
        Code::ALREADY_EXISTS
    );
    let started = sandbox.start().unwrap();
    assert!(host::is_alive(i32::try_from(started.pid).unwrap()));
    let status = sandbox.status();
    assert_eq!(
        (status.sandbox_id.as_str(), status.state.as_str(), status.pid),
        (sandbox.id.as_str(), "SANDBOX_READY", started.pid)
    );
    assert_eq!(status.created_at, started.created_at);
    let info: Value = serde_json::from_str(&status.info["info"]).unwrap();
    let vmms = host::vmms_of(i32::try_from(started.pid).unwrap());
    assert_eq!(info["vmm"]["pid"], vmms[0]);
    sandbox.ping().unwrap();
    let platform = api::PlatformRequest {
        sandbox_id: sandbox.id.clone(),
        ..Default::default()
    };
    let platform = sandbox.client.platform(context(), &platform).unwrap().platform;
    assert_eq!(
        (platform.os.as_str(), platform.architecture.as_str()),
        ("linux", "amd64")
    );
    let metrics = api::SandboxMetricsRequest {
        sandbox_id: sandbox.id.clone(),
        ..Default::default()
    };
    let metrics = sandbox
        .client
        .sandbox_metrics(context(), &metrics)
        .unwrap()
        .metrics;
    assert_eq!(metrics.data.type_url, "io.containerd.cgroups.v2.Metrics");
    let counters =
        containerd_shim_protos::cgroups_v2::metrics::Metrics::parse_from_bytes(&metrics.data.value);
    // A VM from a template has little of its own.
    let usage = counters.unwrap().memory.usage;
    assert!(usage > 1 << 20, "the VM's memory: {usage}");

    let waiting = sandbox.wait();
    let look = "hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/kernel/shm_rmid_forced; \
                cat /proc/sys/net/ipv4/ip_unprivileged_port_start; grep -c localhost /etc/hosts; \
                grep ' /dev/shm ' /proc/mounts; echo kept > /dev/shm/file";
    let seen = sandbox.run("first", look);
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(
        lines[..6],
        [
            "web-0",
            "web-0",
            "search cluster.example",
            "nameserver 192.0.2.53",
            "1",
            "0"
        ],
        "{seen}"
    );
    assert!(
        lines[6].parse::<u32>().unwrap() > 0 && lines[7].contains("size=65536k"),
        "{seen}"
    );
    // The last container has gone, the pod has not: another one finds what the first left.
    sandbox.ping().unwrap();
    assert_eq!(sandbox.run("second", "cat /dev/shm/file"), "kept\n");
    assert!(!waiting.is_finished());

    sandbox.stop();
    let exit = waiting.join().unwrap();
    assert_eq!(exit.exit_status, 0);
    let status = sandbox.status();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert_eq!(status.exited_at, exit.exited_at);
    assert_eq!(refusal(sandbox.ping()).0, Code::UNAVAILABLE);
    sandbox.stop();
    sandbox.shut_down();
    // The answer comes first.
    let pid = i32::try_from(started.pid).unwrap();
    assert!(wait_until(config().seconds(2), || !host::is_alive(pid)));
}

#[test]
fn a_sandbox_whose_vmm_is_killed_is_not_ready() {
    let test = fixture("sandbox-api-kill");
    let sandbox = Sandbox::new(&test);
    sandbox.create(description(false)).unwrap();
    let started = sandbox.start().unwrap();
    let waiting = sandbox.wait();
    let vmm = host::vmms_of(i32::try_from(started.pid).unwrap())[0];
    kill(Pid::from_raw(vmm), Signal::SIGKILL).unwrap();
    assert_eq!(waiting.join().unwrap().exit_status, 137);
    assert_eq!(sandbox.status().state, "SANDBOX_NOTREADY");
    assert_eq!(refusal(sandbox.ping()).0, Code::UNAVAILABLE);
    sandbox.shut_down();
}

#[test]
fn a_sandbox_whose_shim_is_killed_leaves_nothing() {
    let test = fixture("sandbox-api-crash");
    let sandbox = Sandbox::new(&test);
    sandbox.create(description(false)).unwrap();
    let started = sandbox.start().unwrap();
    let vmm = host::vmms_of(i32::try_from(started.pid).unwrap())[0];
    kill(
        Pid::from_raw(i32::try_from(started.pid).unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    delete(&test, &sandbox.id, &sandbox.bundle);
    assert!(wait_until(Duration::from_secs(5), || !host::is_alive(vmm)));
}

#[test]
fn a_pod_on_the_hosts_network_is_refused_and_leaves_nothing() {
    let test = fixture("sandbox-api-refused");
    let sandbox = Sandbox::new(&test);
    let (code, text) = refusal(sandbox.create(description(true)));
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(text.contains("The host's network"), "{text}");
    // As containerd does after a failed create.
    sandbox.shut_down();
}
