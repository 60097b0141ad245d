//! A VM under load goes on from one snapshot after the other.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::{
    self, ConfigureNetworkRequest, CreateContainerRequest, DiskRange, Filesystem, Interface,
    ReattachStreamsRequest, ResumeRequest, RootFilesystem, SetupSandboxRequest, StartContainerRequest,
    Streams, root_filesystem,
};
use bulkhead_protocol::control::{Disk, Net, Request, Start, VERSION, VmConfig};
use bulkhead_protocol::ports;
use bulkhead_sandbox::agent::Agent;
use bulkhead_sandbox::config::Configuration;
use bulkhead_sandbox::jail::Jail;
use bulkhead_sandbox::vm::{Descriptors, Vm, open_for_vm};
use bulkhead_tests::fixture::shell;
use bulkhead_tests::vm::program;
use bulkhead_tests::{Fixture, config};
use tokio::sync::mpsc;

use crate::{fixture, probe};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const STDOUT: u32 = ports::FIRST_STREAM;
const CONTAINER: &str = "load";

/// What the VM has of the host in every life.
struct Host<'a> {
    test: &'a Fixture,
    /// Queues of the tap, one for each vCPU.
    taps: [File; 2],
}

/// The VM in one of its lives.
struct Life {
    vm: Vm,
    agent: Agent,
    output: BufReader<UnixStream>,
}

/// Files of a snapshot.
struct Files {
    state: File,
    memory: File,
}

impl Host<'_> {
    fn new(test: &Fixture) -> Host<'_> {
        let root = test.work.join("root");
        for directory in ["proc", "sys", "dev", "data"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy(probe(), root.join("probe")).unwrap();
        let disk = test.work.join("disk");
        File::create(&disk).unwrap().set_len(128 << 20).unwrap();
        shell(&format!(
            "mkfs.ext4 -q -F -m 0 -d {} {}",
            root.display(),
            disk.display()
        ));
        let host = Host { test, taps: taps() };
        shell("ip address add 10.77.0.1/24 dev snap0 && ip link set snap0 up");
        let server = UdpSocket::bind("10.77.0.1:7").unwrap();
        std::thread::spawn(move || {
            let mut datagram = [0; 2048];
            while let Ok((length, from)) = server.recv_from(&mut datagram) {
                let _ = server.send_to(&datagram[..length], from);
            }
        });
        host
    }

    fn disk(&self) -> std::path::PathBuf {
        self.test.work.join("disk")
    }

    /// Starts a VM at its kernel, or where it was. The host's kernel serves its network, if it can, or the VMM does.
    async fn begin(&self, files: Option<&Files>, kernel_serves: bool) -> Life {
        let configuration = Configuration::load(None).unwrap();
        let (events, _) = mpsc::unbounded_channel();
        let jail = Jail {
            root: None,
            user_namespace: true,
        };
        let vm = Vm::start(&program(), jail, None, 0, events).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (output, stdout) = UnixStream::pair().unwrap();
        let mut fds = Descriptors::default();
        let open = |what, path: &Path, write| open_for_vm(what, path, write).unwrap();
        let kvm = fds.add(open("KVM", Path::new("/dev/kvm"), true));
        let root = fds.add(open("root image", &configuration.image, false));
        let disk = fds.add(open("disk", &self.disk(), true));
        // The life before may have ended with the second queue attached, which the VMM is given detached.
        let _ = set_queue(&self.taps[1], libc::IFF_DETACH_QUEUE);
        let taps = self.taps.iter().map(|tap| tap.try_clone().unwrap().into());
        let taps = taps.map(|tap| fds.add(tap)).collect();
        let vhosts = match kernel_serves {
            true => bulkhead_sandbox::network::open_vhosts(self.taps.len()),
            false => Vec::new(),
        };
        let vhosts = vhosts.into_iter().map(|vhost| fds.add(vhost)).collect();
        let listeners = vec![
            (ports::AGENT, fds.add(theirs.into())),
            (STDOUT, fds.add(stdout.into())),
        ];
        let start = match files {
            None => Start::Kernel {
                kernel: fds.add(open("kernel", &configuration.kernel, false)),
                command_line: String::new(),
            },
            Some(files) => Start::Snapshot {
                state: fds.add(files.state.try_clone().unwrap().into()),
                memory: fds.add(files.memory.try_clone().unwrap().into()),
                written: None,
            },
        };
        let vm_config = VmConfig {
            version: VERSION,
            vcpus: 2,
            max_vcpus: 2,
            memory_mib: 128,
            hotplug_mib: 0,
            kvm,
            start,
            root,
            console: true,
            disk_slots: 1,
            disks: vec![(
                0,
                Disk {
                    files: vec![disk],
                    read_only: false,
                },
            )],
            net_slots: 1,
            nets: vec![Net {
                taps,
                vhosts,
                mac: MAC,
                mtu: 1500,
            }],
            share: None,
            guest_cid: 3,
            vsock_listeners: listeners,
            balloon: true,
            seccomp: true,
        };
        let limit = config().seconds(60);
        let agent = Agent::new(OwnedFd::from(ours), vm.clone(), limit).unwrap();
        vm.boot(vm_config, fds.into_vec(), limit).await.unwrap();
        output.set_read_timeout(Some(config().seconds(30))).unwrap();
        Life {
            vm,
            agent,
            output: BufReader::new(output),
        }
    }
}

