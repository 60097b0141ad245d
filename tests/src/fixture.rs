//! One test: ids of its own, `ctr` commands, and the check at its end that nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::config::config;
use crate::containerd::Containerd;
use crate::cri::Client;
use crate::image::PROBE_IMAGE;
use crate::leak::Snapshot;
use crate::pod::PodBuilder;
use crate::session::{Finished, Session};
use crate::spec::Spec;

/// Tests run one at a time: what is left on the host must be that test's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A test's surroundings. When it is dropped, everything that the test brought to the host must be gone.
#[derive(Debug)]
pub struct Fixture {
    /// The containerd of this process.
    pub containerd: &'static Containerd,
    /// Directory of this test, removed at its end.
    pub work: PathBuf,
    name: &'static str,
    baseline: Snapshot,
    log_start: u64,
    restarted: AtomicBool,
    _turn: MutexGuard<'static, ()>,
}

impl Fixture {
    /// Begins a test. `probe` is the program for the probe image.
    ///
    /// # Panics
    /// If the environment lacks something, with a message that says how to run the suite.
    #[must_use]
    pub fn new(name: &'static str, probe: &Path) -> Self {
        Self::begin(name, probe, false)
    }

    /// Begins a test that drives CRI.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn for_pods(name: &'static str, probe: &Path) -> Self {
        Self::begin(name, probe, true)
    }

    fn begin(name: &'static str, probe: &Path, cri: bool) -> Self {
        let _ = config();
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let containerd = Containerd::get(probe, cri);
        let work = containerd.directory.join("work").join(name);
        fs::create_dir_all(&work).expect("a directory");
        let baseline = Snapshot::take(containerd.pid(), &containerd.directory.join("state"));
        Fixture {
            containerd,
            work,
            name,
            baseline,
            log_start: containerd.log_size(),
            restarted: AtomicBool::new(false),
            _turn: turn,
        }
    }

    /// An id of this test's.
    #[must_use]
    pub fn id(&self, suffix: &str) -> String {
        format!("{}-{suffix}", self.name)
    }

    /// A pod of this test's.
    #[must_use]
    pub fn pod(&self, suffix: &str) -> PodBuilder<'_> {
        PodBuilder::new(self, suffix)
    }

    /// The CRI socket.
    #[must_use]
    pub fn cri(&self) -> Client {
        self.containerd.cri()
    }

    /// Ends containerd and starts it again; containers go on.
    pub fn restart_containerd(&self) {
        self.restarted.store(true, Ordering::Relaxed);
        self.containerd.restart(Signal::SIGTERM);
    }

    /// Kills containerd, does something, and starts it again; containers go on.
    pub fn without_containerd(&self, meanwhile: impl FnOnce()) {
        self.restarted.store(true, Ordering::Relaxed);
        self.containerd.end(Signal::SIGKILL);
        meanwhile();
        self.containerd.start_again();
    }

    /// Runs `ctr` to its end.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Finished {
        self.containerd.run(arguments)
    }

    /// A `ctr run` of the busybox image, with the runtime under test.
    #[must_use]
    pub fn busybox(&self, suffix: &str, command: &[&str]) -> Run<'_> {
        self.run(suffix, &self.containerd.busybox, command)
    }

    /// A `ctr run` of the probe image with the probe's arguments.
    #[must_use]
    pub fn probe(&self, suffix: &str, arguments: &[&str]) -> Run<'_> {
        self.run(suffix, PROBE_IMAGE, &[&["/probe"], arguments].concat())
    }

    /// A `ctr run` of an image, with the runtime under test.
    #[must_use]
    pub fn run(&self, suffix: &str, image: &str, command: &[&str]) -> Run<'_> {
        let command = command.iter().map(ToString::to_string).collect();
        Run {
            test: self,
            id: self.id(suffix),
            options: vec!["--rm".into()],
            image: image.into(),
            command,
        }
    }

    /// A `ctr run` of a specification made by hand. Its root is the probe image's, made anew for this test.
    ///
    /// # Panics
    /// If `ctr` cannot give its default specification.
    #[must_use]
    pub fn spec(&self, suffix: &str, command: &[&str], change: impl FnOnce(Spec) -> Spec) -> Run<'_> {
        let id = self.id(suffix);
        let default = self.ctr(&["oci", "spec"]).text();
        let default: Value = serde_json::from_str(&default).expect("a specification");
        let spec = change(Spec::new(default, &self.rootfs(), &id, command));
        let file = self.work.join(format!("{id}.json"));
        fs::write(&file, spec.0.to_string()).expect("a file");
        let options = vec!["--rm".into(), "--config".into(), file.display().to_string()];
        Run {
            test: self,
            id,
            options,
            image: String::new(),
            command: Vec::new(),
        }
    }

    /// A copy of the probe image's root for this test.
    ///
    /// # Panics
    /// If it cannot be copied.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        let rootfs = self.work.join("rootfs");
        if !rootfs.exists() {
            let mut command = Command::new("cp");
            command.arg("-a").arg(&self.containerd.rootfs).arg(&rootfs);
            let _ = Session::start(command, config().seconds(30))
                .finish()
                .expect_code(0);
        }
        rootfs
    }

    /// Writes this host's configuration of the runtime with some keys changed, for `--runtime-config-path`.
    ///
    /// # Panics
    /// If the host's configuration is not JSON.
    #[must_use]
    pub fn configuration(&self, changes: &[(&str, Value)]) -> String {
        let current = fs::read("/etc/bulkhead/config.json").unwrap_or_else(|_| b"{}".to_vec());
        let mut configuration: Value = serde_json::from_slice(&current).expect("a configuration");
        for (key, value) in changes {
            configuration[key] = value.clone();
        }
        let file = self.work.join("config.json");
        fs::write(&file, configuration.to_string()).expect("a file");
        file.display().to_string()
    }

    /// Removes a container that was not run with `--rm`, and its snapshot.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        let _ = self.ctr(&["containers", "rm", id]).text();
    }

    /// Deletes a task that has ended.
    ///
    /// # Panics
    /// If it has not, or not with this exit code.
    #[track_caller]
    pub fn delete(&self, id: &str, code: u32) {
        // ctr itself exits with 0 and says what the task's exit code was, if it was another one.
        let done = self.ctr(&["tasks", "delete", id]).expect_code(0);
        let said = String::from_utf8_lossy(&done.stderr);
        let expected = format!("exit with non-zero exit code {code}\"");
        assert!(
            if code == 0 {
                said.is_empty()
            } else {
                said.contains(&expected)
            },
            "{done}"
        );
    }

    /// Kills a detached container and removes it.
    #[track_caller]
    pub fn kill_and_remove(&self, id: &str) {
        let _ = self.ctr(&["tasks", "kill", "-s", "SIGKILL", id]).text();
        self.wait_status(id, "STOPPED");
        self.delete(id, 137);
        self.remove(id);
    }

    /// Process id and status of a task as `ctr tasks ls` shows them; `None` when there is no such task.
    #[track_caller]
    #[must_use]
    pub fn task(&self, id: &str) -> Option<(i32, String)> {
        let list = self.ctr(&["tasks", "ls"]).text();
        let row = list
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|row| row[0] == id)?;
        Some((row[1].parse().expect("a process id"), row[2].to_owned()))
    }

    /// Waits until a task has this status.
    ///
    /// # Panics
    /// If it does not come.
    #[track_caller]
    pub fn wait_status(&self, id: &str, status: &str) {
        let mut last = None;
        let seen = wait_until(config().seconds(10), || {
            last = self.task(id);
            last.as_ref().is_some_and(|(_, now)| now == status)
        });
        assert!(seen, "task {id} is not {status} but {last:?}");
    }

    /// Mounts a container's snapshot on the host while `look` runs.
    ///
    /// # Panics
    /// If it cannot be mounted.
    pub fn with_snapshot(&self, snapshotter: &str, id: &str, look: impl FnOnce(&Path)) {
        let target = self.work.join("snapshot");
        fs::create_dir_all(&target).expect("a directory");
        let text = target.to_str().expect("paths of the suite are UTF-8");
        let mount = self
            .ctr(&["snapshots", "--snapshotter", snapshotter, "mounts", text, id])
            .text();
        shell(&mount);
        look(&target);
        shell(&format!("umount {text}"));
    }

    /// Checks that nothing is left that was not there when the test began.
    ///
    /// # Panics
    /// If something is, with a list.
    #[track_caller]
    pub fn expect_clean(&self) {
        self.expect_clean_host();
        for list in [["containers", "ls", "-q"], ["tasks", "ls", "-q"]] {
            let left = self.ctr(&list).text();
            assert_eq!(left, "", "{list:?}");
        }
    }

    /// As [`Self::expect_clean`], without a question to containerd.
    ///
    /// # Panics
    /// If something is left on the host.
    #[track_caller]
    pub fn expect_clean_host(&self) {
        let state = self.containerd.directory.join("state");
        let mut baseline = self.baseline.clone();
        if self.restarted.load(Ordering::Relaxed) {
            // Another process with other descriptors.
            baseline.accept_descriptors_of(self.containerd.pid());
        }
        if let Err(leaked) = baseline.wait_clean(self.containerd.pid(), &state, config().seconds(5)) {
            panic!("left on the host:\n{leaked}{}", self.logs());
        }
    }

    /// containerd's log since the test began.
    #[must_use]
    pub fn logs(&self) -> String {
        format!(
            "--- containerd's log\n{}\n---",
            self.containerd.log_tail(self.log_start)
        )
    }

    /// After a failure: ends what is still there, so that the next test starts clean.
    fn sweep(&self) {
        let limit = config().seconds(10);
        for pod in crate::pod::left(&self.cri()) {
            eprintln!("sweep: pod {pod}");
        }
        let run = |arguments: &[&str]| Session::start(self.containerd.ctr(arguments), limit).finish();
        let ids = String::from_utf8_lossy(&run(&["containers", "ls", "-q"]).stdout).into_owned();
        for id in ids.lines() {
            for arguments in [
                &["tasks", "kill", "-s", "SIGKILL", "-a", id][..],
                &["tasks", "delete", "-f", id],
                &["containers", "rm", id],
            ] {
                let done = run(arguments);
                if !done.status.success() {
                    eprintln!("sweep: {done}");
                }
            }
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.logs());
            // A second panic here would abort the process and hide the first.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.sweep())).is_err() {
                eprintln!("the test's containers could not be removed");
            }
        } else {
            self.expect_clean();
        }
        // What a failed test left mounted stays until the suite ends.
        let _ = fs::remove_dir_all(&self.work);
    }
}

