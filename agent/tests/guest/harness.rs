//! A guest without a VM: the agent as PID 1 of fresh namespaces, served over Unix sockets.
//!
//! Everything but the hypervisor is real: the same set-up code mounts the same filesystems, containers get real
//! namespaces and cgroups, and streams are real sockets.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent as proto;
use bulkhead_protocol::agent::AgentClient;
use bulkhead_protocol::ports;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::with_duration;

mod start;

use start::Started;
pub use start::start;

/// Longest time anything here may take, in emulation too.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A guest under test.
pub struct Guest {
    directory: PathBuf,
    agent: Pid,
    listener: UnixListener,
    client: RefCell<AgentClient>,
    next_port: std::cell::Cell<u32>,
}

/// The host's end of a process's streams.
pub struct Wanted {
    pub message: proto::Streams,
    listeners: [Option<UnixListener>; 3],
}

impl Wanted {
    /// Accepts the connections the agent makes while the process is created.
    pub async fn accept(self) -> [Option<UnixStream>; 3] {
        let mut streams = [None, None, None];
        for (stream, listener) in streams.iter_mut().zip(self.listeners) {
            if let Some(listener) = listener {
                *stream = Some(within(listener.accept()).await.unwrap().0);
            }
        }
        streams
    }
}

/// What a process wrote, and how it ended.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

pub async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, work).await.expect("in time")
}

pub fn context() -> ttrpc::context::Context {
    with_duration(LIMIT)
}

/// The message of an RPC error.
pub fn message<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

async fn accept(listener: &UnixListener) -> AgentClient {
    let (stream, _) = within(listener.accept()).await.unwrap();
    AgentClient::new(ttrpc::asynchronous::Client::new(Socket::new(stream)))
}

impl Guest {
    /// Accepts the agent's connection and sets the sandbox up.
    pub async fn connect(started: Started) -> Self {
        started.listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(started.listener).unwrap();
        let client = accept(&listener).await;
        let early = client
            .setup_sandbox(context(), &proto::SetupSandboxRequest::new())
            .await;
        assert_eq!(message(early).1, "the connection has had no Hello");
        let hello = proto::HelloRequest {
            version: proto::VERSION,
            ..Default::default()
        };
        client.hello(context(), &hello).await.unwrap();
        let guest = Self {
            directory: started.directory,
            agent: started.agent,
            listener,
            client: RefCell::new(client),
            next_port: ports::FIRST_STREAM.into(),
        };
        let request = proto::SetupSandboxRequest {
            sandbox_id: "pod".into(),
            hostname: "pod-host".into(),
            files: [("resolv.conf".to_owned(), b"nameserver 192.0.2.1\n".to_vec())].into(),
            ..Default::default()
        };
        guest.client().setup_sandbox(context(), &request).await.unwrap();
        guest
    }

    pub fn client(&self) -> AgentClient {
        self.client.borrow().clone()
    }

    /// Ends the agent's connection and accepts the next one.
    pub async fn reconnect(&self) {
        // Every copy of a client keeps its connection.
        let dead = ttrpc::asynchronous::Client::new(Socket::new(UnixStream::pair().unwrap().0));
        drop(self.client.replace(AgentClient::new(dead)));
        let client = accept(&self.listener).await;
        self.client.replace(client);
    }

    /// Refuses connections while `work` is done, after the one there is has ended.
    pub async fn without_host(&mut self, work: impl Future<Output = ()>) {
        let path = self.directory.join(ports::AGENT.to_string());
        fs::remove_file(&path).unwrap();
        let dead = ttrpc::asynchronous::Client::new(Socket::new(UnixStream::pair().unwrap().0));
        drop(self.client.replace(AgentClient::new(dead)));
        work.await;
        self.listener = UnixListener::bind(path).unwrap();
        let client = accept(&self.listener).await;
        self.client.replace(client);
    }

