//! Copies of what containers have written. The work is `cp`'s, which knows of holes, links, extended attributes, device
//! nodes, and of file systems that share blocks between copies.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use tokio::process::Command;

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The program is not there, or cannot run.
    #[error("Cannot run cp")]
    Start(#[source] io::Error),
    /// Its target cannot be made.
    #[error("Cannot create {}", .0.display())]
    Create(PathBuf, #[source] io::Error),
    /// It failed.
    #[error("cp {} {} failed ({status}): {message}", .from.display(), .to.display())]
    Failed {
        /// What was copied.
        from: PathBuf,
        /// Where to.
        to: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        message: String,
    },
}

/// Copies what is in directory `from`, and the attributes of the directory, to directory `to`, which is made
/// unless it is there.
///
/// # Errors
/// [`CopyError`]; a part may have been copied.
pub async fn tree(from: &Path, to: &Path) -> Result<(), CopyError> {
    tokio::fs::create_dir_all(to)
        .await
        .map_err(|error| CopyError::Create(to.into(), error))?;
    run(&["--archive", "--reflink=auto"], &from.join("."), to).await
}

/// Copies the file or block device `from` to the file or block device `to`. Zeroes become holes in a file that did not
/// exist.
///
/// # Errors
/// [`CopyError`]; a part may have been copied.
pub async fn disk(from: &Path, to: &Path) -> Result<(), CopyError> {
    run(&["--reflink=auto", "--sparse=always"], from, to).await
}

async fn run(options: &[&str], from: &Path, to: &Path) -> Result<(), CopyError> {
    let output = Command::new("cp")
        .args(options)
        .arg("--")
        .args([from, to])
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("LC_ALL", "C")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(CopyError::Start)?;
    if output.status.success() {
        return Ok(());
    }
    Err(CopyError::Failed {
        from: from.into(),
        to: to.into(),
        status: output.status,
        message: crate::limits::text(&String::from_utf8_lossy(&output.stderr), crate::limits::TEXT),
    })
}
