//! Running pods on this machine without installing anything on it.

use std::process::Command;

use anyhow::{Context, Result};

use crate::host::{Artifacts, Base, Containerd};

/// Puts the kernel and the image where the shim looks by default, in a mount namespace of its own: nothing of it is seen
/// outside, and nothing stays mounted however it ends.
const SCRIPT: &str = r#"
mount -t tmpfs bulkhead /usr/local/share
mkdir /usr/local/share/bulkhead
cp "$KERNEL" /usr/local/share/bulkhead/vmlinux
cp "$IMAGE" /usr/local/share/bulkhead/root.erofs
unset KERNEL IMAGE
exec "$@"
"#;

/// A command that runs the arguments added to it, with Bulkhead and a containerd in its `PATH`. Needs root.
///
/// # Errors
/// A program was built into no directory.
pub fn command(base: &Base, artifacts: &Artifacts, containerd: Containerd) -> Result<Command> {
    let programs = artifacts.shim.parent().context("the shim has no directory")?;
    let machine = std::env::var_os("PATH").unwrap_or_default();
    let directories = [base.containerd(containerd.version()), programs.to_owned()];
    let path = std::env::join_paths(directories.into_iter().chain(std::env::split_paths(&machine)))
        .context("a directory's name has a colon")?;
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation=private", "sh", "-ec", SCRIPT, "sh"])
        .env("KERNEL", &artifacts.kernel)
        .env("IMAGE", &artifacts.image)
        .env("PATH", path);
    Ok(command)
}
