//! Trees of Debian packages, unpacked without running any of their scripts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;

/// Where packages come from if apt does not say.
const MIRROR: &str = "http://deb.debian.org/debian";

/// The suite of nearly everything.
pub const STABLE: &str = "trixie";

/// The suite of containerd 2.1.
pub const TESTING: &str = "forky";

/// Unpacks `packages` of `suite`, and what they depend on, into `target`.
///
/// # Errors
/// A package cannot be found, downloaded or unpacked.
pub fn unpack(suite: &str, packages: &[&str], target: &Path) -> Result<()> {
    let archive = target.with_extension("tar");
    let log = target.with_extension("log");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .arg("--variant=extract")
        .arg(format!("--include={}", packages.join(",")))
        // Older than its Release file allows is good enough for a test machine.
        .arg("--aptopt=Acquire::Check-Valid-Until \"false\"")
        .arg(suite)
        .arg(&archive)
        .arg(mirror());
    process::run(&mut mmdebstrap, &log).with_context(|| format!("cannot unpack packages of {suite}"))?;
    fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
    let mut tar = Command::new("tar");
    tar.args(["--no-same-owner", "--exclude=./dev/*", "-xf"])
        .arg(&archive)
        .arg("-C")
        .arg(target);
    process::run(&mut tar, &log).context("cannot unpack the packages")?;
    fs::remove_file(&archive).context("cannot remove an archive")
}

/// The mirror this machine's apt uses for Debian's packages.
fn mirror() -> String {
    process::output(Command::new("apt-get").args(["indextargets", "--format", "$(ORIGIN) $(SITE)"]))
        .ok()
        .and_then(|targets| debian_site(&targets))
        .unwrap_or_else(|| MIRROR.to_owned())
}

/// The first site of lines `ORIGIN SITE` whose origin is Debian and which is not the one of security updates.
fn debian_site(targets: &str) -> Option<String> {
    targets
        .lines()
        .filter_map(|line| line.strip_prefix("Debian "))
        .find(|site| !site.contains("security"))
        .map(str::to_owned)
}

/// The only entry of `directory` whose name begins with `prefix`.
///
/// # Errors
/// There is none.
pub fn find(directory: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", directory.display()))?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("{} has no {prefix}*", directory.display())
}

#[cfg(test)]
mod tests {
    use super::debian_site;

    #[test]
    fn the_mirror_is_debians_own() {
        let targets = "Somebody https://packages.example/apt\nDebian http://security.example/debian-security\n\
            Debian http://mirror.example/debian\n";
        assert_eq!(
            debian_site(targets).as_deref(),
            Some("http://mirror.example/debian")
        );
        assert_eq!(debian_site("Somebody https://packages.example/apt\n"), None);
    }
}