    /// Listens for the wanted streams.
    pub fn streams(&self, stdin: bool, output: bool, terminal: bool) -> Wanted {
        let listen = |wanted: bool| {
            let port = self.next_port.get();
            self.next_port.set(port + 1);
            let path = self.directory.join(port.to_string());
            if wanted {
                (port, Some(UnixListener::bind(path).unwrap()))
            } else {
                (0, None)
            }
        };
        let (stdin, stdout, stderr) = (listen(stdin), listen(output), listen(output && !terminal));
        let message = proto::Streams {
            terminal,
            stdin_port: stdin.0,
            stdout_port: stdout.0,
            stderr_port: stderr.0,
            width: if terminal { 100 } else { 0 },
            height: if terminal { 30 } else { 0 },
            ..Default::default()
        };
        Wanted {
            message,
            listeners: [stdin.1, stdout.1, stderr.1],
        }
    }

    pub async fn create(&self, id: &str, spec: &Value, streams: &proto::Streams) -> ttrpc::Result<u32> {
        self.create_sharing(id, spec, streams, None).await
    }

    /// Creates a container in a pid namespace that is not its own.
    pub async fn create_sharing(
        &self,
        id: &str,
        spec: &Value,
        streams: &proto::Streams,
        pid_namespace: Option<proto::pid_namespace::Kind>,
    ) -> ttrpc::Result<u32> {
        let mut root = proto::RootFilesystem::new();
        root.set_shared_path("/run/bulkhead/shared/rootfs".into());
        let request = proto::CreateContainerRequest {
            container_id: id.into(),
            spec_json: serde_json::to_vec(spec).unwrap(),
            root: Some(root).into(),
            streams: Some(streams.clone()).into(),
            pid_namespace: pid_namespace
                .map(|kind| proto::PidNamespace {
                    kind: Some(kind),
                    ..Default::default()
                })
                .into(),
            ..Default::default()
        };
        Ok(self.client().create_container(context(), &request).await?.pid)
    }

    pub async fn start(&self, id: &str) -> ttrpc::Result<()> {
        let request = proto::StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client().start_container(context(), &request).await.map(drop)
    }

