//! The emulated host: QEMU in software emulation, with an AMD processor whose SVM gives the host in it a real,
//! unmodified KVM. See docs/emulated-host.md.

pub mod base;
mod cpio;
pub mod debian;
mod lines;
mod machine;
mod qemu;
mod run;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

pub use self::base::Base;
pub use self::machine::Machine;
pub use self::run::{Outcome, Run};

use crate::cargo;
use crate::image;
use crate::kernel;
use crate::progress::Progress;
use crate::rootfs;
use crate::workspace;

/// Steps of [`Host::build`].
pub const HOST_STEPS: usize = 2;

/// Steps of [`Artifacts::build`].
pub const ARTIFACT_STEPS: usize = 3;

/// Where the busybox image is in the host.
pub const IMAGE: &str = "/opt/images/busybox.tar";

/// A containerd that the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Containerd {
    /// Debian trixie's
    #[value(name = "1.7")]
    V1_7,
    /// Debian forky's
    #[value(name = "2.1")]
    V2_1,
}

impl Containerd {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V2_1, Self::V1_7];

    /// Its version, major and minor.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }
}

/// Arguments of `cargo xtask host`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Count time in instructions: one vCPU, 2 ns each, the same in every run
    #[arg(long)]
    deterministic: bool,
    /// Which containerd is first in the command's PATH
    #[arg(long, value_enum, default_value = "2.1")]
    containerd: Containerd,
    /// Seconds after which the machine is stopped
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Memory of the machine in MiB
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Processors of the machine (one in the deterministic mode)
    #[arg(long, default_value_t = run::CPUS)]
    cpus: u32,
    /// Directory whose content is laid over the host's root (repeatable)
    #[arg(short = 'f', long = "files", value_name = "DIR")]
    files: Vec<PathBuf>,
    /// Directory that receives what the command leaves in /out
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Variable of the command's environment (repeatable)
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Install the programs as they were built last
    #[arg(long)]
    no_build: bool,
    /// Do not build or install Bulkhead: the bare host
    #[arg(long)]
    bare: bool,
    /// File that receives the messages of the machine's kernel
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,
    /// The command, found in the host's PATH
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Everything built from this repository that a pod needs.
#[derive(Debug)]
pub struct Artifacts {
    /// `containerd-shim-kata-v2`
    pub shim: PathBuf,
    /// `bulkhead-vmm`
    pub vmm: PathBuf,
    /// `bulkhead`
    pub cli: PathBuf,
    /// `vmlinux`
    pub kernel: PathBuf,
    /// `root.erofs`
    pub image: PathBuf,
}

impl Artifacts {
    /// Builds what is not cached.
    ///
    /// # Errors
    /// A build fails.
    pub fn build(progress: &Progress) -> Result<Self> {
        Self::of(progress, &cargo::programs(progress)?)
    }

    /// With these programs.
    ///
    /// # Errors
    /// One is missing, or the kernel or the image cannot be built.
    pub fn of(progress: &Progress, programs: &cargo::Programs) -> Result<Self> {
        Ok(Self {
            shim: programs.get("containerd-shim-kata-v2")?.to_owned(),
            vmm: programs.get("bulkhead-vmm")?.to_owned(),
            cli: programs.get("bulkhead")?.to_owned(),
            kernel: kernel::build(progress)?,
            image: rootfs::image(progress, programs.get("bulkhead-agent")?)?,
        })
    }

    /// The same with a shim that can be made to fail at every step, in a directory of its own.
    ///
    /// # Errors
    /// The build fails.
    pub fn with_faults(&self, progress: &Progress) -> Result<Self> {
        let build = [
            "build",
            "--profile=faults",
            "--package=containerd-shim-kata-v2",
            "--features=containerd-shim-kata-v2/fault-injection",
        ];
        let programs = cargo::build(progress, "shim with faults", &build)?;
        let directory = workspace::path("target/with-faults");
        std::fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        // The shim looks for the VMM beside itself.
        let copy = |from: &Path| -> Result<PathBuf> {
            let to = directory.join(from.file_name().context("a program has a name")?);
            std::fs::copy(from, &to).with_context(|| format!("cannot write {}", to.display()))?;
            Ok(to)
        };
        Ok(Self {
            shim: copy(programs.get("containerd-shim-kata-v2")?)?,
            vmm: copy(&self.vmm)?,
            cli: self.cli.clone(),
            kernel: self.kernel.clone(),
            image: self.image.clone(),
        })
    }

    /// Files to lay over a host's root: path, source, whether it is a program.
    fn files(&self) -> [(&'static str, &PathBuf, bool); 5] {
        [
            ("usr/local/bin/containerd-shim-kata-v2", &self.shim, true),
            ("usr/local/bin/bulkhead-vmm", &self.vmm, true),
            ("usr/local/bin/bulkhead", &self.cli, true),
            ("usr/local/share/bulkhead/vmlinux", &self.kernel, false),
            ("usr/local/share/bulkhead/root.erofs", &self.image, false),
        ]
    }
}

/// What the emulated host is made of.
#[derive(Debug)]
pub struct Host {
    /// QEMU and the kernel.
    pub machine: Machine,
    /// The root filesystem.
    pub base: Base,
    /// Archive of a busybox image.
    pub busybox: PathBuf,
}

impl Host {
    /// Builds what is not cached.
    ///
    /// # Errors
    /// A build fails.
    pub fn build(progress: &Progress) -> Result<Self> {
        let machine = Machine::build(progress)?;
        let base = Base::build(progress)?;
        let busybox = image::busybox(&base.busybox())?;
        Ok(Self {
            machine,
            base,
            busybox,
        })
    }
}

/// Runs `cargo xtask host`. The result is the command's exit code; 124 after the time limit.
///
/// # Errors
/// Something cannot be built, or the machine ended without saying how the command did.
pub fn main(arguments: &Arguments) -> Result<ExitCode> {
    for directory in &arguments.files {
        ensure!(directory.is_dir(), "{} is not a directory", directory.display());
    }
    let progress = Progress::new(HOST_STEPS);
    let artifacts = if arguments.bare {
        None
    } else {
        progress.extend(ARTIFACT_STEPS);
        Some(if arguments.no_build {
            Artifacts::of(&progress, &cargo::built()?)?
        } else {
            Artifacts::build(&progress)?
        })
    };
    let host = Host::build(&progress)?;
    let mut run = Run::new(arguments.command.clone());
    run.deterministic = arguments.deterministic;
    run.containerd = arguments.containerd;
    run.timeout = Duration::from_secs(arguments.timeout);
    run.memory_mib = arguments.memory;
    run.cpus = arguments.cpus;
    run.trees.clone_from(&arguments.files);
    run.out.clone_from(&arguments.out);
    run.console.clone_from(&arguments.console);
    for variable in &arguments.env {
        let (name, value) = variable
            .split_once('=')
            .with_context(|| format!("--env {variable} is not NAME=VALUE"))?;
        run.environment.push((name.to_owned(), value.to_owned()));
    }
    match run.start(&host, artifacts.as_ref())? {
        Outcome::Exited(code) => Ok(ExitCode::from(code)),
        Outcome::TimedOut => {
            eprintln!("xtask: stopped after {} seconds", arguments.timeout);
            Ok(ExitCode::from(124))
        }
    }
}