impl Life {
    /// Makes the container that works.
    async fn set_up(&self) {
        let limit = config().seconds(60);
        self.agent.hello(limit).await.unwrap();
        let setup = SetupSandboxRequest {
            sandbox_id: "snapshot".into(),
            ..Default::default()
        };
        self.agent.setup_sandbox(&setup, limit).await.unwrap();
        let interface = Interface {
            hardware_address: MAC.to_vec(),
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec!["10.77.0.2/24".into()],
            ..Default::default()
        };
        let network = ConfigureNetworkRequest {
            interfaces: vec![interface],
            ..Default::default()
        };
        self.agent.configure_network(&network).await.unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.1.0",
            "process": {
                "cwd": "/",
                "args": ["/probe", "load", "/data", "10.77.0.1:7"],
                "env": [],
                "user": {"uid": 0, "gid": 0},
            },
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        let disk = Filesystem {
            range: Some(DiskRange::default()).into(),
            type_: "ext4".into(),
            ..Default::default()
        };
        let root = RootFilesystem {
            kind: Some(root_filesystem::Kind::Disk(disk)),
            ..Default::default()
        };
        let streams = Streams {
            stdout_port: STDOUT,
            ..Default::default()
        };
        let create = CreateContainerRequest {
            container_id: CONTAINER.into(),
            spec_json: spec.to_string().into_bytes(),
            root: Some(root).into(),
            streams: Some(streams).into(),
            ..Default::default()
        };
        self.agent.create_container(&create).await.unwrap();
        let start = StartContainerRequest {
            container_id: CONTAINER.into(),
            ..Default::default()
        };
        self.agent.start_container(&start).await.unwrap();
    }

    /// Lets a restored guest go on.
    async fn resume(&self, number: u32) {
        let mut entropy = vec![7; 32];
        entropy[..4].copy_from_slice(&number.to_le_bytes());
        let request = ResumeRequest {
            version: agent::VERSION,
            entropy,
            fork: true,
            ..Default::default()
        };
        self.agent.resume(&request, config().seconds(60)).await.unwrap();
        let request = ReattachStreamsRequest {
            container_id: CONTAINER.into(),
            stdout_port: STDOUT,
            ..Default::default()
        };
        self.agent.reattach_streams(&request).await.unwrap();
    }

    /// The work that is done, once there is more of each kind than `before`.
    fn progress(&mut self, before: [u64; 4]) -> [u64; 4] {
        let deadline = Instant::now() + config().seconds(60);
        loop {
            let mut line = String::new();
            self.output.read_line(&mut line).unwrap();
            assert!(!line.starts_with("failed"), "{line}");
            let numbers: Vec<u64> = line
                .split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect();
            // The first line after a restore may be the end of one.
            if let Ok(now) = <[u64; 4]>::try_from(numbers)
                && line.starts_with("disk ")
                && now.iter().zip(before).all(|(now, before)| *now > before)
            {
                return now;
            }
            assert!(Instant::now() < deadline, "no progress after {before:?}: {line}");
        }
    }

    async fn write(&self) -> Files {
        let file = || {
            let flags = nix::sys::memfd::MemFdCreateFlag::MFD_CLOEXEC;
            File::from(nix::sys::memfd::memfd_create(c"snapshot", flags).unwrap())
        };
        let files = Files {
            state: file(),
            memory: file(),
        };
        self.vm.ask(Request::Pause, Vec::new()).await.unwrap();
        let (state, memory) = (
            files.state.try_clone().unwrap(),
            files.memory.try_clone().unwrap(),
        );
        self.vm.snapshot(state.into(), memory.into()).await.unwrap();
        files
    }
}

/// A tap device with two queues for this process's VMs.
fn taps() -> [File; 2] {
    [(); 2].map(|()| {
        let tap = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        let mut request = request("snap0", flags);
        // SAFETY: the descriptor is open and the argument points to an ifreq for the call's duration.
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        tap
    })
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: the structure is plain numbers and pointers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    request
}

/// Attaches or detaches a queue of a tap.
fn set_queue(tap: &File, flag: libc::c_int) -> std::io::Result<()> {
    let mut request = request("", flag);
    // SAFETY: as in `taps`.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Whether the guest has the pair of a queue on.
fn is_attached(tap: &File) -> bool {
    let mut request = request("", 0);
    // SAFETY: as in `taps`; the kernel fills the structure.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the kernel has set the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    i32::from(flags) & libc::IFF_DETACH_QUEUE == 0
}

#[test]
fn a_machine_under_load_goes_on_from_one_snapshot_after_the_other() {
    let test = fixture("snapshot-load");
    let host = Host::new(&test);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let lives = config().cycles;
    let begin = Instant::now();
    let mut sizes = Vec::new();
    runtime.block_on(async {
        let mut life = host.begin(None, true).await;
        life.set_up().await;
        let mut done = life.progress([0; 4]);
        assert!(is_attached(&host.taps[1]), "two vCPUs use one pair of queues");
        for number in 1..=lives {
            let files = life.write().await;
            sizes.push(std::os::unix::fs::MetadataExt::blocks(&files.memory.metadata().unwrap()) >> 11);
            life.vm.kill();
            life.vm.ended().await;
            life = host.begin(Some(&files), number % 2 == 0).await;
            life.resume(number).await;
            done = life.progress(done);
            assert!(is_attached(&host.taps[1]), "life {number} has one pair of queues");
        }
        println!(
            "snapshot: {lives} lives in {:?}; memory files of {} to {} MiB; work done: disk, network, timers, memory {done:?}",
            begin.elapsed(),
            sizes.iter().min().unwrap(),
            sizes.iter().max().unwrap()
        );
        life.vm.kill();
        tokio::time::timeout(Duration::from_secs(10), life.vm.ended())
            .await
            .unwrap();
    });
}
