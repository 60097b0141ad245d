//! A virtual machine without a sandbox: the VMM program, driven by its control messages.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent;
use bulkhead_protocol::control::{
    Channel, Event, Fd, Inspection, Reply, Request, RequestMessage, Start, VERSION, VMM_SOCKET_FD, VmConfig,
    VmmMessage,
};
use bulkhead_protocol::ports;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use crate::config::{config, find};

/// Time for the VMM to answer, in seconds on hardware.
const ANSWER: u32 = 10;

/// A running VM, killed when dropped.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    channel: Channel,
    agent: UnixStream,
    next_id: u64,
    next_question: u32,
}

/// A VM written down.
#[derive(Debug)]
pub struct Snapshot {
    /// All but memory.
    pub state: File,
    /// Memory.
    pub memory: File,
}

impl Vm {
    /// Boots a VM with the kernel and root image of this host, and `parameters` for the kernel.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    #[must_use]
    pub fn boot(vcpus: u8, memory_mib: u32, parameters: &str) -> Self {
        let kernel = setting("kernel", "/usr/local/share/bulkhead/vmlinux");
        let kernel = File::open(&kernel).unwrap_or_else(|error| panic!("{kernel}: {error}"));
        let start = Start::Kernel {
            kernel: Fd(3),
            command_line: parameters.into(),
        };
        let mut vm = Self::launch();
        let booted = vm.begin(
            start,
            vec![kernel.into()],
            vcpus,
            memory_mib,
            ports::FIRST_GUEST_CID,
        );
        assert!(matches!(booted, Ok(Reply::Booted(_))), "{booted:?}");
        vm
    }

    /// Makes a VM from a snapshot of one with as many vCPUs and as much memory, with another context id.
    ///
    /// # Errors
    /// The VMM's refusal.
    ///
    /// # Panics
    /// If the VMM does not answer.
    #[track_caller]
    pub fn restore(vcpus: u8, memory_mib: u32, cid: u32, snapshot: &Snapshot) -> Result<Self, String> {
        let clone = |file: &File| OwnedFd::from(file.try_clone().expect("a descriptor"));
        let start = Start::Snapshot {
            state: Fd(3),
            memory: Fd(4),
            written: None,
        };
        let files = vec![clone(&snapshot.state), clone(&snapshot.memory)];
        let mut vm = Self::launch();
        vm.begin(start, files, vcpus, memory_mib, cid)?;
        Ok(vm)
    }

    /// Writes the VM down, which is paused.
    ///
    /// # Panics
    /// If it cannot be.
    #[track_caller]
    pub fn snapshot(&mut self) -> Snapshot {
        let snapshot = Snapshot {
            state: scratch_file(),
            memory: scratch_file(),
        };
        let clone = |file: &File| OwnedFd::from(file.try_clone().expect("a descriptor"));
        let files = vec![
            clone(&snapshot.state),
            clone(&snapshot.memory),
            self.pagemap().into(),
        ];
        let request = Request::Snapshot {
            state: Fd(0),
            memory: Fd(1),
            pagemap: Fd(2),
        };
        let answer = self.request(request, files);
        assert!(matches!(answer, Ok(Reply::Done)), "{answer:?}");
        snapshot
    }

    /// What memory of the VMM has been touched.
    ///
    /// # Panics
    /// If the VMM has gone.
    #[track_caller]
    #[must_use]
    pub fn pagemap(&self) -> File {
        File::open(format!("/proc/{}/pagemap", self.child.id())).expect("the VMM runs")
    }

