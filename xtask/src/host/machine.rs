//! The emulated machine: QEMU, Debian's kernel and the modules a container host needs.
//!
//! QEMU is Debian trixie's, run from where it was unpacked with its own libraries.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{debian, qemu};
use crate::cache::{self, Key};
use crate::packages;
use crate::process;
use crate::progress::Progress;
use crate::workspace;

const PACKAGES: [&str; 2] = ["qemu-system-x86", "linux-image-cloud-amd64"];

/// QEMU below the tree it is unpacked to.
const PROGRAM: &str = "usr/bin/qemu-system-x86_64";

/// The unpacked programs and kernel.
#[derive(Debug)]
pub struct Machine(PathBuf);

impl Machine {
    /// Downloads and unpacks unless cached.
    ///
    /// # Errors
    /// Packages are missing or cannot be unpacked.
    pub fn build(progress: &Progress) -> Result<Self> {
        progress.step("emulated machine (QEMU and a Debian kernel)", |step| {
            packages::ensure(packages::HOST)?;
            let list = workspace::path("tests/host/modules");
            let key = Key::new()
                .with(include_str!("machine.rs"))
                .with(include_str!("debian.rs"))
                .with(include_str!("qemu.rs"))
                .with_file(&list)?
                .text();
            let modules = fs::read_to_string(&list).context("cannot read tests/host/modules")?;
            cache::entry(
                "machine",
                &key,
                || step.cached(),
                |directory| make(directory, &modules),
            )
            .map(Machine)
        })
    }

    /// The host's kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.0.join("vmlinuz")
    }

    /// The tree of kernel modules, to be laid over the host's root.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.0.join("modules")
    }

    /// QEMU with its libraries, as a tree to be laid over the root of a host of the same Debian release.
    #[must_use]
    pub fn qemu_tree(&self) -> PathBuf {
        self.0.join("qemu")
    }

    /// A command that starts QEMU and dies with its parent.
    #[must_use]
    pub fn qemu(&self) -> Command {
        let root = self.qemu_tree();
        let libraries = format!("{0}/usr/lib/x86_64-linux-gnu:{0}/usr/lib", root.display());
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(root.join("usr/lib64/ld-linux-x86-64.so.2"))
            .args(["--library-path", &libraries])
            .arg(root.join(PROGRAM))
            .arg("-L")
            .arg(root.join("usr/share/qemu"))
            .arg("-L")
            .arg(root.join("usr/share/seabios"));
        command
    }
}

fn make(directory: &Path, wanted: &str) -> Result<()> {
    let root = directory.join("qemu");
    debian::unpack(debian::STABLE, &PACKAGES, &root)?;
    fs::copy(
        debian::find(&root.join("boot"), "vmlinuz-")?,
        directory.join("vmlinuz"),
    )
    .context("cannot copy the host's kernel")?;
    qemu::repair(&root.join(PROGRAM))?;
    let all = root.join("usr/lib/modules");
    let release = debian::find(&all, "")?;
    let release = release
        .file_name()
        .and_then(|name| name.to_str())
        .context("the modules have no release")?;
    let log = directory.join("depmod.log");
    // depmod looks into lib/modules: in this tree a link to usr/lib, which packages of a merged /usr leave out.
    depmod(&root, release, &log)?;
    select(
        &all.join(release),
        &directory.join("modules/usr/lib/modules").join(release),
        wanted,
    )?;
    depmod(&directory.join("modules"), release, &log)?;
    fs::remove_file(directory.join("modules/lib")).context("cannot remove a link")?;
    for unused in [
        "boot",
        "usr/lib/modules",
        "usr/share/doc",
        "usr/share/locale",
        "var",
    ] {
        let path = root.join(unused);
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn depmod(root: &Path, release: &str, log: &Path) -> Result<()> {
    let link = root.join("lib");
    if !link.exists() {
        std::os::unix::fs::symlink("usr/lib", &link).context("cannot make a link")?;
    }
    let program = if packages::on_path("depmod") {
        "depmod"
    } else {
        "/usr/sbin/depmod"
    };
    process::run(Command::new(program).arg("-b").arg(root).arg(release), log).context("cannot list modules")
}

/// Copies the modules named in `wanted`, and those they need, and uncompresses them.
fn select(from: &Path, to: &Path, wanted: &str) -> Result<()> {
    let dependencies = fs::read_to_string(from.join("modules.dep")).context("cannot read modules.dep")?;
    let builtin = fs::read_to_string(from.join("modules.builtin")).context("cannot read modules.builtin")?;
    for file in needed(&dependencies, &builtin, wanted)? {
        let target = to.join(&file);
        let parent = target.parent().context("a module has no directory")?;
        fs::create_dir_all(parent).context("cannot create a directory of modules")?;
        fs::copy(from.join(&file), &target).with_context(|| format!("cannot copy {file}"))?;
        if file.ends_with(".xz") {
            process::output(Command::new("xz").arg("-d").arg(&target))
                .context("cannot uncompress a module")?;
        }
    }
    for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(from.join(list), to.join(list)).with_context(|| format!("cannot copy {list}"))?;
    }
    Ok(())
}

/// Files of the `wanted` modules and their dependencies. A module that is built in needs none.
fn needed(dependencies: &str, builtin: &str, wanted: &str) -> Result<BTreeSet<String>> {
    let name = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split('.').next().unwrap_or(file).replace('-', "_")
    };
    let mut files = BTreeSet::new();
    let words = wanted
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::split_whitespace);
    for word in words {
        let module = word.replace('-', "_");
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| name(file) == module);
        match line {
            Some((file, needs)) => {
                files.insert(file.to_owned());
                files.extend(needs.split_whitespace().map(str::to_owned));
            }
            None if builtin.lines().any(|file| name(file) == module) => {}
            None => anyhow::bail!("the host's kernel has no module {word} (tests/host/modules)"),
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::needed;

    const DEPENDENCIES: &str = "kernel/a/kvm-amd.ko.xz: kernel/a/kvm.ko.xz kernel/b/irq.ko.xz\n\
        kernel/a/kvm.ko.xz: kernel/b/irq.ko.xz\nkernel/b/irq.ko.xz:\n";

    #[test]
    fn modules_come_with_what_they_need() {
        let files = needed(DEPENDENCIES, "kernel/c/in.ko\n", "# reason\nkvm_amd in\n").unwrap();
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        assert_eq!(
            files,
            [
                "kernel/a/kvm-amd.ko.xz",
                "kernel/a/kvm.ko.xz",
                "kernel/b/irq.ko.xz"
            ]
        );
        assert_eq!(needed(DEPENDENCIES, "kernel/c/in.ko\n", "irq").unwrap().len(), 1);
    }

    #[test]
    fn a_module_that_is_nowhere_is_an_error() {
        let error = needed(DEPENDENCIES, "", "kvm nothing").unwrap_err();
        assert!(error.to_string().contains("nothing"), "{error}");
    }
}
