//! The guest's root image: the agent as `/sbin/init` and empty directories to mount on.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{self, Key};
use crate::cargo;
use crate::packages;
use crate::process;
use crate::progress::Progress;
use crate::workspace;

/// virtio-pmem maps the image into the guest in pieces of this size, in bytes.
const ALIGNMENT: u64 = 2 << 20;

/// Instead of a random one, so that two builds are the same bytes.
const UUID: &str = "b0c4ead0-0000-4000-8000-000000000001";

/// The path of the image, built unless it is cached.
///
/// # Errors
/// The agent or the image cannot be built.
pub fn build(progress: &Progress) -> Result<PathBuf> {
    let programs = cargo::programs(progress)?;
    image(progress, programs.get("bulkhead-agent")?)
}

/// The path of the image with this agent, built unless it is cached.
///
/// # Errors
/// The image cannot be built.
pub fn image(progress: &Progress, agent: &Path) -> Result<PathBuf> {
    progress.step("root image", |step| {
        packages::ensure(packages::ROOTFS)?;
        let tree = workspace::path("rootfs/directories");
        let key = Key::new()
            .with(include_str!("rootfs.rs"))
            .with_file(&tree)?
            .with_file(agent)?
            .text();
        let directories = fs::read_to_string(&tree).context("cannot read rootfs/directories")?;
        let entry = cache::entry(
            "rootfs",
            &key,
            || step.cached(),
            |directory| make(directory, agent, &directories),
        )?;
        Ok(entry.join("root.erofs"))
    })
}

/// Leaves `root.erofs` in `directory`.
fn make(directory: &Path, agent: &Path, directories: &str) -> Result<()> {
    let tree = directory.join("tree");
    for line in directories.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let path = tree.join(line.trim_start_matches('/'));
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    let init = tree.join("sbin/init");
    fs::copy(agent, &init).context("cannot copy the agent")?;
    normalise(&tree)?;

    let image = directory.join("root.erofs");
    let mut mkfs = Command::new("mkfs.erofs");
    // Not compressed and with no file's end inside its inode: the guest maps pages of the image as they are (DAX).
    mkfs.args(["-x-1", "-T0", "--all-root", "-Enoinline_data", "-U", UUID])
        .arg(&image)
        .arg(&tree);
    process::run(&mut mkfs, &directory.join("mkfs.log")).context("cannot make the image")?;
    let file = File::options()
        .write(true)
        .open(&image)
        .context("cannot open the image")?;
    let length = file.metadata().context("cannot look at the image")?.len();
    file.set_len(length.next_multiple_of(ALIGNMENT))
        .context("cannot pad the image")?;
    fs::remove_dir_all(&tree).context("cannot remove the tree")
}

/// Gives everything below `directory` the mode it has in the image, whatever the caller's umask.
fn normalise(directory: &Path) -> Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).context("cannot set a mode")?;
    for entry in fs::read_dir(directory).context("cannot read the tree")? {
        let path = entry.context("cannot read the tree")?.path();
        if path.is_dir() {
            normalise(&path)?;
        } else {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).context("cannot set a mode")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::time::{Duration, SystemTime};

    use super::*;

    /// The image with an agent of these bytes, made at a time and in a place of its own.
    fn image(scratch: &Path, name: &str, modified: SystemTime) -> Vec<u8> {
        let directory = scratch.join(name);
        fs::create_dir_all(&directory).unwrap();
        let agent = scratch.join(format!("{name}.agent"));
        fs::write(&agent, vec![0x5a; 3 << 20]).unwrap();
        File::options()
            .write(true)
            .open(&agent)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        let directories = fs::read_to_string(workspace::path("rootfs/directories")).unwrap();
        make(&directory, &agent, &directories).unwrap();
        fs::read(directory.join("root.erofs")).unwrap()
    }

    #[test]
    fn two_builds_are_the_same_bytes_and_aligned() {
        let scratch = std::env::temp_dir().join(format!("bulkhead-rootfs-{}", std::process::id()));
        let now = SystemTime::now();
        let first = image(&scratch, "first", now);
        let second = image(
            &scratch,
            "second-with-a-longer-name",
            now - Duration::from_secs(86400),
        );
        fs::remove_dir_all(&scratch).unwrap();
        assert!(first == second, "two builds of the same tree differ");
        assert_eq!(first.len() as u64 % ALIGNMENT, 0);
        assert_eq!(
            first[1024..1028],
            0xe0f5_e1e2_u32.to_le_bytes(),
            "no EROFS superblock"
        );
        let pages = first
            .chunks_exact(4096)
            .filter(|page| page.iter().all(|byte| *byte == 0x5a));
        assert_eq!(
            pages.count(),
            (3 << 20) / 4096,
            "the agent is not there as whole pages"
        );
    }
}
