//! A containerd of the suite's own: own root, state and socket, ended with the test process.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::config::config;
use crate::cri::Client;
use crate::cri::api::VersionRequest;
use crate::session::{Finished, Session};
use crate::{host, image, pod, settings};

/// Namespace of the suite that uses `ctr`; also the parent cgroup `ctr` gives its containers.
pub const NAMESPACE: &str = "bulkhead-tests";
/// Namespace of what CRI makes.
pub const CRI_NAMESPACE: &str = "k8s.io";

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    /// Directory of everything: `root`, `state`, `containerd.log`, `work`.
    pub directory: PathBuf,
    /// [`NAMESPACE`], or [`CRI_NAMESPACE`] if it serves CRI.
    pub namespace: &'static str,
    /// Version, such as `2.1.9`.
    pub version: String,
    /// The busybox image's name.
    pub busybox: String,
    /// The unpacked root of the probe image.
    pub rootfs: PathBuf,
}

/// Where `ctr` makes its FIFOs and shims their sockets, whatever containerd's own directories are.
const FIFOS: &str = "/run/containerd/fifo";
const SOCKETS: &str = "/run/containerd/s";

static PID: AtomicI32 = AtomicI32::new(0);

impl Containerd {
    /// The containerd of this process, started at the first call. `probe` is the program put into
    /// the suite's images. With `cri` it serves CRI too.
    ///
    /// # Panics
    /// If it does not come up, with its log.
    pub fn get(probe: &Path, cri: bool) -> &'static Self {
        static CONTAINERD: OnceLock<Containerd> = OnceLock::new();
        CONTAINERD.get_or_init(|| Self::start(probe, cri))
    }

    fn start(probe: &Path, cri: bool) -> Self {
        let directory = PathBuf::from(format!("/run/bulkhead-tests/{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory below /run");
        // overlayfs wants an upper directory that is not itself an overlay, and files of 100 MiB want room.
        let none = None::<&str>;
        mount(
            Some("bulkhead-tests"),
            &directory,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=80%,nr_inodes=0"),
        )
        .expect("a tmpfs");
        // What containerd and a kubelet mount must reach the pods that run already, as where systemd makes mounts shared.
        mount(none, &directory, none, MsFlags::MS_SHARED, none).expect("a shared mount");
        // SAFETY: the handler is a plain function and uses nothing that exit has torn down.
        unsafe { libc::atexit(end) };

        let version = version();
        fs::create_dir(directory.join("work")).expect("a directory");
        let settings = if cri {
            settings::prepare_cri(&directory);
            settings::cri(&directory, &version)
        } else {
            settings::tasks(&directory, &version)
        };
        fs::write(directory.join("config.toml"), settings).expect("a file");
        blockfile_scratch(&directory.join("scratch.ext4"));
        spawn(&directory);
        let mut containerd = Containerd {
            directory,
            namespace: if cri { CRI_NAMESPACE } else { NAMESPACE },
            version,
            busybox: String::new(),
            rootfs: PathBuf::new(),
        };
        containerd.wait_ready();
        containerd.load_images(probe);
        // Containers share these; made here so that the first container is not the one that leaves them behind.
        let tasks = containerd.bundle("id").with_file_name("");
        let name = if cri { pod::CGROUP } else { NAMESPACE };
        let cgroup = Path::new("/sys/fs/cgroup").join(name.trim_start_matches('/'));
        for shared in [cgroup, tasks, FIFOS.into(), SOCKETS.into()] {
            fs::create_dir_all(shared).expect("a directory");
        }
        containerd
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        PID.load(Ordering::SeqCst)
    }

    /// Its CRI socket.
    #[must_use]
    pub fn cri(&self) -> Client {
        Client::new(self.directory.join("containerd.sock"))
    }

    /// Removes the FIFOs of a container that `ctr` has left: it does so when its Delete meets a shim that has just died.
    pub fn forget_fifos(&self, id: &str) {
        let directories = fs::read_dir(FIFOS).into_iter().flatten().flatten();
        for directory in directories.map(|entry| entry.path()) {
            let of_id = |name: &str| directory.join(format!("{id}-{name}")).exists();
            if ["stdin", "stdout", "stderr"].into_iter().any(of_id) {
                fs::remove_dir_all(directory).expect("FIFOs");
            }
        }
    }

    /// Its socket for plugins of the Node Resource Interface.
    #[must_use]
    pub fn nri_socket(&self) -> PathBuf {
        self.directory.join(settings::NRI_SOCKET)
    }

    /// Ends containerd by a signal and starts it again; containers go on.
    ///
    /// # Panics
    /// If it does not end or does not come up.
    pub fn restart(&self, how: Signal) {
        self.end(how);
        self.start_again();
    }

    /// Starts containerd after [`Self::end`].
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_again(&self) {
        spawn(&self.directory);
        self.wait_ready();
    }

    /// Ends containerd; containers go on.
    ///
    /// # Panics
    /// If it does not end.
    pub fn end(&self, how: Signal) {
        let pid = self.pid();
        kill(Pid::from_raw(pid), how).expect("containerd runs");
        let deadline = Instant::now() + config().seconds(20);
        while host::is_alive(pid) {
            assert!(Instant::now() < deadline, "containerd does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_ready(&self) {
        let deadline = Instant::now() + config().seconds(30);
        loop {
            let tried = Session::start(self.ctr(&["version"]), config().seconds(30)).finish();
            // CRI comes up after the other services.
            let cri = self.namespace == CRI_NAMESPACE;
            if tried.status.success() && (!cri || self.cri().version(&VersionRequest::default()).is_ok()) {
                return;
            }
            assert!(
                Instant::now() < deadline && host::is_alive(self.pid()),
                "containerd did not come up: {tried}\n{}",
                self.log_tail(0)
            );
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn load_images(&mut self, probe: &Path) {
        let (probe_image, rootfs) = image::build(&config().image, probe, &self.directory);
        self.rootfs = rootfs;
        self.import(&config().image, "overlayfs");
        let names = self.run(&["images", "ls", "-q"]).text();
        self.busybox = names
            .lines()
            .next()
            .expect("the busybox image has a name")
            .to_owned();
        self.import(&probe_image, "overlayfs");
        if self.namespace == CRI_NAMESPACE {
            for image in image::for_pods(&config().image, probe, &self.directory) {
                self.import(&image.archive, "overlayfs");
                // CRI learns of an image by containerd's event.
                let known =
                    crate::fixture::wait_until(config().seconds(10), || self.cri().has_image(&image.name));
                assert!(known, "CRI does not know {}", image.name);
            }
        }
    }

    /// Unpacks the probe image for a snapshotter.
    pub fn unpack_probe(&self, snapshotter: &str) {
        self.import(&self.directory.join("probe.tar"), snapshotter);
    }

    fn import(&self, image: &Path, snapshotter: &str) {
        let image = image.to_str().expect("paths of the suite are UTF-8");
        let import = ["images", "import", "--local", "--snapshotter", snapshotter, image];
        let _ = self.run(&import).text();
    }

    /// A `ctr` command for this containerd.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&config().ctr);
        command
            .env("CONTAINERD_ADDRESS", self.directory.join("containerd.sock"))
            .env("CONTAINERD_NAMESPACE", self.namespace)
            .args(arguments);
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Finished {
        Session::start(self.ctr(arguments), config().seconds(30)).finish()
    }

    /// Snapshotters that this containerd has and that work on this host.
    #[must_use]
    pub fn snapshotters(&self) -> Vec<String> {
        let plugins = self.run(&["plugins", "ls"]).text();
        let rows = plugins
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.filter(|row| row.first() == Some(&"io.containerd.snapshotter.v1") && row.last() == Some(&"ok"))
            .map(|row| row[1].to_owned())
            .collect()
    }

    /// Removes the layers that an image was unpacked to; some snapshotters keep them mounted.
    ///
    /// # Panics
    /// If one is in use.
    pub fn remove_snapshots(&self, snapshotter: &str) {
        let list = || {
            let rows = self
                .run(&["snapshots", "--snapshotter", snapshotter, "ls"])
                .text();
            rows.lines()
                .skip(1)
                .filter_map(|row| row.split_whitespace().next().map(str::to_owned))
                .collect()
        };
        let mut left: Vec<String> = list();
        while !left.is_empty() {
            // Only those that no other one is made from can go.
            for key in &left {
                let _ = self.run(&["snapshots", "--snapshotter", snapshotter, "rm", key]);
            }
            let now = list();
            assert!(
                now.len() < left.len(),
                "snapshots of {snapshotter} cannot be removed: {now:?}"
            );
            left = now;
        }
    }

    /// Directory of a task's bundle.
    #[must_use]
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.directory
            .join("state/io.containerd.runtime.v2.task")
            .join(self.namespace)
            .join(id)
    }

    /// Size of the log, to give to [`Self::log_tail`] later.
    #[must_use]
    pub fn log_size(&self) -> u64 {
        fs::metadata(self.log()).map_or(0, |metadata| metadata.len())
    }

    /// The log from byte `from` on, at most the last 20,000 characters. The shims' logs are in it.
    #[must_use]
    pub fn log_tail(&self, from: u64) -> String {
        let log = fs::read(self.log()).unwrap_or_default();
        let from = usize::try_from(from)
            .unwrap_or(0)
            .max(log.len().saturating_sub(20_000));
        String::from_utf8_lossy(log.get(from..).unwrap_or_default()).into_owned()
    }

    fn log(&self) -> PathBuf {
        self.directory.join("containerd.log")
    }
}

fn version() -> String {
    let mut command = Command::new(&config().containerd);
    command.arg("--version");
    let text = Session::start(command, config().seconds(20)).finish().text();
    let version = text.split_whitespace().nth(2).expect("containerd's version");
    version
        .trim_start_matches('v')
        .split(['~', '+', '-'])
        .next()
        .expect("split gives one part")
        .to_owned()
}

fn blockfile_scratch(file: &Path) {
    File::create(file)
        .and_then(|file| file.set_len(64 << 20))
        .expect("a sparse file");
    let mut command = Command::new("mkfs.ext4");
    command
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal"])
        .arg(file);
    let _ = Session::start(command, config().seconds(30))
        .finish()
        .expect_code(0);
}

/// Starts containerd, from a thread that lives as long as the process, since the signal at the
/// parent's death comes when the *thread* that forked ends.
fn spawn(directory: &Path) {
    let (sender, receiver) = mpsc::channel();
    let directory = directory.to_path_buf();
    thread::spawn(move || {
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.join("containerd.log"))
            .expect("a log file");
        let mut command = Command::new(&config().containerd);
        command
            .arg("--config")
            .arg(directory.join("config.toml"))
            .stdin(Stdio::null());
        command.stdout(log.try_clone().expect("a descriptor")).stderr(log);
        // SAFETY: prctl is async-signal-safe and takes integers.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        let mut child = command.spawn().expect("containerd starts");
        sender
            .send(i32::try_from(child.id()).expect("a process id"))
            .expect("the receiver waits");
        let status = child.wait();
        eprintln!("containerd ended: {status:?}");
    });
    let pid = receiver
        .recv()
        .expect("the thread sends the process id or has panicked");
    PID.store(pid, Ordering::SeqCst);
}

/// Ends containerd and takes its directory away.
extern "C" fn end() {
    let pid = PID.load(Ordering::SeqCst);
    if pid != 0 && kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok() {
        let deadline = Instant::now() + Duration::from_secs(5);
        while host::is_alive(pid) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
    let directory = PathBuf::from(format!("/run/bulkhead-tests/{}", std::process::id()));
    if let Some(logs) = &config().log_dir {
        // A lost log is no reason to fail at exit.
        let _ = fs::copy(directory.join("containerd.log"), logs.join("containerd.log"));
    }
    let _ = umount2(&directory, MntFlags::MNT_DETACH);
    let _ = fs::remove_dir(&directory);
    let _ = fs::remove_dir("/run/bulkhead-tests");
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(NAMESPACE));
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(pod::CGROUP.trim_start_matches('/')));
    settings::remove_bridge();
}
