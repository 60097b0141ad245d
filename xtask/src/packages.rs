//! Debian packages that builds need: found missing, named, installed.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::process;

/// What the programs link against.
pub const PROGRAMS: &[&str] = &["build-essential", "libseccomp-dev", "libcap-ng-dev"];

/// What the guest kernel is built from and with.
pub const KERNEL: &[&str] = &[
    "linux-source-6.12",
    "build-essential",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "xz-utils",
];

/// What makes the guest's root image.
pub const ROOTFS: &[&str] = &["erofs-utils"];

/// What makes the emulated host.
pub const HOST: &[&str] = &["mmdebstrap", "debian-archive-keyring", "kmod", "xz-utils"];

/// The version of an installed package.
#[must_use]
pub fn version(package: &str) -> Option<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Status} ${Version}", package]);
    let answer = process::output(query.stderr(Stdio::null())).ok()?;
    let version = answer.strip_prefix("installed ")?;
    Some(version.to_owned())
}

/// Installs those of `packages` that are missing, and says which.
///
/// # Errors
/// One is missing, and this is no Debian machine, there is no way to become root, or apt fails.
pub fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| version(package).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if !on_path("apt-get") {
        bail!("needed, and there is no apt-get to install it: {names}");
    }
    eprintln!("installing Debian packages: {names}");
    let log = cache::directory("log")?.join("apt.log");
    // The lists may be absent or too old to name files that the mirror still has.
    process::run(as_root()?.args(["apt-get", "update", "-q"]), &log)
        .context("cannot update the package lists")?;
    let mut install = as_root()?;
    install
        .args(["env", "DEBIAN_FRONTEND=noninteractive"])
        .args(["apt-get", "install", "-qy", "--no-install-recommends"])
        .args(&missing);
    process::run(&mut install, &log).with_context(|| format!("cannot install {names}"))
}

/// A command that runs its arguments as root.
fn as_root() -> Result<Command> {
    if is_root() {
        return Ok(Command::new("env"));
    }
    if !on_path("sudo") {
        bail!("installing packages needs root, or sudo");
    }
    let mut sudo = Command::new("sudo");
    sudo.arg("--non-interactive");
    Ok(sudo)
}

/// Whether this process has root's user id.
#[must_use]
pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// Whether `program` is in one of the directories of `PATH`.
#[must_use]
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| is_file(&directory.join(program))))
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}
