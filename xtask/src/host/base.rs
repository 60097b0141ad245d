//! The emulated host's root filesystem.

use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::debian;
use crate::cache::{self, Key};
use crate::packages;
use crate::process;
use crate::progress::Progress;
use crate::workspace;

/// What no test reads. An initial ramfs is in memory, and unpacked at each start.
const UNUSED: [&str; 12] = [
    "usr/share/bash-completion",
    "usr/share/bug",
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/perl",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl-base",
    "var/lib/apt",
];

/// Debian's packages make these by `update-alternatives`.
const IPTABLES: [&str; 6] = [
    "iptables",
    "iptables-save",
    "iptables-restore",
    "ip6tables",
    "ip6tables-save",
    "ip6tables-restore",
];

/// The unpacked root filesystem and its archive.
#[derive(Debug)]
pub struct Base(PathBuf);

impl Base {
    /// Downloads and unpacks unless cached.
    ///
    /// # Errors
    /// Packages are missing or cannot be unpacked.
    pub fn build(progress: &Progress) -> Result<Self> {
        progress.step("root filesystem of the emulated host (Debian packages)", |step| {
            packages::ensure(packages::HOST)?;
            let list = workspace::path("tests/host/packages");
            let key = Key::new()
                .with(include_str!("base.rs"))
                .with(include_str!("debian.rs"))
                .with(include_str!("cpio.rs"))
                .with_file(&list)?
                .text();
            let list = fs::read_to_string(&list).context("cannot read tests/host/packages")?;
            cache::entry("host", &key, || step.cached(), |directory| make(directory, &list)).map(Base)
        })
    }

    /// The root filesystem as an archive.
    #[must_use]
    pub fn archive(&self) -> PathBuf {
        self.0.join("base.cpio")
    }

    /// The static busybox in it.
    #[must_use]
    pub fn busybox(&self) -> PathBuf {
        self.0.join("root/usr/bin/busybox")
    }

    /// The directory of the CNI plugins.
    #[must_use]
    pub fn cni(&self) -> PathBuf {
        self.0.join("root/usr/lib/cni")
    }

    /// The directory that holds a containerd and its `ctr`.
    #[must_use]
    pub fn containerd(&self, version: &str) -> PathBuf {
        self.0
            .join("root")
            .join(containerd(version).trim_start_matches('/'))
    }
}

/// Where a containerd of this version is in the host.
#[must_use]
pub fn containerd(version: &str) -> String {
    format!("/opt/containerd-{version}/bin")
}

fn make(directory: &Path, list: &str) -> Result<()> {
    let names: Vec<&str> = list
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace)
        .collect();
    let root = directory.join("root");
    debian::unpack(debian::STABLE, &names, &root)?;
    let testing = directory.join("testing");
    debian::unpack(debian::TESTING, &["containerd"], &testing)?;
    move_containerd(&root, &root, "1.7")?;
    move_containerd(&testing, &root, "2.1")?;
    fs::remove_dir_all(&testing).context("cannot remove the packages of the other suite")?;

    for unused in UNUSED {
        let path = root.join(unused);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    complete(&root)?;
    let archive = directory.join("base.cpio");
    let file = File::create(&archive).context("cannot create the archive")?;
    let mut archive = Archive::new(BufWriter::new(file));
    archive.tree(&root)?;
    archive.finish()
}

/// Gives the containerd below `from` a directory of its own below `root`.
fn move_containerd(from: &Path, root: &Path, version: &str) -> Result<()> {
    let target = root.join(containerd(version).trim_start_matches('/'));
    fs::create_dir_all(&target).context("cannot create a directory for containerd")?;
    for program in ["containerd", "containerd-shim-runc-v2", "ctr"] {
        fs::rename(from.join("usr/bin").join(program), target.join(program))
            .with_context(|| format!("cannot move {program}"))?;
    }
    Ok(())
}

/// What the packages' scripts would have made.
fn complete(root: &Path) -> Result<()> {
    for name in [
        "dev",
        "mnt",
        "opt",
        "out",
        "proc",
        "root",
        "run",
        "sys",
        "tmp",
        "etc/cni/net.d",
        "var/lib",
        "opt/cni",
    ] {
        fs::create_dir_all(root.join(name)).with_context(|| format!("cannot create {name}"))?;
    }
    for name in ["bin", "sbin", "lib", "lib64"] {
        if !root.join(name).exists() {
            symlink(format!("usr/{name}"), root.join(name)).with_context(|| format!("cannot link {name}"))?;
        }
    }
    let files = [
        (
            "etc/passwd",
            "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        ),
        ("etc/group", "root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n"),
        ("etc/hostname", "emulated-host\n"),
        ("etc/hosts", "127.0.0.1 localhost emulated-host\n::1 localhost\n"),
    ];
    for (name, content) in files {
        fs::write(root.join(name), content).with_context(|| format!("cannot write {name}"))?;
    }
    link(root, "usr/bin/sh", "bash")?;
    link(root, "opt/cni/bin", "/usr/lib/cni")?;
    for name in IPTABLES {
        link(root, &format!("usr/sbin/{name}"), "xtables-nft-multi")?;
    }
    let busybox = root.join("usr/bin/busybox");
    let applets =
        process::output(Command::new(&busybox).arg("--list")).context("cannot list busybox's applets")?;
    for applet in applets.lines() {
        if !root.join("usr/sbin").join(applet).is_symlink() && !root.join("usr/sbin").join(applet).exists() {
            link(root, &format!("usr/bin/{applet}"), "busybox")?;
        }
    }
    Ok(())
}

/// Makes a symbolic link unless something is there.
fn link(root: &Path, name: &str, target: &str) -> Result<()> {
    let path = root.join(name);
    if path.is_symlink() || path.exists() {
        return Ok(());
    }
    symlink(target, &path).with_context(|| format!("cannot link {name}"))
}