    pub async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
        streams: &proto::Streams,
    ) -> ttrpc::Result<u32> {
        let request = proto::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: serde_json::to_vec(process).unwrap(),
            streams: Some(streams.clone()).into(),
            ..Default::default()
        };
        Ok(self.client().exec_process(context(), &request).await?.pid)
    }

    pub async fn wait(&self, id: &str, exec: &str) -> u32 {
        let request = proto::WaitProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client()
            .wait_process(context(), &request)
            .await
            .unwrap()
            .exit_status
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let request = proto::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client().signal_process(context(), &request).await.map(drop)
    }

    /// Processes of a container. Their ids are the agent's.
    pub async fn processes(&self, id: &str) -> Vec<proto::ContainerProcess> {
        let request = proto::ListProcessesRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client()
            .list_processes(context(), &request)
            .await
            .unwrap()
            .processes
    }

    pub async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = proto::RemoveContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client()
            .remove_container(context(), &request)
            .await
            .map(drop)
    }

    /// Runs a container to its end with some input and removes it.
    pub async fn run(&self, id: &str, spec: &Value, input: Option<&[u8]>) -> ttrpc::Result<Outcome> {
        let wanted = self.streams(input.is_some(), true, false);
        self.create(id, spec, &wanted.message).await?;
        let [stdin, stdout, stderr] = wanted.accept().await;
        self.start(id).await?;
        let outcome = finish(stdin, stdout, stderr, input).await;
        let status = self.wait(id, "").await;
        self.remove(id).await?;
        Ok(Outcome { status, ..outcome })
    }

    /// What a started container writes until its end.
    pub async fn outcome(&self, id: &str, wanted: Wanted) -> Outcome {
        let [stdin, stdout, stderr] = wanted.accept().await;
        let outcome = finish(stdin, stdout, stderr, None).await;
        Outcome {
            status: self.wait(id, "").await,
            ..outcome
        }
    }

    /// Runs a further process to its end.
    pub async fn run_exec(&self, id: &str, exec: &str, process: &Value) -> ttrpc::Result<Outcome> {
        let wanted = self.streams(false, true, false);
        self.exec(id, exec, process, &wanted.message).await?;
        let [stdin, stdout, stderr] = wanted.accept().await;
        let outcome = finish(stdin, stdout, stderr, None).await;
        Ok(Outcome {
            status: self.wait(id, exec).await,
            ..outcome
        })
    }

    /// A container that sleeps.
    pub async fn sleeper(&self, id: &str) {
        let spec = crate::specs::spec(&["sleep", "1000"]);
        self.create(id, &spec, &proto::Streams::new()).await.unwrap();
        self.start(id).await.unwrap();
    }

    /// The next event.
    pub async fn events(&self, count: usize) -> Vec<proto::Event> {
        let mut stream = self
            .client()
            .events(context(), &proto::EventsRequest::new())
            .await
            .unwrap();
        let mut events = Vec::new();
        while events.len() < count {
            events.push(within(stream.recv()).await.unwrap().expect("an event"));
        }
        events
    }

    /// What of containers is left in the guest, for comparison: descriptors, processes, mounts, cgroups, files.
    pub fn traces(&self) -> BTreeSet<String> {
        let agent = self.agent_pid();
        let mut traces = BTreeSet::new();
        let root = PathBuf::from(format!("/proc/{agent}/root"));
        for entry in fs::read_dir(format!("/proc/{agent}/fd")).unwrap().flatten() {
            let target = fs::read_link(entry.path()).unwrap_or_default();
            // Sockets and pipes by number only: their inodes differ from run to run.
            traces.insert(format!(
                "fd {:?} {}",
                entry.file_name(),
                target.display().to_string().starts_with('/')
            ));
        }
        let children = fs::read_to_string(format!("/proc/{agent}/task/{agent}/children")).unwrap();
        traces.extend(children.split_whitespace().map(|pid| format!("process {pid}")));
        let mounts = fs::read_to_string(format!("/proc/{agent}/mountinfo")).unwrap();
        traces.extend(
            mounts
                .lines()
                .map(|line| format!("mount {}", line.split(' ').nth(4).unwrap())),
        );
        for directory in [
            "sys/fs/cgroup/bulkhead",
            "run/bulkhead",
            "run/bulkhead/containers",
        ] {
            for entry in fs::read_dir(root.join(directory)).into_iter().flatten().flatten() {
                if entry.file_type().unwrap().is_dir() || !directory.starts_with("sys") {
                    traces.insert(format!("file {}", entry.path().display()));
                }
            }
        }
        traces
    }

    /// A file of the guest.
    pub fn guest_file(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.agent_pid()))
    }

    /// A directory of the machine that goes with the guest.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The agent as the machine numbers it.
    pub fn agent_pid(&self) -> i32 {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.agent)).unwrap();
        children.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // The hierarchy is the machine's; the guest's mount of it is the only sure way to it.
        let hierarchy = File::open(self.guest_file("/sys/fs/cgroup"));
        // PID 1 of the namespace takes everything in it along.
        let _ = kill(Pid::from_raw(self.agent_pid()), Signal::SIGKILL);
        let _ = waitpid(self.agent, None);
        if let Ok(hierarchy) = hierarchy {
            for group in ["bulkhead", "agent"] {
                remove_cgroups(&PathBuf::from(format!(
                    "/proc/self/fd/{}/{group}",
                    hierarchy.as_raw_fd()
                )));
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn remove_cgroups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(group);
}

async fn finish(
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
    input: Option<&[u8]>,
) -> Outcome {
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            stdin.write_all(input).await.unwrap();
        }
    };
    let read = async |stream: Option<UnixStream>| {
        let mut data = Vec::new();
        if let Some(mut stream) = stream {
            stream.read_to_end(&mut data).await.unwrap();
        }
        String::from_utf8_lossy(&data).into_owned()
    };
    let ((), stdout, stderr) = within(async { tokio::join!(write, read(stdout), read(stderr)) }).await;
    Outcome {
        status: 0,
        stdout,
        stderr,
    }
}