/// A `ctr run` in the making.
#[derive(Debug)]
pub struct Run<'a> {
    test: &'a Fixture,
    /// The container's id.
    pub id: String,
    options: Vec<String>,
    image: String,
    command: Vec<String>,
}

impl Run<'_> {
    /// Adds options.
    #[must_use]
    pub fn with(mut self, options: &[&str]) -> Self {
        self.options.extend(options.iter().map(ToString::to_string));
        self
    }

    /// Keeps the container and its snapshot after the run.
    #[must_use]
    pub fn keep(mut self) -> Self {
        self.options.retain(|option| option != "--rm");
        self
    }

    fn command(&self, verb: &[&str]) -> Command {
        let mut command = self.test.containerd.ctr(verb);
        command.args(["--runtime", &config().runtime]).args(&self.options);
        if !self.image.is_empty() {
            command.arg(&self.image);
        }
        command.arg(&self.id).args(&self.command);
        command
    }

    /// Starts it and leaves it running beside the test.
    #[track_caller]
    #[must_use]
    pub fn start(&self) -> Session {
        Session::start(self.command(&["run"]), config().seconds(30))
    }

    /// Starts it with a longer limit, in seconds on hardware.
    #[track_caller]
    #[must_use]
    pub fn start_for(&self, seconds: u32) -> Session {
        Session::start(self.command(&["run"]), config().seconds(seconds))
    }

    /// Starts it on a terminal.
    #[track_caller]
    #[must_use]
    pub fn start_on_terminal(&self, rows: u16, columns: u16) -> Session {
        let mut command = self.command(&["run", "--tty"]);
        command.env("TERM", "dumb");
        Session::start_on_terminal(command, rows, columns, config().seconds(30))
    }

    /// Runs it to its end.
    #[track_caller]
    #[must_use]
    pub fn finish(&self) -> Finished {
        self.start().finish()
    }

    /// Runs it detached; it stays until it is removed. Returns its id.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn detach(self) -> String {
        let mut run = self.keep();
        if !run.options.iter().any(|option| option == "--log-uri") {
            // Once ctr has gone nobody reads its FIFOs.
            run = run.with(&["--null-io"]);
        }
        let _ = Session::start(run.command(&["run", "--detach"]), config().seconds(30))
            .finish()
            .expect_code(0);
        run.id
    }

    /// Creates the container without a task. Returns its id.
    #[track_caller]
    pub fn create(self) -> String {
        let run = self.keep();
        let command = run.command(&["containers", "create"]);
        let _ = Session::start(command, config().seconds(30))
            .finish()
            .expect_code(0);
        run.id
    }
}

/// Tries until `done` or the limit has passed.
#[must_use]
pub fn wait_until(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if done() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a line of shell on the host.
///
/// # Panics
/// If it fails.
#[track_caller]
pub fn shell(line: &str) {
    let mut command = Command::new("sh");
    command.args(["-c", line]);
    let _ = Session::start(command, config().seconds(30))
        .finish()
        .expect_code(0);
}