    /// Starts a VMM that has nothing to do yet.
    fn launch() -> Self {
        let (channel, theirs) = Channel::pair().expect("a socket pair");
        let mut command = Command::new(program());
        let fd = theirs.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe and needs no memory.
        unsafe {
            command.pre_exec(move || match libc::dup2(fd, VMM_SOCKET_FD) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        let child = command.spawn().expect("the VMM");
        let (agent, _) = UnixStream::pair().expect("a socket pair");
        Vm {
            child,
            channel,
            agent,
            next_id: 0,
            next_question: 1,
        }
    }

    /// `files` get the numbers from 3 on.
    fn begin(
        &mut self,
        start: Start,
        files: Vec<OwnedFd>,
        vcpus: u8,
        memory_mib: u32,
        guest_cid: u32,
    ) -> Result<Reply, String> {
        let (agent, far_end) = UnixStream::pair().expect("a socket pair");
        self.agent = agent;
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let root = setting("image", "/usr/local/share/bulkhead/root.erofs");
        let root = File::open(&root).unwrap_or_else(|error| panic!("{root}: {error}"));
        let mut descriptors: Vec<OwnedFd> = vec![kvm.expect("/dev/kvm").into(), root.into(), far_end.into()];
        descriptors.extend(files);
        let config = VmConfig {
            version: VERSION,
            vcpus,
            max_vcpus: vcpus,
            memory_mib,
            kvm: Fd(0),
            start,
            guest_cid,
            root: Fd(1),
            console: true,
            disk_slots: 0,
            net_slots: 0,
            hotplug_mib: 0,
            disks: Vec::new(),
            nets: Vec::new(),
            share: None,
            vsock_listeners: vec![(ports::AGENT, Fd(2))],
            balloon: true,
            seccomp: true,
        };
        self.request(Request::Boot(Box::new(config)), descriptors)
    }

    /// Sends a request and waits for its answer.
    ///
    /// # Errors
    /// The VMM's refusal.
    ///
    /// # Panics
    /// If it does not answer.
    #[track_caller]
    pub fn request(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Reply, String> {
        self.next_id += 1;
        let id = self.next_id;
        let label = format!("{request:?}");
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.channel
            .send(&RequestMessage { id, request }, &borrowed)
            .expect("the VMM takes a request");
        let deadline = Instant::now() + config().seconds(ANSWER);
        loop {
            assert!(readable(&self.channel, deadline), "no answer to {label}");
            let message = self
                .channel
                .receive::<VmmMessage>()
                .map(|received| received.message);
            match message.unwrap_or_else(|error| panic!("{label}: {error}")) {
                VmmMessage::Reply { id: answered, result } if answered == id => return result,
                VmmMessage::Event(Event::Exited(exit)) => panic!("{label}: the VM has ended: {exit:?}"),
                _ => {}
            }
        }
    }

    /// A request that must succeed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn tell(&mut self, request: Request) {
        let answer = self.request(request, Vec::new());
        assert!(matches!(answer, Ok(Reply::Done)), "{answer:?}");
    }

    /// State of the VM.
    ///
    /// # Panics
    /// If the VMM does not tell.
    #[track_caller]
    pub fn inspect(&mut self) -> Inspection {
        match self.request(Request::Inspect, Vec::new()) {
            Ok(Reply::Inspected(inspection)) => inspection,
            other => panic!("{other:?}"),
        }
    }

    /// Asks the agent for its version; [`answers`](Self::answers) waits for what it says.
    ///
    /// # Panics
    /// If the VMM has closed the agent's stream.
    #[track_caller]
    pub fn ask_agent(&mut self) {
        self.ask("Hello", &[1 << 3, agent::VERSION as u8]);
    }

    /// Gives the agent of a restored VM the bytes of entropy that it waits for.
    ///
    /// # Panics
    /// If the VMM has closed the agent's stream.
    #[track_caller]
    pub fn resume_agent(&mut self, entropy: [u8; 32]) {
        let mut request = vec![1 << 3, agent::VERSION as u8, 2 << 3 | 2, 32];
        request.extend(entropy);
        self.ask("Resume", &request);
    }

    fn ask(&mut self, method: &str, payload: &[u8]) {
        let mut request = Vec::new();
        // ttrpc's `Request`: service 1, method 2, payload 3.
        for (field, value) in [
            (1, b"bulkhead.agent.v1.Agent".as_slice()),
            (2, method.as_bytes()),
            (3, payload),
        ] {
            request.extend([field << 3 | 2, u8::try_from(value.len()).expect("short")]);
            request.extend(value);
        }
        // ttrpc's frame: length, stream, type "request", no flags.
        let mut frame = u32::try_from(request.len())
            .expect("short")
            .to_be_bytes()
            .to_vec();
        frame.extend(self.next_question.to_be_bytes());
        frame.extend([1, 0]);
        frame.extend(request);
        self.next_question += 2;
        self.agent.write_all(&frame).expect("the agent's stream");
    }

    /// Whether the agent answers the next question within `limit`.
    ///
    /// # Panics
    /// If it says something else than an answer.
    #[track_caller]
    #[must_use]
    pub fn answers(&mut self, limit: Duration) -> bool {
        if !readable(&self.agent, Instant::now() + limit) {
            return false;
        }
        let mut header = [0; 10];
        self.agent.read_exact(&mut header).expect("a frame of the agent");
        assert_eq!(header[8], 2, "not a response: {header:?}");
        let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        let mut body = vec![0; usize::try_from(length).expect("64-bit")];
        self.agent.read_exact(&mut body).expect("a frame of the agent");
        // ttrpc's `Response`: status 1, which is empty if all is well, payload 2.
        assert!(
            !matches!(body[..], [0x0a, 1..=255, ..]),
            "the agent refuses: {}",
            String::from_utf8_lossy(&body)
        );
        true
    }

    /// Time that the vCPUs have run.
    ///
    /// # Panics
    /// If the VMM has gone.
    #[track_caller]
    #[must_use]
    pub fn vcpu_time(&self) -> Duration {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("the VMM runs");
        let mut vcpus = 0;
        let time = tasks
            .flatten()
            .filter(|task| {
                fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("vcpu"))
            })
            .map(|task| {
                vcpus += 1;
                let text =
                    fs::read_to_string(task.path().join("schedstat")).expect("the scheduler's figures");
                let nanoseconds = text.split(' ').next().and_then(|word| word.parse().ok());
                Duration::from_nanos(nanoseconds.expect("a number"))
            })
            .sum();
        assert!(vcpus > 0, "the VMM has no vCPU");
        time
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has gone already if these fail.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A path the configuration of this host gives.
fn configured(key: &str) -> Option<String> {
    let settings = fs::read("/etc/bulkhead/config.json").unwrap_or_else(|_| b"{}".to_vec());
    let settings: Value = serde_json::from_slice(&settings).expect("a configuration");
    settings[key].as_str().map(str::to_owned)
}

fn setting(key: &str, default: &str) -> String {
    configured(key).unwrap_or_else(|| default.to_owned())
}

/// An empty file without a name, in memory as templates are.
fn scratch_file() -> File {
    let fd = nix::sys::memfd::memfd_create(c"snapshot", nix::sys::memfd::MemFdCreateFlag::MFD_CLOEXEC);
    fd.expect("a file in memory").into()
}

/// The VMM as the shim finds it.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(path) = configured("vmm") {
        return path.into();
    }
    find("bulkhead-vmm", None)
        .unwrap_or_else(|_| Path::new("/usr/local/libexec/bulkhead/bulkhead-vmm").into())
}

fn readable(fd: &impl AsFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(count) => return count > 0,
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
    }
}
