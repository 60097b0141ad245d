//! Building this workspace's programs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::packages;
use crate::progress::Progress;
use crate::workspace;

/// Programs built by one run of cargo.
#[derive(Debug)]
pub struct Programs(Vec<(String, PathBuf)>);

impl Programs {
    /// The one named `name`.
    ///
    /// # Errors
    /// It was not built.
    pub fn get(&self, name: &str) -> Result<&Path> {
        self.0
            .iter()
            .find(|(built, _)| built == name)
            .map(|(_, path)| path.as_path())
            .with_context(|| format!("cargo did not build {name}"))
    }

    /// Adds those of another run.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

/// Builds every program that is installed or put into the root image. One selection of packages for all purposes: cargo
/// unites the features of what it builds together, and another selection would build the dependencies again.
///
/// # Errors
/// As [`build`].
pub fn programs(progress: &Progress) -> Result<Programs> {
    build(
        progress,
        "programs",
        &[
            "build",
            "--release",
            "--bins",
            "--package=containerd-shim-kata-v2",
            "--package=bulkhead-vmm",
            "--package=bulkhead",
            "--package=bulkhead-agent",
        ],
    )
}

/// The programs as they were built last, whatever has changed since.
///
/// # Errors
/// There is no directory of release builds.
pub fn built() -> Result<Programs> {
    let own = std::env::current_exe().context("cannot find this program")?;
    // target/TRIPLE/PROFILE/xtask
    let release = own
        .ancestors()
        .nth(2)
        .context("this program is in no target directory")?
        .join("release");
    let files = std::fs::read_dir(&release).with_context(|| format!("cannot read {}", release.display()))?;
    Ok(Programs(
        files
            .filter_map(|file| file.ok())
            .map(|file| (file.file_name().to_string_lossy().into_owned(), file.path()))
            .collect(),
    ))
}

/// Runs `cargo` with `arguments` (of `build`, or `test --no-run`) and finds the executables it names.
/// Cargo's messages go to the standard error.
///
/// # Errors
/// The build fails, or a package it needs is missing and cannot be installed.
pub fn build(progress: &Progress, title: &str, arguments: &[&str]) -> Result<Programs> {
    progress.step(title, |_| {
        packages::ensure(packages::PROGRAMS)?;
        let mut child = Command::new(program())
            .current_dir(workspace::root())
            .args(arguments)
            .arg("--message-format=json-render-diagnostics")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run cargo")?;
        let stdout = child.stdout.take().context("cargo has no output")?;
        let mut programs = Vec::new();
        for line in BufReader::new(stdout).lines() {
            let line = line.context("cannot read cargo's output")?;
            programs.extend(executable(&line));
        }
        let status = child.wait().context("cannot wait for cargo")?;
        ensure!(
            status.success(),
            "cargo {} failed ({status})",
            arguments.join(" ")
        );
        Ok(Programs(programs))
    })
}

/// The name and path of the executable that a line of cargo's JSON messages announces.
fn executable(line: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(line).ok()?;
    let path = message.get("executable")?.as_str()?;
    let name = message.get("target")?.get("name")?.as_str()?;
    Some((name.to_owned(), path.into()))
}

/// The cargo that runs this program.
#[must_use]
pub fn program() -> std::ffi::OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// A command of the cargo that runs this program, for work that gives way to emulated hosts: they have deadlines.
#[must_use]
pub fn in_background() -> Command {
    let mut command = Command::new("nice");
    command.arg("-n10").arg(program());
    command
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_artifacts_with_an_executable_count() {
        let program = r#"{"reason":"compiler-artifact","target":{"name":"tool"},"executable":"/t/tool"}"#;
        assert_eq!(
            executable(program).unwrap(),
            ("tool".to_owned(), "/t/tool".into())
        );
        for line in [
            r#"{"reason":"compiler-artifact","target":{"name":"lib"},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
            "not json",
        ] {
            assert!(executable(line).is_none(), "{line}");
        }
    }
}
