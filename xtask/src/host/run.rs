//! One run of the emulated host.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::base;
use super::cpio::Archive;
use super::lines::Lines;
use super::{Artifacts, Containerd, Host, IMAGE};
use crate::cache;
use crate::process;
use crate::workspace;

/// The processor. `svm`, `npt`, `nrip-save`: what kvm_amd needs. Without `erms` and `fsrm` kernels copy by eight bytes
/// an instruction; emulation makes each byte of a `rep movsb` an instruction, which no processor does. Without `cx16`,
/// because QEMU 7.2 corrupts the flags around `cmpxchg16b`; the same processor in all versions.
const PROCESSOR: &str = "EPYC-Milan,+svm,+npt,+nrip-save,-erms,-fsrm,-cx16";

/// Processors of the machine. With two, which QEMU emulates in parallel, about one start of a guest in forty ended in a
/// triple fault, and the machine's own kernel once in a panic; with one, none in hundreds.
pub(super) const CPUS: u32 = 1;

/// Files that the init looks for.
const FILES: [(&str, u32, &str); 2] = [
    ("init", 0o755, "tests/host/init"),
    (
        "usr/local/bin/with-containerd",
        0o755,
        "tests/host/with-containerd",
    ),
];

/// What to run, and in which machine.
#[derive(Debug)]
pub struct Run {
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Whether virtual time is counted in instructions.
    pub deterministic: bool,
    /// The containerd in the command's `PATH`.
    pub containerd: Containerd,
    /// Wall time after which the machine is stopped.
    pub timeout: Duration,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Variables of the command's environment.
    pub environment: Vec<(String, String)>,
    /// Directories laid over the root.
    pub trees: Vec<PathBuf>,
    /// Single files laid over the root: path, source. They can be executed.
    pub files: Vec<(String, PathBuf)>,
    /// Receives the content of the host's `/out`.
    pub out: Option<PathBuf>,
    /// Receives the kernel's messages.
    pub console: Option<PathBuf>,
    /// Receives a copy of the command's standard output.
    pub transcript: Option<PathBuf>,
    /// Begins every line of output, when several machines run at once.
    pub label: Option<String>,
}

/// Runs of this process so far.
static RUNS: AtomicU32 = AtomicU32::new(0);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The command's exit code.
    Exited(u8),
    /// The machine was stopped at its time limit.
    TimedOut,
}

/// A directory that is removed with its content.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Run {
    /// A run of `command` in a machine of one processor and 4 GiB.
    #[must_use]
    pub fn new(command: Vec<OsString>) -> Self {
        Self {
            command,
            deterministic: false,
            containerd: Containerd::V2_1,
            timeout: Duration::from_secs(600),
            memory_mib: 4096,
            cpus: CPUS,
            environment: Vec::new(),
            trees: Vec::new(),
            files: Vec::new(),
            out: None,
            console: None,
            transcript: None,
            label: None,
        }
    }

    /// Starts the machine and waits for its end. The command's output goes to this process's.
    ///
    /// # Errors
    /// A file cannot be prepared, QEMU does not start, or the machine ends without the command's exit code.
    pub fn start(&self, host: &Host, artifacts: Option<&Artifacts>) -> Result<Outcome> {
        let scratch = Scratch(cache::directory("run")?.join(format!(
            "{}-{}",
            std::process::id(),
            RUNS.fetch_add(1, Ordering::Relaxed)
        )));
        let directory = scratch.0.as_path();
        fs::create_dir_all(directory).context("cannot create a directory for the run")?;
        self.write_root(&directory.join("root.cpio"), host, artifacts)?;
        let console = directory.join("console");
        let mut qemu = self.qemu(host, directory, &console);

        let output = Port::open(&directory.join("out"))?;
        let errors = Port::open(&directory.join("err"))?;
        let transcript = match &self.transcript {
            Some(path) => {
                Some(File::create(path).with_context(|| format!("cannot create {}", path.display()))?)
            }
            None => None,
        };
        let output = output.copy_to(Lines::new(self.label.clone(), io::stdout()), transcript);
        let errors = errors.copy_to(Lines::new(self.label.clone(), io::stderr()), None);
        let log = directory.join("qemu.log");
        let mut child = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).context("cannot create QEMU's log")?)
            .spawn()
            .context("cannot run QEMU")?;
        let ended = wait(&mut child, self.timeout);
        output.finish()?;
        errors.finish()?;

        if let Some(path) = &self.console {
            fs::copy(&console, path).with_context(|| format!("cannot write {}", path.display()))?;
        }
        if !ended? {
            return Ok(Outcome::TimedOut);
        }
        let code = fs::read_to_string(directory.join("code")).unwrap_or_default();
        let Ok(code) = code.trim().parse() else {
            bail!(
                "the emulated host ended without an exit code\nkernel: {}\nQEMU: {}",
                process::tail(&console),
                process::tail(&log)
            );
        };
        if let Some(out) = &self.out {
            fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
            let mut tar = Command::new("tar");
            tar.arg("--no-same-owner")
                .arg("-xf")
                .arg(directory.join("files"))
                .arg("-C")
                .arg(out);
            process::run(&mut tar, &directory.join("tar.log")).context("cannot unpack the host's /out")?;
        }
        Ok(Outcome::Exited(code))
    }

    /// Writes the first root filesystem: the base and what is laid over it.
    fn write_root(&self, path: &Path, host: &Host, artifacts: Option<&Artifacts>) -> Result<()> {
        fs::copy(host.base.archive(), path).context("cannot copy the base archive")?;
        let file = File::options()
            .append(true)
            .open(path)
            .context("cannot open the archive")?;
        let mut archive = Archive::new(BufWriter::new(file));
        archive.tree(&host.machine.modules())?;
        for (name, mode, source) in FILES {
            archive.copy(name, mode, &workspace::path(source))?;
        }
        archive.copy(IMAGE.trim_start_matches('/'), 0o644, &host.busybox)?;
        for (name, source, program) in artifacts.map(Artifacts::files).into_iter().flatten() {
            archive.copy(name, if program { 0o755 } else { 0o644 }, source)?;
        }
        for tree in &self.trees {
            archive.tree(tree)?;
        }
        for (name, source) in &self.files {
            archive.copy(name.trim_start_matches('/'), 0o755, source)?;
        }
        archive.file("host/command", 0o644, &quote(&self.command))?;
        archive.file("host/environment", 0o644, self.environment().as_bytes())?;
        if self.out.is_some() {
            archive.file("host/collect", 0o644, b"")?;
        }
        archive.finish()
    }

    fn environment(&self) -> String {
        let containerd = base::containerd(self.containerd.version());
        let mut text = format!("export PATH={containerd}:$PATH\n");
        for (name, value) in &self.environment {
            text += &format!("export {name}='{}'\n", value.replace('\'', r"'\''"));
        }
        text
    }

    fn qemu(&self, host: &Host, directory: &Path, console: &Path) -> Command {
        let mut qemu = host.machine.qemu();
        if self.deterministic {
            qemu.args([
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=1,sleep=off",
                "-smp",
                "1",
            ]);
        } else {
            qemu.args(["-accel", "tcg,thread=multi", "-smp", &self.cpus.to_string()]);
        }
        qemu.args(["-cpu", PROCESSOR, "-M", "q35", "-m", &self.memory_mib.to_string()]);
        qemu.args(["-display", "none", "-no-reboot", "-nodefaults"]);
        qemu.arg("-kernel").arg(host.machine.kernel());
        qemu.arg("-initrd").arg(directory.join("root.cpio"));
        qemu.args(["-append", "console=ttyS0 panic=-1 quiet loglevel=5 rdinit=/init"]);
        qemu.args(["-device", "virtio-serial-pci"]);
        for name in ["out", "err", "code", "files"] {
            let mut device = OsString::from(format!("file,id={name},path="));
            device.push(directory.join(name));
            qemu.arg("-chardev").arg(device);
            qemu.args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
        }
        qemu.args(["-object", "rng-random,id=rng,filename=/dev/urandom"]);
        qemu.args(["-device", "virtio-rng-pci,rng=rng"]);
        let mut serial = OsString::from("file:");
        serial.push(console);
        qemu.arg("-serial").arg(serial);
        qemu
    }
}

/// Waits for `child`; false if it was killed at the time limit.
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        if child.try_wait().context("cannot wait for QEMU")?.is_some() {
            return Ok(true);
        }
        if Instant::now() > deadline {
            child.kill().context("cannot kill QEMU")?;
            child.wait().context("cannot wait for QEMU")?;
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The command as a script that becomes it.
fn quote(command: &[OsString]) -> Vec<u8> {
    let mut script = b"exec".to_vec();
    for word in command {
        script.push(b' ');
        script.extend(quoted(word));
    }
    script.push(b'\n');
    script
}

fn quoted(word: &OsStr) -> Vec<u8> {
    let mut quoted = vec![b'\''];
    for byte in word.as_bytes() {
        if *byte == b'\'' {
            quoted.extend(br"'\''");
        } else {
            quoted.push(*byte);
        }
    }
    quoted.push(b'\'');
    quoted
}

/// A FIFO that QEMU writes into.
struct Port {
    /// Keeps the FIFO open, so that the reader has no end before this is dropped.
    hold: File,
    reader: File,
}

/// A thread that copies a port's bytes.
struct Copy {
    hold: File,
    thread: thread::JoinHandle<io::Result<()>>,
}

impl Port {
    fn open(path: &Path) -> Result<Self> {
        process::output(Command::new("mkfifo").arg(path)).context("cannot create a FIFO")?;
        // Open for both, or the opening would wait for the other end.
        let hold = File::options()
            .read(true)
            .write(true)
            .open(path)
            .context("cannot open a FIFO")?;
        let reader = File::open(path).context("cannot open a FIFO")?;
        Ok(Self { hold, reader })
    }

    fn copy_to(self, mut target: impl Write + Send + 'static, mut transcript: Option<File>) -> Copy {
        let Self { hold, mut reader } = self;
        let thread = thread::spawn(move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let length = reader.read(&mut buffer)?;
                if length == 0 {
                    return Ok(());
                }
                target.write_all(&buffer[..length])?;
                target.flush()?;
                if let Some(transcript) = &mut transcript {
                    transcript.write_all(&buffer[..length])?;
                }
            }
        });
        Copy { hold, thread }
    }
}

impl Copy {
    /// Waits until all is copied. QEMU must have ended.
    fn finish(self) -> Result<()> {
        drop(self.hold);
        let result = self.thread.join();
        ensure!(result.is_ok(), "the thread that copies the output panicked");
        match result {
            Ok(Err(error)) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(error).context("cannot copy the command's output")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_command_survives_the_shell() {
        let words = ["printf", "%s|", "a b", "it's", "$HOME", "", "`x`", "a\nb"];
        let script = quote(&words.map(OsString::from));
        let output = Command::new("sh")
            .arg("-c")
            .arg(OsStr::from_bytes(&script))
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"a b|it's|$HOME||`x`|a\nb|");
    }

    #[test]
    fn a_machine_that_does_not_end_is_stopped() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!wait(&mut child, Duration::from_millis(50)).unwrap());
        let mut child = Command::new("true").spawn().unwrap();
        assert!(wait(&mut child, Duration::from_secs(30)).unwrap());
    }
}
